"""A client of the endpoint in a process of its own, so that it takes no time of the server's event loop.

Owns: that process, and that interrupted work still gives what was finished.
Must not know: what the work is (serving/bench.py, serving/evaluation), the server.
"""

import asyncio
import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Awaitable, Coroutine
from multiprocessing.connection import Connection
from typing import Any, Protocol, TypeVar

from tqdm import tqdm

from serving.errors import ServingError

SIGNALS = (signal.SIGINT, signal.SIGTERM)
INTERRUPT_TIMEOUT_S = 10.0

Result = TypeVar("Result")
ResultOf = TypeVar("ResultOf", covariant=True)


class Progress(tqdm):  # type: ignore[type-arg]  # a run-time class, it takes no parameter
    """A progress bar without a thread of its own, which would only redraw a bar that stands still."""

    monitor_interval = 0


class Work(Protocol[ResultOf]):
    """What the client does. When `stop` is set it gives up what is in flight and returns what was finished."""

    def __call__(self, *, stop: asyncio.Event) -> Awaitable[ResultOf]: ...


async def run_in_process(work: Work[Result]) -> Result:
    """Do `work`, which has to be picklable. Cancelled, it is stopped and what it finished is returned;
    cancelled once more, it is killed.

    Raises ServingError if it fails.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_main, args=(theirs, work), name="client", daemon=True)
    # Inherited: a terminal's Ctrl-C reaches the process too, maybe before it can deal with it.
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
    theirs.close()  # so that its end is seen here
    assert process.pid is not None
    loop = asyncio.get_running_loop()
    has_reply = asyncio.Event()
    loop.add_reader(ours.fileno(), has_reply.set)
    results: tuple[Result, ...] = ()
    error, patience_s = "it ended without a result", 0.0
    try:
        try:
            await has_reply.wait()
        except asyncio.CancelledError:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGINT)
            await asyncio.wait_for(has_reply.wait(), INTERRUPT_TIMEOUT_S)
        results, error = ours.recv()
        patience_s = INTERRUPT_TIMEOUT_S  # it is about to end
    except (EOFError, TimeoutError):
        pass
    finally:  # also after a second cancellation
        loop.remove_reader(ours.fileno())
        ours.close()
        process.join(patience_s)
        if process.is_alive():
            process.kill()
            process.join()
    if not results:
        raise ServingError(f"client of the endpoint: {error}")
    return results[0]


async def is_interrupted(work: Coroutine[Any, Any, None], stop: asyncio.Event) -> bool:
    """Run `work` to its end, or give it up when `stop` is set: True. Raises what `work` raises."""
    task = asyncio.create_task(work)
    stopper = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((task, stopper), return_when=asyncio.FIRST_COMPLETED)
        interrupted = not task.done()
    finally:
        task.cancel()
        stopper.cancel()
        await asyncio.gather(task, stopper, return_exceptions=True)
    if not task.cancelled() and (error := task.exception()) is not None:
        raise error
    return interrupted


def run_until_interrupt(work: Work[Result]) -> Result:
    """Do `work` here, in a loop of its own; the first Ctrl-C stops it, a second one raises as usual."""

    async def main() -> Result:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()

        def interrupt() -> None:
            stop.set()
            loop.remove_signal_handler(signal.SIGINT)

        loop.add_signal_handler(signal.SIGINT, interrupt)
        try:
            return await work(stop=stop)
        finally:
            loop.remove_signal_handler(signal.SIGINT)

    return asyncio.run(main())


def _main(connection: Connection, work: Work[Result]) -> None:
    tqdm.set_lock(threading.RLock())  # its own is a named semaphore, and stays in /dev/shm if this process is killed

    async def until_signal() -> Result:
        stop = asyncio.Event()
        for number in SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        try:
            return await work(stop=stop)
        finally:  # a second signal would come while the loop takes its handlers down
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    reply: tuple[tuple[Result, ...], str | None]
    try:
        reply = ((asyncio.run(until_signal()),), None)
    except ServingError as error:
        reply = ((), str(error))
    connection.send(reply)
