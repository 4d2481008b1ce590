"""Options that several commands share.

Owns: their names, help and checks.
Must not know: what a command does with them.
"""

import os
from pathlib import Path
from typing import Annotated

import typer

from serving.errors import ConfigError


def check_writable(path: Path | None) -> Path | None:
    """Before the work, not after it."""
    if path is not None and not os.access(path if path.exists() else path.parent, os.W_OK):
        raise typer.BadParameter(f"{path} cannot be written.")
    return path


def make_writable(directory: Path) -> None:
    """Make a directory for results, before the work and not after it. Raises ConfigError if that cannot be."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{directory}: {error.strerror}") from None
    if not os.access(directory, os.W_OK):
        raise ConfigError(f"{directory}: cannot be written to")


def listed(text: str) -> tuple[str, ...]:
    """The parts of an option's value that is a list by comma."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


Config = Annotated[str, typer.Argument(help="Preset, such as laptop, or a YAML file.", metavar="CONFIG")]
Trace = Annotated[
    Path | None,
    typer.Option(
        "--trace", help="Workload from a trace: Mooncake .jsonl, Azure .csv, or .gz; ServeGen .parquet.", dir_okay=False
    ),
]
TraceDivisor = Annotated[
    int,
    typer.Option(
        "--trace-divisor", help="Divide the lengths of a trace or built-in workload, for a short context.", min=1
    ),
]
WorkloadName = Annotated[
    str | None,
    typer.Option("--workload", help="Built-in workload: r1-reasoning, conversation, chat or code.", metavar="NAME"),
]
Rate = Annotated[float | None, typer.Option(help="Requests per second; of a trace, its times are scaled.")]
Duration = Annotated[float | None, typer.Option(help="Seconds in which requests arrive.")]
NumRequests = Annotated[int | None, typer.Option(help="Requests at most.", min=1)]
Seed = Annotated[
    int | None, typer.Option(help="Of prompts, lengths and arrivals; the configuration's by default.", min=0)
]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="Override a key: --set a.b=c.", metavar="KEY=VALUE")]
Json = Annotated[
    Path | None,
    typer.Option("--json", help="Write the result to this file.", dir_okay=False, callback=check_writable),
]
Ray = Annotated[
    str | None,
    typer.Option("--address", envvar="RAY_ADDRESS", help="Join this Ray cluster instead of starting a local one."),
]
