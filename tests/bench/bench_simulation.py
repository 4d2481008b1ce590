"""How fast systems are simulated; every figure from a process of its own, from its start to its end.

`python -m tests.bench.bench_simulation [--only NAMES] [--trace F] [--plot F.png] [--duration S] [--rate R]`

- laptop: 2,000 requests on the laptop preset, as a command.
- requests: 2,000 requests of 4,096 + 256 tokens, Poisson, on cloudmatrix384, as a command.
- trace: Mooncake's conversation trace (FAST25-release/traces) on cloudmatrix384, as a command. Its file is named by
  --trace or the environment variable MOONCAKE_TRACE, and skipped without one.
- hour: an hour of cloudmatrix384-full at as many reasoning requests as it can hold.
- linear: seconds per request over 1x to 8x requests, and per step over 1x to 8x tokens in a step.

Owns: which runs there are, their bars, what is printed and drawn.
Must not know: how a run is made (tests/bench/simulated_run.py), how a process is measured (tests/bench/measured.py).
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.bench.measured import Cost, cost_of
from tests.bench.simulated_run import Run, as_argument

SIMULATE = (sys.executable, "-m", "serving.cli", "simulate")
REQUESTS = (  # 4,096 + 256 tokens each, as the preset has them but for its range
    "cloudmatrix384",
    "--set=workload.num_requests=2000",
    "--set=workload.request_rate=100",
    "--set=workload.range_ratio=0",
)
REPEATS = 5  # of what takes a second; medians are printed
HOUR_S = 3600.0
# A little more than prefill holds: its queue is always there. At 200 it comes and goes, at 220 it grows.
REASONING_RATE = 210.0
FACTORS = (1, 2, 4, 8)
BATCH = 1280  # requests, 4 for each of 320 ranks
OUTPUT_LENS = (1024, 16_384)  # of 8x as many requests a rank's KV holds the longer ones: 32 x 33 blocks of 1,150


def commanded(*arguments: str) -> tuple[Cost, dict[str, Any]]:
    """Cost and figures of one `supernode simulate`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figures.json"
        return cost_of([*SIMULATE, *arguments, "--json", str(path)]), json.loads(path.read_text())


