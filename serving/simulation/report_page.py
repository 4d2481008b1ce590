"""A page with plots that needs nothing but itself.

Owns: the HTML of a report: its style, the places of plots and tables, and plotly.js inside it.
Must not know: runs, what a plot shows.
Source: plotly.js as the package plotly ships it (MIT license).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from serving.simulation.plots import Plot

_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
_STYLE = f"""
body {{ font: 14px/1.45 {_FONT}; margin: 0 auto; max-width: 1500px; padding: 16px 24px 48px; color: #1f2328;
  background: #fff; }}
h1 {{ font-size: 22px; margin: 8px 0 2px; }}
h2 {{ font-size: 17px; margin: 28px 0 6px; padding-bottom: 4px; border-bottom: 1px solid #d8dee4; }}
h3 {{ font-size: 14px; margin: 10px 0 0; }}
p {{ margin: 2px 0; }}
.note {{ color: #59636e; font-size: 12.5px; max-width: 110ch; }}
.warning {{ background: #fff8c5; border: 1px solid #d4a72c66; padding: 6px 10px; margin: 8px 0; }}
.tables {{ display: flex; flex-wrap: wrap; gap: 12px 36px; align-items: flex-start; margin-top: 10px; }}
table {{ border-collapse: collapse; font-size: 13px; }}
th, td {{ padding: 2px 10px 2px 0; text-align: left; vertical-align: top; border-bottom: 1px solid #eaeef2; }}
th {{ font-weight: 600; color: #59636e; }}
td.number {{ text-align: right; font-variant-numeric: tabular-nums; }}
.plots {{ display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 6px 28px; }}
.plots > div {{ min-width: 0; }}
.wide {{ grid-column: 1 / -1; }}
.modebar-container {{ top: -24px !important; }}  /* beside the title, not over the legend */
.empty {{ color: #59636e; padding: 18px 0; }}
@media (max-width: 900px) {{ .plots {{ grid-template-columns: minmax(0, 1fr); }} }}
"""
_LAYOUT: Mapping[str, Any] = {
    "margin": {"l": 64, "r": 16, "t": 8, "b": 44},
    "font": {"family": _FONT, "size": 12, "color": "#1f2328"},
    "paper_bgcolor": "#fff",
    "plot_bgcolor": "#fff",
    "hovermode": "closest",
    "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom", "font": {"size": 11}},
}
_AXIS: Mapping[str, Any] = {
    "gridcolor": "#e6e9ed",
    "linecolor": "#b6bdc6",
    "zeroline": False,
    "automargin": True,
    "ticks": "outside",
    "tickcolor": "#b6bdc6",
    "exponentformat": "SI",
}
_DRAW = """
for (const element of document.querySelectorAll('script[type="application/json"]')) {
  const figure = JSON.parse(element.textContent);
  Plotly.newPlot(element.dataset.target, figure.data, figure.layout, {responsive: true, displaylogo: false,
    modeBarButtonsToRemove: ['select2d', 'lasso2d', 'autoScale2d', 'zoomIn2d', 'zoomOut2d']});
}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows of text; columns after the first are numbers, flush right, unless there are only names and texts."""

    rows: Sequence[Sequence[str]]
    header: Sequence[str] = ()
    has_numbers: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """Plots under a heading."""

    title: str
    plots: Sequence[Plot]


def page(
    *, title: str, subtitle: str, warnings: Sequence[str], tables: Sequence[Table], sections: Sequence[Section]
) -> str:
    """The whole file."""
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>",
        f'<h1>{escape(title)}</h1><p class="note">{escape(subtitle)}</p>',
        *(f'<p class="warning">{escape(warning)}</p>' for warning in warnings),
        '<div class="tables">',
        *(_table(table) for table in tables),
        "</div>",
        f"<script>{_plotly_js()}</script>",
    ]
    for section in sections:
        parts.append(f'<h2>{escape(section.title)}</h2><div class="plots">')
        parts += [_plot(plot) for plot in section.plots]
        parts.append("</div>")
    parts.append(f"<script>{_DRAW}</script></body></html>\n")
    return "\n".join(parts)


def _plotly_js() -> str:
    from plotly.offline import get_plotlyjs  # only here: nobody else needs it, and it is not quick to import

    script: str = get_plotlyjs()
    return script


def _table(table: Table) -> str:
    css = ' class="number"' if table.has_numbers else ""
    header = "".join(f"<th>{escape(cell)}</th>" for cell in table.header)
    rows = [
        "<tr>" + "".join(f"<td{css if i else ''}>{escape(cell)}</td>" for i, cell in enumerate(row)) + "</tr>"
        for row in table.rows
    ]
    return "<table>" + (f"<tr>{header}</tr>" if header else "") + "".join(rows) + "</table>"


def _plot(plot: Plot) -> str:
    note = f'<p class="note">{escape(plot.note)}</p>' if plot.note else ""
    opening = f"<div{' class=wide' if plot.is_wide else ''}><h3>{escape(plot.title)}</h3>{note}"
    if not plot.traces:
        return f'{opening}<p class="empty">{escape(plot.empty[0].upper() + plot.empty[1:])}.</p></div>'
    layout = {**_LAYOUT, "height": plot.height_px, "xaxis": {}, "yaxis": {}, **plot.layout}
    for name, value in layout.items():
        if name.startswith(("xaxis", "yaxis")):
            layout[name] = {**_AXIS, **value}
    figure = json.dumps({"data": plot.traces, "layout": layout}, allow_nan=False, separators=(",", ":"))
    # A browser ends a script at the first "</", whatever is in it.
    figure = figure.replace("</", "<\\/")
    return (
        f'{opening}<div id="{escape(plot.key)}" style="height:{plot.height_px}px"></div>'
        f'<script type="application/json" data-target="{escape(plot.key)}">{figure}</script></div>'
    )
