"""The tables of `supernode reproduce`: published figures beside ours, group by group, and the summary.

Owns: what the text and the JSON file look like.
Must not know: how ours was computed, options.
"""

import math
from collections.abc import Sequence
from typing import Any

from serving.estimation.evaluation import EvaluatedRow, Summary

_HEADINGS = ("row", "quantity", "unit", "published", "ours", "error", "role")
_NUM_TEXT_COLUMNS = 3  # the first columns are words, the next three numbers


def format_reproduction(rows: Sequence[EvaluatedRow], summary: Summary, *, has_bars: bool = True) -> str:
    """A table per group with the notes of its rows below it, then the errors by group and role, then the bars.

    The bars are of all rows; a part of them has none.
    """
    cells = [_HEADINGS, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(_HEADINGS))]
    lines: list[str] = []
    for group in summary.by_group:
        lines += [group, _line(_HEADINGS, widths)]
        members = [row for row in rows if row.row.group == group]
        lines += [_line(_cells(row), widths) for row in members]
        lines += [f"  ({row.row.row}, {row.row.quantity}: {row.row.note})" for row in members if row.row.note]
        lines.append("")
    return "\n".join(lines + format_summary(summary, has_bars=has_bars))


def format_summary(summary: Summary, *, has_bars: bool = True) -> list[str]:
    """Lines: absolute errors by group and role, then by role, then what was asked of them."""
    lines = [f"{'absolute error of':<34}{'rows':>6}{'median':>10}{'worst':>10}  worst row"]
    groups = [(f"{group}, {role}", errors) for group, by in summary.by_group.items() for role, errors in by.items()]
    for name, errors in [*groups, *((f"all {role} rows", errors) for role, errors in summary.by_role.items())]:
        worst = f"{errors.worst_row.row}, {errors.worst_row.quantity}"
        lines.append(f"{name:<34}{errors.count:>6}{errors.median:>10.2%}{errors.worst:>10.2%}  {worst}")
    if has_bars:
        lines.append("")
    for bar in summary.bars if has_bars else ():
        verdict = "pass" if bar.passed else "FAIL"
        lines.append(f"{verdict}  {bar.role}: {bar.statistic} error {bar.value:.2%}, at most {bar.limit:.0%}")
    return lines


def reproduction_as_json(rows: Sequence[EvaluatedRow], summary: Summary) -> dict[str, Any]:
    """`rows` and `summary`, errors as shares."""
    return {"rows": [row.as_json() for row in rows], "summary": summary.as_json()}


def format_number(value: float) -> str:
    """Four significant digits, or all that are before the point; never an exponent."""
    if value == 0:
        return "0"
    decimals = max(0, 3 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _cells(row: EvaluatedRow) -> tuple[str, ...]:
    said = row.row
    numbers = (format_number(said.published), format_number(row.ours), f"{row.error:+.1%}")
    return (said.row, said.quantity, said.unit, *numbers, said.role)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    words = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
    numbers = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
    return "  " + "  ".join([*words[:_NUM_TEXT_COLUMNS], *numbers[_NUM_TEXT_COLUMNS:-1], words[-1]]).rstrip()
