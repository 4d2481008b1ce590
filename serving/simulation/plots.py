"""What every plot of a report is made of: figures as plain values, colors, rounded numbers.

Owns: `Plot`, the color of an instance, a role, a plane and a stream, and how values become JSON.
Must not know: columns of a run beyond their instances, HTML.
Source: figures are plotly.js's JSON (data, layout); colors are those of Okabe and Ito, chosen for the color-blind.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from serving.simulation.columns import InstanceColumns
from serving.simulation.windows import Windows

Trace = dict[str, Any]
MOST_LINES = 4  # instances of a role that get a line of their own; of more, the mean and the range are drawn
GRAY = "#8a8f98"
ROLE_COLORS: Mapping[str, str] = {"prefill": "#0072b2", "decode": "#d55e00", "colocated": "#009e73"}
PLANE_COLORS: Mapping[str, str] = {"rdma": "#cc79a7", "ub": "#e69f00"}
PERCENTILE_COLORS: Mapping[int, str] = {50: "#56b4e9", 90: "#e69f00", 99: "#d55e00"}
METRIC_COLORS: Mapping[str, str] = {"ttft": "#0072b2", "tpot": "#d55e00", "itl": "#e69f00", "e2el": "#009e73"}
# One hue for each stream of operators, its operators from dark to light.
STREAM_COLORS: Mapping[str, str] = {
    "attention": "#0072b2",
    "moe": "#d55e00",
    "sdma": "#cc79a7",
    "communication": "#cc79a7",
    "other": "#6b7280",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """One figure of plotly.js under a title. `note` says what is drawn, where the title does not."""

    key: str  # of its element in the page
    title: str
    traces: Sequence[Trace]
    layout: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    height_px: int = 340
    is_wide: bool = False
    empty: str = "nothing happened"  # said in place of a figure without traces


def numbers(values: ArrayLike, *, digits: int = 6) -> list[float | None]:
    """The values as JSON has them, rounded to significant digits; None where they are not finite."""
    array: NDArray[np.float64] = np.asarray(values, dtype=np.float64)
    return [float(f"{value:.{digits}g}") if np.isfinite(value) else None for value in array.tolist()]


def line(x: ArrayLike, y: ArrayLike, *, name: str, color: str, **more: Any) -> Trace:
    """A line; its gaps stay open, and a point between two gaps is drawn as a point."""
    ys = numbers(y)
    has_point = any(
        y is not None and before is None and after is None
        for before, y, after in zip([None, *ys[:-1]], ys, [*ys[1:], None], strict=True)
    )
    style = {"color": color, "width": 1.6} | more.pop("line", {})
    mode = "lines+markers" if has_point or len(ys) <= 20 else "lines"
    trace = {"type": "scatter", "x": numbers(x), "y": ys, "name": name, "mode": mode, "line": style, **more}
    return trace | {"marker": {"size": 4}} if "markers" in mode else trace


def by_instance(
    instances: Sequence[InstanceColumns], x: ArrayLike, rows: Sequence[ArrayLike], *, unit: str = ""
) -> list[Trace]:
    """A line per instance, or per role its mean, lowest and highest where there are many."""
    traces: list[Trace] = []
    for role in dict.fromkeys(instance.role for instance in instances):
        members = [i for i, instance in enumerate(instances) if instance.role == role]
        suffix = f"%{{y:.4g}}{unit}<extra>%{{fullData.name}}</extra>"
        if len(members) <= MOST_LINES:
            shades = shades_of(ROLE_COLORS[role], len(members))
            for i, color in zip(members, shades, strict=True):
                traces.append(line(x, rows[i], name=instances[i].instance_id, color=color, hovertemplate=suffix))
            continue
        table = np.array([np.asarray(rows[i], dtype=np.float64) for i in members])
        known = ~np.isnan(table).all(axis=0)
        low, middle, high = (np.full(table.shape[1], np.nan) for _ in range(3))
        low[known], high[known] = np.nanmin(table[:, known], axis=0), np.nanmax(table[:, known], axis=0)
        middle[known] = np.nanmean(table[:, known], axis=0)
        color, thin = ROLE_COLORS[role], {"width": 0.8, "dash": "dot"}
        traces.append(line(x, middle, name=f"{role}, mean of {len(members)}", color=color, hovertemplate=suffix))
        for name, values in (("lowest", low), ("highest", high)):
            traces.append(line(x, values, name=f"{role}, {name}", color=color, line=thin, hovertemplate=suffix))
    return traces


def shades_of(color: str, count: int) -> list[str]:
    """`count` shades of a color, from itself toward white."""
    base = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    lightest = 0.62 if count > 1 else 0.0
    shades = []
    for i in range(count):
        share = lightest * i / max(count - 1, 1)
        shades.append("#" + "".join(f"{round(part + (255 - part) * share):02x}" for part in base))
    return shades


def stream_of(operator: str) -> str:
    """`attention` of `attention.o_proj`; `other` of what belongs to no stream."""
    stream, dot, _ = operator.partition(".")
    return stream if dot and stream in STREAM_COLORS else "other"


def operator_colors(operators: Sequence[str]) -> dict[str, str]:
    """A color for each operator: its stream's hue, dark where it comes first."""
    colors: dict[str, str] = {}
    for stream, color in STREAM_COLORS.items():
        members = [operator for operator in operators if stream_of(operator) == stream]
        colors |= dict(zip(members, shades_of(color, len(members)), strict=True))
    return colors


def time_axis(windows: Windows) -> dict[str, Any]:
    """Of simulated time, as far as the run went, whatever the last point is."""
    return {"title": {"text": "simulated time [s]"}, "range": [0, windows.end_ns / 1e9]}


def axis(title: str, **more: Any) -> dict[str, Any]:
    """An axis from 0."""
    return {"title": {"text": title}, "rangemode": "tozero"} | more


def log_axis(title: str, values: Sequence[float | None]) -> dict[str, Any]:
    """Logarithmic over positive values, labeled at 1, 2 and 5 of each power of ten; from 0 where they differ little."""
    known = [value for value in values if value is not None and value > 0] or [1.0]
    low, high = min(known), max(known)
    if high < 5 * low:
        return axis(title)
    steps = (1, 2, 5) if high / low < 1e4 else (1,)
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    ticks = [factor * 10.0**power for power in powers for factor in steps]
    margin = max(0.03 * math.log10(high / low), 0.01)
    return {
        "type": "log",
        "title": {"text": f"{title}, logarithmic"},
        "tickmode": "array",
        "tickvals": ticks,
        "ticktext": [f"{tick:,.10g}" for tick in ticks],
        "range": [math.log10(low) - margin, math.log10(high) + margin],
    }


def scaled_bytes(num_bytes: float) -> str:
    """Bytes as people read them, in decimal units."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.3g} {unit}"
    return f"{num_bytes:.0f} B"
