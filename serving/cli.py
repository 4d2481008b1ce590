"""The command line: few verbs, the configuration first.

Owns: options, what is printed, exit codes: 0 good, also of a server that was told to stop; 1 a request failed, or
was rejected but by `simulate`, or a device failed, or something is still held at the end; 2 a wrong argument or
configuration; 130 interrupted before the end.
Must not know: how anything is done. Ray and torch are imported by the verbs that need them, so that `check` is quick.
"""

import json
import logging
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from model.train import train
from serving.cli_options import Config, Json, Overrides, Ray, Trace, TraceDivisor
from serving.errors import ConfigError, ServingError
from serving.estimation.calibrate_command import calibrate
from serving.estimation.estimate_command import app as estimate
from serving.estimation.reproduce_command import reproduce
from serving.evaluation.command import evaluate
from serving.expert_load_command import expert_load
from serving.expert_traffic_command import expert_traffic
from serving.quantize_command import quantize
from serving.simulation.command import simulate
from serving.simulation.plan_command import plan
from serving.simulation.sweep_command import sweep
from serving.simulation.verify_command import verify

if TYPE_CHECKING:
    from serving.report import BenchResult

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="A CloudMatrix-style supernode that runs without one.",
)
app.command()(train)


Shards = Annotated[
    Literal["torch", "timing"],
    typer.Option("--shards", help="torch: real tokens in Ray actors; timing: no tensors, no Ray."),
]


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
    """Serve an OpenAI-compatible endpoint until Ctrl-C or SIGTERM; then the exit code is 0.

    The line with the address goes to standard output once requests are taken, everything else to standard error.
    """
    from serving.config_file import load_config
    from serving.live import serve_forever

    settings = list(overrides or ())
    settings += [
        f"server.{key}={json.dumps(v)}"
        for key, v in (("host", host), ("port", port), ("api_key", api_key))
        if v is not None
    ]
    held = serve_forever(load_config(config, settings), shards=shards, address=address)
    if any(held.values()):
        typer.echo(f"still held at the end: {held}", err=True)
        raise typer.Exit(1)


@app.command()
def run(
    config: Config,
    overrides: Overrides = None,
    json_file: Json = None,
    trace: Trace = None,
    trace_divisor: TraceDivisor = 1,
    shards: Shards = "torch",
    address: Ray = None,
) -> None:
    """Serve, drive the endpoint with the configuration's workload, print the result, shut down."""
    from serving.config_file import load_config
    from serving.live import run_once

    settings = load_config(config, overrides or ())
    _finish(run_once(settings, trace=trace, trace_divisor=trace_divisor, shards=shards, address=address), json_file)


app.command()(simulate)


@app.command()
def replay(
    config: Config,
    overrides: Overrides = None,
    json_file: Json = None,
    trace: Trace = None,
    trace_divisor: TraceDivisor = 1,
    address: Ray = None,
) -> None:
    """Run the workload in virtual time with torch shards in Ray actors: real tokens, deterministic."""
    from serving import live
    from serving.config_file import load_config
    from serving.workloads.load import load_workload

    settings = load_config(config, overrides or ())
    num_requests = settings.workload.num_requests  # of a trace too: real tensors take their time
    workload = load_workload(settings, trace=trace, trace_divisor=trace_divisor, num_requests=num_requests)
    _finish(live.replay(settings, workload, address=address).bench, json_file)


