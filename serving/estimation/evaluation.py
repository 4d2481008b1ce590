"""Published rows beside ours: the errors, what they come to by group and role, and the bars.

Owns: the error of a row, the summary, the bars.
Must not know: how an estimate is made (the registry is an argument), files, the fit, how a table looks.
"""

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from serving.errors import ConfigError
from serving.estimation.published import ROLES, PublishedRow, RowRole

Estimate = Callable[..., Mapping[str, Any]]
Hardware = str | Mapping[str, Any]  # a name, or a description as a configs/hardware/*.yaml file holds it

MEDIAN_BARS: Mapping[RowRole, float] = {"calibration": 0.02, "validation": 0.04}
WORST_BARS: Mapping[RowRole, float] = {"calibration": 0.06, "validation": 0.10}


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluatedRow:
    """A published figure and ours, in the row's unit."""

    row: PublishedRow
    ours: float

    @property
    def error(self) -> float:
        """(ours - published) / published; where 0 is published, the difference itself."""
        return relative_error(self.ours, self.row.published)

    def as_json(self) -> dict[str, str | float]:
        """The row of a report."""
        row = self.row
        return {
            "group": row.group,
            "row": row.row,
            "quantity": row.quantity,
            "unit": row.unit,
            "published": row.published,
            "ours": self.ours,
            "error": self.error,
            "role": row.role,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorSummary:
    """Absolute errors of some rows."""

    count: int
    median: float
    worst: float
    worst_row: PublishedRow

    def as_json(self) -> dict[str, str | int | float]:
        """For a report."""
        return {"count": self.count, "median": self.median, "worst": self.worst, "worst_row": self.worst_row.label}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One limit on the errors of a role, and what they are. `statistic` is median or worst."""

    role: RowRole
    statistic: str
    limit: float
    value: float

    @property
    def passed(self) -> bool:
        return self.value <= self.limit

    def as_json(self) -> dict[str, str | float | bool]:
        """For a report."""
        return {
            "role": self.role,
            "statistic": self.statistic,
            "limit": self.limit,
            "value": self.value,
            "passed": self.passed,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Errors by group and role, by role, and the bars of the roles that have rows."""

    by_group: Mapping[str, Mapping[RowRole, ErrorSummary]]
    by_role: Mapping[RowRole, ErrorSummary]
    bars: tuple[Bar, ...]

    def as_json(self) -> dict[str, Any]:
        """For a report."""
        return {
            "groups": {
                group: {role: errors.as_json() for role, errors in roles.items()}
                for group, roles in self.by_group.items()
            },
            "roles": {role: errors.as_json() for role, errors in self.by_role.items()},
            "bars": [bar.as_json() for bar in self.bars],
        }


def relative_error(ours: float, published: float) -> float:
    """(ours - published) / published; where 0 is published, the difference itself."""
    return (ours - published) / published if published else ours


def evaluate_rows(
    rows: Iterable[PublishedRow],
    estimates: Mapping[str, Estimate],
    *,
    hardware: str,
    description: Hardware | None = None,
) -> tuple[EvaluatedRow, ...]:
    """Ours for every row, in order; equal estimates are made once.

    `hardware` names the device of rows that name none. Those are estimated on `description`, if one is given.
    Raises ConfigError naming the row if its estimate is unknown, fails, or gives no finite number under its key.
    """
    made: dict[str, Mapping[str, Any]] = {}

    def value(row: PublishedRow, changed: Mapping[str, Any]) -> float:
        name = row.ours.estimate
        arguments = {**row.ours.arguments, **changed}
        device = row.hardware or hardware
        call = json.dumps([name, device, arguments], sort_keys=True)
        if call not in made:
            on = description if description is not None and device == hardware else device
            made[call] = _estimate(estimates, name, {**arguments, "hardware": on})
        result = made[call]
        if row.ours.key not in result:
            raise ConfigError(f"ours.key: {row.ours.key!r} is not among {', '.join(result)}")
        return _finite(f"ours.key: {row.ours.key}", result[row.ours.key])

    def ours(row: PublishedRow) -> float:
        number = value(row, {})
        if row.ours.minus is not None:
            number -= value(row, row.ours.minus)
        if row.ours.over is not None:
            divisor = value(row, row.ours.over)
            if divisor == 0:
                raise ConfigError("ours.over: is 0")
            number /= divisor
        return row.ours.factor * number

    evaluated = []
    for row in rows:
        try:
            evaluated.append(EvaluatedRow(row=row, ours=ours(row)))
        except ConfigError as error:
            raise ConfigError(f"{row.label}: {error}") from error
    return tuple(evaluated)


def summarize(rows: Sequence[EvaluatedRow]) -> Summary:
    """Count, median and worst absolute error of every group and role that has rows."""
    groups = dict.fromkeys(row.row.group for row in rows)
    by_role = _by_role(rows)
    bars = []
    for role, errors in by_role.items():
        if role in MEDIAN_BARS:
            bars.append(Bar(role=role, statistic="median", limit=MEDIAN_BARS[role], value=errors.median))
            bars.append(Bar(role=role, statistic="worst", limit=WORST_BARS[role], value=errors.worst))
    return Summary(
        by_group={group: _by_role([row for row in rows if row.row.group == group]) for group in groups},
        by_role=by_role,
        bars=tuple(bars),
    )


def _by_role(rows: Sequence[EvaluatedRow]) -> dict[RowRole, ErrorSummary]:
    summaries: dict[RowRole, ErrorSummary] = {}
    for role in ROLES:
        errors = [(abs(row.error), row.row) for row in rows if row.row.role == role]
        if errors:
            worst, worst_row = max(errors, key=lambda pair: pair[0])
            median = statistics.median(error for error, _ in errors)
            summaries[role] = ErrorSummary(count=len(errors), median=median, worst=worst, worst_row=worst_row)
    return summaries


def _estimate(estimates: Mapping[str, Estimate], name: str, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    if name not in estimates:
        raise ConfigError(f"ours.estimate: {name!r}, there are {', '.join(estimates)}")
    try:
        return estimates[name](**arguments)
    except (ValueError, TypeError, LookupError, ArithmeticError) as error:  # TypeError: of an argument that it lacks
        raise ConfigError(f"ours.estimate: {name}: {error}") from error


def _finite(name: str, number: Any) -> float:
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
        raise ConfigError(f"{name}: {number!r} is not a finite number")
    return float(number)
