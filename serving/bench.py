"""Load generator: sends a workload to an OpenAI-compatible endpoint and measures what comes back.

Owns: when each request is sent (arrival process, trace, closed loop), how many are in flight, which are given up,
and that every request sent ends in exactly one record, also when the run is interrupted.
Must not know: HTTP (serving/bench_client.py), chunks (serving/bench_stream.py), the system under test.
Source: `vllm bench serve`. Latency counts from sending; how late a request was sent is kept beside it (`queue`), so
that a client that cannot keep up is seen.

Runs on an ordinary event loop, in wall time: not on the loop of a server whose clock is simulated.
"""

import asyncio
import functools
import itertools
import logging
import math
import sys
import time
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

from serving.bench_client import BenchClient, RenderText
from serving.bench_config import BenchConfig
from serving.bench_stream import StreamRecorder
from serving.client_process import Progress, is_interrupted, run_until_interrupt
from serving.errors import ConfigError
from serving.records import RequestRecord
from serving.report import BenchResult, RunInfo, needed_percentiles
from serving.spec_decode import SpecDecodeStats, stats_between
from serving.summary import summarize
from serving.workloads.arrivals import generator_for
from serving.workloads.requests import Piece, WorkloadRequest
from serving.workloads.workload import Workload, to_ns

log = logging.getLogger(__name__)


async def run_bench(
    config: BenchConfig,
    workload: Workload,
    *,
    stop: asyncio.Event | None = None,
    render_text: RenderText | None = None,
) -> BenchResult:
    """Send `workload` and measure it. Raises EndpointNotReady if the endpoint does not answer.

    When `stop` is set, requests in flight are given up and what was finished until then is the result, marked as
    interrupted. `render_text` turns token ids into a prompt where text is sent; by default a word per token.
    """
    run = _Run(config, workload, render_text)
    interrupted = await is_interrupted(run.drive(), stop or asyncio.Event())
    return run.result(interrupted=interrupted)


def run_bench_until_interrupt(
    config: BenchConfig, workload: Workload, *, render_text: RenderText | None = None
) -> BenchResult:
    """`run_bench` in a loop of its own; the first Ctrl-C ends the measurement, a second one raises as usual."""

    return run_until_interrupt(functools.partial(run_bench, config, workload, render_text=render_text))


def send_times_ns(config: BenchConfig, workload: Workload) -> list[int] | None:
    """When each request is due, from the start of the run; None in a closed loop, where a free slot decides."""
    if config.replay:
        if workload.arrival_ns is None:
            raise ConfigError(f"replay: workload {workload.name} has no arrival times")
        return [round(arrival_ns * config.time_factor) for arrival_ns in workload.arrival_ns.tolist()]
    arrivals = config.arrivals
    if arrivals.kind == "inf" and config.max_concurrency is not None:
        return None
    due_ns: list[int] = to_ns(arrivals.times_s(generator_for(config.seed, "arrivals"), len(workload))).tolist()
    return due_ns


