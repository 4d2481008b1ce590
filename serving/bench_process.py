"""The load generator in a process of its own, so that it takes no time of the server's event loop.

Owns: that process, and that an interrupted measurement still gives what was finished.
Must not know: what is measured (serving/bench.py), the server.
"""

import asyncio
import contextlib
import multiprocessing
import os
import signal
import threading
from multiprocessing.connection import Connection

from tqdm import tqdm

from serving.bench import run_bench
from serving.bench_config import BenchConfig
from serving.errors import ServingError
from serving.report import BenchResult
from serving.workload import Workload

SIGNALS = (signal.SIGINT, signal.SIGTERM)
INTERRUPT_TIMEOUT_S = 10.0


async def run_bench_in_process(config: BenchConfig, workload: Workload) -> BenchResult:
    """Send `workload` and measure it. Cancelled, it gives up what is in flight and returns what was finished.

    Raises ServingError if the load generator fails.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_main, args=(theirs, config, workload), name="bench", daemon=True)
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
    try:
        try:
            await has_reply.wait()
        except asyncio.CancelledError:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGINT)
            await asyncio.wait_for(has_reply.wait(), INTERRUPT_TIMEOUT_S)
        result, error = ours.recv()
    except (EOFError, TimeoutError):
        process.kill()
        result, error = None, "it ended without a result"
    finally:
        loop.remove_reader(ours.fileno())
        ours.close()
    process.join(INTERRUPT_TIMEOUT_S)
    if not isinstance(result, BenchResult):
        raise ServingError(f"load generator: {error}")
    return result


def _main(connection: Connection, config: BenchConfig, workload: Workload) -> None:
    tqdm.set_lock(threading.RLock())  # its own is a named semaphore, and stays in /dev/shm if this process is killed

    async def measure() -> BenchResult:
        stop = asyncio.Event()
        for number in SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return await run_bench(config, workload, stop=stop)

    reply: tuple[BenchResult | None, str | None]
    try:
        reply = (asyncio.run(measure()), None)
    except ServingError as error:
        reply = (None, str(error))
    connection.send(reply)
