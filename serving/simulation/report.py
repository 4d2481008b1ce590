"""A run as one page: its figures and interactive plots, in a file that needs no network.

Owns: what the page holds, in which order, and its head; the width of the windows of time.
Must not know: how a plot is made (latency_plots.py, load_plots.py, flow_plots.py), HTML (report_page.py).
"""

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np

from serving.config import RunConfig
from serving.records import OUTCOMES, Goodput
from serving.simulation.columns import RunColumns
from serving.simulation.flow_plots import flow_plots
from serving.simulation.latencies import Latencies, latencies_of
from serving.simulation.latency_plots import latency_plots
from serving.simulation.load_plots import instance_plots, queue_plots, throughput_plots
from serving.simulation.plots import scaled_bytes
from serving.simulation.report_page import Section, Table, page
from serving.simulation.windows import Floats, Windows, weighted_quantiles
from serving.workload import Workload

MOST_WINDOWS = 300  # of lines and heat maps
MOST_PERCENTILE_WINDOWS = 120
LEAST_ARRIVALS = 3  # in a window of throughput, on average; fewer make noise of it
LEAST_PER_WINDOW = 10  # requests, on average, that percentiles over time are made of


def write_report(
    config: RunConfig,
    workload: Workload,
    run: RunColumns,
    path: Path,
    *,
    name: str | None = None,
    goodput: Goodput | None = None,
) -> None:
    """Write the report of a run, about 5 MB, nearly all of it plotly.js; `name` is that of the configuration.

    Values in plots are rounded to six digits. Lines have at most 300 points whatever the size of the run.
    ModuleNotFoundError without plotly.
    """
    path.write_text(report_html(config, workload, run, name=name, goodput=goodput), encoding="utf-8")