class _Run:
    """State of one run: what was sent when, and the record of each request by its place in the workload."""

    def __init__(self, config: BenchConfig, workload: Workload, render_text: RenderText | None) -> None:
        self._config = config
        self._workload = workload
        self._client = BenchClient(config, workload, render_text=render_text)
        self._due_ns = send_times_ns(config, workload)
        self._free = asyncio.Semaphore(config.max_concurrency or max(len(workload), 1))
        num_cancelled = round(config.cancel_share * len(workload))
        chosen = generator_for(config.seed, "cancellation").permutation(len(workload))[:num_cancelled]
        self._cancelled = frozenset(chosen.tolist())
        self._records: dict[int, RequestRecord] = {}
        self._spec_decode: SpecDecodeStats | None = None
        self._started = datetime.now()
        self._start_ns = self._end_ns = time.perf_counter_ns()

    async def drive(self) -> None:
        """Everything from readiness to the last answer."""
        async with self._client as client:
            await client.wait_until_ready()
            await self._warm_up()
            counters = await client.spec_decode_counters()
            disable = self._config.disable_tqdm
            with Progress(total=len(self._workload), disable=disable, file=sys.stderr, unit="req") as progress:
                self._started, self._start_ns = datetime.now(), time.perf_counter_ns()
                try:
                    await self._dispatch(progress)
                finally:
                    self._end_ns = time.perf_counter_ns()
            self._spec_decode = stats_between(counters, await client.spec_decode_counters())

    async def _dispatch(self, progress: Progress) -> None:
        async with asyncio.TaskGroup() as group:
            for index, request in enumerate(self._workload.requests):
                body = self._client.encode(request)  # ahead of its time, so that sending is prompt
                recorder = self._client.recorder(request)
                wait_ns = 0
                if self._due_ns is not None:
                    recorder.scheduled_ns = self._start_ns + self._due_ns[index]
                    wait_ns = max(recorder.scheduled_ns - time.perf_counter_ns(), 0)
                await asyncio.sleep(wait_ns / 1e9)  # 0 too, so that what has been started goes on
                await self._free.acquire()
                group.create_task(self._send(index, body, recorder, progress))

    async def _send(self, index: int, body: bytes, recorder: StreamRecorder, progress: Progress) -> None:
        cancel_after_s = self._config.cancel_delay_s if index in self._cancelled else None
        try:
            self._records[index] = await self._client.send(body, recorder, cancel_after_s=cancel_after_s)
        except asyncio.CancelledError:
            self._records[index] = recorder.ended("aborted", "interrupted", None)
            raise
        finally:
            self._free.release()
            progress.update()

    async def _warm_up(self) -> None:
        """Requests of the workload's lengths whose prompts share nothing with it; they are not counted."""
        requests = self._workload.requests[: self._config.num_warmups]
        if not requests:
            return

        async def send(index: int, like: WorkloadRequest) -> RequestRecord:
            request = WorkloadRequest(
                request_id=f"warmup-{index}",
                num_prompt_tokens=like.num_prompt_tokens,
                max_tokens=like.max_tokens,
                pieces=(Piece(-1 - index, like.num_prompt_tokens),),  # streams of workloads are not negative
            )
            async with self._free:
                return await self._client.send(self._client.encode(request), self._client.recorder(request))

        cycle = itertools.islice(itertools.cycle(requests), self._config.num_warmups)
        records = await asyncio.gather(*(send(index, like) for index, like in enumerate(cycle)))
        failed = [record for record in records if record.outcome != "finished"]
        if failed:
            log.warning("%d of %d warm-up requests failed: %s", len(failed), len(records), failed[0].error)

    def result(self, *, interrupted: bool) -> BenchResult:
        config, workload = self._config, self._workload
        records = tuple(self._records[index] for index in sorted(self._records))
        return BenchResult(
            info=RunInfo(
                date=self._started.strftime("%Y%m%d-%H%M%S"),
                backend=config.backend,
                model_id=self._client.model,
                tokenizer_id=config.tokenizer,
                label=config.label,
                num_prompts=len(workload),
                request_rate=math.inf if config.replay else config.request_rate,
                burstiness=config.burstiness,
                max_concurrency=config.max_concurrency,
                ramp_up=config.ramp_up,
                workload=workload.name,
                workload_digest=workload.digest,
                metadata=config.metadata,
            ),
            summary=summarize(
                records,
                duration_s=(self._end_ns - self._start_ns) / 1e9,
                percentiles=needed_percentiles(config.metric_percentiles),
                goodput=config.goodput,
            ),
            records=records,
            spec_decode=self._spec_decode,
            percentile_metrics=config.percentile_metrics,
            metric_percentiles=config.metric_percentiles,
            rps_change_events=self._rps_change_events(len(records)),
            interrupted=interrupted,
            num_not_sent=len(workload) - len(records),
        )

    def _rps_change_events(self, num_sent: int) -> tuple[Mapping[str, Any], ...]:
        """When a ramp-up reached each whole number of requests per second."""
        if self._config.ramp_up is None or self._due_ns is None or self._config.replay:
            return ()
        events, last = [], None
        rates = self._config.ramp_up.rates_per_s(len(self._workload)).astype(int).tolist()
        for rate, due_ns in zip(rates[:num_sent], self._due_ns, strict=False):
            if rate != last:
                when = self._started + timedelta(microseconds=due_ns / 1e3)
                events.append({"rps": rate, "timestamp": when.isoformat()})
                last = rate
        return tuple(events)
