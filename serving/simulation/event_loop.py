"""Virtual time without asyncio: callbacks in the order in which devices.clock would make the same things happen.

Owns: the instant, what is due when, and the order of what is due at the same instant.
Must not know: requests, instances.
Source: the order is that of devices/clock.py, so that both drivers make the same decisions even at equal instants.

    call_soon   at this instant, after all that was asked for before: what asyncio would run in its next round
    call_at     when nothing is left to do at the instants before. Of equal instants in the order of the calls
    due again   what ends with real work (`external`) gives way, once, to everything else that is due at its instant
"""

import heapq
from collections import deque
from collections.abc import Callable
from typing import Any

Callback = Callable[..., None]


class EventLoop:
    """One heap of instants and one queue of what is to be done now."""

    def __init__(self) -> None:
        self.now_ns = 0
        self._ready: deque[tuple[Callback, Any]] = deque()
        # (instant, instant of the call, number of the call, callback, argument, whether it gives way once)
        self._due: list[tuple[int, int, int, Callback, Any, bool]] = []
        self._num_calls = 0

    def call_soon(self, callback: Callback, argument: Any) -> None:
        """Call at this instant, after everything that is ready."""
        self._ready.append((callback, argument))

    def call_at(
        self, when_ns: int, callback: Callback, argument: Any, *, gives_way: bool = True, called_ns: int = -1
    ) -> None:
        """Call at an instant. `called_ns`: when the plain plane would have asked for it, now if not given."""
        self._num_calls += 1
        called_ns = self.now_ns if called_ns < 0 else called_ns
        heapq.heappush(self._due, (when_ns, called_ns, self._num_calls, callback, argument, gives_way))

    def run(self) -> None:
        """Until nothing is left to do."""
        ready, due = self._ready, self._due
        pop, popleft = heapq.heappop, ready.popleft
        while True:
            while ready:
                callback, argument = popleft()
                callback(argument)
            if not due:
                return
            when_ns, _, _, callback, argument, gives_way = pop(due)
            self.now_ns = when_ns
            if gives_way and due and due[0][0] == when_ns:
                self.call_at(when_ns, callback, argument, gives_way=False)
            else:
                callback(argument)
