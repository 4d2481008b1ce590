"""Order of events under the virtual clock, holds, stalls and asyncio's own timers."""

import asyncio
import selectors
import socket
import threading
from collections.abc import Awaitable, Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.clock import ClockEventLoop, ClockStalled, VirtualClock, run, run_virtual
from devices.wall import Events

Log = list[tuple[int, str]]


async def note_at(clock: VirtualClock, when_ns: int, name: str, log: Log) -> None:
    await clock.sleep_until(when_ns)
    log.append((clock.now_ns(), name))


def test_sleepers_wake_in_order_of_time_and_then_of_calling() -> None:
    log: Log = []

    async def main(clock: VirtualClock) -> None:
        async with asyncio.TaskGroup() as group:
            for name, when_ns in (("late", 30), ("first", 10), ("second", 10), ("middle", 20)):
                group.create_task(note_at(clock, when_ns, name, log))

    run_virtual(main)
    assert log == [(10, "first"), (10, "second"), (20, "middle"), (30, "late")]


def test_a_past_instant_counts_as_now_and_lets_ready_work_go_first() -> None:
    log: list[str] = []

    async def main(clock: VirtualClock) -> int:
        await clock.sleep_until(100)
        asyncio.get_running_loop().call_soon(log.append, "ready")
        await clock.sleep_until(5)
        log.append("past")
        return clock.now_ns()

    assert run_virtual(main) == 100
    assert log == ["ready", "past"]


def test_everything_that_an_instant_causes_happens_before_the_next_entry() -> None:
    log: Log = []

    async def chain(clock: VirtualClock, name: str) -> None:
        await clock.sleep_until(10)
        for i in range(3):
            log.append((clock.now_ns(), f"{name}{i}"))
            await asyncio.sleep(0)

    async def main(clock: VirtualClock) -> None:
        await asyncio.gather(chain(clock, "a"), chain(clock, "b"))

    run_virtual(main)
    assert log == [(10, "a0"), (10, "a1"), (10, "a2"), (10, "b0"), (10, "b1"), (10, "b2")]


def test_call_at_runs_in_order_and_can_be_cancelled() -> None:
    log: Log = []

    async def main(clock: VirtualClock) -> None:
        def note(name: str) -> None:
            log.append((clock.now_ns(), name))

        clock.call_at(20, note, "c")
        kept = clock.call_at(10, note, "a")
        dropped = clock.call_at(10, note, "never")
        clock.call_at(10, note, "b")
        dropped.cancel()
        dropped.cancel()
        assert (dropped.cancelled(), kept.cancelled(), kept.when_ns) == (True, False, 10)
        assert clock.num_pending == 3
        await clock.sleep_until(40)
        kept.cancel()  # has fired: no effect
        assert (clock.num_pending, kept.cancelled()) == (0, False)

    run_virtual(main)
    assert log == [(10, "a"), (10, "b"), (20, "c")]


def test_a_cancelled_sleeper_leaves_nothing_behind() -> None:
    async def main(clock: VirtualClock) -> tuple[int, int]:
        sleepers = [asyncio.create_task(clock.sleep_until(1000 + i)) for i in range(500)]
        await clock.sleep_until(10)
        for sleeper in sleepers[1:]:
            sleeper.cancel()
        await asyncio.wait(sleepers[1:])
        pending = clock.num_pending
        clock._timeline.check_invariants()
        await sleepers[0]
        return pending, clock.now_ns()

    assert run_virtual(main) == (1, 1000)


def test_a_sleeper_cancelled_in_the_instant_in_which_it_fired_is_counted_once() -> None:
    async def main(clock: VirtualClock) -> int:
        sleeper = asyncio.create_task(clock.sleep_until(10))
        await asyncio.sleep(0)
        clock.call_at(10, lambda: None)
        fired = next(iter(clock._timeline._heap))[2]
        assert isinstance(fired, asyncio.Future)
        fired.add_done_callback(lambda _: sleeper.cancel())
        await asyncio.wait([sleeper])
        clock._timeline.check_invariants()
        return clock.num_pending

    assert run_virtual(main) == 1


