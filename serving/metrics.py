"""What is measured: events in, metrics out.

Owns: which event feeds which metric, and that reporting is cheap: an engine reports once per step, the frontend once
per request, nobody once per token.
Must not know: when things happen (durations are given), HTTP, the engine's state.
Source: vLLM's `docs/design/metrics.md` for what counts when. Names are in serving/metric_families.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Gauge, generate_latest

from serving.histograms import Series
from serving.messages import FinishReason, Latencies, RequestTimes
from serving.metric_families import LatencyFamilies, MetricFamilies

# The one format that every scraper reads and that keeps the colon: OpenMetrics' escaping turns `vllm:x` into `vllm_x`.
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_FINISH_REASONS: tuple[FinishReason, ...] = ("stop", "length", "abort", "error")
_FRONTEND = "frontend"  # the engine label of what belongs to no instance
_NO_VALUES: NDArray[np.float64] = np.zeros(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedRequest:
    """One request that was admitted and has ended, whatever its outcome."""

    engine: str  # the instance that ended it
    finish_reason: FinishReason
    times: RequestTimes
    num_prompt_tokens: int
    num_generation_tokens: int
    max_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One step of one instance. Times in seconds; an `itl` array has one entry per token that followed another."""

    num_tokens: int  # prompt and output tokens of the batch
    num_generation_tokens: int
    simulated_s: float  # charged
    wall_s: float  # what it took
    npu_busy_s: float = 0.0  # simulated, summed over the instance's NPUs
    num_preemptions: int = 0
    simulated_itl_s: NDArray[np.float64] = field(default_factory=lambda: _NO_VALUES)
    wall_itl_s: NDArray[np.float64] = field(default_factory=lambda: _NO_VALUES)
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0


class Metrics:
    """Every metric of one serving system."""

    def __init__(self, *, model_name: str, max_model_len: int) -> None:
        self._model_name = model_name
        self._families = MetricFamilies(max_model_len=max_model_len)
        self._engines: dict[str, EngineMetrics] = {}
        self._before_render: list[Callable[[], None]] = []

    @property
    def registry(self) -> CollectorRegistry:
        return self._families.registry

    def engine(self, name: str) -> "EngineMetrics":
        """The metrics of one instance; `name` is the `engine` label. Keep it: looking it up each step is waste."""
        if name not in self._engines:
            self._engines[name] = EngineMetrics(self._families, (self._model_name, name))
        return self._engines[name]

    def observe_finished(self, record: FinishedRequest) -> None:
        """Count an admitted request that has ended."""
        self.engine(record.engine).observe_finished(record)

    def observe_rejected(self, reason: str) -> None:
        """`reason` is a RequestRejected.reason: a fixed set, never text from a client."""
        self._families.rejected.labels(reason).inc()

    def observe_num_choices(self, num_choices: int) -> None:
        self._families.num_choices.labels(self._model_name, _FRONTEND).observe(num_choices)

    def add_plane_bytes(self, plane: str, num_bytes: int) -> None:
        self._families.plane_bytes.labels(plane).inc(num_bytes)

    def set_held(self, held: Mapping[str, int]) -> None:
        """Blocks, leases, slots ...: what requests hold now."""
        for resource, amount in held.items():
            self._families.held.labels(resource).set(amount)

    def set_clock(self, *, simulated_s: float, lag_s: float) -> None:
        self._families.simulated_time.set(simulated_s)
        self._families.clock_lag.set(lag_s)

    def set_cache_config(self, values: Mapping[str, str]) -> None:
        """`vllm:cache_config_info`: always 1, the configuration is in the labels. Once per system."""
        names = ("model_name", *values)
        info = Gauge("vllm:cache_config_info", "Cache configuration.", names, registry=self.registry)
        info.labels(self._model_name, *values.values()).set(1)

    def before_render(self, refresh: Callable[[], None]) -> None:
        """Have `refresh` bring gauges up to date whenever they are read."""
        self._before_render.append(refresh)

    def render(self) -> bytes:
        """The exposition, in the format of CONTENT_TYPE."""
        for refresh in self._before_render:
            refresh()
        return generate_latest(self.registry)


