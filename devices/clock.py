"""Simulated time for one asyncio loop, virtual or scaled to the wall.

Owns: the current instant, when it may move, and what happens while real work is late.
Must not know: devices, requests, actors.

A whole control plane runs in one `ClockEventLoop`. While callbacks are ready the loop runs them and time
stands still, so everything that an instant causes happens at that instant. When nothing is ready the loop
asks its selector to wait, and the clock decides what to do. It has one heap of entries, ordered by
`(when_ns, seq)`:

    timer    `sleep_until`, `call_at`   fires when time reaches `when_ns`; one per quiescent point, never two
    hold     `external`                 taken at the current instant; fires when its real work has finished

Time cannot pass an entry that has not fired. A hold therefore freezes time until its work is done, and
several holds resume in the order in which they were taken, not in which their work finished. So the order of
events follows from simulated times alone, and is the same under both clocks:

    VirtualClock   the first entry fires at once
    ScaledClock    a timer fires when the wall reaches `origin + when_ns * scale`; real I/O may come first,
                   and then the instant moves to the time that the wall shows, but not past the first entry

The lag of a `ScaledClock` is the wall time between the instant at which an entry was due and the instant at
which it fired, whatever the reason: late real work, or a busy processor. It is never caught up: the origin
moves by the same amount. So between two firings the wall advances by at least `scale` times the simulated
difference, and a step never lasts less than it is charged.

Source: SimPy (heap of time and sequence number, real-time factor), trio MockClock (jump when all tasks are
blocked).
"""

import asyncio
import math
import operator
import selectors
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Protocol, TypeVar

from devices.event_loop import ClockEventLoop, run
from devices.timeline import Entry, Hold, Target, Timeline, Timer
from devices.wall import Events, MonotonicWall, Wall

__all__ = ["Clock", "ClockEventLoop", "ClockStalled", "ScaledClock", "VirtualClock", "run", "run_virtual"]

T = TypeVar("T")


class ClockStalled(RuntimeError):
    """Virtual time has nothing to advance to, and nothing real can wake the loop: the run is stuck."""


class Clock(Protocol):
    """What the control plane may do with time."""

    def now_ns(self) -> int:
        """Simulated nanoseconds since the clock was made. Stands still while anything is ready."""

    @property
    def lag_ns(self) -> int:
        """Wall nanoseconds by which events came later than they were due; 0 in virtual time."""

    async def sleep_until(self, when_ns: int) -> None:
        """Wait for an instant. A past one counts as now, and still lets everything that is ready go first."""

    async def external(self, awaitable: Awaitable[T]) -> T:
        """Wait for real work while time stands still, and return its result.

        The work must not itself wait for simulated time: that would be for ever. Cancelling cancels the work.
        """

    def call_at(self, when_ns: int, callback: Callable[..., object], *args: object) -> Timer:
        """Call `callback(*args)` in the loop at an instant; calls for equal instants keep their order."""


class EventClock:
    """The instant and the timeline. Subclasses decide how long to wait for the first entry."""

    def __init__(self) -> None:
        self._now_ns = 0
        self._timeline = Timeline()
        self._num_late_holds = 0
        self._gave_way_to_io = False
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def lag_ns(self) -> int:
        """Wall nanoseconds by which entries fired later than they were due; always 0 in virtual time."""
        return 0

    @property
    def num_late_holds(self) -> int:
        """How often time stood still because real work was not finished at its deadline."""
        return self._num_late_holds

    @property
    def num_pending(self) -> int:
        """Timers and holds that have neither fired nor been cancelled."""
        return len(self._timeline)

    def now_ns(self) -> int:
        return self._now_ns

    async def sleep_until(self, when_ns: int) -> None:
        waiter: asyncio.Future[None] = self._bound_loop().create_future()
        self._push(when_ns, waiter)
        await self._wait(waiter)

    async def external(self, awaitable: Awaitable[T]) -> T:
        waiter: asyncio.Future[None] = self._bound_loop().create_future()
        work = asyncio.ensure_future(awaitable)
        self._push(self._now_ns, Hold(work, waiter))
        try:
            await self._wait(waiter)
        except asyncio.CancelledError:
            work.cancel()  # as awaiting it directly would have done
            raise
        return work.result()

    def call_at(self, when_ns: int, callback: Callable[..., object], *args: object) -> Timer:
        timer = Timer(self._timeline, max(operator.index(when_ns), self._now_ns), callback, args)
        self._push(timer.when_ns, timer)
        return timer

    def bind(self, loop: asyncio.AbstractEventLoop) -> None:
        """Called by the loop that this clock will drive."""
        if self._loop is not None:
            raise RuntimeError("this clock already drives an event loop")
        self._loop = loop

    def unbind(self) -> None:
        """Called when the loop closes. Whatever still waits belongs to a dead loop and is forgotten."""
        self._loop = None
        self._timeline.clear()

    def when_idle(self, selector: selectors.BaseSelector, timeout_s: float | None) -> Events:
        """Nothing is ready: wait for real I/O and return it, or fire one entry and return no events."""
        raise NotImplementedError

    def _bound_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            raise RuntimeError("this clock drives no event loop: run the program with devices.clock.run")
        return self._loop

    def _push(self, when_ns: int, target: Target) -> None:
        when_ns = operator.index(when_ns)  # a numpy integer must not become the time; a float is an error
        self._timeline.push(when_ns if when_ns > self._now_ns else self._now_ns, target)

    async def _wait(self, waiter: asyncio.Future[None]) -> None:
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.cancelled():  # else it fired in the same instant, and has left the timeline
                self._timeline.note_cancelled()
            raise

    def _is_held(self, target: Target) -> bool:
        """Whether the first entry is real work that has not finished."""
        if not isinstance(target, Hold) or target.work.done():
            return False
        if not target.is_late:
            target.is_late = True
            self._num_late_holds += 1
        return True

    def _fire(self, entry: Entry) -> None:
        """Move to the instant of the first entry and make its waiter or its callback ready."""
        when_ns, _, target = entry
        assert when_ns >= self._now_ns
        assert self._loop is not None
        self._timeline.remove_first()
        self._now_ns = when_ns
        if isinstance(target, Timer):
            target.fire(self._loop)
        elif isinstance(target, Hold):
            target.waiter.set_result(None)
        else:
            target.set_result(None)