def report_html(
    config: RunConfig,
    workload: Workload,
    run: RunColumns,
    *,
    name: str | None = None,
    goodput: Goodput | None = None,
) -> str:
    """The page itself."""
    requests, latencies = run.requests, latencies_of(run)
    end_ns = max(
        round(run.simulated_s * 1e9),
        int(requests.arrival_ns.max(initial=0)),
        int(requests.last_token_ns.max(initial=0)),
        *(int((i.start_ns + i.charged_ns).max(initial=0)) for i in run.instances),
        1,
    )
    windows = Windows.over(end_ns, most=MOST_WINDOWS)
    load_windows = Windows.over(end_ns, most=min(max(len(requests) // LEAST_ARRIVALS, 12), MOST_WINDOWS))
    most = min(max(len(latencies.ttft_ms) // LEAST_PER_WINDOW, 1), MOST_PERCENTILE_WINDOWS)
    sections = [
        Section(title="Latency", plots=latency_plots(run, latencies, Windows.over(end_ns, most=most))),
        Section(title="Load", plots=[*throughput_plots(run, load_windows), *queue_plots(run, windows)]),
        Section(title="Instances", plots=instance_plots(run, windows)),
        Section(title="Where tokens and bytes go", plots=flow_plots(run)),
    ]
    title = f"{name or workload.name}: {len(requests):,} requests on {config.total_npus} NPUs"
    return page(
        title=title,
        subtitle="Simulated time throughout: of the charged model on the charged hardware.",
        warnings=_warnings(run),
        tables=[_setting(config, workload, run, name), _figures(run, goodput, latencies), _latency_table(latencies)],
        sections=sections,
    )


def _warnings(run: RunColumns) -> list[str]:
    warnings = []
    if run.interrupted:
        warnings.append(
            f"The run was interrupted at {run.simulated_s:,.6g} s of simulated time; "
            f"{run.num_not_arrived:,} requests of the workload had not arrived."
        )
    outcomes = np.bincount(run.requests.outcome, minlength=len(OUTCOMES))
    if not outcomes[0]:
        warnings.append("No request finished.")
    unfinished = ~run.requests.is_finished
    reasons = Counter(
        {
            f"{OUTCOMES[outcome]}: {run.requests.reasons[reason]}": int(count)
            for (outcome, reason), count in zip(
                *np.unique(
                    np.column_stack([run.requests.outcome[unfinished], run.requests.reason[unfinished]]),
                    axis=0,
                    return_counts=True,
                ),
                strict=True,
            )
        }
    )
    if reasons:
        warnings.append("Not finished: " + ", ".join(f"{count:,} {why}" for why, count in reasons.most_common()))
    return warnings


def _setting(config: RunConfig, workload: Workload, run: RunColumns, name: str | None) -> Table:
    rows = [("configuration", name or "-"), ("hardware", config.hardware.name)]
    for role, section in config.instances.items():
        charged = config.charged_instance(role)
        npus = f"{section.count} x {section.npus} NPUs" if section.count > 1 else f"{section.npus} NPUs"
        rows.append((role, f"{npus}, charged as one die of EP {charged.ep} per rank"))
    pool = run.pool
    rows += [
        ("pool", scaled_bytes(pool.capacity_bytes) if pool is not None else "none"),
        ("router, scheduler", f"{config.router.policy}, {config.scheduler.policy}"),
        ("workload", f"{workload.name}, {len(run.requests):,} requests"),
        ("seed", str(workload.seed)),
    ]
    if run.digest is not None:
        rows.append(("digest of events", run.digest))
    return Table(rows=rows, has_numbers=False)


def _figures(run: RunColumns, goodput: Goodput | None, latencies: Latencies) -> Table:
    requests, done = run.requests, run.requests.is_finished
    duration_s = run.simulated_s
    per_s = 1.0 / duration_s if duration_s > 0 else 0.0
    num_input = int(requests.num_prompt_tokens[done].sum(dtype=np.int64))
    num_output = int(requests.num_output_tokens[done].sum(dtype=np.int64))
    num_cached = int(requests.num_cached_tokens[done].sum(dtype=np.int64))
    rows = [
        ("duration", f"{duration_s:,.6g} s"),
        ("completed", f"{done.sum():,} of {len(requests):,}"),
        ("requests", f"{done.sum() * per_s:,.4g} /s"),
        ("input", f"{num_input * per_s:,.0f} tok/s"),
        ("output", f"{num_output * per_s:,.0f} tok/s"),
    ]
    for role in dict.fromkeys(instance.role for instance in run.instances):
        members = [instance for instance in run.instances if instance.role == role]
        npus = sum(instance.num_npus for instance in members)
        busy = sum(instance.busy_ns for instance in members) / 1e9 / len(members)
        column = "num_tokens" if role == "prefill" else "num_sampled"
        tokens = sum(int(getattr(instance, column).sum(dtype=np.int64)) for instance in members)
        kind = "computed" if role == "prefill" else "sampled"
        rows.append((f"{role}, {kind}", f"{tokens * per_s / npus:,.4g} tok/s per NPU"))
        rows.append((f"{role}, busy", f"{100 * busy * per_s:.1f} %"))
    rows.append(("prompt tokens cached", f"{100 * num_cached / num_input:.1f} %" if num_input else "-"))
    if run.pool is not None:
        asked = run.pool.num_hits + run.pool.num_misses
        rows.append(("pool blocks found", f"{100 * run.pool.num_hits / asked:.1f} %" if asked else "-"))
        rows.append(("pool blocks evicted", f"{run.pool.num_evicted:,}"))
    if run.num_drafts:
        rows.append(("drafts accepted", f"{100 * run.num_accepted / run.num_drafts:.1f} %"))
    rows.append(("preemptions", f"{requests.num_preemptions.sum(dtype=np.int64):,}"))
    if goodput is not None:
        limits = {k.removesuffix("_ms"): v for k, v in dataclasses.asdict(goodput).items() if v is not None}
        good = np.ones(len(latencies.ttft_ms), dtype=np.bool_)
        for metric, limit_ms in limits.items():
            good &= np.nan_to_num(getattr(latencies, f"{metric}_ms")) <= limit_ms
        wanted = ", ".join(f"{metric.upper()} {limit:g} ms" for metric, limit in limits.items())
        rows.append((f"goodput ({wanted})", f"{good.sum() * per_s:,.4g} /s"))
    if run.wall_s:
        rows.append(("simulated in", f"{run.wall_s:,.3g} s, {scaled_bytes(run.peak_rss_bytes)} at most"))
    return Table(rows=rows)


def _latency_table(latencies: Latencies) -> Table:
    rows = []
    for label, values, counts in (
        ("TTFT", latencies.ttft_ms, None),
        ("TPOT", latencies.tpot_ms[~np.isnan(latencies.tpot_ms)], None),
        ("ITL", latencies.gap_ms, latencies.gap_counts),
        ("E2EL", latencies.e2el_ms, None),
    ):
        rows.append((label, *(f"{value:,.2f}" for value in _statistics(values, counts))) if values.size else (label,))
    return Table(header=("ms", "mean", "p50", "p90", "p99", "max"), rows=rows)


def _statistics(values: Floats, counts: Floats | None) -> list[float]:
    if counts is None:
        return [float(values.mean()), *np.percentile(values, [50, 90, 99]).tolist(), float(values.max())]
    quantiles = weighted_quantiles(values, counts, [0.5, 0.9, 0.99, 1.0])
    return [float(np.average(values, weights=counts)), *quantiles.tolist()]