class EngineMetrics:
    """The metrics of one instance, with the label values bound once."""

    def __init__(self, families: MetricFamilies, labels: tuple[str, str]) -> None:
        self._expert_tokens = families.expert_tokens
        self._expert_load: NDArray[np.int64] | None = None
        self._labels = labels
        self._num_running = families.num_running.labels(*labels)
        self._num_waiting = families.num_waiting.labels(*labels)
        self._kv_cache_usage = families.kv_cache_usage.labels(*labels)
        self._prompt_tokens = families.prompt_tokens.labels(*labels)
        self._prompt_tokens_cached = families.prompt_tokens_cached.labels(*labels)
        by_source = families.prompt_tokens_by_source
        self._computed_tokens = by_source.labels(*labels, "local_compute")
        self._local_tokens = by_source.labels(*labels, "local_cache_hit")
        self._pool_tokens = by_source.labels(*labels, "external_kv_transfer")
        self._generation_tokens = families.generation_tokens.labels(*labels)
        self._preemptions = families.preemptions.labels(*labels)
        self._success = {reason: families.request_success.labels(*labels, reason) for reason in _FINISH_REASONS}
        self._prefix_queries = families.prefix_queries.labels(*labels)
        self._prefix_hits = families.prefix_hits.labels(*labels)
        self._pool_queries = families.pool_queries.labels(*labels)
        self._pool_hits = families.pool_hits.labels(*labels)
        self._drafts = families.drafts.labels(*labels)
        self._draft_tokens = families.draft_tokens.labels(*labels)
        self._accepted_tokens = families.accepted_tokens.labels(*labels)
        self._accepted_first_tokens = families.accepted_tokens_per_pos.labels(*labels, "0")  # a draft is one token
        self._npu_busy = families.npu_busy.labels(*labels)
        self._prompt_len = families.prompt_len.labels(*labels)
        self._output_len = families.output_len.labels(*labels)
        self._computed_len = families.computed_len.labels(*labels)
        self._max_tokens = families.max_tokens.labels(*labels)
        self._iteration_tokens = families.iteration_tokens.labels(*labels)
        self._wall = _LatencySeries(families.wall, labels)
        self._simulated = _LatencySeries(families.simulated, labels)
        self._wall_step = families.step_time.labels(*labels, "wall")
        self._simulated_step = families.step_time.labels(*labels, "simulated")
        self._transfer_bytes = families.transfer_bytes.labels(*labels)
        self._transfer_time = families.transfer_time.labels(*labels)
        self._simulated_transfer_time = families.simulated_transfer_time.labels(*labels)

    def set_gauges(self, *, num_running: int, num_waiting: int, kv_cache_usage: float) -> None:
        """`kv_cache_usage` is the share of the blocks in use, 0 to 1."""
        self._num_running.set(num_running)
        self._num_waiting.set(num_waiting)
        self._kv_cache_usage.set(kv_cache_usage)

    def set_expert_load(self, load: NDArray[np.int64], *, first_layer: int) -> None:
        """Tokens per expert so far, (num_moe_layers, n_routed_experts). Called when metrics are read, not per step."""
        new = load if self._expert_load is None else load - self._expert_load
        for row, expert in np.argwhere(new).tolist():
            self._expert_tokens.labels(*self._labels, first_layer + row, expert).inc(int(new[row, expert]))
        self._expert_load = load

    def observe_step(self, step: StepRecord) -> None:
        self._iteration_tokens.observe(step.num_tokens)
        self._wall_step.observe(step.wall_s)
        self._simulated_step.observe(step.simulated_s)
        self._wall.itl.observe_many(step.wall_itl_s)
        self._simulated.itl.observe_many(step.simulated_itl_s)
        for counter, amount in (
            (self._generation_tokens, step.num_generation_tokens),
            (self._npu_busy, step.npu_busy_s),
            (self._preemptions, step.num_preemptions),
            (self._drafts, step.num_drafts),
            (self._draft_tokens, step.num_draft_tokens),
            (self._accepted_tokens, step.num_accepted_tokens),
            (self._accepted_first_tokens, step.num_accepted_tokens),
        ):
            if amount:
                counter.inc(amount)

    def observe_prefill(self, *, num_prompt_tokens: int, num_local_hits: int, num_pool_hits: int) -> None:
        """A prompt whose prefill is done: tokens found in the NPU's blocks, then in the pool; the rest computed."""
        num_computed = num_prompt_tokens - num_local_hits - num_pool_hits
        assert num_computed >= 0, f"{num_local_hits} + {num_pool_hits} hits in {num_prompt_tokens} prompt tokens"
        self._prompt_tokens.inc(num_prompt_tokens)
        self._prompt_tokens_cached.inc(num_local_hits + num_pool_hits)
        self._computed_tokens.inc(num_computed)
        self._local_tokens.inc(num_local_hits)
        self._pool_tokens.inc(num_pool_hits)
        self._prefix_queries.inc(num_prompt_tokens)
        self._prefix_hits.inc(num_local_hits)
        self._pool_queries.inc(num_prompt_tokens - num_local_hits)
        self._pool_hits.inc(num_pool_hits)

    def observe_transfer(self, *, num_bytes: int, wall_s: float, simulated_s: float) -> None:
        """One hand-over of latent KV from prefill to decode."""
        self._transfer_bytes.observe(num_bytes)
        self._transfer_time.observe(wall_s)
        self._simulated_transfer_time.observe(simulated_s)

    def observe_finished(self, record: FinishedRequest) -> None:
        """Count an ended request. Those aborted or failed do not enter lengths and latencies, as in vLLM."""
        self._success[record.finish_reason].inc()
        if record.finish_reason not in ("stop", "length"):
            return
        self._prompt_len.observe(record.num_prompt_tokens)
        self._output_len.observe(record.num_generation_tokens)
        self._computed_len.observe(record.num_prompt_tokens - record.times.num_cached_tokens)
        self._max_tokens.observe(record.max_tokens)
        self._wall.observe(record.times.wall)
        self._simulated.observe(record.times.simulated)


class _LatencySeries:
    """LatencyFamilies with the label values bound."""

    def __init__(self, families: LatencyFamilies, labels: tuple[str, str]) -> None:
        self.itl = families.itl.labels(*labels)
        self._series: dict[str, Series] = {
            name: getattr(families, name).labels(*labels)
            for name in ("ttft", "tpot", "e2e", "queue", "prefill", "decode", "inference")
        }

    def observe(self, latencies: Latencies) -> None:
        queue, ttft, end = latencies.queue_ms, latencies.ttft_ms, latencies.e2el_ms
        intervals_ms = {"ttft": ttft, "tpot": latencies.tpot_ms, "e2e": end, "queue": queue}
        if queue is not None:
            intervals_ms["inference"] = end - queue
        if queue is not None and ttft is not None:
            intervals_ms["prefill"] = ttft - queue
        if ttft is not None:
            intervals_ms["decode"] = end - ttft
        for name, interval_ms in intervals_ms.items():
            if interval_ms is not None:
                self._series[name].observe(interval_ms / 1e3)
