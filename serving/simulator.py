"""Runs of a workload in virtual time: with timing shards in this process, or with torch shards behind a transport.

Owns: the result of such a run.
Must not know: HTTP, Ray (a transport is given).
"""

import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from devices.clock import VirtualClock, run_virtual
from serving.build import build_cluster
from serving.cluster import Cluster
from serving.config import RunConfig
from serving.core.event_log import EventLog
from serving.core.ids import RequestId
from serving.expert_load import ExpertLoad
from serving.frontend import Frontend
from serving.report import BenchResult, RunInfo, needed_percentiles
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


def simulate(config: RunConfig, workload: Workload, *, keep_events: bool = False) -> SimulationResult:
    """Run `workload` with timing shards: no tensors, one process."""
    return run_in_virtual_time(config, workload, keep_events=keep_events)


def run_in_virtual_time(
    config: RunConfig,
    workload: Workload,
    *,
    open_transport: Callable[[], Transport] | None = None,
    close_transport: Callable[[], Awaitable[None]] | None = None,
    keep_events: bool = False,
) -> SimulationResult:
    """Run `workload` on a virtual clock; `open_transport` is called in the event loop and gives torch shards.

    Raises AssertionError if anything is held in the end.
    """

    async def main(clock: VirtualClock) -> SimulationResult:
        started = time.perf_counter()
        log = EventLog(keep=keep_events)
        transport = open_transport() if open_transport is not None else None
        try:
            cluster = build_cluster(config, clock=clock, log=log, transport=transport)
            frontend = Frontend(cluster, tokenizer=None, on_outcome=lambda request, times, instance_id: None)
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
            finally:
                simulated_s = clock.now_ns() / 1e9
                await frontend.abort_all()
                await cluster.stop()
            cluster.check_invariants()
            held = cluster.held() | {"lives": frontend.num_lives, "queued": frontend.num_waiting}
        finally:
            if close_transport is not None:
                await close_transport()
        wall_s = time.perf_counter() - started
        return SimulationResult(
            bench=_bench_result(
                config, workload, run, cluster, simulated_s=simulated_s, wall_s=wall_s, held=held, log=log
            ),
            digest=log.digest(),
            token_ids=run.token_ids,
            log=log,
            wall_s=wall_s,
            simulated_s=simulated_s,
        )

    return run_virtual(main)


def _bench_result(
    config: RunConfig,
    workload: Workload,
    run: WorkloadRun,
    cluster: Cluster,
    *,
    simulated_s: float,
    wall_s: float,
    held: dict[str, int],
    log: EventLog,
) -> BenchResult:
    section = config.workload
    rate = math.inf if section.request_rate == "inf" else section.request_rate
    return BenchResult(
        info=RunInfo(
            date=datetime.now().strftime("%Y%m%d-%H%M%S"),
            backend="simulated",
            model_id=config.model.served_model_name,
            num_prompts=len(workload),
            request_rate=rate,
            burstiness=section.burstiness,
            max_concurrency=section.max_concurrency,
            workload=workload.name,
            workload_digest=workload.digest,
        ),
        summary=summarize(run.records, duration_s=simulated_s, percentiles=needed_percentiles((99.0,))),
        records=tuple(run.records),
        spec_decode=SpecDecodeStats.of_single_drafts(
            sum(engine.num_drafts for engine in cluster.all_engines),
            sum(engine.num_accepted for engine in cluster.all_engines),
        ),
        held_at_rest=held,
        expert_load=measured_expert_load(cluster),
        cluster=cluster_figures(cluster) | {"simulated_s": simulated_s, "wall_s": wall_s, "digest": log.digest()},
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
