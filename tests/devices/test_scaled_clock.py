"""The scaled clock, with a wall that the tests move by hand, and lower bounds on the real one."""

import asyncio
import selectors
import socket
import threading
import time
from collections.abc import Callable

import pytest

from devices.clock import ScaledClock, run
from devices.wall import Events, MonotonicWall

MS = 1_000_000


class FakeWall:
    """Waiting moves it; real I/O that is ready arrives `io_after_ns` into a wait."""

    def __init__(self) -> None:
        self.time_ns = 5_000_000_000
        self.jitter_ns = 0
        self.io_after_ns = 0
        self.on_wait: Callable[[], object] = lambda: None

    def now_ns(self) -> int:
        return self.time_ns

    def wait(self, selector: selectors.BaseSelector, seconds: float | None) -> Events:
        self.on_wait()
        events = selector.select(10 if seconds is None else 0)
        if events:
            self.time_ns += self.io_after_ns
        elif seconds is not None:
            self.time_ns += round(seconds * 1e9) + self.jitter_ns
        return events


def test_a_timer_fires_when_the_wall_reaches_it() -> None:
    wall = FakeWall()
    clock = ScaledClock(10.0, wall=wall)
    log: list[tuple[int, int]] = []

    async def main() -> None:
        start_ns = wall.time_ns
        for when_ns in (3 * MS, 4 * MS, 4 * MS, 9 * MS):
            await clock.sleep_until(when_ns)
            log.append((clock.now_ns(), wall.time_ns - start_ns))

    run(main(), clock)
    assert log == [(3 * MS, 30 * MS), (4 * MS, 40 * MS), (4 * MS, 40 * MS), (9 * MS, 90 * MS)]
    assert clock.lag_ns == 0


def test_lateness_is_lag_and_is_never_caught_up() -> None:
    wall = FakeWall()
    clock = ScaledClock(2.0, wall=wall)
    log: list[tuple[int, int, int]] = []

    async def main() -> None:
        start_ns = wall.time_ns

        async def note(when_ns: int) -> None:
            await clock.sleep_until(when_ns)
            log.append((clock.now_ns(), wall.time_ns - start_ns, clock.lag_ns))

        await note(1 * MS)
        wall.time_ns += 7 * MS  # busy: the next entry was due after 2 of them
        await note(2 * MS)
        await note(3 * MS)
        wall.jitter_ns = 1 * MS
        await note(4 * MS)

    run(main(), clock)
    assert log == [
        (1 * MS, 2 * MS, 0),
        (2 * MS, 9 * MS, 5 * MS),
        (3 * MS, 11 * MS, 5 * MS),
        (4 * MS, 14 * MS, 6 * MS),
    ]
    assert clock.hold_lag_ns == 0


def test_a_hold_freezes_time_and_its_lag_is_counted_apart() -> None:
    wall = FakeWall()
    clock = ScaledClock(1.0, wall=wall)
    log: list[tuple[int, str]] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()

        async def background() -> None:
            await clock.sleep_until(12 * MS)
            log.append((clock.now_ns(), "background"))

        task = asyncio.create_task(background())
        await clock.sleep_until(10 * MS)
        work: asyncio.Future[str] = loop.create_future()
        wall.io_after_ns = 30 * MS  # the wake-up from the thread is the I/O
        is_held = threading.Event()
        wall.on_wait = is_held.set

        def finish() -> None:
            assert is_held.wait(timeout=10)
            loop.call_soon_threadsafe(work.set_result, "step")

        thread = threading.Thread(target=finish)
        thread.start()
        result = await clock.external(work)
        log.append((clock.now_ns(), result))
        wall.io_after_ns = 0
        await task
        thread.join()

    run(main(), clock)
    assert log == [(10 * MS, "step"), (12 * MS, "background")]
    assert clock.num_late_holds == 1
    assert (clock.hold_lag_ns, clock.lag_ns) == (30 * MS, 30 * MS)


