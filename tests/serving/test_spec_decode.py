"""Figures of speculative decoding: read from an endpoint's metrics, printed and written as vLLM does."""

from serving.metrics import Metrics, StepRecord
from serving.report import BenchResult, RunInfo, format_table, to_json
from serving.spec_decode import SpecDecodeStats, parse_counters, stats_between
from serving.summary import summarize

VLLM = """# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="m"} 10.0
vllm:spec_decode_num_drafts_total{engine="1",model_name="m"} 2.0
vllm:spec_decode_num_drafts_created{engine="0",model_name="m"} 1.7e9
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="m"} 24.0
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="m"} 15.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="0"} 9.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="1"} 6.0
vllm:generation_tokens_total{engine="0",model_name="m"} 99.0
"""


def test_counters_of_an_endpoint_are_summed_over_its_engines():
    assert parse_counters(VLLM) == {
        "drafts": 12,
        "draft_tokens": 24,
        "accepted_tokens": 15,
        "accepted_tokens_per_pos/0": 9,
        "accepted_tokens_per_pos/1": 6,
    }


def test_figures_are_those_between_two_readings():
    before = {"drafts": 2.0, "draft_tokens": 4.0, "accepted_tokens": 0.0, "accepted_tokens_per_pos/0": 0.0}
    stats = stats_between(before, parse_counters(VLLM))
    assert (stats.num_drafts, stats.num_draft_tokens, stats.num_accepted_tokens) == (10, 20, 15)
    assert stats.acceptance_rate == 75
    assert stats.acceptance_length == 2.5
    assert stats.acceptance_by_position == [0.9, 0.6]
    assert stats_between(parse_counters(VLLM), parse_counters(VLLM)) is None
    assert stats_between(parse_counters(VLLM), {}) is None
    assert stats_between({}, {}) is None


def test_our_own_metrics_are_read():
    metrics = Metrics(model_name="mini-r1", max_model_len=16)
    step = {"num_tokens": 8, "num_generation_tokens": 6, "simulated_s": 0.1, "wall_s": 0.1}
    for engine, num_accepted in (("decode-0", 1), ("decode-1", 2)):
        record = StepRecord(**step, num_drafts=4, num_draft_tokens=4, num_accepted_tokens=num_accepted)
        metrics.engine(engine).observe_step(record)
    stats = stats_between({}, parse_counters(metrics.render().decode()))
    assert stats == SpecDecodeStats.of_single_drafts(8, 3)


def result_with(stats):
    info = RunInfo(date="20260101-000000", backend="openai", model_id="mini", num_prompts=0)
    return BenchResult(info=info, summary=summarize((), duration_s=1.0), spec_decode=stats)


def test_the_section_and_the_keys_are_vllms():
    result = result_with(SpecDecodeStats.of_single_drafts(40, 28))
    table = format_table(result).splitlines()
    start = table.index("---------------Speculative Decoding---------------")
    assert [line.rstrip() for line in table[start + 1 : start + 8]] == [
        "Acceptance rate (%):                     70.00",
        "Acceptance length:                       1.70",
        "Drafts:                                  40",
        "Draft tokens:                            40",
        "Accepted tokens:                         28",
        "Per-position acceptance (%):",
        "  Position 0:                            70.00",
    ]
    assert {key: value for key, value in to_json(result).items() if key.startswith("spec_decode_")} == {
        "spec_decode_acceptance_rate": 70,
        "spec_decode_acceptance_length": 1.7,
        "spec_decode_num_drafts": 40,
        "spec_decode_draft_tokens": 40,
        "spec_decode_accepted_tokens": 28,
        "spec_decode_per_position_acceptance_rates": [0.7],
    }


def test_a_run_without_drafts_says_nothing_of_them():
    result = result_with(SpecDecodeStats.of_single_drafts(0, 0))
    assert "Speculative" not in format_table(result)
    assert not any(key.startswith("spec_decode") for key in to_json(result))
