"""The command line: few verbs, the configuration first.

Owns: options, what is printed, exit codes (0 good, 1 a request failed, 2 a wrong argument or configuration, 130 Ctrl-C).
Must not know: how anything is done. Ray and torch are imported by the verbs that need them, so that `check` is quick.
"""

import json
import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from serving.errors import ConfigError, ServingError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="A CloudMatrix-style supernode that runs without one.",
)

Config = Annotated[str, typer.Argument(help="Preset, such as laptop, or a YAML file.", metavar="CONFIG")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="Override a key: --set a.b=c.", metavar="KEY=VALUE")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the result to this file.", dir_okay=False)]
Ray = Annotated[
    str | None,
    typer.Option("--address", envvar="RAY_ADDRESS", help="Join this Ray cluster instead of starting a local one."),
]
Trace = Annotated[
    Path | None,
    typer.Option("--trace", help="Workload from a trace: Mooncake .jsonl or Azure .csv, or .gz of it.", dir_okay=False),
]
TraceScale = Annotated[int, typer.Option("--trace-divisor", help="Divide the trace's lengths, for a short context.", min=1)]
Shards = Annotated[str, typer.Option("--shards", help="torch: real tokens in Ray actors; timing: no tensors, no Ray.")]


@app.command()
def check(config: Config, overrides: Overrides = None) -> None:
    """Validate a configuration and print its plan."""
    from serving.config_file import load_config
    from serving.plan import format_plan

    typer.echo(format_plan(load_config(config, overrides or ())))


@app.command()
def serve(
    config: Config,
    overrides: Overrides = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 picks one.", min=0, max=65535)] = None,
    api_key: Annotated[str | None, typer.Option("--api-key", help="Ask /v1 requests for this key.")] = None,
    shards: Shards = "torch",
    address: Ray = None,
) -> None:
    """Serve an OpenAI-compatible endpoint until Ctrl-C."""
    from serving.config_file import load_config
    from serving.live import serve_forever

    settings = list(overrides or ())
    settings += [f"server.{key}={json.dumps(v)}" for key, v in (("host", host), ("port", port), ("api_key", api_key)) if v is not None]
    held = serve_forever(load_config(config, settings), shards=_shards(shards), address=address)
    if any(held.values()):
        typer.echo(f"still held at the end: {held}", err=True)
        raise typer.Exit(1)


@app.command()
def run(
    config: Config,
    overrides: Overrides = None,
    json_file: Json = None,
    trace: Trace = None,
    trace_divisor: TraceScale = 1,
    shards: Shards = "torch",
    address: Ray = None,
) -> None:
    """Serve, drive the endpoint with the configuration's workload, print the result, shut down."""
    from serving.config_file import load_config
    from serving.live import run_once

    settings = load_config(config, overrides or ())
    result = run_once(settings, trace=trace, trace_divisor=trace_divisor, shards=_shards(shards), address=address)
    _finish(result, json_file)


@app.command()
def simulate(
    config: Config,
    overrides: Overrides = None,
    json_file: Json = None,
    trace: Trace = None,
    trace_divisor: TraceScale = 1,
) -> None:
    """Run the workload in virtual time with timing shards: one process, no tensors, no Ray."""
    from serving.config_file import load_config
    from serving.simulator import simulate as run_simulation

    _finish(run_simulation(load_config(config, overrides or ()), trace=trace, trace_divisor=trace_divisor), json_file)


@app.command()
def replay(
    config: Config,
    overrides: Overrides = None,
    json_file: Json = None,
    trace: Trace = None,
    trace_divisor: TraceScale = 1,
    address: Ray = None,
) -> None:
    """Run the workload in virtual time with torch shards in Ray actors: real tokens, deterministic."""
    from serving.config_file import load_config
    from serving.live import replay as run_replay

    settings = load_config(config, overrides or ())
    _finish(run_replay(settings, trace=trace, trace_divisor=trace_divisor, address=address), json_file)


@app.command()
def presets() -> None:
    """List the shipped configurations."""
    from serving.config_file import presets as names

    typer.echo("\n".join(names()))


def _shards(name: str) -> str:
    if name not in ("torch", "timing"):
        raise ConfigError(f"--shards: {name!r} is neither torch nor timing")
    return name
