"""`supernode sweep`.

Owns: its options, what it prints, its exit codes: 0 when at least one point gave figures, 1 when none did, 130 when it
was interrupted (what is done is kept).
Must not know: how points run, what a row holds.
"""

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from serving.cli_options import Overrides, Ray, check_writable
from serving.errors import ConfigError

if TYPE_CHECKING:
    from serving.interrupts import Interrupts
    from serving.simulation.sweep import Objective, Runner
    from serving.simulation.sweep_points import Axis, Point, Row


def sweep(
    config: Annotated[str, typer.Argument(help="Preset, such as laptop, or a YAML file.", metavar="CONFIG")],
    out: Annotated[
        Path, typer.Option(help="Rows, one per point: a .parquet file.", dir_okay=False, callback=check_writable)
    ],
    grid: Annotated[
        list[str] | None,
        typer.Option("--set-grid", help="Vary a key: --set-grid a.b=1,2 or a.b=2:8:2.", metavar="KEY=V1,V2"),
    ] = None,
    rate: Annotated[str | None, typer.Option(help="Requests per second to vary: 1,2 or 2:8:2.")] = None,
    seed: Annotated[str | None, typer.Option(help="Seeds to vary.")] = None,
    overrides: Overrides = None,
    trace: Annotated[
        Path | None, typer.Option(help="Workload from a trace, read where a point runs.", dir_okay=False, exists=True)
    ] = None,
    workload: Annotated[str | None, typer.Option(help="Built-in workload.", metavar="NAME")] = None,
    num_requests: Annotated[int | None, typer.Option(help="Requests of a point at most.", min=1)] = None,
    duration: Annotated[float | None, typer.Option(help="Seconds of arrivals of a point.", min=0)] = None,
    goodput: Annotated[list[str] | None, typer.Option(help="Objectives, such as ttft:200.", metavar="NAME:MS")] = None,
    search: Annotated[
        str | None,
        typer.Option(help="Do not run the whole grid but search it for max:COLUMN or min:COLUMN of the rows."),
    ] = None,
    where: Annotated[
        list[str] | None, typer.Option(help="Limit of a search, such as 'p99_ttft_ms<=2000'.", metavar="COLUMN<=X")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Pareto plot: .html (interactive) or .png.", dir_okay=False, callback=check_writable),
    ] = None,
    color: Annotated[str | None, typer.Option(help="Key that colors the plot; the first varied.")] = None,
    jobs: Annotated[
        int, typer.Option(help="Points at a time, as tasks of a Ray of our own; 0 or 1: in this process.", min=0)
    ] = 1,
    address: Ray = None,
) -> None:
    """Simulate every point of a grid, or search it; one row each, resumable; print and draw the Pareto front.

    A point that FILE holds already is not run again. With --address, or RAY_ADDRESS, points are tasks of that cluster.
    """
    from serving.interrupts import Interrupts
    from serving.records import parse_goodput
    from serving.simulation.pareto import check_suffix, draw_pareto, format_front, plotted
    from serving.simulation.run_source import WorkloadSource
    from serving.simulation.sweep import Sweep, best_row, parse_objective
    from serving.simulation.sweep_points import Point
    from serving.simulation.sweep_rows import RowStore

    if out.suffix != ".parquet":
        raise ConfigError(f"--out: {out} must end in .parquet")
    if plot is not None:
        check_suffix(plot)
    if where and search is None:
        raise ConfigError(f"--where: {where[0]} needs --search")
    objective = None if search is None else parse_objective(search, where or ())
    axes = _axes(grid or (), rate=rate, seed=seed)
    if color is not None and color not in (axis.key for axis in axes):
        raise ConfigError(f"--color: {color} is not varied; there are {', '.join(axis.key for axis in axes)}")
    base = Point(
        config=config,
        overrides=tuple(overrides or ()),
        workload=WorkloadSource.of(trace=trace, name=workload, num_requests=num_requests, duration_s=duration),
        varied={},
        goodput=parse_goodput(goodput or ()),
    )
    with Interrupts() as interrupts, RowStore(out) as store:
        # What starts and ends processes and writes files is outside the block in which a signal raises.
        with contextlib.suppress(KeyboardInterrupt), ExitStack() as stack:
            run = Sweep(store, run=_runner(stack, interrupts, jobs=jobs, address=address))
            with interrupts.raised():
                if objective is None:
                    run.grid(base, axes)
                else:
                    run.search(base, axes, objective)
    done = run.result
    typer.echo(
        f"{done.num_run} points simulated, {done.num_known} known before, "
        f"{sum(row['status'] != 'ok' for row in done.rows)} without figures; rows are in {out}",
        err=True,
    )
    varied = [axis.key for axis in axes]
    _print_errors(done.rows, varied)
    typer.echo(format_front(done.rows, varied))
    if objective is not None:
        _print_best(best_row(done.rows, objective), objective, varied)
    if plot is not None and plotted(done.rows):
        draw_pareto(done.rows, plot, varied=varied, title=f"{config}: {_workload_words(base)}", color=color)
    if interrupts.was_interrupted:
        raise typer.Exit(130)
    if not any(row["status"] == "ok" for row in done.rows):
        raise typer.Exit(1)


