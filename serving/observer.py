"""From what happens in a serving system to its metrics.

Owns: the translation of step records and outcomes into `Metrics` events.
Must not know: how metrics are named or exposed (serving/metrics.py), how the system works.
"""

from serving.cluster import Cluster, KvTransfer
from serving.config import RunConfig
from serving.core.request import OutcomeReason, Request, RequestState
from serving.engine_run import StepRecord
from serving.frontend import Frontend
from serving.life import FINISH_REASON
from serving.messages import RequestTimes
from serving.metrics import FinishedRequest, Metrics
from serving.metrics import StepRecord as StepMetrics

PLANES = ("ub", "rdma", "vpc")


class Observer:
    """Feeds the metrics of one system."""

    def __init__(self, metrics: Metrics, *, config: RunConfig) -> None:
        self._metrics = metrics
        self._config = config
        self._cluster: Cluster | None = None
        self._frontend: Frontend | None = None
        self._plane_bytes = dict.fromkeys(PLANES, 0)

    def watch(self, cluster: Cluster, frontend: Frontend) -> None:
        """Take gauges from here whenever metrics are read."""
        self._cluster, self._frontend = cluster, frontend
        cluster.on_kv_transfer = self._on_kv_transfer
        self._metrics.before_render(self._refresh)
        self._metrics.set_cache_config(
            {
                "block_size": str(self._config.cache.block_size),
                **{f"num_{role}_blocks": str(s.num_blocks) for role, s in self._config.instances.items()},
            }
        )

    def on_step(self, step: StepRecord) -> None:
        """Implements Engine's `on_step`."""
        seconds = step.time.ns / 1e9
        role = step.instance_id.rpartition("-")[0]
        npus = self._config.instances[role].npus  # type: ignore[index]
        self._metrics.engine(step.instance_id).observe_step(
            StepMetrics(
                num_tokens=step.num_tokens,
                num_generation_tokens=step.num_sampled,
                simulated_s=seconds,
                wall_s=step.wall_ns / 1e9,
                npu_busy_s=seconds * npus,
                num_preemptions=step.num_preemptions,
                num_drafts=step.num_drafts,
                num_draft_tokens=step.num_drafts,
                num_accepted_tokens=step.num_accepted,
                simulated_itl_s=step.simulated_itl_ns / 1e9,
                wall_itl_s=step.wall_itl_ns / 1e9,
            )
        )

    def on_outcome(self, request: Request, times: RequestTimes, instance_id: str) -> None:
        """Implements Frontend's `on_outcome`."""
        assert request.outcome is not None
        if request.state is RequestState.REJECTED:
            return  # the HTTP layer counts what it refuses
        engine = self._metrics.engine(instance_id)
        if request.first_token_ns is not None:
            engine.observe_prefill(
                num_prompt_tokens=request.num_prompt_tokens,
                num_local_hits=request.num_cached_tokens - request.num_pool_tokens,
                num_pool_hits=request.num_pool_tokens,
            )
        self._metrics.observe_finished(
            FinishedRequest(
                engine=instance_id,
                finish_reason=FINISH_REASON[OutcomeReason(request.outcome.reason)],
                times=times,
                num_prompt_tokens=request.num_prompt_tokens,
                num_generation_tokens=request.num_output_tokens,
                max_tokens=request.max_tokens,
            )
        )

    def _on_kv_transfer(self, transfer: KvTransfer) -> None:
        self._metrics.engine(transfer.instance_id).observe_transfer(
            num_bytes=transfer.num_bytes, wall_s=transfer.wall_ns / 1e9, simulated_s=transfer.simulated_ns / 1e9
        )

    def _refresh(self) -> None:
        assert self._cluster is not None
        assert self._frontend is not None
        first_layer = self._config.shape.first_k_dense_replace
        for engine in self._cluster.all_engines:
            metrics = self._metrics.engine(engine.instance_id)
            if engine.expert_load is not None:
                metrics.set_expert_load(engine.expert_load, first_layer=first_layer)
            metrics.set_gauges(
                num_running=engine.scheduler.num_running,
                num_waiting=engine.scheduler.num_waiting,
                kv_cache_usage=engine.cache_usage,
            )
        admission = self._metrics.engine("frontend")  # where requests wait for any place at all
        admission.set_gauges(num_running=0, num_waiting=self._frontend.num_waiting, kv_cache_usage=0.0)
        for plane in PLANES:
            carried = self._cluster.fabric.stats(plane).num_bytes  # type: ignore[arg-type]
            self._metrics.add_plane_bytes(plane, carried - self._plane_bytes[plane])
            self._plane_bytes[plane] = carried
        held = {"lives": self._frontend.num_lives, "queued": self._frontend.num_waiting}
        self._metrics.set_held(self._cluster.held() | held)
        clock = self._cluster.clock
        self._metrics.set_clock(simulated_s=clock.now_ns() / 1e9, lag_s=clock.lag_ns / 1e9)