@app.command()
def bench(
    url: Annotated[str, typer.Argument(help="Base URL of an OpenAI-compatible endpoint.", metavar="URL")],
    backend: Annotated[Literal["openai", "openai-chat"], typer.Option(help="Completions or chat.")] = "openai",
    model: Annotated[str | None, typer.Option(help="Model to ask for; the first listed if not given.")] = None,
    num_prompts: Annotated[int, typer.Option(help="Number of requests.", min=1)] = 64,
    input_len: Annotated[int, typer.Option("--random-input-len", help="Prompt tokens.", min=1)] = 128,
    output_len: Annotated[int, typer.Option("--random-output-len", help="Output tokens.", min=1)] = 32,
    range_ratio: Annotated[float, typer.Option("--random-range-ratio", help="Spread of both lengths.")] = 0.0,
    num_prefixes: Annotated[int, typer.Option(help="Distinct shared prefixes.", min=0)] = 0,
    prefix_len: Annotated[int, typer.Option("--random-prefix-len", help="Tokens of a shared prefix.", min=0)] = 0,
    trace: Trace = None,
    trace_divisor: TraceDivisor = 1,
    time_factor: Annotated[float, typer.Option(help="Stretch the arrival times of a trace.")] = 1.0,
    request_rate: Annotated[float, typer.Option(help="Requests per second; inf sends all at once.")] = math.inf,
    burstiness: Annotated[float, typer.Option(help="Gamma shape of the arrivals; 1 is Poisson.")] = 1.0,
    max_concurrency: Annotated[int | None, typer.Option(help="Requests in flight at most.", min=1)] = None,
    num_warmups: Annotated[int, typer.Option(help="Requests before the measurement.", min=0)] = 0,
    prompt_format: Annotated[
        Literal["tokens", "text"] | None, typer.Option(help="Prompts as token ids or text.")
    ] = None,
    ignore_eos: Annotated[bool, typer.Option(help="Generate all tokens that are asked for.")] = True,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling.")] = None,
    seed: Annotated[int, typer.Option(help="Of prompts and arrivals.", min=0)] = 0,
    goodput: Annotated[list[str] | None, typer.Option(help="Objectives, such as ttft:200.", metavar="NAME:MS")] = None,
    percentile_metrics: Annotated[str, typer.Option(help="Metrics in the table.")] = "ttft,tpot,itl",
    metric_percentiles: Annotated[str, typer.Option(help="Percentiles in the table.")] = "99",
    cancel_share: Annotated[float, typer.Option(help="Share of requests that the client gives up.")] = 0.0,
    cancel_delay_s: Annotated[float, typer.Option(help="When it gives them up.")] = 1.0,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", help="Bearer token.")] = None,
    header: Annotated[list[str] | None, typer.Option(help="Extra header.", metavar="KEY=VALUE")] = None,
    extra_body: Annotated[str, typer.Option(help="Extra fields of the request, as JSON.")] = "{}",
    ready_check_timeout_sec: Annotated[float, typer.Option(help="Wait so long for the endpoint.")] = 60.0,
    json_file: Json = None,
    disable_tqdm: Annotated[bool, typer.Option("--disable-tqdm", help="No progress bar.")] = False,
) -> None:
    """Measure any OpenAI-compatible endpoint; options and table are those of `vllm bench serve`."""
    from serving.bench import run_bench_until_interrupt
    from serving.bench_config import BenchConfig, parse_metrics, parse_pairs, parse_percentiles
    from serving.records import parse_goodput
    from serving.workloads.synthetic import synthetic_workload
    from serving.workloads.traces import TraceOptions, load_trace

    try:
        body = json.loads(extra_body)
    except json.JSONDecodeError as error:
        raise ConfigError(f"--extra-body: not valid JSON: {error}") from None
    if not isinstance(body, dict):
        raise ConfigError(f"--extra-body: must be a JSON object, not {type(body).__name__}")
    settings = BenchConfig(
        base_url=url,
        backend=backend,
        model=model,
        api_key=api_key,
        headers=parse_pairs("--header", header or []),
        extra_body=body,
        replay=trace is not None,
        time_factor=time_factor,
        request_rate=request_rate,
        burstiness=burstiness,
        max_concurrency=max_concurrency,
        prompt_format=prompt_format,
        ignore_eos=ignore_eos,
        temperature=temperature,
        top_p=top_p,
        num_warmups=num_warmups,
        ready_check_timeout_s=ready_check_timeout_sec,
        cancel_share=cancel_share,
        cancel_delay_s=cancel_delay_s,
        seed=seed,
        percentile_metrics=parse_metrics(percentile_metrics),
        metric_percentiles=parse_percentiles(metric_percentiles),
        goodput=parse_goodput(goodput or []),
        disable_tqdm=disable_tqdm or None,
    )
    if trace is not None:
        workload = load_trace(trace, TraceOptions(length_divisor=trace_divisor, seed=seed))
        workload = workload.limited(num_requests=num_prompts)
    else:
        workload = synthetic_workload(
            num_requests=num_prompts,
            input_len=input_len,
            output_len=output_len,
            range_ratio=range_ratio,
            num_prefixes=num_prefixes,
            prefix_len=prefix_len,
            seed=seed,
        )
    _finish(run_bench_until_interrupt(settings, workload), json_file)


app.command()(quantize)
app.command("eval")(evaluate)
app.command("expert-load")(expert_load)
app.command("expert-traffic")(expert_traffic)
app.command()(sweep)
app.command()(plan)
app.command()(reproduce)
app.command()(calibrate)
app.command()(verify)
app.add_typer(estimate, name="estimate")


@app.command()
def presets() -> None:
    """List the shipped configurations."""
    from serving.config_file import presets as names

    typer.echo("\n".join(names()))


def _finish(result: "BenchResult", json_file: Path | None) -> None:
    """Print the table, write the JSON file, end with the result's exit code."""
    from serving.report import format_table, to_json

    typer.echo(format_table(result))
    if json_file is not None:
        json_file.write_text(json.dumps(to_json(result, detailed=True), indent=2) + "\n", encoding="utf-8")
    if result.exit_code:
        raise typer.Exit(result.exit_code)


def main() -> None:
    """Entry point: errors that a user can mend become one line and exit code 2."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    try:
        app(prog_name="supernode")
    except ServingError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2 if isinstance(error, ValueError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