def _axes(grid: Sequence[str], *, rate: str | None, seed: str | None) -> "list[Axis]":
    from serving.simulation.sweep_points import RATE, SEED, Axis, parse_axis, parse_values

    axes = [parse_axis(text) for text in grid]
    axes += [
        Axis(key=key, values=parse_values(text, option=f"--{key}"))
        for key, text in ((RATE, rate), (SEED, seed))
        if text is not None
    ]
    if not axes:
        raise ConfigError("sweep: nothing is varied; give --set-grid, --rate or --seed")
    return axes


def _runner(stack: ExitStack, interrupts: "Interrupts", *, jobs: int, address: str | None) -> "Runner":
    """Where points run: in this process, or as tasks of a Ray that ends with `stack`."""
    from serving.simulation.sweep import run_here
    from serving.simulation.sweep_points import run_point

    if jobs <= 1 and address is None:
        return run_here
    from serving.ray_cluster import TaskCluster
    from serving.session import Session

    session = stack.enter_context(Session())
    with interrupts.raised():
        cluster = stack.enter_context(TaskCluster(session, address=address, num_cpus=jobs))

    def run(points: "Sequence[Point]") -> "Iterator[tuple[int, Row | Exception]]":
        return cluster.map(run_point, points)

    return run


def _print_errors(rows: "Sequence[Row]", varied: Sequence[str]) -> None:
    """Each mistake once, with its first point."""
    first: dict[str, Row] = {}
    for row in rows:
        if row["status"] != "ok":
            first.setdefault(row["error"], row)
    for error, row in first.items():
        number = sum(other.get("error") == error for other in rows)
        where = ", ".join(f"{key}={row[key]}" for key in varied)
        more = f" and {number - 1} more" if number > 1 else ""
        typer.echo(f"{row['status']}: {where}{more}: {error}", err=True)


def _print_best(row: "Row | None", objective: "Objective", varied: Sequence[str]) -> None:
    if row is None:
        typer.echo("Best: none, no point has the columns that are asked for")
        return
    excess = objective.score(row)[0]
    columns = dict.fromkeys((objective.column, *(limit[0] for limit in objective.limits)))
    values = ", ".join(f"{column} {row[column]:,.2f}" for column in columns)
    told = "Best" if not excess else "Nothing keeps to the limits; closest"
    typer.echo(f"{told}: {', '.join(f'{key}={row[key]}' for key in varied)}: {values}")


def _workload_words(base: "Point") -> str:
    source = base.workload
    return source.name or (Path(source.trace).name if source.trace else "the configuration's workload")
