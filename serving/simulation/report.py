"""A run as one page: its figures and interactive plots, in a file that needs no network.

Owns: what the page holds, in which order, and its head; the width of the windows of time.
Must not know: how a plot is made (latency_plots.py, load_plots.py, flow_plots.py), HTML (report_page.py).
"""

import dataclasses
from pathlib import Path

import numpy as np

from serving.config import RunConfig
from serving.records import Goodput
from serving.simulation.columns import RunColumns
from serving.simulation.figures import summarize_columns, throughput
from serving.simulation.flow_plots import flow_plots
from serving.simulation.latencies import column_timings
from serving.simulation.latency_plots import latency_plots
from serving.simulation.load_plots import instance_plots, queue_plots, throughput_plots
from serving.simulation.plots import scaled_bytes
from serving.simulation.report_page import Section, Table, page
from serving.simulation.windows import Windows
from serving.summary import Summary
from serving.timings import METRICS
from serving.workloads.workload import Workload

MOST_WINDOWS = 300  # of lines and heat maps
MOST_PERCENTILE_WINDOWS = 120
PERCENTILES = (50.0, 90.0, 99.0)
_RATE_LABELS = {"output": "output", "prefill": "prefill, computed", "decode": "decode, sampled"}
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
    requests, timings = run.requests, column_timings(run, np.flatnonzero(run.requests.is_finished))
    summary = summarize_columns(run, percentiles=PERCENTILES, goodput=goodput)
    end_ns = max(
        round(run.simulated_s * 1e9),
        int(requests.arrival_ns.max(initial=0)),
        int(requests.last_token_ns.max(initial=0)),
        *(int((i.start_ns + i.charged_ns).max(initial=0)) for i in run.instances),
        1,
    )
    windows = Windows.over(end_ns, most=MOST_WINDOWS)
    load_windows = Windows.over(end_ns, most=min(max(len(requests) // LEAST_ARRIVALS, 12), MOST_WINDOWS))
    most = min(max(timings.count // LEAST_PER_WINDOW, 1), MOST_PERCENTILE_WINDOWS)
    sections = [
        Section(title="Latency", plots=latency_plots(run, timings, Windows.over(end_ns, most=most))),
        Section(title="Load", plots=[*throughput_plots(run, load_windows), *queue_plots(run, windows)]),
        Section(title="Instances", plots=instance_plots(run, windows)),
        Section(title="Where tokens and bytes go", plots=flow_plots(run)),
    ]
    title = f"{name or workload.name}: {len(requests):,} requests on {config.total_npus} NPUs"
    return page(
        title=title,
        subtitle="Simulated time throughout: of the charged model on the charged hardware.",
        warnings=_warnings(run, summary),
        tables=[_setting(config, workload, run, name), _figures(config, run, summary), _latency_table(summary)],
        sections=sections,
    )


def _warnings(run: RunColumns, summary: Summary) -> list[str]:
    warnings = []
    if run.interrupted:
        warnings.append(
            f"The run was interrupted at {run.simulated_s:,.6g} s of simulated time; "
            f"{run.num_not_arrived:,} requests of the workload had not arrived."
        )
    if not summary.completed:
        warnings.append("No request finished.")
    if summary.reasons:
        warnings.append("Not finished: " + ", ".join(f"{n:,} {why}" for why, n in summary.reasons.items()) + ".")
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


def _figures(config: RunConfig, run: RunColumns, summary: Summary) -> Table:
    rows = [
        ("duration", f"{summary.duration_s:,.6g} s"),
        ("completed", f"{summary.completed:,} of {len(run.requests):,}"),
        ("requests", f"{summary.request_throughput:,.4g} /s"),
        ("input and output", f"{summary.total_token_throughput:,.0f} tok/s"),
    ]
    for kind, rates in throughput(config, run).items():
        per_npu = f"{rates['tokens_per_s_per_npu']:,.4g} tok/s per NPU ({rates['num_npus']})"
        rows += [(_RATE_LABELS[kind], f"{rates['tokens_per_s']:,.0f} tok/s"), ("", per_npu)]
    for role in dict.fromkeys(instance.role for instance in run.instances):
        members = [instance for instance in run.instances if instance.role == role]
        busy_s = sum(instance.busy_ns for instance in members) / 1e9 / len(members)
        rows.append((f"{role}, busy", _percent(busy_s, summary.duration_s)))
        if role != "prefill" and busy_s:
            seq_s = sum(float(i.num_seqs @ i.charged_ns) / 1e9 / (i.max_num_seqs * i.num_ranks) for i in members)
            rows.append((f"{role}, slots used in a step", _percent(seq_s, busy_s * len(members))))
    rate = summary.cache_hit_rate
    rows.append(("prompt tokens cached", "-" if rate is None else f"{100 * rate:.1f} %"))
    if run.pool is not None:
        asked = run.pool.num_hits + run.pool.num_misses
        rows.append(("pool blocks asked for, found", _percent(run.pool.num_hits, asked)))
        rows.append(("pool blocks evicted", f"{run.pool.num_evicted:,}"))
    if run.num_drafts:
        rows.append(("drafts accepted", f"{100 * run.num_accepted / run.num_drafts:.1f} %"))
    rows.append(("preemptions", f"{run.requests.num_preemptions.sum(dtype=np.int64):,}"))
    if summary.goodput is not None:
        limits = {name: limit for name, limit in dataclasses.asdict(summary.goodput).items() if limit is not None}
        wanted = ", ".join(f"{name.removesuffix('_ms').upper()} {limit:g} ms" for name, limit in limits.items())
        share = summary.slo_attainment["simulated"]
        rows.append((f"goodput ({wanted})", f"{summary.request_goodput:,.4g} /s"))
        rows.append(("within these", "-" if share is None else f"{100 * share:.1f} %"))
    if run.wall_s:
        rows.append(("simulated in", f"{run.wall_s:,.3g} s, {scaled_bytes(run.peak_rss_bytes)} at most"))
    return Table(rows=rows)


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _latency_table(summary: Summary) -> Table:
    rows = []
    for metric in METRICS:
        values = summary.simulated.get(metric)
        cells = [] if values is None else [values.mean_ms, *values.percentiles.values()]
        label = metric if metric == "queue" else metric.upper()
        rows.append((label, *(f"{value:,.2f}" for value in cells)))
    return Table(header=("ms", "mean", *(f"p{p:g}" for p in PERCENTILES)), rows=rows)
