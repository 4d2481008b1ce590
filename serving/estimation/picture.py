"""A picture of published figures against ours, and of the error of every row.

Owns: the drawing.
Must not know: how ours was computed.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from serving.estimation.evaluation import EvaluatedRow
from serving.estimation.published import RowRole

_BAND = 0.10  # the bar of a single validation row, drawn in both panels
_WIDEST_ERROR = 0.30  # beyond it a marker sits at the edge, its error in figures
_LINES_PER_COLUMN = 56  # of the panel of errors
_LINE_INCHES = 0.165
_SCATTER_INCHES = 9.0
_PALETTES = (("tab10", 10), ("Dark2", 8))  # none of their colors is too light for a hollow marker
_MARKERS: Mapping[RowRole, str] = {"calibration": "o", "validation": "o", "input": "s", "comparison": "^"}
_SIZES: Mapping[RowRole, float] = {"calibration": 6.0, "validation": 6.5, "input": 4.5, "comparison": 5.5}


def draw_reproduction(rows: Sequence[EvaluatedRow], path: Path, *, title: str) -> None:
    """Write the picture: left published against ours, right the signed error by row; hollow markers are validation.

    The left panel has logarithmic axes of absolute values, so a row whose published figure or ours is 0 is only in the
    right one.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    groups = list(dict.fromkeys(row.row.group for row in rows))
    palette = [plt.get_cmap(name)(index) for name, count in _PALETTES for index in range(count)]
    colors = {group: palette[index % len(palette)] for index, group in enumerate(groups)}
    columns = _columns(rows)
    height = max(6.0, 1.6 + _LINE_INCHES * max(map(len, columns)))
    figure, axes = plt.subplots(
        1,
        1 + len(columns),
        figsize=(_SCATTER_INCHES + 6.0 * len(columns), height),
        width_ratios=[_SCATTER_INCHES] + [6.0] * len(columns),
        layout="constrained",
        squeeze=False,
    )
    _draw_scatter(axes[0, 0], rows, colors)
    edge = min(_WIDEST_ERROR, max(1.2 * _BAND, *(1.1 * abs(row.error) for row in rows)))
    for panel, lines in zip(axes[0, 1:], columns, strict=True):
        _draw_errors(panel, lines, colors, edge=edge, num_lines=max(map(len, columns)))
    figure.suptitle(title, fontsize=13)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _style(role: RowRole, color: Any) -> dict[str, Any]:
    return {
        "marker": _MARKERS[role],
        "markersize": _SIZES[role],
        "linestyle": "none",
        "color": color,
        "markerfacecolor": "white" if role == "validation" else color,
        "markeredgewidth": 1.4,
    }


def _draw_scatter(axes: Any, rows: Sequence[EvaluatedRow], colors: Mapping[str, Any]) -> None:
    from matplotlib.lines import Line2D

    points = [(abs(row.row.published), abs(row.ours), row.row) for row in rows if row.row.published and row.ours]
    for published, ours, row in points:
        axes.plot(published, ours, zorder=3, **_style(row.role, colors[row.group]))
    axes.set(xscale="log", yscale="log", xlabel="published (absolute value)", ylabel="ours (absolute value)")
    values = [value for published, ours, _ in points for value in (published, ours)]
    ends = [min(values, default=1.0) / 1.6, max(values, default=1.0) * 1.6]
    axes.plot(ends, ends, color="0.3", linewidth=1, zorder=2)
    low, high = ([factor * end for end in ends] for factor in (1 - _BAND, 1 + _BAND))
    axes.fill_between(ends, low, high, color="0.85", zorder=1)
    axes.set(xlim=ends, ylim=ends)
    axes.set_aspect("equal")
    axes.grid(color="0.93")
    roles = [role for role in _MARKERS if any(row.row.role == role for row in rows)]
    handles = [Line2D([], [], **_style(role, "0.3"), label=role) for role in roles]
    handles += [Line2D([], [], color="0.3", linewidth=1, label=f"equal; band: {_BAND:.0%}")]
    handles += [Line2D([], [], color=color, linewidth=5, label=group) for group, color in colors.items()]
    axes.legend(handles=handles, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3)


def _columns(rows: Sequence[EvaluatedRow]) -> list[list[str | EvaluatedRow]]:
    """Lines of the panel of errors: a group's name, then its rows; a name is never the last line of a column."""
    columns: list[list[str | EvaluatedRow]] = [[]]
    group = None
    for row in rows:
        is_new = row.row.group != group
        if len(columns[-1]) + is_new >= _LINES_PER_COLUMN:
            columns.append([])
            is_new = True
        if is_new:
            group = row.row.group
            columns[-1].append(group)
        columns[-1].append(row)
    return columns


def _draw_errors(
    axes: Any, lines: Sequence[str | EvaluatedRow], colors: Mapping[str, Any], *, edge: float, num_lines: int
) -> None:
    axes.axvspan(-_BAND, _BAND, color="0.92", zorder=0)
    axes.axvline(0, color="0.3", linewidth=1, zorder=1)
    for place, line in enumerate(lines):
        if isinstance(line, str):
            continue
        color, error = colors[line.row.group], line.error
        shown = max(-edge, min(edge, error))
        axes.plot([0, shown], [place, place], color=color, linewidth=1.2, zorder=2)
        axes.plot(shown, place, clip_on=False, zorder=3, **_style(line.row.role, color))
        if shown != error:  # between the axis and the marker at the edge
            axes.text(
                0.93 * shown, place, f"{error:+.0%}", ha="left" if error < 0 else "right", va="bottom", fontsize=6
            )
    axes.set_yticks(
        range(len(lines)),
        [line if isinstance(line, str) else f"{line.row.row}: {line.row.quantity}" for line in lines],
        fontsize=7,
    )
    for label, line in zip(axes.get_yticklabels(), lines, strict=True):
        if isinstance(line, str):
            label.set(fontweight="bold", fontsize=8)
    axes.set(xlim=(-edge, edge), ylim=(num_lines - 0.5, -0.5), xlabel="(ours - published) / published")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:+.0%}" if value else "0")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="0.85", zorder=0)
