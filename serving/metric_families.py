"""Names, labels and buckets of every metric.

Owns: what /metrics offers. `vllm:` names mean what they mean in vLLM and count wall seconds; the same latencies in
simulated seconds are under `supernode:simulated_`.
Must not know: which event feeds which metric (serving/metrics.py).
Source: vLLM's `v1/metrics/loggers.py` and `docs/design/metrics.md`.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge

from serving import histograms as edges
from serving.histograms import Histogram

LABELS = ("model_name", "engine")


class LatencyFamilies:
    """A request's latencies by one clock, in seconds. Intervals are vLLM's:

    arrival --queue--> scheduled --prefill--> first token --decode--> last token; inference is prefill + decode.
    """

    def __init__(self, prefix: str, clock: str, registry: CollectorRegistry) -> None:
        def family(name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
            documentation = f"{what}, in seconds of the {clock} clock."
            return Histogram(prefix + name, documentation, label_names=LABELS, edges=buckets, registry=registry)

        request = edges.REQUEST_TIME_BUCKETS
        self.ttft = family("time_to_first_token_seconds", "Time to first token", edges.TTFT_BUCKETS)
        self.itl = family("inter_token_latency_seconds", "Time between tokens", edges.TOKEN_TIME_BUCKETS)
        self.tpot = family(
            "request_time_per_output_token_seconds",
            "Mean time per output token after the first",
            edges.TOKEN_TIME_BUCKETS,
        )
        self.e2e = family("e2e_request_latency_seconds", "Arrival to last token", request)
        self.queue = family("request_queue_time_seconds", "Arrival to first scheduled", request)
        self.prefill = family("request_prefill_time_seconds", "Scheduled to first token", request)
        self.decode = family("request_decode_time_seconds", "First to last token", request)
        self.inference = family("request_inference_time_seconds", "Scheduled to last token", request)


class MetricFamilies:
    """Every metric, without label values. The registry is private: two systems can live in one process."""

    def __init__(self, *, max_model_len: int) -> None:
        self.registry = registry = CollectorRegistry()

        def gauge(name: str, documentation: str, labels: tuple[str, ...] = LABELS) -> Gauge:
            return Gauge(name, documentation, labels, registry=registry)

        def counter(name: str, documentation: str, labels: tuple[str, ...] = LABELS) -> Counter:
            return Counter(name, documentation, labels, registry=registry)

        def histogram(
            name: str, documentation: str, buckets: tuple[float, ...], labels: tuple[str, ...] = LABELS
        ) -> Histogram:
            return Histogram(name, documentation, label_names=labels, edges=buckets, registry=registry)

        self.num_running = gauge("vllm:num_requests_running", "Requests in the running batch.")
        self.num_waiting = gauge("vllm:num_requests_waiting", "Requests that wait to be scheduled.")
        self.kv_cache_usage = gauge("vllm:kv_cache_usage_perc", "Share of the blocks in use; 1 is all of them.")
        self.clock_lag = gauge(
            "supernode:clock_lag_seconds",
            "Simulated time added because real compute was slower than its charged time.",
            (),
        )
        self.held = gauge("supernode:held", "What requests hold now, of each kind; all 0 at rest.", ("resource",))
        self.simulated_time = gauge("supernode:simulated_time_seconds", "The simulated clock.", ())

        self.prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens prefilled or found in a cache.")
        self.prompt_tokens_by_source = counter(
            "vllm:prompt_tokens_by_source", "Prompt tokens by where their cache came from.", (*LABELS, "source")
        )
        self.prompt_tokens_cached = counter("vllm:prompt_tokens_cached", "Prompt tokens not computed.")
        self.generation_tokens = counter("vllm:generation_tokens", "Output tokens.")
        self.preemptions = counter("vllm:num_preemptions", "Requests preempted, to be recomputed.")
        self.request_success = counter(
            "vllm:request_success", "Ended requests by reason.", (*LABELS, "finished_reason")
        )
        self.prefix_queries = counter("vllm:prefix_cache_queries", "Tokens looked up in the NPU's blocks.")
        self.prefix_hits = counter("vllm:prefix_cache_hits", "Tokens found in the NPU's blocks.")
        self.pool_queries = counter("vllm:external_prefix_cache_queries", "Tokens looked up in the pool.")
        self.pool_hits = counter("vllm:external_prefix_cache_hits", "Tokens found in the pool.")
        self.drafts = counter("vllm:spec_decode_num_drafts", "Speculative drafts.")
        self.draft_tokens = counter("vllm:spec_decode_num_draft_tokens", "Tokens drafted.")
        self.accepted_tokens = counter("vllm:spec_decode_num_accepted_tokens", "Drafted tokens accepted.")
        self.accepted_tokens_per_pos = counter(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Drafted tokens accepted, by position in the draft.",
            (*LABELS, "position"),
        )
        self.npu_busy = counter("supernode:npu_busy_seconds", "Simulated seconds that NPUs were at work.")
        self.plane_bytes = counter("supernode:plane_bytes", "Bytes sent over a plane.", ("plane",))
        self.expert_tokens = counter(
            "supernode:expert_tokens", "Tokens that chose a routed expert.", (*LABELS, "layer", "expert")
        )
        self.rejected = counter("supernode:requests_rejected", "Requests not admitted.", ("reason",))

        tokens = edges.one_two_five_buckets(max_model_len)
        self.prompt_len = histogram("vllm:request_prompt_tokens", "Prompt tokens of a request.", tokens)
        self.output_len = histogram("vllm:request_generation_tokens", "Output tokens of a request.", tokens)
        self.computed_len = histogram(
            "vllm:request_prefill_kv_computed_tokens", "Prompt tokens of a request that were computed.", tokens
        )
        self.max_tokens = histogram("vllm:request_params_max_tokens", "max_tokens of a request.", tokens)
        self.num_choices = histogram("vllm:request_params_n", "n of a request.", edges.NUM_CHOICES_BUCKETS)
        self.iteration_tokens = histogram(
            "vllm:iteration_tokens_total", "Tokens of one step.", edges.ITERATION_TOKENS_BUCKETS
        )
        self.wall = LatencyFamilies("vllm:", "wall", registry)
        self.simulated = LatencyFamilies("supernode:simulated_", "simulated", registry)
        self.step_time = histogram(
            "supernode:step_seconds", "One step, by each clock.", edges.STEP_TIME_BUCKETS, (*LABELS, "clock")
        )
        self.transfer_bytes = histogram(
            "vllm:nixl_bytes_transferred", "Bytes of one latent-KV hand-over.", edges.TRANSFER_BYTES_BUCKETS
        )
        self.transfer_time = histogram(
            "vllm:nixl_xfer_time_seconds", "One hand-over, by the wall clock.", edges.TRANSFER_TIME_BUCKETS
        )
        self.simulated_transfer_time = histogram(
            "supernode:simulated_xfer_time_seconds", "One hand-over, simulated.", edges.STEP_TIME_BUCKETS
        )