def test_times_must_be_integers_and_numpy_ones_do_not_leak() -> None:
    async def main(clock: VirtualClock) -> int:
        with pytest.raises(TypeError):
            await clock.sleep_until(1.5)  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            clock.call_at(1.5, print)  # type: ignore[arg-type]
        await clock.sleep_until(np.int64(7))  # type: ignore[arg-type]
        assert type(clock.now_ns()) is int
        return clock.num_pending

    assert run_virtual(main) == 0


def finish_in_thread(loop: asyncio.AbstractEventLoop, future: asyncio.Future[str], result: str) -> None:
    threading.Thread(target=lambda: loop.call_soon_threadsafe(future.set_result, result)).start()


async def steps(clock: VirtualClock, log: Log, start: Callable[[str], Awaitable[str]]) -> None:
    """Three engines whose deadlines coincide, each followed by a timer that must come after all of them."""

    async def engine(name: str) -> None:
        for step in range(2):
            work = start(f"{name}{step}")
            await clock.sleep_until((step + 1) * 10)
            log.append((clock.now_ns(), await clock.external(work)))
            await asyncio.sleep(0)
            log.append((clock.now_ns(), f"after {name}{step}"))

    await asyncio.gather(engine("a"), engine("b"), engine("c"), note_at(clock, 11, "timer", log))


def test_real_work_gives_the_same_log_whether_it_is_early_or_late() -> None:
    def logged(kind: str) -> tuple[Log, int]:
        log: Log = []

        async def main(clock: VirtualClock) -> int:
            loop = asyncio.get_running_loop()
            waiting: list[tuple[asyncio.Future[str], str]] = []

            def start(name: str) -> Awaitable[str]:
                future: asyncio.Future[str] = loop.create_future()
                if kind == "early":
                    future.set_result(name)
                elif kind == "late":
                    finish_in_thread(loop, future, name)
                else:  # late, and in the opposite order
                    waiting.append((future, name))
                    if len(waiting) == 3:
                        for done in reversed(waiting):
                            finish_in_thread(loop, *done)
                        waiting.clear()
                return future

            await steps(clock, log, start)
            return clock.num_late_holds

        return log, run_virtual(main)

    early, num_late_holds = logged("early")
    assert num_late_holds == 0
    assert early == [
        (10, "a0"), (10, "after a0"), (10, "b0"), (10, "after b0"), (10, "c0"), (10, "after c0"),
        (11, "timer"),
        (20, "a1"), (20, "after a1"), (20, "b1"), (20, "after b1"), (20, "c1"), (20, "after c1"),
    ]  # fmt: skip
    assert logged("late")[0] == early
    assert logged("reversed")[0] == early


def test_time_stands_still_while_real_work_is_outstanding() -> None:
    log: Log = []

    async def main(clock: VirtualClock) -> None:
        loop = asyncio.get_running_loop()
        work: asyncio.Future[str] = loop.create_future()
        background = asyncio.create_task(note_at(clock, 50, "background", log))
        await asyncio.sleep(0)
        loop.call_later(0.02, work.set_result, "done")  # asyncio's own timers go on meanwhile
        assert await clock.external(work) == "done"
        log.append((clock.now_ns(), "done"))
        await background
        assert clock.num_late_holds == 1
        assert clock.lag_ns == 0

    run_virtual(main)
    assert log == [(0, "done"), (50, "background")]


def test_external_runs_a_coroutine_and_passes_its_error_on() -> None:
    async def main(clock: VirtualClock) -> int:
        async def work() -> int:
            await asyncio.sleep(0)
            return 7

        async def broken() -> int:
            raise KeyError("broken")

        with pytest.raises(KeyError):
            await clock.external(broken())
        return await clock.external(work()) + clock.num_pending

    assert run_virtual(main) == 7


def test_cancelling_external_cancels_the_work_and_lets_time_go_on() -> None:
    async def main(clock: VirtualClock) -> int:
        work: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        held = asyncio.create_task(clock.external(work))
        await asyncio.sleep(0)
        held.cancel()
        with pytest.raises(asyncio.CancelledError):
            await held
        assert work.cancelled()
        await clock.sleep_until(10)
        return clock.now_ns()

    assert run_virtual(main) == 10