class VirtualClock(EventClock):
    """Time jumps to the next entry as soon as nothing is ready."""

    def __init__(self) -> None:
        super().__init__()
        self.detect_stall = False  # see run_virtual

    def when_idle(self, selector: selectors.BaseSelector, timeout_s: float | None) -> Events:
        entry = self._timeline.first()
        if entry is None:
            has_io = len(selector.get_map()) > 1  # the loop itself registers one pipe
            if self.detect_stall and timeout_s is None and not has_io:
                raise ClockStalled(_describe_stall(self._bound_loop(), self._now_ns))
            return selector.select(timeout_s)
        if self._is_held(entry[2]):
            return selector.select(timeout_s)
        if not self._gave_way_to_io:
            events = selector.select(0)
            if events:
                self._gave_way_to_io = True  # but not twice in a row: a flood of I/O must not stop time
                return events
        self._gave_way_to_io = False
        self._fire(entry)
        return []


class ScaledClock(EventClock):
    """Time follows the wall at `scale` wall seconds per simulated second, and waits for late real work."""

    def __init__(self, scale: float, *, wall: Wall | None = None) -> None:
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"clock scale {scale}: wall seconds per simulated second must be finite and > 0")
        super().__init__()
        self._scale = scale
        self._wall = wall if wall is not None else MonotonicWall()
        self._origin_ns = self._wall.now_ns()
        self._lag_ns = 0
        self._hold_lag_ns = 0

    @property
    def scale(self) -> float:
        """Wall seconds per simulated second."""
        return self._scale

    @property
    def lag_ns(self) -> int:
        return self._lag_ns

    @property
    def hold_lag_ns(self) -> int:
        """The part of `lag_ns` that was spent on real work which was not finished at its deadline."""
        return self._hold_lag_ns

    def bind(self, loop: asyncio.AbstractEventLoop) -> None:
        super().bind(loop)
        self._origin_ns = self._wall.now_ns() - math.ceil(self._now_ns * self._scale)

    def when_idle(self, selector: selectors.BaseSelector, timeout_s: float | None) -> Events:
        entry = self._timeline.first()
        if entry is None:
            events = self._wall.wait(selector, timeout_s)
            self._follow_wall(None)
            return events
        if self._is_held(entry[2]):
            return self._wall.wait(selector, timeout_s)
        due_ns = self._origin_ns + math.ceil(entry[0] * self._scale)
        wait_s = (due_ns - self._wall.now_ns()) * 1e-9
        if wait_s > 0:
            events = self._wall.wait(selector, wait_s if timeout_s is None else min(wait_s, timeout_s))
            if events or self._wall.now_ns() < due_ns:
                self._follow_wall(entry[0])
                return events
        elif not self._gave_way_to_io:
            events = selector.select(0)
            if events:
                self._gave_way_to_io = True  # but not twice in a row: a flood of I/O must not stop time
                self._follow_wall(entry[0])
                return events
        self._gave_way_to_io = False
        self._lose(self._wall.now_ns() - due_ns, entry[2])
        self._fire(entry)
        return []

    def _lose(self, late_ns: int, target: Target) -> None:
        """Account for an entry that fires late, and move the origin so that nothing is caught up."""
        self._origin_ns += late_ns
        self._lag_ns += late_ns
        if isinstance(target, Hold) and target.is_late:
            self._hold_lag_ns += late_ns

    def _follow_wall(self, limit_ns: int | None) -> None:
        """Move the instant to what the wall shows, never backwards and never past the first entry."""
        shown_ns = math.floor((self._wall.now_ns() - self._origin_ns) / self._scale)
        if limit_ns is not None and shown_ns > limit_ns:
            shown_ns = limit_ns
        if shown_ns > self._now_ns:
            self._now_ns = shown_ns


def _describe_stall(loop: asyncio.AbstractEventLoop, now_ns: int) -> str:
    names = sorted(task.get_name() for task in asyncio.all_tasks(loop))
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return (
        f"virtual time stalled at {now_ns} ns: no timer, no external work and no I/O is pending, "
        f"but {len(names)} task(s) still wait: {shown}"
    )


def run_virtual(main: Callable[[VirtualClock], Coroutine[Any, Any, T]]) -> T:
    """Run `main(clock)` in virtual time, and raise ClockStalled when it can never continue.

    All real work of `main` must be awaited through `clock.external` or through sockets that the loop
    watches; a thread that is awaited in another way looks like a stall.
    """
    clock = VirtualClock()

    async def watched() -> T:
        clock.detect_stall = True
        try:
            return await main(clock)
        finally:
            clock.detect_stall = False  # closing the loop waits for threads, which is no stall

    return run(watched(), clock)