@pytest.mark.parametrize(("io_after_ns", "seen_ns"), [(0, 0), (10 * MS, 20 * MS), (80 * MS, 100 * MS)])
def test_io_is_stamped_with_the_wall_but_not_past_the_next_timer(io_after_ns: int, seen_ns: int) -> None:
    wall = FakeWall()
    clock = ScaledClock(0.5, wall=wall)
    wall.io_after_ns = io_after_ns
    reader, writer = socket.socketpair()
    log: list[tuple[str, int]] = []

    def send_once() -> None:
        writer.send(b"x")
        wall.on_wait = lambda: None

    wall.on_wait = send_once

    async def main() -> None:
        loop = asyncio.get_running_loop()

        def note() -> None:
            reader.recv(10)
            log.append(("io", clock.now_ns()))

        loop.add_reader(reader, note)
        await clock.sleep_until(100 * MS)
        log.append(("timer", clock.now_ns()))
        loop.remove_reader(reader)

    with reader, writer:
        reader.setblocking(False)
        run(main(), clock)
    assert log == [("io", seen_ns), ("timer", 100 * MS)]


def test_following_the_wall_never_goes_back_or_past_the_limit() -> None:
    wall = FakeWall()
    clock = ScaledClock(2.0, wall=wall)
    wall.time_ns += 10 * MS
    clock._follow_wall(None)
    assert clock.now_ns() == 5 * MS
    wall.time_ns -= 4 * MS
    clock._follow_wall(None)
    assert clock.now_ns() == 5 * MS
    wall.time_ns += 44 * MS
    clock._follow_wall(6 * MS)
    assert clock.now_ns() == 6 * MS


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_a_scale_must_be_positive_and_finite(scale: float) -> None:
    with pytest.raises(ValueError, match="clock scale"):
        ScaledClock(scale)


def test_a_step_never_lasts_less_than_it_is_charged() -> None:
    clock = ScaledClock(0.5)

    async def main() -> None:
        for charged_ns in (1 * MS, 3 * MS, 300_000, 7 * MS):
            start_ns = time.monotonic_ns()
            await clock.sleep_until(clock.now_ns() + charged_ns)
            # Firing to firing; the microseconds between a firing and the reading after it come off.
            assert time.monotonic_ns() - start_ns >= charged_ns * 0.5 - 0.2 * MS

    start_ns = time.monotonic_ns()
    run(main(), clock)
    assert time.monotonic_ns() - start_ns >= clock.now_ns() * 0.5
    assert clock.now_ns() == 11_300_000


def test_real_io_is_served_while_a_timer_waits() -> None:
    clock = ScaledClock(1.0)

    async def main() -> int:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(await reader.readline())
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        far = asyncio.create_task(clock.sleep_until(3600 * 1000 * MS))
        async with server:
            port = server.sockets[0].getsockname()[1]
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"hello\n")
            assert await reader.readline() == b"hello\n"
            writer.close()
            await writer.wait_closed()
        far.cancel()
        return clock.now_ns()

    assert 0 < run(main(), clock) < 3600 * 1000 * MS


def test_asyncio_timers_come_before_a_far_simulated_one() -> None:
    clock = ScaledClock(1.0)

    async def main() -> None:
        far = asyncio.create_task(clock.sleep_until(3600 * 1000 * MS))
        await asyncio.sleep(0.002)
        far.cancel()

    run(main(), clock)
    assert 1 * MS <= clock.now_ns() < 3600 * 1000 * MS


def test_a_server_without_timers_waits_for_io() -> None:
    clock = ScaledClock(1.0)

    async def main() -> str:
        return await asyncio.to_thread(lambda: "woken")

    assert run(main(), clock) == "woken"


def test_the_real_wall_waits_at_least_what_is_asked() -> None:
    wall = MonotonicWall()
    with selectors.DefaultSelector() as selector:
        for seconds in (0.0, 0.0003, 0.002):
            start_ns = wall.now_ns()
            assert wall.wait(selector, seconds) == []
            assert wall.now_ns() - start_ns >= int(seconds * 1e3) * MS  # whole milliseconds may be all it waits
