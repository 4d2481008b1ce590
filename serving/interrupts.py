"""What Ctrl-C, SIGTERM and SIGHUP do to a launch, from its first step to its last.

Owns: the handlers of the three signals, for the main thread, and what they mean at each stage.
Must not know: what is interrupted.

    remember     the first stage and the last: a signal is noted, so that neither the making nor the removing of things
                 is cut in two
    raise        while something slow starts: KeyboardInterrupt, once
    call         while serving: a callback, at every signal

A signal handler that raises can do so anywhere, in a `finally` or in a destructor that swallows it too. So it raises
once and remembers from then on, and `check` raises between two steps if a signal was swallowed. Python would print the
traceback of what a destructor (or a callback of the import lock) swallowed; a remembered interrupt is no news.
"""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """The handlers. A context manager; outside the main thread, where no signal arrives, it does nothing."""

    def __init__(self) -> None:
        self._was_interrupted = False
        self._raises = False
        self._callback: Callable[[], object] | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._report_unraisable: Callable[[Any], object] | None = None

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                    continue  # nohup
                self._previous[number] = signal.signal(number, self._handle)
            self._report_unraisable, sys.unraisablehook = sys.unraisablehook, self._swallowed
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._report_unraisable is not None:
            sys.unraisablehook = self._report_unraisable

    @property
    def was_interrupted(self) -> bool:
        """Whether a signal has come."""
        return self._was_interrupted

    def check(self) -> None:
        """Raise KeyboardInterrupt if a signal has come."""
        if self._was_interrupted:
            self._raises = False
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def raised(self) -> Iterator[None]:
        """Inside the block a signal raises KeyboardInterrupt, and one that came before does so at its start."""
        self._raises = True
        try:
            self.check()
            yield
            self.check()
        finally:
            self._raises = False

    @contextlib.contextmanager
    def redirected(self, callback: Callable[[], object]) -> Iterator[None]:
        """Inside the block a signal calls `callback`, in the main thread; one that came before does so at its start."""
        self._callback = callback
        try:
            if self._was_interrupted:
                callback()
            yield
        finally:
            self._callback = None

    def _swallowed(self, unraisable: Any) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt) and self._was_interrupted:
            return
        assert self._report_unraisable is not None  # since this is the hook
        self._report_unraisable(unraisable)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self._was_interrupted = True
        if self._callback is not None:
            self._callback()
        elif self._raises:
            self._raises = False
            raise KeyboardInterrupt