def run_alone(run: Run) -> tuple[Cost, dict[str, Any]]:
    """Cost and figures of one run in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figures.json"
        command = [sys.executable, "-m", "tests.bench.simulated_run", as_argument(run)]
        return cost_of(command, stdout=path), json.loads(path.read_text())


def line(name: str, value: float, unit: str, *, bar: float | None = None, least: bool = False, more: str = "") -> None:
    """One figure, and how it stands to its bar; `least`: the bar is to be exceeded."""
    limit = "" if bar is None else f"   bar {'>=' if least else '<='} {bar:g}"
    if bar is not None and (value < bar if least else value > bar):
        limit += "  MISSED"
    print(f"  {name:<44}{value:>10.3f} {unit:<12}{limit}{'   ' * bool(more)}{more}", flush=True)


def cost_lines(cost: Cost, *, wall_bar: float | None = None, rss_bar_mb: float | None = None) -> None:
    line("whole command, wall", cost.wall_s, "s", bar=wall_bar)
    line("whole command, CPU", cost.cpu_s, "s")
    line("peak memory", cost.peak_rss_bytes / 1e6, "MB", bar=rss_bar_mb)


def median_of(runs: Sequence[tuple[Cost, dict[str, Any]]]) -> tuple[Cost, dict[str, Any]]:
    """The run with the median simulation time."""
    return sorted(runs, key=lambda run: run[1]["machine"]["wall_s"])[len(runs) // 2]


def bench_laptop() -> None:
    print(f"2,000 requests, laptop (median of {REPEATS} runs)")
    cost, figures = median_of([commanded("laptop", "--set", "workload.num_requests=2000") for _ in range(REPEATS)])
    line("simulation, wall", figures["machine"]["wall_s"], "s")
    line("simulated seconds per second", figures["machine"]["simulated_s_per_wall_s"], "", bar=100, least=True)
    cost_lines(cost)


def bench_requests() -> None:
    print(f"2,000 requests of 4,096 + 256 tokens, 100/s, cloudmatrix384 (median of {REPEATS} runs)")
    runs = [commanded(*REQUESTS) for _ in range(REPEATS)]
    walls = [figures["machine"]["wall_s"] for _, figures in runs]
    cost, figures = median_of(runs)
    assert figures["total_input_tokens"] == 2000 * 4096, figures["total_input_tokens"]
    spread = f"{min(walls):.3f} to {max(walls):.3f}; aim 0.25"
    line("simulation, wall", statistics.median(walls), "s", bar=1.0, more=spread)
    cost_lines(cost, wall_bar=2.0, rss_bar_mb=300)
    line("simulated", figures["simulated_s"], "s")


def bench_trace(trace: Path | None) -> None:
    if trace is None or not trace.exists():
        print(f"Mooncake conversation trace: skipped, {trace or 'no file given'} (--trace or MOONCAKE_TRACE)")
        return
    print("Mooncake conversation trace, whole, cloudmatrix384")
    cost, figures = commanded("cloudmatrix384", "--trace", str(trace.absolute()))
    line("requests", figures["completed"], "")
    line("simulation, wall", figures["machine"]["wall_s"], "s", bar=5.0)
    cost_lines(cost)
    line("simulated", figures["simulated_s"], "s")
    line("prompt tokens from the pool", figures["cache"]["hit_rate_tokens"], "", bar=0.36, least=True)


def bench_hour(duration_s: float, rate: float) -> None:
    print(f"{duration_s:g} s of reasoning requests, {rate:g}/s, cloudmatrix384-full")
    cost, figures = run_alone(Run(config="cloudmatrix384-full", rate=rate, duration_s=duration_s))
    bar = 60.0 if duration_s == HOUR_S else None  # of an hour: a shorter run is mostly its beginning and its end
    num_tokens, num_requests = figures["num_output_tokens"], figures["num_requests"]
    line("requests", num_requests, "", more=f"{num_tokens / 1e6:.1f} M output tokens")
    line("simulation until arrivals end, wall", figures["simulation_until_arrivals_end_s"], "s", bar=bar)
    more = f"{figures['simulated_s']:.0f} s simulated: after the last arrival the longest outputs run out"
    line("simulation, wall", figures["simulation_s"], "s", bar=bar, more=more)
    line("simulation, CPU", figures["simulation_cpu_s"], "s")
    cost_lines(cost, rss_bar_mb=2000)
    line("output tokens per wall second", num_tokens / figures["simulation_s"] / 1e6, "M", bar=18, least=True)
    line("steps", figures["num_steps"], "", more=f"{1e6 * figures['simulation_s'] / figures['num_steps']:.1f} us each")
    for role, of_role in figures["roles"].items():
        line(f"{role}: busy, idlest instance", 100 * of_role["least_busy"], "%", bar=99, least=True)
        slots = "" if role == "prefill" else f"slots {100 * of_role['slots_used']:.0f} %, "
        more = f"{slots}KV {100 * of_role['kv_used']:.0f} % in use"
        line(f"{role}: tokens per second and NPU", of_role["tokens_per_s_per_npu"], "", more=more)
    for at in figures["standing"]:
        print(
            f"  at {at['at_s']:6.0f} s: {at['no_place']} without a place, {at['prefill_queue']} wait for prefill, "
            f"{at['hand_over']} for their KV, {at['decoding']} decode"
        )
    line("preemptions", figures["num_preemptions"], "")


def linear_requests() -> list[tuple[float, float]]:
    """(requests, seconds per request) at one rate: more requests take longer."""
    points = []
    for factor in FACTORS:
        runs = [
            run_alone(Run(config="cloudmatrix384", rate=100.0, num_requests=2000 * factor, input_len=4096))
            for _ in range(3)
        ]
        seconds = statistics.median(figures["simulation_cpu_s"] for _, figures in runs)
        points.append((2000.0 * factor, seconds / (2000 * factor)))
        line(f"{2000 * factor} requests", seconds, "s CPU", more=f"{1e6 * points[-1][1]:.0f} us per request")
    return points


def linear_tokens() -> list[tuple[float, float]]:
    """(tokens per decode step, seconds per step): requests that arrive together and decode for long.

    Two runs differ only in the length of outputs: what is divided is their difference in time by that in steps. So
    what requests cost, of which a larger batch has more, is left out.
    """
    points = []
    for factor in FACTORS:
        batch = BATCH * factor
        runs: dict[int, list[dict[str, Any]]] = {output_len: [] for output_len in OUTPUT_LENS}
        for _ in range(3):
            for output_len, figures_of_len in runs.items():
                run = Run(config="cloudmatrix384", rate=1e5, num_requests=batch, input_len=64, output_len=output_len)
                figures_of_len.append(run_alone(run)[1])
        less, more = (statistics.median(f["simulation_cpu_s"] for f in figures) for figures in runs.values())
        num_less, num_more = (figures[0]["num_decode_steps"] for figures in runs.values())
        seconds = (more - less) / (num_more - num_less)
        points.append((2.0 * batch, seconds))  # a draft each
        line(f"{2 * batch} tokens in a decode step", 1e6 * seconds, "us per step", more=f"{num_more} steps")
    return points


def bench_linear(plot: Path | None) -> None:
    print("cost against size, cloudmatrix384 (medians of 3 runs)")
    by_requests, by_tokens = linear_requests(), linear_tokens()
    line("seconds per request, 8x over 1x", by_requests[-1][1] / by_requests[0][1], "")
    line("seconds per step, 8x over 1x", by_tokens[-1][1] / by_tokens[0][1], "")
    if plot is not None:
        draw(plot, by_requests, by_tokens)
        print(f"  drawn to {plot}")


def draw(path: Path, by_requests: Sequence[tuple[float, float]], by_tokens: Sequence[tuple[float, float]]) -> None:
    """Two panels that start at zero, so that flat looks flat."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = (
        (by_requests, "requests of 4,096 + 256 tokens", "CPU microseconds per request"),
        (by_tokens, "tokens in a decode step of 320 ranks", "CPU microseconds per decode step"),
    )
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, (points, x_label, y_label) in zip(axes, panels, strict=True):
        xs, ys = [x for x, _ in points], [1e6 * y for _, y in points]
        axis.plot(xs, ys, "o-")
        for factor, x, y in zip(FACTORS, xs, ys, strict=True):
            axis.annotate(f"{factor}x", (x, y), textcoords="offset points", xytext=(0, 8), ha="center")
        axis.set(xlabel=x_label, ylabel=y_label, xlim=(0, 1.1 * max(xs)), ylim=(0, 1.3 * max(ys)))
    figure.suptitle("Cost of a simulation against its size")
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("laptop", "requests", "trace", "hour", "linear")
    parser.add_argument("--only", default=",".join(names), help=f"some of {','.join(names)}")
    parser.add_argument("--trace", type=Path, default=os.environ.get("MOONCAKE_TRACE"))
    parser.add_argument("--duration", type=float, default=HOUR_S, help="seconds of arrivals of `hour`")
    parser.add_argument("--rate", type=float, default=REASONING_RATE, help="requests per second of `hour`")
    parser.add_argument("--plot", type=Path, help="draw `linear` to this .png file")
    options = parser.parse_args(arguments)
    chosen = options.only.split(",")
    if unknown := set(chosen) - set(names):
        parser.error(f"--only: {', '.join(sorted(unknown))} is not one of {', '.join(names)}")
    print(f"load of this machine before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    if "laptop" in chosen:
        bench_laptop()
    if "requests" in chosen:
        bench_requests()
    if "trace" in chosen:
        bench_trace(None if options.trace is None else Path(options.trace))
    if "hour" in chosen:
        bench_hour(options.duration, options.rate)
    if "linear" in chosen:
        bench_linear(options.plot)


if __name__ == "__main__":
    main(sys.argv[1:])
