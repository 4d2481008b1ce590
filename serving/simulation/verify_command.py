"""`supernode verify`.

Owns: its options, and what it prints and writes.
Must not know: how anything is done.
"""

import json
from typing import Annotated, Literal

import typer

from serving.cli_options import Json, NumRequests, Overrides, Rate, Ray, Trace, TraceDivisor, WorkloadName
from serving.errors import ConfigError

# Wall seconds per simulated second. Measured with the laptop preset on two cores that others used too: at 4 the lag is
# 1.3 % of the time, at 2 16 % (2.5 % on quiet ones), at 1 48 % (9 %).
SCALE = 4.0


def verify(
    config: Annotated[str, typer.Argument(help="Preset, such as laptop, or a YAML file.", metavar="CONFIG")],
    overrides: Overrides = None,
    trace: Trace = None,
    trace_divisor: TraceDivisor = 1,
    workload_name: WorkloadName = None,
    rate: Rate = None,
    num_requests: NumRequests = None,
    scale: Annotated[
        float, typer.Option(help="Wall seconds per simulated second; the larger, the less real compute is late.")
    ] = SCALE,
    tolerance: Annotated[
        float | None,
        typer.Option(help="Percent by which a figure may differ; exit code 1 if one differs more.", min=0),
    ] = None,
    shards: Annotated[
        Literal["torch", "timing"],
        typer.Option("--shards", help="torch: real tokens in Ray actors; timing: HTTP and the clock alone."),
    ] = "torch",
    json_file: Json = None,
    address: Ray = None,
) -> None:
    """Simulate a workload, run it live on Ray, and print predicted against observed, with the reasons."""
    from serving.config_file import load_config
    from serving.simulation import observe, verify_report
    from serving.workloads.load import load_workload

    if not scale > 0:
        raise ConfigError(f"--scale: {scale:g} must be above 0 wall seconds per simulated second")
    settings = load_config(config, [*(overrides or ()), f"clock.scale={scale}"])
    workload = load_workload(
        settings,
        trace=trace,
        trace_divisor=trace_divisor,
        name=workload_name,
        rate=rate,
        num_requests=num_requests,
    )
    prediction = observe.predict(settings, workload)
    typer.echo(
        f"simulated {len(workload)} requests, {prediction.simulated_s:.1f} s, in {prediction.wall_s:.1f} s; "
        f"live, at {scale:g} wall seconds per second, they take {prediction.simulated_s * scale:.0f} s after the boot, "
        "and the lag",
        err=True,
    )
    result = observe.verify(settings, workload, prediction, tolerance=tolerance, shards=shards, address=address)
    typer.echo(verify_report.format_verification(result))
    if json_file is not None:
        described = {"config": config, "workload": workload.name, "workload_digest": workload.digest}
        values = described | verify_report.to_json(result)
        json_file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    if result.exit_code:
        raise typer.Exit(result.exit_code)
