"""An asyncio loop whose idle moments belong to a simulated clock.

Owns: the selector that asks the clock before the loop may block, and running a program on such a loop.
Must not know: how time advances.

asyncio asks its selector to wait only when no callback is ready. A selector of our own, which is a
documented parameter of `asyncio.SelectorEventLoop`, is therefore all that it takes to let a clock decide
what happens then.
"""

import asyncio
import selectors
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Protocol, TypeVar

from devices.wall import Events

T = TypeVar("T")


class IdleHandler(Protocol):
    """The part of a clock that the loop calls."""

    def bind(self, loop: asyncio.AbstractEventLoop) -> None:
        """Raises RuntimeError if another loop is bound."""

    def unbind(self) -> None: ...

    def when_idle(self, selector: selectors.BaseSelector, timeout_s: float | None) -> Events:
        """Nothing is ready: wait for real I/O and return it, or make something ready and return no events."""


class ClockEventLoop(asyncio.SelectorEventLoop):
    """Runs callbacks, real I/O and, when idle, the clock. `time()` and `call_later` stay on the wall."""

    def __init__(self, clock: IdleHandler) -> None:
        super().__init__(IdleSelector(selectors.DefaultSelector(), clock.when_idle))
        self._clock: IdleHandler | None = None
        try:
            clock.bind(self)
        except RuntimeError:
            self.close()
            raise
        self._clock = clock

    def close(self) -> None:
        if not self.is_closed():
            super().close()
            if self._clock is not None:
                self._clock.unbind()


def run(main: Coroutine[Any, Any, T], clock: IdleHandler) -> T:
    """`asyncio.run` on a `ClockEventLoop`: runs `main`, cancels what is left, closes the loop."""
    with asyncio.Runner(loop_factory=lambda: ClockEventLoop(clock)) as runner:
        return runner.run(main)


class IdleSelector(selectors.BaseSelector):
    """Passes real I/O through, and calls `when_idle(inner, timeout_s)` in place of a wait that may block."""

    def __init__(
        self,
        inner: selectors.BaseSelector,
        when_idle: Callable[[selectors.BaseSelector, float | None], Events],
    ) -> None:
        self._inner = inner
        self._when_idle = when_idle

    def select(self, timeout: float | None = None) -> Events:
        if timeout is not None and timeout <= 0:
            return self._inner.select(0)
        return self._when_idle(self._inner, timeout)

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._inner.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._inner.unregister(fileobj)

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._inner.modify(fileobj, events, data)

    def get_key(self, fileobj: Any) -> selectors.SelectorKey:
        return self._inner.get_key(fileobj)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._inner.get_map()

    def close(self) -> None:
        self._inner.close()
