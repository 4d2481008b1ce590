"""A run that is stopped keeps what was finished and says what was not."""

import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path

import pytest

from serving.bench import run_bench
from serving.report import format_table

ROOT = Path(__file__).parents[3]


@pytest.mark.asyncio
async def test_stopping_keeps_what_was_finished_and_says_what_was_not(serve, tokens):
    async def script(exchange):
        if exchange.id in ("w-0", "w-1"):
            await exchange.answer()
        else:
            await exchange.token()
            waiting.append(exchange.id)
            if len(waiting) == 2:
                stop.set()
            await asyncio.Event().wait()

    stop, waiting = asyncio.Event(), []
    async with serve(script) as endpoint:
        result = await run_bench(endpoint.config(max_concurrency=2), tokens(9), stop=stop)
        await endpoint.idle()
    assert [(r.request_id, r.outcome, r.reason) for r in result.records] == [
        ("w-0", "finished", "length"),
        ("w-1", "finished", "length"),
        ("w-2", "aborted", "interrupted"),
        ("w-3", "aborted", "interrupted"),
    ]
    assert (result.interrupted, result.num_not_sent, result.exit_code) == (True, 5, 130)
    assert "Not sent (interrupted):                  5" in format_table(result)
    assert endpoint.num_disconnects == 2


@pytest.mark.asyncio
async def test_stopping_before_anything_was_sent_gives_an_empty_result(serve, answer, tokens):
    stop = asyncio.Event()
    stop.set()
    async with serve(answer, models=503) as endpoint:
        result = await run_bench(endpoint.config(), tokens(2), stop=stop)
    assert (result.interrupted, result.num_not_sent, result.records) == (True, 2, ())


@pytest.mark.asyncio
async def test_cancelling_the_run_ends_its_requests(serve, tokens):
    arrived = asyncio.Event()

    async def script(exchange):
        arrived.set()
        await asyncio.Event().wait()

    async with serve(script) as endpoint:
        run = asyncio.create_task(run_bench(endpoint.config(), tokens(1)))
        await arrived.wait()
        run.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await run
        assert run.cancelled()
        await endpoint.idle()
    assert endpoint.num_disconnects == 1


@pytest.mark.asyncio
async def test_control_c_prints_what_was_finished_and_exits_with_an_error(serve):
    program = """
import sys
from serving.bench import run_bench_until_interrupt
from serving.bench_config import BenchConfig
from serving.report import format_table
from serving.workloads.synthetic import synthetic_workload
workload = synthetic_workload(num_requests=3, input_len=8, output_len=2, name="w")
result = run_bench_until_interrupt(BenchConfig(base_url=sys.argv[1], max_concurrency=1), workload)
print(format_table(result))
sys.exit(result.exit_code)
"""
    waiting = asyncio.Event()

    async def script(exchange):
        if exchange.id == "w-0":
            await exchange.answer()
        else:
            waiting.set()
            await asyncio.Event().wait()

    async with serve(script) as endpoint:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-c", program, endpoint.url),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        await waiting.wait()
        process.send_signal(signal.SIGINT)
        out, err = await process.communicate()
    assert process.returncode == 130, err.decode()
    assert b"Successful requests:                     1" in out
    assert b"Not sent (interrupted):                  1" in out
    assert err == b""  # no traceback, and no progress bar where stderr is not a terminal
