"""Interpolation between measured points: exact on them, refused outside them.

Owns: the grid of one measured quantity, its limits, and the errors that name what is asked and what there is.
Must not know: files, operators, units.
Source: multilinear interpolation of the value's logarithm over log2 of the sizes. Each table of devices/table_files.py
has a smaller median error that way than by interpolating the value itself: `Grid.leave_one_out` measures both.

Grids need not be rectangular. Sizes are ordered, and the points form a tree: every value of the first size has its
own values of the second, and so on. A query goes down the branches left and right of it, each of which must reach far
enough:

    ep 32   tokens 16 ........................ 16384
    ep 48   tokens 16 ........... 8192                 <- as far as both neighbors go
    ep 64   tokens 16 ........... 8192
"""

import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

__all__ = ["Grid", "OutOfGrid", "TableError", "TablesUnavailable", "UnknownEntry"]

Point: TypeAlias = tuple[float, ...]


class TableError(ValueError):
    """Base of what can be wrong with a question to measured tables. Arguments equal `args`, so it survives pickling."""


class TablesUnavailable(TableError):
    """The tables, one of their files or columns, or the package that reads them is not there."""


class UnknownEntry(TableError):
    """A name that the table does not have: an operator, a field, or a value of a field that is not a size."""

    def __init__(self, operator: str, field: str, value: object, known: tuple[object, ...]) -> None:
        super().__init__(operator, field, value, known)
        self.operator, self.field, self.value, self.known = operator, field, value, known

    def __str__(self) -> str:
        return f"{self.operator}: {self.field} {self.value!r} is not among {', '.join(repr(k) for k in self.known)}"


class OutOfGrid(TableError):
    """A size that was not measured, nor lies between two that were. `where` names the sizes fixed before it."""

    def __init__(self, operator: str, field: str, value: float, low: float, high: float, where: str = "") -> None:
        super().__init__(operator, field, value, low, high, where)
        self.operator, self.field, self.value = operator, field, value
        self.low, self.high, self.where = low, high, where

    def __str__(self) -> str:
        at = f" at {self.where}" if self.where else ""
        return (
            f"{self.operator}: {self.field} {self.value:g} is outside the measured {self.low:g} to {self.high:g}{at}; "
            "measured tables are not extrapolated"
        )


class _Branch:
    """The points that share the sizes before this one: sorted values of the next size, and what lies below each."""

    __slots__ = ("below", "keys")

    def __init__(self, points: Mapping[Point, float], depth: int) -> None:
        groups: dict[float, dict[Point, float]] = {}
        for point, value in points.items():
            groups.setdefault(point[depth], {})[point] = value
        self.keys = sorted(groups)
        last = depth + 1 == len(next(iter(points)))
        self.below: list[_Branch | float] = [
            next(iter(groups[key].values())) if last else _Branch(groups[key], depth + 1) for key in self.keys
        ]


class Grid:
    """A measured quantity as a function of sizes."""

    def __init__(self, operator: str, fields: Sequence[str], points: Mapping[Point, float]) -> None:
        """`points` maps one positive number per field, in the order of `fields`, to a positive value.

        Raises ValueError if there is no point, or one is not of that form.
        """
        if not points:
            raise ValueError(f"{operator}: no points")
        for point, value in points.items():
            if len(point) != len(fields) or not all(0 < x < math.inf for x in (*point, value)):
                raise ValueError(
                    f"{operator}: {point} -> {value} is not {len(fields)} positive sizes and a positive value"
                )
        self.operator = operator
        self.fields = tuple(fields)
        self.points: Mapping[Point, float] = dict(points)
        self.limits: Mapping[str, tuple[float, float]] = {  # smallest and largest size anywhere in the grid
            field: (min(sizes), max(sizes)) for field, sizes in zip(fields, zip(*points, strict=True), strict=True)
        }
        self._root = _Branch(self.points, 0)

    def __call__(self, point: Sequence[float]) -> float:
        """The value at these sizes. Raises OutOfGrid."""
        return self._at(self._root, tuple(point), 0)

    def leave_one_out(self, field: str, *, log_value: bool = True) -> list[float]:
        """Relative errors when a point is predicted from its neighbors along one size, for every inner point.

        The gap that is bridged is twice that of a real query, so these errors bound those of interpolation from above
        where the curve is smooth.
        """
        errors = []
        for line in self._lines(self.fields.index(field)):
            for (x0, y0), (x, y), (x1, y1) in zip(line, line[1:], line[2:], strict=False):
                errors.append(abs(_between(x, x0, x1, y0, y1, log_value=log_value) / y - 1))
        return errors

    def _at(self, branch: _Branch, point: Point, depth: int) -> float:
        keys, x = branch.keys, point[depth]
        if not keys[0] <= x <= keys[-1]:
            fixed = zip(self.fields[:depth], point, strict=False)
            where = ", ".join(f"{field} {value:g}" for field, value in fixed)
            raise OutOfGrid(self.operator, self.fields[depth], x, keys[0], keys[-1], where)
        right = bisect_left(keys, x)
        high = self._below(branch.below[right], point, depth)
        if keys[right] == x:
            return high
        low = self._below(branch.below[right - 1], point, depth)
        return _between(x, keys[right - 1], keys[right], low, high)

    def _below(self, below: "_Branch | float", point: Point, depth: int) -> float:
        return self._at(below, point, depth + 1) if isinstance(below, _Branch) else below

    def _lines(self, axis: int) -> Iterator[list[tuple[float, float]]]:
        """Points along one size with the others fixed, sorted."""
        lines: dict[Point, list[tuple[float, float]]] = {}
        for point, value in self.points.items():
            lines.setdefault(point[:axis] + point[axis + 1 :], []).append((point[axis], value))
        return (sorted(line) for line in lines.values())


def _between(x: float, x0: float, x1: float, y0: float, y1: float, *, log_value: bool = True) -> float:
    weight = math.log2(x / x0) / math.log2(x1 / x0)
    return y0 * math.exp(weight * math.log(y1 / y0)) if log_value else y0 + weight * (y1 - y0)
