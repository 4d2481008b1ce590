"""A sweep: many simulations, each once, here or as Ray tasks, their rows kept as they come.

Owns: which points still have to run, their order, what becomes of one that fails, progress; the search over a grid.
Must not know: what a simulation is, Ray, command lines, pictures.

The search is a coordinate descent: from the middle of every axis, all values of one axis at a time, to the best of
them, until no axis has a better one. It ends at a point that no single change improves, which need not be the best.
"""

import itertools
import math
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from tqdm import tqdm

from serving.errors import ConfigError, ServingError, shown
from serving.simulation.sweep_points import Axis, Point, Row, grid_points, invalid_key, point_at, point_key, run_point
from serving.simulation.sweep_rows import RowStore

Runner = Callable[[Sequence[Point]], Iterator[tuple[int, Row | Exception]]]


@dataclass(slots=True, kw_only=True)
class SweepResult:
    """Rows of the points that are done so far, in the order of the grid or of the search."""

    rows: list[Row] = field(default_factory=list)
    num_run: int = 0  # simulated now
    num_known: int = 0  # found in the file


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What a search is for: most or least of a column, where other columns keep to limits."""

    column: str
    sense: Literal["max", "min"]
    limits: tuple[tuple[str, Literal["<=", ">="], float], ...] = ()

    def score(self, row: Row) -> tuple[float, float]:
        """Lower is better: how far the limits are exceeded, in shares of them, then the column. Infinite if invalid."""
        value = row.get(self.column)
        if row["status"] != "ok" or not isinstance(value, int | float):
            return (math.inf, math.inf)
        excess = 0.0
        for column, relation, limit in self.limits:
            measured = row.get(column)
            if not isinstance(measured, int | float):
                return (math.inf, math.inf)
            beyond = measured - limit if relation == "<=" else limit - measured
            excess += max(0.0, beyond) / (abs(limit) or 1.0)
        return (excess, -value if self.sense == "max" else value)

    def check_columns(self, rows: Sequence[Row]) -> None:
        """Raise ConfigError if simulations succeeded and none has a column that is asked for."""
        done = [row for row in rows if row["status"] == "ok"]
        for column in (self.column, *(limit[0] for limit in self.limits)):
            if done and all(not isinstance(row.get(column), int | float) for row in done):
                known = sorted(n for n, v in done[0].items() if isinstance(v, int | float) and not isinstance(v, bool))
                raise ConfigError(f"--search: {shown(column)} is no number of a row; there are {', '.join(known)}")


def parse_objective(target: str, limits: Sequence[str]) -> Objective:
    """From `max:COLUMN` or `min:COLUMN`, and limits such as `p99_ttft_ms<=2000`. Raises ConfigError."""
    sense, separator, column = target.partition(":")
    if sense not in ("max", "min") or not separator or not column.strip():
        raise ConfigError(f"--search: {shown(target)} is not max:COLUMN or min:COLUMN")
    parsed: list[tuple[str, Literal["<=", ">="], float]] = []
    for text in limits:
        match = re.fullmatch(r"\s*(\S+?)\s*(<=|>=)\s*(\S+)\s*", text)
        try:
            limit = float(match[3]) if match else math.nan
        except ValueError:
            limit = math.nan
        if match is None or not math.isfinite(limit):
            raise ConfigError(f"--where: {shown(text)} is not COLUMN<=NUMBER or COLUMN>=NUMBER")
        parsed.append((match[1], "<=" if match[2] == "<=" else ">=", limit))
    return Objective(column=column.strip(), sense="max" if sense == "max" else "min", limits=tuple(parsed))


def run_here(points: Sequence[Point]) -> Iterator[tuple[int, Row | Exception]]:
    """Run every point in this process, one after the other."""
    for index, point in enumerate(points):
        try:
            yield index, run_point(point)
        except Exception as error:  # noqa: BLE001 - the boundary of a task: its crash is its row, as it is with Ray
            yield index, error


class Sweep:
    """Runs points whose rows the store does not have, and keeps them there. What an interrupt leaves is in `result`."""

    def __init__(self, store: RowStore, *, run: Runner = run_here) -> None:
        self._store = store
        self._run = run
        self.result = SweepResult()

    def grid(self, base: Point, axes: Sequence[Axis]) -> None:
        """Every point of the grid. Raises ConfigError if none of them can be loaded; then nothing has run."""
        self._evaluate(grid_points(base, axes))

    def search(self, base: Point, axes: Sequence[Axis], objective: Objective) -> None:
        """The points that a search for the best one comes by. Raises as `grid` does."""
        grid_points(base, axes)  # its checks
        known: dict[tuple[int, ...], Row] = {}
        here = tuple(len(axis.values) // 2 for axis in axes)
        num_settled = 0  # axes, one after the other, that had nothing better
        for turn in itertools.count():
            which = turn % len(axes)
            line = [(*here[:which], i, *here[which + 1 :]) for i in range(len(axes[which].values))]
            self._ask(base, axes, line, known)
            objective.check_columns(self.result.rows)
            # The present place wins a tie, so that the descent ends.
            best = min(line, key=lambda place: (objective.score(known[place]), place != here))
            num_settled = num_settled + 1 if best == here else 1
            here = best
            if num_settled >= len(axes):
                return

    def _ask(
        self, base: Point, axes: Sequence[Axis], places: Sequence[tuple[int, ...]], known: dict[tuple[int, ...], Row]
    ) -> None:
        """Evaluate the places, indices into the axes' values, that are not known yet."""
        new = [place for place in places if place not in known]
        values = [[axis.values[i] for axis, i in zip(axes, place, strict=True)] for place in new]
        first = len(self.result.rows)
        self._evaluate([point_at(base, axes, value) for value in values])
        known.update(zip(new, self.result.rows[first:], strict=True))

    def _evaluate(self, points: Sequence[Point]) -> None:
        """Append the row of every point to the result, in their order; of those that are done, if interrupted."""
        keys: list[str] = []
        errors: dict[str, str] = {}
        for point in points:
            try:
                keys.append(point_key(point))
            except ConfigError as error:
                keys.append(invalid_key(point))
                errors[keys[-1]] = str(error)
        if points and len(errors) == len(points):
            raise ConfigError(next(iter(errors.values())))
        for key, point in zip(keys, points, strict=True):
            if key in errors and key not in self._store:
                self._store.add(key, dict(point.varied) | {"status": "invalid", "error": errors[key]})
        todo = {key: point for key, point in zip(keys, points, strict=True) if key not in self._store}
        self.result.num_known += sum(key in self._store and key not in errors for key in keys)
        try:
            self._run_all(todo, num_done=len(points) - len(todo))
        finally:
            for key, point in zip(keys, points, strict=True):
                if key in self._store:
                    # Another sweep may have varied other keys on its way to the same simulation.
                    self.result.rows.append(self._store[key] | dict(point.varied))

    def _run_all(self, todo: dict[str, Point], *, num_done: int) -> None:
        keys, points = list(todo), list(todo.values())
        # On standard error, and only where a person looks at it.
        with tqdm(total=num_done + len(todo), initial=num_done, unit="point", disable=None) as bar:
            for index, row in self._run(points) if points else ():
                if isinstance(row, Exception):
                    reason = str(row) if isinstance(row, ServingError) else f"{type(row).__name__}: {row}"
                    row = dict(points[index].varied) | {"status": "crashed", "error": reason}
                self._store.add(keys[index], row)
                self.result.num_run += 1
                bar.update()


def best_row(rows: Sequence[Row], objective: Objective) -> Row | None:
    """The row with the best score, None where every point is invalid."""
    scored = [(objective.score(row), row) for row in rows]
    best = min(scored, key=operator.itemgetter(0), default=None)
    return best[1] if best and math.isfinite(best[0][0]) else None
