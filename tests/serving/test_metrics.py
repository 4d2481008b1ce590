"""Metrics: names, labels, buckets and what each event counts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from serving.histograms import Histogram, Series, one_two_five_buckets
from serving.messages import FinishReason, Latencies, RequestTimes
from serving.metrics import FinishedRequest, Metrics, StepRecord

DECODE = {"model_name": "mini-r1", "engine": "decode-0"}


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(model_name="mini-r1", max_model_len=1024)


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def finished(reason: FinishReason = "length") -> FinishedRequest:
    wall = Latencies(queue_ms=100.0, ttft_ms=400.0, tpot_ms=50.0, e2el_ms=900.0)
    simulated = Latencies(queue_ms=10.0, ttft_ms=40.0, tpot_ms=5.0, e2el_ms=90.0)
    return FinishedRequest(
        engine="decode-0",
        finish_reason=reason,
        times=RequestTimes(simulated=simulated, wall=wall, num_cached_tokens=16),
        num_prompt_tokens=100,
        num_generation_tokens=11,
        max_tokens=11,
    )


def test_a_finished_request_by_both_clocks(metrics):
    metrics.observe_finished(finished())
    assert value(metrics, "vllm:request_success_total", finished_reason="length", **DECODE) == 1
    assert value(metrics, "vllm:request_success_total", finished_reason="stop", **DECODE) == 0
    seconds = {
        "time_to_first_token_seconds": 0.4,
        "request_time_per_output_token_seconds": 0.05,
        "e2e_request_latency_seconds": 0.9,
        "request_queue_time_seconds": 0.1,
        "request_prefill_time_seconds": 0.3,
        "request_decode_time_seconds": 0.5,
        "request_inference_time_seconds": 0.8,
    }
    for name, wall_s in seconds.items():
        assert value(metrics, f"vllm:{name}_sum", **DECODE) == pytest.approx(wall_s)
        assert value(metrics, f"supernode:simulated_{name}_sum", **DECODE) == pytest.approx(wall_s / 10)
    assert value(metrics, "vllm:request_prompt_tokens_sum", **DECODE) == 100
    assert value(metrics, "vllm:request_prefill_kv_computed_tokens_sum", **DECODE) == 84
    assert value(metrics, "vllm:request_generation_tokens_sum", **DECODE) == 11
    assert value(metrics, "vllm:request_params_max_tokens_sum", **DECODE) == 11


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_a_request_that_did_not_finish_is_counted_and_not_timed(metrics, reason):
    metrics.observe_finished(finished(reason))
    assert value(metrics, "vllm:request_success_total", finished_reason=reason, **DECODE) == 1
    assert value(metrics, "vllm:e2e_request_latency_seconds_count", **DECODE) == 0


def test_a_request_without_a_token_has_no_token_times(metrics):
    nothing = Latencies(queue_ms=None, ttft_ms=None, tpot_ms=None, e2el_ms=5.0)
    record = finished()
    metrics.observe_finished(
        FinishedRequest(
            engine="decode-0",
            finish_reason="stop",
            times=RequestTimes(simulated=nothing, wall=record.times.wall),
            num_prompt_tokens=1,
            num_generation_tokens=0,
            max_tokens=1,
        )
    )
    assert value(metrics, "supernode:simulated_time_to_first_token_seconds_count", **DECODE) == 0
    assert value(metrics, "supernode:simulated_e2e_request_latency_seconds_count", **DECODE) == 1


def test_a_step(metrics):
    engine = metrics.engine("decode-0")
    step = StepRecord(
        num_tokens=3,
        num_generation_tokens=3,
        simulated_s=0.05,
        wall_s=0.07,
        npu_busy_s=0.2,
        num_preemptions=1,
        simulated_itl_s=np.array([0.05, 0.05]),
        wall_itl_s=np.array([0.07, 0.08]),
        num_drafts=3,
        num_draft_tokens=3,
        num_accepted_tokens=2,
    )
    engine.observe_step(step)
    engine.observe_step(StepRecord(num_tokens=1, num_generation_tokens=1, simulated_s=0.05, wall_s=0.07))
    assert value(metrics, "vllm:generation_tokens_total", **DECODE) == 4
    assert value(metrics, "vllm:iteration_tokens_total_count", **DECODE) == 2
    assert value(metrics, "vllm:inter_token_latency_seconds_sum", **DECODE) == pytest.approx(0.15)
    assert value(metrics, "vllm:inter_token_latency_seconds_bucket", le="0.075", **DECODE) == 1
    assert value(metrics, "supernode:simulated_inter_token_latency_seconds_bucket", le="0.05", **DECODE) == 2
    assert value(metrics, "supernode:step_seconds_sum", clock="simulated", **DECODE) == pytest.approx(0.1)
    assert value(metrics, "supernode:step_seconds_count", clock="wall", **DECODE) == 2
    assert value(metrics, "supernode:npu_busy_seconds_total", **DECODE) == pytest.approx(0.2)
    assert value(metrics, "vllm:num_preemptions_total", **DECODE) == 1
    counts = {
        name: value(metrics, f"vllm:spec_decode_num_{name}_total", **DECODE)
        for name in ("drafts", "draft_tokens", "accepted_tokens")
    }
    assert counts == {"drafts": 3, "draft_tokens": 3, "accepted_tokens": 2}
    assert value(metrics, "vllm:spec_decode_num_accepted_tokens_per_pos_total", position="0", **DECODE) == 2


def test_a_prefill_by_source(metrics):
    metrics.engine("decode-0").observe_prefill(num_prompt_tokens=100, num_local_hits=32, num_pool_hits=16)
    by_source = {
        source: value(metrics, "vllm:prompt_tokens_by_source_total", source=source, **DECODE)
        for source in ("local_compute", "local_cache_hit", "external_kv_transfer")
    }
    assert by_source == {"local_compute": 52, "local_cache_hit": 32, "external_kv_transfer": 16}
    assert value(metrics, "vllm:prompt_tokens_total", **DECODE) == 100
    assert value(metrics, "vllm:prefix_cache_queries_total", **DECODE) == 100
    assert value(metrics, "vllm:prefix_cache_hits_total", **DECODE) == 32
    assert value(metrics, "vllm:external_prefix_cache_queries_total", **DECODE) == 68
    assert value(metrics, "vllm:external_prefix_cache_hits_total", **DECODE) == 16


def test_gauges_transfers_and_the_rest(metrics):
    engine = metrics.engine("decode-0")
    engine.set_gauges(num_running=3, num_waiting=2, kv_cache_usage=0.25)
    engine.observe_transfer(num_bytes=4096, wall_s=0.01, simulated_s=0.0004)
    metrics.add_plane_bytes("rdma", 4096)
    metrics.observe_rejected("queue_full")
    metrics.observe_num_choices(2)
    metrics.set_cache_config({"block_size": "16", "num_blocks": "256"})
    metrics.before_render(lambda: metrics.set_clock(simulated_s=12.5, lag_s=0.5))
    text = metrics.render()
    assert value(metrics, "vllm:num_requests_running", **DECODE) == 3
    assert value(metrics, "vllm:num_requests_waiting", **DECODE) == 2
    assert value(metrics, "vllm:kv_cache_usage_perc", **DECODE) == 0.25
    assert value(metrics, "vllm:nixl_bytes_transferred_sum", **DECODE) == 4096
    assert value(metrics, "vllm:nixl_xfer_time_seconds_count", **DECODE) == 1
    assert value(metrics, "supernode:simulated_xfer_time_seconds_bucket", le="0.0005", **DECODE) == 1
    assert value(metrics, "supernode:plane_bytes_total", plane="rdma") == 4096
    assert value(metrics, "supernode:requests_rejected_total", reason="queue_full") == 1
    assert value(metrics, "supernode:simulated_time_seconds") == 12.5
    assert value(metrics, "supernode:clock_lag_seconds") == 0.5
    config = {"model_name": "mini-r1", "block_size": "16", "num_blocks": "256"}
    assert value(metrics, "vllm:cache_config_info", **config) == 1
    assert b'vllm:request_params_n_bucket{engine="frontend",le="2.0",model_name="mini-r1"} 1.0' in text


def test_the_exposition_parses(metrics):
    metrics.observe_finished(finished())
    families = {family.name: family for family in text_string_to_metric_families(metrics.render().decode())}
    assert families["vllm:time_to_first_token_seconds"].type == "histogram"
    edges = [
        sample.labels["le"]
        for sample in families["vllm:inter_token_latency_seconds"].samples
        if sample.name.endswith("_bucket")
    ]
    assert edges[:3] == ["0.01", "0.025", "0.05"]
    assert edges[-1] == "+Inf"


def test_two_systems_live_in_one_process():
    for _ in range(2):
        Metrics(model_name="mini-r1", max_model_len=16).observe_finished(finished())


def test_a_name_is_taken_once():
    registry = CollectorRegistry()
    options = {"label_names": (), "edges": (1.0,), "registry": registry}
    Histogram("x", "X.", **options)
    with pytest.raises(ValueError, match="Duplicated"):
        Histogram("x", "X.", **options)


def test_buckets_of_token_counts():
    assert one_two_five_buckets(100) == (1, 2, 5, 10, 20, 50, 100)


@given(st.lists(st.floats(0, 10) | st.sampled_from([0.5, 1.0, 2.0]), max_size=20))
def test_many_at_once_count_as_one_by_one(values: list[float]):
    edges = (0.5, 1.0, 2.0)
    one_by_one, at_once = Series(edges), Series(edges)
    for single in values:
        one_by_one.observe(single)
    at_once.observe_many(np.array(values))
    counts, total = at_once.samples()
    assert counts == one_by_one.samples()[0]
    assert total == pytest.approx(one_by_one.samples()[1])
    assert [count for _, count in counts] == [
        *(sum(single <= edge for single in values) for edge in edges),
        len(values),
    ]
