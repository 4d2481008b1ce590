"""Runs of a workload in virtual time: with timing shards in this process, or with torch shards behind a transport.

Owns: the result of such a run.
Must not know: HTTP, Ray (a transport is given).
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from devices.clock import VirtualClock, run_virtual
from serving.build import build_cluster
from serving.cluster import Cluster
from serving.config import RunConfig
from serving.core.event_log import EventLog
from serving.core.ids import RequestId
from serving.core.request import Request
from serving.engine_run import StepRecord
from serving.expert_load import ExpertLoad
from serving.frontend import Frontend
from serving.report import BenchResult, needed_percentiles
from serving.run_info import run_info
from serving.spec_decode import SpecDecodeStats
from serving.summary import summarize
from serving.transport import Transport
from serving.workload_run import WorkloadRun
from serving.workloads.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationResult:
    """What a run in virtual time gave. `digest` is that of the event log."""

    bench: BenchResult
    digest: str
    token_ids: dict[RequestId, list[int]]  # empty lists where shards make no tensors
    log: EventLog
    wall_s: float
    simulated_s: float


def run_in_virtual_time(
    config: RunConfig,
    workload: Workload,
    *,
    open_transport: Callable[[], Transport] | None = None,
    close_transport: Callable[[], Awaitable[None]] | None = None,
    keep_events: bool = False,
) -> SimulationResult:
    """Run `workload` on a virtual clock, on the asyncio plane, whatever the configuration; keeps a record per request.

    `open_transport` is called in the event loop and gives torch shards; without it shards make no tensors. Raises
    AssertionError if anything is held in the end.
    """
    started = time.perf_counter()
    log = EventLog(keep=keep_events)
    run = drive(config, workload, log=log, open_transport=open_transport, close_transport=close_transport)
    wall_s = time.perf_counter() - started
    return SimulationResult(
        bench=_bench_result(config, workload, run, wall_s=wall_s, digest=log.digest()),
        digest=log.digest(),
        token_ids=run.workload_run.token_ids,
        log=log,
        wall_s=wall_s,
        simulated_s=run.simulated_s,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class VirtualRun:
    """A run in virtual time that is over, with all that took part in it."""

    workload_run: WorkloadRun
    cluster: Cluster
    held: dict[str, int]
    simulated_s: float
    interrupted: bool  # by Ctrl-C; what was running is aborted, what had not arrived never will


def drive(
    config: RunConfig,
    workload: Workload,
    *,
    open_transport: Callable[[], Transport] | None = None,
    close_transport: Callable[[], Awaitable[None]] | None = None,
    log: EventLog,
    on_step: Callable[[StepRecord], None] = lambda record: None,
    on_outcome: Callable[[Request], None] = lambda request: None,
    watch: Callable[[Cluster], None] = lambda cluster: None,
) -> VirtualRun:
    """As `run_in_virtual_time`, with events in `log`.

    `on_step` hears of every step, `on_outcome` of every request that is over, `watch` of the cluster before it starts.
    """

    async def main(clock: VirtualClock) -> VirtualRun:
        transport = open_transport() if open_transport is not None else None
        interrupted = False
        try:
            cluster = build_cluster(config, clock=clock, log=log, transport=transport, on_step=on_step)
            watch(cluster)
            frontend = Frontend(cluster, tokenizer=None, on_outcome=lambda request, *_: on_outcome(request))
            run = WorkloadRun(
                workload,
                frontend=frontend,
                clock=clock,
                block_size=config.cache.block_size,
                closed_loop=config.workload.max_concurrency,
                reads_tokens=open_transport is not None,
            )
            cluster.start()
            try:
                await run.drive()
            except asyncio.CancelledError:  # Ctrl-C, which asyncio turns into the end of this task
                interrupted = True
            finally:
                simulated_s = clock.now_ns() / 1e9
                await frontend.abort_all()
                await cluster.stop()
            cluster.check_invariants()
            held = cluster.held() | {"lives": frontend.num_lives, "queued": frontend.num_waiting}
        finally:
            if close_transport is not None:
                await close_transport()
        return VirtualRun(
            workload_run=run, cluster=cluster, held=held, simulated_s=simulated_s, interrupted=interrupted
        )

    return run_virtual(main)


def _bench_result(config: RunConfig, workload: Workload, run: VirtualRun, *, wall_s: float, digest: str) -> BenchResult:
    records, cluster = run.workload_run.records, run.cluster
    return BenchResult(
        info=run_info(config, workload),
        summary=summarize(records, duration_s=run.simulated_s, percentiles=needed_percentiles((99.0,))),
        records=tuple(records),
        spec_decode=SpecDecodeStats.of_single_drafts(
            sum(engine.num_drafts for engine in cluster.all_engines),
            sum(engine.num_accepted for engine in cluster.all_engines),
        ),
        held_at_rest=run.held,
        expert_load=measured_expert_load(cluster),
        cluster=cluster_figures(cluster) | {"simulated_s": run.simulated_s, "wall_s": wall_s, "digest": digest},
        interrupted=run.interrupted,
        num_not_sent=len(workload) - len(run.workload_run.requests),
    )


def measured_expert_load(cluster: Cluster) -> dict[str, Any] | None:
    """How many tokens chose each expert so far, per instance, in the layout of serving/expert_load.py.

    None for timing shards, which choose none.
    """
    loads = {str(engine.instance_id): engine.expert_load for engine in cluster.all_engines}
    parts = {instance_id: load for instance_id, load in loads.items() if load is not None}
    return ExpertLoad(shape=cluster.config.shape, divided_by="instances", parts=parts).as_json() if parts else None


def cluster_figures(cluster: Cluster) -> dict[str, float | int | str]:
    """What the cluster has done so far: steps and busy share per instance, bytes per plane, pool."""
    now_ns = max(1, cluster.clock.now_ns())
    figures: dict[str, float | int | str] = {}
    for engine in cluster.all_engines:
        figures[f"{engine.instance_id} steps"] = engine.num_steps
        figures[f"{engine.instance_id} busy share"] = engine.busy_ns / now_ns
    for plane in ("ub", "rdma", "vpc"):
        figures[f"{plane} bytes"] = cluster.fabric.stats(plane).num_bytes
    if cluster.pool is not None:
        figures["pool blocks loaded"] = cluster.pool.num_loaded_blocks
        figures["pool blocks stored"] = cluster.pool.num_stored_blocks
    return figures
