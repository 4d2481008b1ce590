"""`supernode simulate`.

Owns: its options, what it prints and writes, its exit codes, and the progress bar.
Must not know: how a run is driven, how figures are made.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from serving.cli_options import (
    Config,
    Duration,
    Json,
    NumRequests,
    Overrides,
    Rate,
    Seed,
    Trace,
    TraceDivisor,
    WorkloadName,
    check_writable,
)
from serving.errors import ConfigError

if TYPE_CHECKING:
    from serving.config import RunConfig
    from serving.report import BenchResult
    from serving.workloads.workload import Workload

BAR_DELAY_S = 1.0  # a run that is over by then shows no bar


def _file(option: str, help_text: str) -> typer.models.OptionInfo:
    option_info: typer.models.OptionInfo = typer.Option(option, help=help_text, dir_okay=False, callback=check_writable)
    return option_info


def simulate(
    config: Config,
    overrides: Overrides = None,
    trace: Trace = None,
    trace_divisor: TraceDivisor = 1,
    workload_name: WorkloadName = None,
    rate: Rate = None,
    duration: Duration = None,
    num_requests: NumRequests = None,
    seed: Seed = None,
    goodput: Annotated[list[str] | None, typer.Option(help="Objectives, such as ttft:2000.", metavar="NAME:MS")] = None,
    json_file: Json = None,
    requests_file: Annotated[
        Path | None, _file("--requests", "Write every request's timeline to this .parquet or .csv.")
    ] = None,
    report_file: Annotated[Path | None, _file("--report", "Write plots of the run to this .html file.")] = None,
    perfetto_file: Annotated[
        Path | None, _file("--perfetto", "Write a trace for ui.perfetto.dev to this .json or .json.gz file.")
    ] = None,
    digest: Annotated[bool, typer.Option("--digest", help="Print the digest of all events, as replay does.")] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse a workload with a request that is too long.")
    ] = False,
) -> None:
    """Run a workload in virtual time: one process, no tensors, no Ray. Ctrl-C prints what was finished so far.

    Exit code 0, whatever was rejected: the table and the JSON count it by reason. 1 if a request failed, or something
    is still held.
    """
    from serving.config_file import load_config
    from serving.records import parse_goodput
    from serving.report import format_table
    from serving.simulation.export import check_export, write_requests
    from serving.simulation.figures import bench_result, figures_of
    from serving.simulation.run import simulate as run_simulation
    from serving.simulation.table import simulation_rows
    from serving.workloads.load import load_workload

    if trace is not None and workload_name is not None:
        raise ConfigError(f"--workload: {workload_name}, but --trace {trace} is the workload")
    settings = load_config(config, [*(overrides or ()), *([] if seed is None else [f"seed={seed}"])])
    objectives = parse_goodput(goodput or [])
    if requests_file is not None:
        check_export(requests_file)
    files = {"--json": json_file, "--requests": requests_file, "--report": report_file, "--perfetto": perfetto_file}
    _check_files(files | {"--trace": trace})
    workload = load_workload(
        settings,
        trace=trace,
        trace_divisor=trace_divisor,
        name=workload_name,
        rate=rate,
        duration_s=duration,
        num_requests=num_requests,
    )
    if strict:
        check_served(settings, workload)
    moves = report_file is not None or perfetto_file is not None
    with _bar(len(workload)) as on_progress:
        run = run_simulation(settings, workload, moves=moves, digest=digest, on_progress=on_progress)
    result = bench_result(settings, workload, run, goodput=objectives)
    figures = figures_of(settings, run, result)
    typer.echo(format_table(replace(result, held_at_rest=None), more_rows=simulation_rows(figures)))
    problems = []
    for option, path in files.items():
        if path is None:
            continue
        try:
            if option == "--json":
                path.write_text(json.dumps(figures, indent=2, allow_nan=False) + "\n", encoding="utf-8")
            elif option == "--requests":
                write_requests(run, path)
            elif option == "--report":
                from serving.simulation.report import write_report

                write_report(settings, workload, run, path, name=config, goodput=objectives)
            else:
                from serving.simulation.perfetto import write_trace

                typer.echo(write_trace(settings, run, path), err=True)
        except OSError as error:  # a full disk must not cost the other files
            problems.append(f"{option}: {path}: {error.strerror or error}")
    if problems:
        raise ConfigError("; ".join(problems))
    code = exit_code(result)
    if code:
        raise typer.Exit(code)


def exit_code(result: "BenchResult") -> int:
    """That of the command. A rejection is an answer of a simulation, not a failure of it."""
    if result.interrupted:
        return 130
    return 1 if result.summary.outcomes["failed"] or any((result.held_at_rest or {}).values()) else 0


def check_served(config: "RunConfig", workload: "Workload") -> None:
    """Raise ConfigError, which names the first, if a request does not fit the context, as KV space always does."""
    limit = config.model.max_model_len
    num_tokens = workload.num_prompt_tokens + workload.max_tokens
    (too_long,) = (num_tokens > limit).nonzero()
    if too_long.size:
        first = int(too_long[0])
        raise ConfigError(
            f"--strict: request {workload.request_ids[first]}: prompt_too_long: {workload.num_prompt_tokens[first]} + "
            f"{workload.max_tokens[first]} tokens exceed max_model_len {limit}; {too_long.size} of {len(workload)} "
            f"requests cannot be served"
        )


def _check_files(files: Mapping[str, Path | None]) -> None:
    """Before the run, not after it: every file of its own, with the suffix of what it will hold."""
    seen: dict[Path, str] = {}
    for option, path in files.items():
        if path is None:
            continue
        same = seen.setdefault(path.resolve(), option)
        if same != option:
            raise ConfigError(f"{option}: {path}: the same file as {same}")
        suffixes = {"--perfetto": (".json", ".json.gz"), "--report": (".html", ".htm")}.get(option)
        if suffixes is not None and not path.name.endswith(suffixes):
            raise ConfigError(f"{option}: {path}: the suffix must be {' or '.join(suffixes)}")


@contextmanager
def _bar(num_requests: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error, if that is a terminal, told how many requests are over."""
    if not sys.stderr.isatty():
        yield lambda num_over: None
        return
    import threading

    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())  # its own is a named semaphore, and stays in /dev/shm if this process is killed
    with tqdm(total=num_requests, unit="req", delay=BAR_DELAY_S, file=sys.stderr, leave=False) as bar:

        def on_progress(num_over: int) -> None:
            bar.update(num_over - bar.n)

        yield on_progress
