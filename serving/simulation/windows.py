"""Equal windows of time, and what a run's columns come to in each of them.

Owns: the choice of a window's width, and sums, means, levels and percentiles by window, all exact and without a loop
over requests or steps.
Must not know: what the values mean, plots.

A window is [edge, next edge). Times are nanoseconds, as in serving/simulation/columns.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """`count` windows of `width_ns` from 0 on; the last one, cut at no end, holds `end_ns`."""

    width_ns: int
    count: int
    end_ns: int

    @classmethod
    def over(cls, end_ns: int, *, most: int) -> "Windows":
        """At most `most` windows that cover [0, end_ns], their width 1, 2 or 5 times a power of ten."""
        if most < 1:
            raise ValueError(f"windows: most {most} is below the limit 1")
        least_ns = end_ns // most + 1  # so that end_ns itself lies in the last window
        width_ns = next(
            factor * 10**power for power in range(20) for factor in (1, 2, 5) if factor * 10**power >= least_ns
        )
        return cls(width_ns=width_ns, count=end_ns // width_ns + 1, end_ns=end_ns)

    @property
    def edges_ns(self) -> Floats:
        """Shape (count + 1,)."""
        return np.linspace(0.0, float(self.count * self.width_ns), self.count + 1)

    @property
    def width_s(self) -> float:
        return self.width_ns / 1e9

    @property
    def middles_s(self) -> Floats:
        """Shape (count,), seconds."""
        return np.arange(0.5, self.count, dtype=np.float64) * self.width_s

    def totals(self, times_ns: ArrayLike, values: ArrayLike | None = None) -> Floats:
        """Sum of `values`, or number, of the instants in each window."""
        places = np.clip(np.asarray(times_ns, dtype=np.int64) // self.width_ns, 0, self.count - 1)
        weights = None if values is None else np.asarray(values, dtype=np.float64)
        return np.bincount(places, weights, self.count).astype(np.float64)

    def shares(self, starts_ns: ArrayLike, lengths_ns: ArrayLike) -> Floats:
        """Share of each window that is covered by intervals which follow each other without overlap."""
        starts = np.asarray(starts_ns, dtype=np.float64)
        return self._integral(starts, starts + np.asarray(lengths_ns), np.ones(len(starts))) / self.width_ns

    def means(self, starts_ns: ArrayLike, lengths_ns: ArrayLike, values: ArrayLike) -> Floats:
        """Mean of `values` over the covered part of each window, by time; NaN where nothing is covered."""
        starts = np.asarray(starts_ns, dtype=np.float64)
        ends = starts + np.asarray(lengths_ns)
        covered = self._integral(starts, ends, np.ones(len(starts)))
        sums = self._integral(starts, ends, np.asarray(values, dtype=np.float64))
        # Far less than the shortest step: what the interpolation leaves of nothing.
        return np.where(covered > 1.0, sums / np.maximum(covered, 1.0), np.nan)

    def levels(self, starts_ns: ArrayLike, ends_ns: ArrayLike) -> Floats:
        """Mean number of intervals [start, end) that are open, by window; they may overlap."""
        opened = self._time_since(np.asarray(starts_ns, dtype=np.float64))
        closed = self._time_since(np.asarray(ends_ns, dtype=np.float64))
        return np.maximum(np.diff(opened - closed), 0.0) / self.width_ns

    def held(self, times_ns: ArrayLike, values: ArrayLike) -> Floats:
        """Mean of a value that holds until the next one, by window; it is 0 before the first."""
        times = np.asarray(times_ns, dtype=np.float64)
        last = self.edges_ns[-1]
        lengths = np.diff(np.append(times, max(last, times[-1] if times.size else 0.0)))
        return self._integral(times, times + lengths, np.asarray(values, dtype=np.float64)) / self.width_ns

    def percentiles(self, times_ns: ArrayLike, values: ArrayLike, wanted: Sequence[float]) -> Floats:
        """Of the values whose instant is in a window, interpolated; shape (len(wanted), count), NaN if none."""
        places = np.clip(np.asarray(times_ns, dtype=np.int64) // self.width_ns, 0, self.count - 1)
        order = np.lexsort((np.asarray(values), places))
        ordered = np.asarray(values, dtype=np.float64)[order]
        sizes = np.bincount(places, minlength=self.count)
        first = np.cumsum(sizes) - sizes
        result = np.full((len(wanted), self.count), np.nan)
        has = sizes > 0
        for row, p in enumerate(wanted):
            rank = p / 100 * (sizes[has] - 1)
            below = np.floor(rank).astype(np.int64)
            low, high = ordered[first[has] + below], ordered[first[has] + np.minimum(below + 1, sizes[has] - 1)]
            result[row, has] = low + (high - low) * (rank - below)
        return result

    def _integral(self, starts: Floats, ends: Floats, values: Floats) -> Floats:
        """Of a step function that is `values` in [starts, ends) and else 0, over each window."""
        if not len(starts):
            return np.zeros(self.count)
        upto = np.cumsum(values * (ends - starts))
        times = np.column_stack([starts, ends]).ravel()
        sums = np.column_stack([np.concatenate([[0.0], upto[:-1]]), upto]).ravel()
        integral: Floats = np.diff(np.interp(self.edges_ns, times, sums))
        return integral

    def _time_since(self, instants: Floats) -> Floats:
        """At each edge, the times that have passed since each of the instants before it, added up."""
        ordered = np.sort(instants)
        sums = np.concatenate([[0.0], np.cumsum(ordered)])
        before = np.searchsorted(ordered, self.edges_ns, side="left")
        passed: Floats = before * self.edges_ns - sums[before]
        return passed
