"""`supernode sweep`.

Owns: its options, what it prints, its exit codes: 0 when at least one point gave figures, 1 when none did, 130 when it
was interrupted (what is done is kept).
Must not know: how points run, what a row holds.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from serving.cli_options import Overrides, Ray, check_writable
from serving.errors import ConfigError

if TYPE_CHECKING:
    from serving.simulation.sweep import Runner
    from serving.simulation.sweep_points import Axis, Point, Row
    from serving.simulation.run_source import WorkloadSource


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
    from serving.simulation.pareto import check_suffix
    from serving.simulation.run_source import WorkloadSource
    from serving.simulation.sweep import Sweep, parse_objective
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
    ...
