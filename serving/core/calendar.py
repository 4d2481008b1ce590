"""Small counts per rank and future step.

Owns: a ring of columns, one per step, that grows to the farthest step that is written.
Must not know: what is counted.
"""

import numpy as np
from numpy.typing import NDArray

from serving.core.ids import Counts

SMALLEST = 64  # columns
# Behind each row: one cache line of 64 bytes. Rows of a power of two apart would all fall into the same few sets of a
# cache, and reading a column would miss it in every rank.
PADDING = 32


class Calendar:
    """Counts of 0 to 65,535. A step's column is read, then forgotten; only steps that are still to come are written.

    Rows lie together in memory: a request writes a run of steps of one rank, and one column is read per step.
    """

    def __init__(self, num_ranks: int) -> None:
        self._counts: NDArray[np.uint16] = np.zeros((num_ranks, SMALLEST + PADDING), np.uint16)
        self._mask = SMALLEST - 1
        self._start = 0  # the first step that is not forgotten

    @property
    def is_empty(self) -> bool:
        """Whether every count is zero."""
        return not self._counts.any()

    def reach(self, step: int) -> None:
        """Make room for counts up to `step`."""
        size = self._mask + 1
        if step - self._start < size:
            return
        wider = 2 * size
        while step - self._start >= wider:
            wider *= 2
        steps = np.arange(self._start, self._start + size)
        counts = np.zeros((len(self._counts), wider + PADDING), np.uint16)
        counts[:, steps & (wider - 1)] = self._counts[:, steps & self._mask]
        self._counts, self._mask = counts, wider - 1

    def add(self, rank: int, step: int) -> None:
        """Count one."""
        self._counts[rank, step & self._mask] += 1

    def add_run(self, rank: int, step: int, counts: NDArray[np.uint8]) -> None:
        """Count `counts[i]` in step `step + i`."""
        row, first = self._counts[rank], step & self._mask
        room = self._mask + 1 - first
        if len(counts) <= room:
            row[first : first + len(counts)] += counts
        else:
            row[first : first + room] += counts[:room]
            row[: len(counts) - room] += counts[room:]

    def column(self, step: int) -> NDArray[np.uint16]:
        """Counts of one step, a view."""
        return self._counts[:, step & self._mask]

    def columns(self, step: int, num_steps: int, ranks: Counts) -> NDArray[np.int64]:
        """Counts of some ranks in a run of steps, shape (len(ranks), num_steps)."""
        first = step & self._mask
        if first + num_steps <= self._mask + 1:
            near: NDArray[np.int64] = self._counts[ranks, first : first + num_steps].astype(np.int64)
            return near
        steps = np.arange(step, step + num_steps) & self._mask
        counts: NDArray[np.int64] = self._counts[ranks[:, None], steps].astype(np.int64)
        return counts

    def clear(self, rank: int) -> None:
        """Forget all counts of a rank."""
        self._counts[rank] = 0

    def forget(self, step: int, num_steps: int) -> None:
        """The steps are over: their columns are those of later steps from now on."""
        self._start = step + num_steps
        first = step & self._mask
        if first + num_steps <= self._mask + 1:
            self._counts[:, first : first + num_steps] = 0
        else:
            self._counts[:, np.arange(step, step + num_steps) & self._mask] = 0
