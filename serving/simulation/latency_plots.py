"""Plots of a run's requests: how long they took, when, and with what.

Owns: distributions and percentiles over time of TTFT, TPOT, ITL and E2EL; the phases of a request's time.
Must not know: instances beyond their steps' gaps, HTML.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from serving.simulation.columns import RunColumns
from serving.simulation.latencies import ColumnTimings, phase_label, phases_of, step_gaps
from serving.simulation.plots import (
    METRIC_COLORS,
    PERCENTILE_COLORS,
    Plot,
    Trace,
    axis,
    line,
    log_axis,
    numbers,
    time_axis,
)
from serving.simulation.windows import Floats, Windows
from serving.timings import weighted_quantiles

MOST_POINTS = 3_000  # of a scatter plot; more are sampled by stride
# Even shares, and beyond them the tail that percentiles are read from.
SHARES = np.concatenate([np.linspace(0, 0.98, 197), np.linspace(0.981, 0.999, 37), np.linspace(0.9991, 1, 10)])
PHASE_COLORS: Mapping[str, str] = {
    "admission": "#9aa1ab",
    "prefill_queue": "#a6cee3",
    "pool_load": "#e69f00",
    "prefill": "#0072b2",
    "hand_over": "#cc79a7",
    "decode": "#d55e00",
}


def latency_plots(run: RunColumns, timings: ColumnTimings, windows: Windows) -> list[Plot]:
    """Distributions, percentiles over time, phases and TTFT against the prompt's length."""
    arrival_ns = timings.start_ns + timings.origin_ns
    over_time = [
        _over_time("ttft", "TTFT", arrival_ns, timings.ttft_ns / 1e6, windows),
        _over_time("tpot", "TPOT", arrival_ns, timings.tpot_ns / 1e6, windows),
        _gaps_over_time(run, windows),
        _over_time("e2el", "E2EL", arrival_ns, timings.e2el_ns / 1e6, windows),
    ]
    return [_distribution(timings), *_phases(run, timings), *over_time, _by_prompt(run)]


def _distribution(timings: ColumnTimings) -> Plot:
    traces: list[Trace] = []
    for name, values, counts in (
        ("ttft", timings.ttft_ns, None),
        ("tpot", timings.tpot_ns, None),
        ("itl", timings.gaps_ns, timings.gap_counts),
        ("e2el", timings.e2el_ns, None),
    ):
        known = values[~np.isnan(values)] / 1e6
        if not known.size:
            continue
        at = weighted_quantiles(known, np.ones(known.size) if counts is None else counts, SHARES)
        # A logarithmic axis has no zero: gaps of two tokens of one step, say.
        x = np.maximum(at, 1e-3)
        hover = "%{y:.4p} within %{x:.4g} ms<extra>" + name.upper() + "</extra>"
        traces.append(line(x, SHARES, name=name.upper(), color=METRIC_COLORS[name], hovertemplate=hover))
    return Plot(
        key="distribution",
        title="Distributions: share of requests (of gaps between tokens for ITL) within a time",
        traces=traces,
        layout={
            "xaxis": log_axis("time [ms]", [x for trace in traces for x in trace["x"]]),
            "yaxis": axis("share [%]", range=[0, 1.01], tickformat=".0%"),
        },
        is_wide=True,
        empty="no request finished",
    )


def _over_time(name: str, label: str, arrival_ns: Floats, values: Floats, windows: Windows) -> Plot:
    known = ~np.isnan(values)
    rows = windows.percentiles(arrival_ns[known], values[known], tuple(PERCENTILE_COLORS))
    return _percentile_plot(f"{name}-time", f"{label} over time of arrival", rows, label, windows, bool(known.any()))


def _gaps_over_time(run: RunColumns, windows: Windows) -> Plot:
    """Percentiles of the gaps that are a step's length, each as often as rows had it; first gaps have no instant."""
    parts = [step_gaps(instance) for instance in run.instances]
    when = np.concatenate([part.end_ns for part in parts])
    gap = np.concatenate([part.gap_ns for part in parts]) / 1e6
    count = np.concatenate([part.counts for part in parts]).astype(np.float64)
    rows = np.full((len(PERCENTILE_COLORS), windows.count), np.nan)
    order = np.argsort(when, kind="stable")
    cuts = np.searchsorted(when[order], windows.edges_ns)
    for window in range(windows.count):
        inside = order[cuts[window] : cuts[window + 1]]
        if inside.size:
            rows[:, window] = weighted_quantiles(gap[inside], count[inside], np.array(list(PERCENTILE_COLORS)) / 100)
    return _percentile_plot("itl-time", "ITL over time", rows, "ITL", windows, gap.size > 0)


