"""The order of everything that waits for an instant.

Owns: one heap of entries, ordered by `(when_ns, seq)`, with lazy removal of cancelled ones.
Must not know: how time advances, real I/O.
Source: the heap of SimPy's core.py; lazy removal as in asyncio's own timers.
"""

import asyncio
import contextvars
import heapq
from collections.abc import Callable
from typing import Any, Final, TypeAlias

_MIN_CANCELLED_TO_COMPACT: Final = 64


class Timer:
    """A callback that waits for an instant."""

    __slots__ = ("_args", "_callback", "_context", "_done", "_timeline", "_when_ns")

    def __init__(
        self, timeline: "Timeline", when_ns: int, callback: Callable[..., object], args: tuple[object, ...]
    ) -> None:
        self._timeline = timeline
        self._when_ns = when_ns
        self._callback: Callable[..., object] | None = callback
        self._args = args
        self._context = contextvars.copy_context()
        self._done = False

    @property
    def when_ns(self) -> int:
        return self._when_ns

    def cancel(self) -> None:
        """Forget the callback. Nothing happens if it has fired or was cancelled before."""
        if not self._done:
            self._done = True
            self._callback = None
            self._args = ()
            self._timeline.note_cancelled()

    def cancelled(self) -> bool:
        return self._callback is None

    def done(self) -> bool:
        """Whether it has fired or was cancelled."""
        return self._done

    def fire(self, loop: asyncio.AbstractEventLoop) -> None:
        assert self._callback is not None
        self._done = True
        loop.call_soon(self._callback, *self._args, context=self._context)


class Hold:
    """Real work that time waits for, and the future that lets its waiter go on."""

    __slots__ = ("is_late", "waiter", "work")

    def __init__(self, work: asyncio.Future[Any], waiter: asyncio.Future[None]) -> None:
        self.work = work
        self.waiter = waiter
        self.is_late = False

    def done(self) -> bool:
        """Whether the waiter was released or cancelled."""
        return self.waiter.done()


Target: TypeAlias = asyncio.Future[None] | Timer | Hold
Entry: TypeAlias = tuple[int, int, Target]  # when_ns, seq, what to wake


class Timeline:
    """A heap of entries. An entry is live until its target is done."""

    def __init__(self) -> None:
        self._heap: list[Entry] = []
        self._next_seq = 0
        self._num_cancelled = 0

    def __len__(self) -> int:
        """Live entries. Walks the heap: for reports and tests."""
        return sum(not entry[2].done() for entry in self._heap)

    def push(self, when_ns: int, target: Target) -> None:
        heapq.heappush(self._heap, (when_ns, self._next_seq, target))
        self._next_seq += 1

    def first(self) -> Entry | None:
        """The first live entry, left in place."""
        heap = self._heap
        while heap:
            entry = heap[0]
            if not entry[2].done():
                return entry
            heapq.heappop(heap)
            self._num_cancelled -= 1
        return None

    def remove_first(self) -> None:
        """Remove the entry that `first` returned."""
        heapq.heappop(self._heap)

    def note_cancelled(self) -> None:
        """The target of one entry was cancelled. Must be called exactly once for each."""
        self._num_cancelled += 1
        if self._num_cancelled > _MIN_CANCELLED_TO_COMPACT and self._num_cancelled * 2 > len(self._heap):
            live = [entry for entry in self._heap if not entry[2].done()]
            # May fall below 0: a future is done at once, but its task says so only when it runs.
            self._num_cancelled -= len(self._heap) - len(live)
            heapq.heapify(live)
            self._heap = live

    def clear(self) -> None:
        self._heap.clear()
        self._num_cancelled = 0

    def check_invariants(self) -> None:
        """To be called when nothing is ready: only then has every cancelled task run."""
        assert self._num_cancelled == sum(entry[2].done() for entry in self._heap)
        assert all(self._heap[(i - 1) // 2] <= entry for i, entry in enumerate(self._heap) if i)
        assert len({entry[1] for entry in self._heap}) == len(self._heap)
