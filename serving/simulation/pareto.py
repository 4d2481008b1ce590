"""The Pareto front of a sweep: throughput per NPU against the time per output token of a user.

Owns: which rows no other beats in both, the table of them, the picture.
Must not know: how rows came about.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.errors import ConfigError, shown
from serving.simulation.sweep_points import Row

THROUGHPUT = "throughput.output.tokens_per_s_per_npu"
TPOT = "mean_tpot_ms"
SUFFIXES = (".html", ".png")
_X_TITLE, _Y_TITLE = "TPOT, mean (ms): less is more interactive", "Output tokens per second and NPU"


def pareto_front(throughput: Sequence[float], tpot: Sequence[float]) -> NDArray[np.int64]:
    """Indices of the points that none beats: no other has at least the throughput and at most the TPOT, and one better.

    By rising TPOT; of equal points the first stands for all.
    """
    order = np.lexsort((np.arange(len(tpot)), -np.asarray(throughput, float), np.asarray(tpot, float)))
    front, most = [], -np.inf
    for index in order:
        if throughput[index] > most:
            front.append(index)
            most = throughput[index]
    return np.array(front, np.int64)


def plotted(rows: Sequence[Row]) -> list[Row]:
    """The rows that have both figures: simulations that finished requests of more than one token."""
    return [
        row
        for row in rows
        if row["status"] == "ok" and all(isinstance(row.get(c), int | float) and row[c] > 0 for c in (THROUGHPUT, TPOT))
    ]


def front_of(rows: Sequence[Row]) -> list[Row]:
    """Rows of the Pareto front, by rising TPOT."""
    shown_rows = plotted(rows)
    front = pareto_front([row[THROUGHPUT] for row in shown_rows], [row[TPOT] for row in shown_rows])
    return [shown_rows[index] for index in front]


def format_front(rows: Sequence[Row], varied: Sequence[str]) -> str:
    """The front as a table, without a newline at the end."""
    front = front_of(rows)
    if not front:
        return "Pareto front: no point with a TPOT"
    heads = [*varied, "TPOT ms", "tok/s/NPU"]
    cells = [[*(str(row[key]) for key in varied), f"{row[TPOT]:,.2f}", f"{row[THROUGHPUT]:,.1f}"] for row in front]
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in (heads, *cells)]
    title = f"Pareto front: {len(front)} of {len(plotted(rows))} points"
    return "\n".join([title, lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def draw_pareto(
    rows: Sequence[Row], path: Path, *, varied: Sequence[str], title: str, color: str | None = None
) -> None:
    """Write the picture: HTML that needs no network, or PNG. `color` is one of `varied`; None: the first.

    Raises ConfigError for another suffix, a key that is not varied, or rows without a single figure.
    """
    check_suffix(path)
    color = color or next(iter(varied), None)
    if color is not None and color not in varied:
        raise ConfigError(f"--color: {shown(color)} is not varied; there are {', '.join(varied)}")
    points = plotted(rows)
    if not points:
        raise ConfigError(f"--plot: no point has both {THROUGHPUT} and {TPOT}")
    groups: dict[Any, list[Row]] = {}
    for row in sorted(points, key=lambda row: _order(row[color]) if color else ()):
        groups.setdefault(row[color] if color else None, []).append(row)
    draw = _draw_html if path.suffix == ".html" else _draw_png
    draw(path, groups, front_of(rows), varied=varied, title=title, color=color)


def check_suffix(path: Path) -> None:
    """Raise ConfigError unless a picture of this kind can be drawn."""
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"--plot: {path} must end in {' or '.join(SUFFIXES)}")


def _order(value: object) -> tuple[bool, float, str]:
    """Numbers by size, then words."""
    is_number = isinstance(value, int | float)
    return (not is_number, float(value) if isinstance(value, int | float) else 0.0, str(value))


def _palette(number: int) -> list[str]:
    """Colors from dark to light, none of them too light on white."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps["viridis"](0.88 * i / max(number - 1, 1))) for i in range(number)]


def _settings(row: Row, varied: Sequence[str]) -> str:
    return "<br>".join(f"{key} = {row[key]}" for key in varied)


def _draw_html(
    path: Path,
    groups: Mapping[Any, list[Row]],
    front: Sequence[Row],
    *,
    varied: Sequence[str],
    title: str,
    color: str | None,
) -> None:
    from plotly import graph_objects

    figure = graph_objects.Figure()
    figure.add_scatter(
        x=[row[TPOT] for row in front],
        y=[row[THROUGHPUT] for row in front],
        mode="lines",
        line={"color": "#888", "dash": "dot", "shape": "hv"},
        name="Pareto front",
        hoverinfo="skip",
    )
    for (value, rows), shade in zip(groups.items(), _palette(len(groups)), strict=True):
        figure.add_scatter(
            x=[row[TPOT] for row in rows],
            y=[row[THROUGHPUT] for row in rows],
            mode="markers",
            marker={"color": shade, "size": 10, "opacity": 0.85, "line": {"color": "white", "width": 1}},
            name=f"{color} = {value}" if color else "points",
            text=[_settings(row, varied) for row in rows],
            hovertemplate="%{text}<br>TPOT %{x:.2f} ms<br>%{y:,.1f} tok/s/NPU<extra></extra>",
        )
    figure.update_layout(
        title=title,
        xaxis_title=_X_TITLE,
        yaxis_title=_Y_TITLE,
        template="plotly_white",
        hovermode="closest",
        height=620,
    )
    # A fixed element id: the same rows give the same bytes.
    figure.write_html(
        path,
        include_plotlyjs=True,
        div_id="pareto",
        config={"displaylogo": False, "responsive": True},
    )


def _draw_png(
    path: Path,
    groups: Mapping[Any, list[Row]],
    front: Sequence[Row],
    *,
    varied: Sequence[str],
    title: str,
    color: str | None,
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9.0, 5.6), layout="constrained")
    axes.step(
        [row[TPOT] for row in front],
        [row[THROUGHPUT] for row in front],
        where="post",
        color="#888",
        linestyle=":",
        zorder=1,
        label="Pareto front",
    )
    for (value, rows), shade in zip(groups.items(), _palette(len(groups)), strict=True):
        axes.scatter(
            [row[TPOT] for row in rows],
            [row[THROUGHPUT] for row in rows],
            color=shade,
            s=48,
            alpha=0.85,
            edgecolors="white",
            zorder=2,
            label=f"{color} = {value}" if color else "points",
        )
    axes.set(xlabel=_X_TITLE, ylabel=_Y_TITLE, title=title)
    axes.grid(color="#ddd")
    axes.set_axisbelow(True)
    axes.legend(fontsize=8, loc="best")
    figure.savefig(path, dpi=120)
    plt.close(figure)