def test_work_that_was_cancelled_elsewhere_cancels_its_waiter() -> None:
    async def main(clock: VirtualClock) -> None:
        work: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await clock.external(work)

    run_virtual(main)


def test_finished_work_costs_one_iteration() -> None:
    class CountingClock(VirtualClock):
        num_idle = 0

        def when_idle(self, selector: selectors.BaseSelector, timeout_s: float | None) -> Events:
            self.num_idle += 1
            return super().when_idle(selector, timeout_s)

    clock = CountingClock()

    async def main() -> None:
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        done.set_result(1)
        for _ in range(5):
            await clock.external(done)

    run(main(), clock)
    assert clock.num_idle == 5


def test_a_thread_can_wake_the_loop() -> None:
    async def main() -> str:
        return await asyncio.to_thread(threading.current_thread().__class__.__name__.lower)

    assert run(main(), VirtualClock()) == "_mainthread"


def test_asyncio_timers_work_with_and_without_simulated_ones() -> None:
    async def main(clock: VirtualClock) -> None:
        await asyncio.sleep(0.001)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.001):
                await asyncio.get_running_loop().create_future()
        ticks = 0
        waker = asyncio.create_task(asyncio.sleep(0.005))
        while not waker.done():
            await clock.sleep_until(clock.now_ns() + 1)
            ticks += 1
        assert clock.now_ns() == ticks

    run_virtual(main)


def test_a_stall_is_an_error_that_names_the_tasks() -> None:
    async def main(clock: VirtualClock) -> None:
        await clock.sleep_until(42)
        asyncio.create_task(asyncio.Event().wait(), name="forgotten")  # noqa: RUF006
        await asyncio.get_running_loop().create_future()

    with pytest.raises(ClockStalled, match=r"at 42 ns: .* 2 task\(s\) still wait: Task-\d+, forgotten"):
        run_virtual(main)


def test_closing_waits_for_threads_without_calling_it_a_stall() -> None:
    async def main(clock: VirtualClock) -> int:
        return await clock.external(asyncio.to_thread(lambda: 3))

    assert run_virtual(main) == 3


def test_io_cannot_keep_time_from_moving() -> None:
    async def main(clock: VirtualClock) -> int:
        loop = asyncio.get_running_loop()
        reader, writer = socket.socketpair()
        with reader, writer:
            reader.setblocking(False)
            writer.send(b"never read, so always ready")
            reads = 0

            def note() -> None:
                nonlocal reads
                reads += 1

            loop.add_reader(reader, note)
            for when_ns in range(1, 11):
                await clock.sleep_until(when_ns)
            loop.remove_reader(reader)
        assert reads > 0
        return clock.now_ns()

    assert run_virtual(main) == 10


def test_a_clock_drives_one_loop_at_a_time_and_keeps_its_time() -> None:
    clock = VirtualClock()
    loop = ClockEventLoop(clock)
    with pytest.raises(RuntimeError, match="already drives"):
        ClockEventLoop(clock)
    loop.close()
    loop.close()
    run(clock.sleep_until(5), clock)
    run(clock.sleep_until(8), clock)
    assert clock.now_ns() == 8


def test_a_clock_without_a_loop_says_so() -> None:
    async def main() -> None:
        with pytest.raises(RuntimeError, match="drives no event loop"):
            await VirtualClock().sleep_until(1)

    asyncio.run(main())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=6), min_size=1, max_size=8))
def test_any_set_of_sleepers_replays_as_a_sorted_list(naps: list[list[int]]) -> None:
    log: list[tuple[int, int, int]] = []

    async def main(clock: VirtualClock) -> None:
        async def sleeper(task: int) -> None:
            for i, nap in enumerate(naps[task]):
                await clock.sleep_until(clock.now_ns() + nap)
                log.append((clock.now_ns(), task, i))

        await asyncio.gather(*(sleeper(task) for task in range(len(naps))))

    run_virtual(main)
    assert [when_ns for when_ns, _, _ in log] == sorted(when_ns for when_ns, _, _ in log)
    for task, own in enumerate(naps):
        assert [when_ns for when_ns, t, _ in log if t == task] == list(np.cumsum(own))
    first, log = log, []
    run_virtual(main)
    assert log == first