def _percentile_plot(key: str, title: str, rows: Floats, label: str, windows: Windows, has_any: bool) -> Plot:
    highest = np.nanmax(rows) if has_any else 1.0
    # Seconds once milliseconds would need four digits and more.
    unit, factor = ("s", 1e-3) if highest >= 5_000 else ("ms", 1.0)
    traces = [
        line(
            windows.middles_s,
            row * factor,
            name=f"p{p}",
            color=color,
            hovertemplate=f"%{{y:.4g}} {unit} at %{{x:.4g}} s<extra>p{p}</extra>",
        )
        for (p, color), row in zip(PERCENTILE_COLORS.items(), rows, strict=True)
    ]
    return Plot(
        key=key,
        title=f"{title}, windows of {windows.width_s:g} s",
        traces=traces if has_any else [],
        layout={"xaxis": time_axis(windows), "yaxis": axis(f"{label} [{unit}]")},
        height_px=280,
        empty="no request finished" if label != "TPOT" else "no request has two tokens",
    )


def _phases(run: RunColumns, timings: ColumnTimings) -> list[Plot]:
    """Phases of E2EL and, larger, of TTFT."""
    phases = phases_of(run.requests, run.requests.is_finished, run.moves)
    before_first = {name: values for name, values in phases.items() if name not in ("hand_over", "decode")}
    note = "" if run.moves is not None else "Movements were not kept: the load from the pool is in the prefill queue."
    return [
        _stack("phases", "E2EL", phases, timings.e2el_ns, note),
        _stack("ttft-phases", "TTFT", before_first, timings.ttft_ns, note),
    ]


def _stack(key: str, label: str, phases: Mapping[str, Floats], by: Floats, note: str) -> Plot:
    """Mean phases of all requests, and of those around three percentiles of `by`; phases in milliseconds."""
    groups: list[tuple[str, NDArray[np.bool_]]] = []
    if by.size:
        groups.append(("all, mean", np.ones(by.size, dtype=np.bool_)))
        for p in PERCENTILE_COLORS:
            low, high = np.percentile(by, [p - 0.5, p + 0.5])
            near = (by >= low) & (by <= high)
            if not near.any():  # few requests: the nearest one
                near[np.argmin(np.abs(by - np.percentile(by, p)))] = True
            groups.append((f"at p{p} of {label}", near))
    unit, factor = ("s", 1e-3) if by.size and by.max() >= 5_000 else ("ms", 1.0)
    traces = []
    for name, values in phases.items():
        means = np.array([values[members].mean() for _, members in groups])
        if means.any():
            traces.append(
                {
                    "type": "bar",
                    "orientation": "h",
                    "name": phase_label(name),
                    "y": [group for group, _ in groups],
                    "x": numbers(means * factor),
                    "marker": {"color": PHASE_COLORS[name]},
                    "hovertemplate": f"%{{x:.4g}} {unit}<extra>{phase_label(name)}</extra>",
                }
            )
    return Plot(
        key=key,
        title=f"Where {label} goes, mean of requests within half a percentile",
        traces=traces,
        layout={
            "barmode": "stack",
            "xaxis": axis(f"time since arrival [{unit}]"),
            "yaxis": {"autorange": "reversed", "ticks": ""},
            "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "traceorder": "normal"},
        },
        note=note,
        height_px=280,
        empty="no request finished",
    )


def _by_prompt(run: RunColumns) -> Plot:
    """TTFT against the prompt, colored by how much of it was cached; few enough requests to look at."""
    requests = run.requests
    done = np.flatnonzero(requests.is_finished)
    stride = max(-(-done.size // MOST_POINTS), 1)
    shown = done[::stride]
    cached = requests.num_cached_tokens[shown] / np.maximum(requests.num_prompt_tokens[shown], 1)
    ttft_ms = (requests.first_token_ns - requests.arrival_ns)[shown] / 1e6
    traces: list[Trace] = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": name,
            "x": requests.num_prompt_tokens[shown[members]].tolist(),
            "y": numbers(ttft_ms[members], digits=4),
            "marker": {"size": 4, "color": color, "opacity": 0.5},
            "hovertemplate": "%{x} tokens, %{y:.4g} ms<extra>" + name + "</extra>",
        }
        for name, color, members in (
            # A block that all prompts begin with, of instructions say, makes nobody fast.
            ("less than 10 % of the prompt cached", "#0072b2", cached < 0.1),
            ("10 to 50 %", "#cc79a7", (cached >= 0.1) & (cached < 0.5)),
            ("half and more", "#e69f00", cached >= 0.5),
        )
        if members.any()
    ]
    return Plot(
        key="ttft-prompt",
        title="TTFT against the prompt's length" + (f", every {stride}th finished request" if stride > 1 else ""),
        traces=traces,
        layout={
            "xaxis": log_axis("prompt [tokens]", requests.num_prompt_tokens[shown].tolist()),
            "yaxis": log_axis("TTFT [ms]", ttft_ms.tolist()),
        },
        is_wide=True,
        height_px=320,
        empty="no request finished",
    )
