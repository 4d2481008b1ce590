"""The machine's own time, as a scaled clock sees it.

Owns: reading the wall, and waiting for it or for I/O, whichever comes first.
Must not know: simulated instants.
"""

import math
import selectors
import time
from typing import Final, Protocol, TypeAlias

Events: TypeAlias = list[tuple[selectors.SelectorKey, int]]

_MAX_WAIT_S: Final = 3600.0  # selectors refuse timeouts that overflow their own unit; the loop asks again


class Wall(Protocol):
    """Where a scaled clock reads the time and waits; a test may bring its own."""

    def now_ns(self) -> int: ...

    def wait(self, selector: selectors.BaseSelector, seconds: float | None) -> Events:
        """Wait for I/O, at most `seconds`; may return early and empty-handed."""


class MonotonicWall:
    """The machine's monotonic clock."""

    def now_ns(self) -> int:
        return time.monotonic_ns()

    def wait(self, selector: selectors.BaseSelector, seconds: float | None) -> Events:
        """Wait for I/O, at most `seconds`.

        A selector rounds its timeout up to a millisecond, which every timer would pay for. So the last
        fraction is slept without watching I/O, which is then seen less than a millisecond late.
        """
        if seconds is None:
            return selector.select(None)
        whole_s = math.floor(min(seconds, _MAX_WAIT_S) * 1e3) / 1e3
        if whole_s > 0:
            return selector.select(whole_s)
        time.sleep(max(0.0, seconds))
        return selector.select(0)
