"""The table letter for letter, the JSON keys one by one, and values worked out by hand."""

import dataclasses
import json
import math

import numpy as np
import pytest

from serving.records import Goodput, RequestRecord, Timing
from serving.report import BenchResult, RunInfo, format_table, reserved_keys, result_filename, to_json
from serving.summary import summarize
from serving.workloads.arrivals import RampUp

MS = 1_000_000


def timing(start_ms, ttft_ms, *gaps_ms, **changes):
    return Timing(
        start_ns=start_ms * MS,
        ttft_ns=ttft_ms * MS,
        e2el_ns=(ttft_ms + sum(gaps_ms)) * MS,
        itl_ns=[gap * MS for gap in gaps_ms],
        **changes,
    )


def finished(request_id, wall, *, num_prompt_tokens=100, **changes):
    values = {"num_output_tokens": 1 + len(wall.itl_ns)} | changes
    return RequestRecord(
        request_id=request_id,
        outcome="finished",
        reason="length",
        num_prompt_tokens=num_prompt_tokens,
        wall=wall,
        **values,
    )


def unfinished(request_id, outcome, reason, error=None):
    return RequestRecord(
        request_id=request_id,
        outcome=outcome,
        reason=reason,
        num_prompt_tokens=100,
        num_output_tokens=0,
        error=error,
    )


def three_finished():
    return [
        finished("a", timing(0, 100, 20, 30), num_cached_tokens=50, simulated=timing(0, 10, 2, 3)),
        finished("b", timing(500, 200, 40), num_cached_tokens=0, simulated=timing(5, 20, 4, queue_ns=3 * MS)),
        finished("c", timing(2000, 300), num_prompt_tokens=200, num_cached_tokens=100, simulated=timing(9, 30)),
    ]


INFO = RunInfo(
    date="20250102-030405",
    backend="openai",
    model_id="org/mini",
    num_prompts=6,
    request_rate=2.5,
    max_concurrency=8,
    workload="synthetic",
    workload_digest="abc",
    metadata={"node": "laptop"},
)


def full_result(**changes):
    records = [
        *three_finished(),
        unfinished("d", "rejected", "HTTP 429", "HTTP 429: the queue is full"),
        unfinished("e", "failed", "connection", "ServerDisconnectedError"),
        unfinished("f", "aborted", "cancelled by client"),
    ]
    goodput = Goodput(ttft_ms=250, tpot_ms=30)
    values = {
        "info": INFO,
        "summary": summarize(records, duration_s=4.0, goodput=goodput),
        "records": tuple(records),
        "percentile_metrics": ("ttft", "tpot", "itl", "e2el"),
        "metric_percentiles": (99.0,),
        "held_at_rest": {"blocks": 0, "leases": 0},
        "cluster": {"clock lag (s)": 0.25, "NPUs": 6},
    }
    return BenchResult(**(values | changes))


VLLM_ROWS = """\
============ Serving Benchmark Result ============
Successful requests:                     3
Failed requests:                         2
Maximum request concurrency:             8
Request rate configured (RPS):           2.50
Benchmark duration (s):                  4.00
Total input tokens:                      400
Total generated tokens:                  6
Request throughput (req/s):              0.75
Request goodput (req/s):                 0.25
Output token throughput (tok/s):         1.50
Peak output token throughput (tok/s):    5.00
Peak concurrent requests:                1.00
Total token throughput (tok/s):          101.50
---------------Time to First Token----------------
Mean TTFT (ms):                          200.00
Median TTFT (ms):                        200.00
P99 TTFT (ms):                           298.00
-----Time per Output Token (excl. 1st token)------
Mean TPOT (ms):                          32.50
Median TPOT (ms):                        32.50
P99 TPOT (ms):                           39.85
---------------Inter-token Latency----------------
Mean ITL (ms):                           30.00
Median ITL (ms):                         30.00
P99 ITL (ms):                            39.80
----------------End-to-end Latency----------------
Mean E2EL (ms):                          230.00
Median E2EL (ms):                        240.00
P99 E2EL (ms):                           298.80
"""
OUR_ROWS = """\
--------------Latency by Clock (ms)---------------
                           P50       P90       P99
TTFT wall               200.00    280.00    298.00
TTFT simulated           20.00     28.00     29.80
TPOT wall                32.50     38.50     39.85
TPOT simulated            3.25      3.85      3.98
ITL wall                 30.00     38.00     39.80
ITL simulated             3.00      3.80      3.98
E2EL wall               240.00    288.00    298.80
E2EL simulated           24.00     28.80     29.88
Queue simulated           3.00      3.00      3.00
---------------Requests by Outcome----------------
Finished:                                3
Rejected:                                1
Aborted:                                 1
Failed:                                  1
  rejected: HTTP 429                     1
  failed: connection                     1
  aborted: cancelled by client           1
Cache hit rate (% of prompt tokens):     37.50
Within SLO, wall time (%):               33.33
Within SLO, simulated time (%):          100.00
---------------------Cluster----------------------
clock lag (s):                           0.25
NPUs:                                    6
-------------------Held at Rest-------------------
blocks:                                  0
leases:                                  0
==================================================
"""


def stripped(table):
    """Rows without the blanks that pad a value to ten characters, and with a final newline."""
    return "".join(line.rstrip() + "\n" for line in table.split("\n"))


def test_the_table_is_that_of_vllm_with_our_sections_after_its_rows():
    assert stripped(format_table(full_result())) == VLLM_ROWS + OUR_ROWS


def test_rows_pad_label_to_forty_and_value_to_ten():
    lines = format_table(full_result()).split("\n")
    assert lines[1] == "Successful requests:                     3         "
    assert lines[5] == "Benchmark duration (s):                  4.00      "
    assert {len(line) for line in lines} == {50, 51}


def test_optional_rows_of_the_table_are_left_out():
    info = RunInfo(date="", backend="openai", model_id="m", num_prompts=1)
    summary = summarize([finished("a", timing(0, 100, 20))], duration_s=1.0)
    table = format_table(BenchResult(info=info, summary=summary))
    assert (
        stripped(table)
        == """\
============ Serving Benchmark Result ============
Successful requests:                     1
Failed requests:                         0
Benchmark duration (s):                  1.00
Total input tokens:                      100
Total generated tokens:                  2
Request throughput (req/s):              1.00
Output token throughput (tok/s):         2.00
Peak output token throughput (tok/s):    2.00
Peak concurrent requests:                1.00
Total token throughput (tok/s):          102.00
---------------Time to First Token----------------
Mean TTFT (ms):                          100.00
Median TTFT (ms):                        100.00
P99 TTFT (ms):                           100.00
-----Time per Output Token (excl. 1st token)------
Mean TPOT (ms):                          20.00
Median TPOT (ms):                        20.00
P99 TPOT (ms):                           20.00
---------------Inter-token Latency----------------
Mean ITL (ms):                           20.00
Median ITL (ms):                         20.00
P99 ITL (ms):                            20.00
--------------Latency by Clock (ms)---------------
                           P50       P90       P99
TTFT wall               100.00    100.00    100.00
TPOT wall                20.00     20.00     20.00
ITL wall                 20.00     20.00     20.00
E2EL wall               120.00    120.00    120.00
---------------Requests by Outcome----------------
Finished:                                1
Rejected:                                0
Aborted:                                 0
Failed:                                  0
==================================================
"""
    )


VLLM_KEYS = [
    "date",
    "endpoint_type",
    "backend",
    "label",
    "model_id",
    "tokenizer_id",
    "num_prompts",
    "node",
    "request_rate",
    "burstiness",
    "max_concurrency",
    "duration",
    "completed",
    "failed",
    "total_input_tokens",
    "total_output_tokens",
    "request_throughput",
    "request_goodput",
    "output_throughput",
    "total_token_throughput",
    "max_output_tokens_per_s",
    "max_concurrent_requests",
]
STATISTICS = ["mean", "median", "std", "p50", "p90", "p99"]
OUR_KEYS = [
    "workload",
    "workload_digest",
    "clock",
    "outcomes",
    "outcome_reasons",
    "not_sent",
    "interrupted",
    "num_without_usage",
    "cached_tokens",
    "cache_hit_rate",
    "slo_attainment",
    "simulated",
    "held_at_rest",
    "cluster",
    "expert_load",
]


def statistics(*metrics):
    return [f"{name}_{metric}_ms" for metric in metrics for name in STATISTICS]


def test_the_json_keys_are_those_of_vllm_and_then_ours():
    values = to_json(full_result())
    assert list(values) == VLLM_KEYS + statistics("ttft", "tpot", "itl", "e2el") + OUR_KEYS
    assert list(values["simulated"]) == statistics("ttft", "tpot", "itl", "e2el", "queue")
    assert json.loads(json.dumps(values, allow_nan=False)) == values


def test_detailed_json_adds_the_lists_of_vllm_in_seconds():
    values = to_json(full_result(), detailed=True)
    assert list(values)[-8:] == [
        "input_lens",
        "output_lens",
        "ttfts",
        "itls",
        "generated_texts",
        "errors",
        "request_ids",
        "request_outcomes",
    ]
    assert values["input_lens"] == [100, 100, 200, 100, 100, 100]
    assert values["output_lens"] == [3, 2, 1, 0, 0, 0]
    assert values["ttfts"] == pytest.approx([0.1, 0.2, 0.3, 0, 0, 0])
    assert values["itls"][0] == pytest.approx([0.02, 0.03])
    assert values["itls"][2:] == [[], [], [], []]
    assert values["errors"] == ["", "", "", "HTTP 429: the queue is full", "ServerDisconnectedError", ""]
    json.dumps(values, allow_nan=False)


def test_json_values_of_a_run_with_an_infinite_rate_and_a_ramp_up():
    ramp_up = RampUp(strategy="linear", start_rps=1.0, end_rps=3.0)
    info = dataclasses.replace(INFO, request_rate=math.inf, burstiness=math.inf, ramp_up=ramp_up)
    events = ({"rps": 1, "timestamp": "2025-01-02T03:04:05"},)
    values = to_json(full_result(info=info, rps_change_events=events))
    assert (values["request_rate"], values["burstiness"]) == ("inf", "inf")
    assert values["ramp_up_strategy"] == "linear"
    assert (values["ramp_up_start_rps"], values["ramp_up_end_rps"]) == (1.0, 3.0)
    assert values["rps_change_events"] == [{"rps": 1, "timestamp": "2025-01-02T03:04:05"}]


def test_other_percentiles_appear_in_table_and_json():
    records = three_finished()
    summary = summarize(records, duration_s=1.0, percentiles=(50.0, 90.0, 99.0, 99.9))
    result = BenchResult(info=INFO, summary=summary, metric_percentiles=(50.0, 99.9))
    assert "P50 TTFT (ms):                           200.00" in format_table(result)
    assert "P99.9 TTFT (ms):                         299.80" in format_table(result)
    assert to_json(result)["p99.9_ttft_ms"] == pytest.approx(299.8)


def test_values_in_json_are_those_of_the_table():
    values = to_json(full_result())
    assert values["mean_ttft_ms"] == 200.0
    assert values["std_ttft_ms"] == pytest.approx(np.std([100, 200, 300]))
    assert values["p99_tpot_ms"] == pytest.approx(39.85)
    assert values["outcomes"] == {"finished": 3, "rejected": 1, "aborted": 1, "failed": 1}
    assert values["cached_tokens"] == 150
    assert values["cache_hit_rate"] == 150 / 400
    assert values["slo_attainment"] == {"wall": 1 / 3, "simulated": 1.0}
    assert values["simulated"]["p50_itl_ms"] == 3.0
    assert values["held_at_rest"] == {"blocks": 0, "leases": 0}


def test_a_run_without_simulated_times_says_null():
    summary = summarize([finished("a", timing(0, 100))], duration_s=1.0)
    values = to_json(BenchResult(info=INFO, summary=summary))
    assert values["simulated"] is None
    assert values["held_at_rest"] is None
    assert values["p99_itl_ms"] == 0.0  # as vLLM, which has no null there


def test_a_simulated_metric_that_was_not_reported_is_null():
    simulated = Timing(ttft_ns=5 * MS, e2el_ns=9 * MS)
    records = [finished("a", timing(0, 100, 10), simulated=simulated)]
    values = to_json(BenchResult(info=INFO, summary=summarize(records, duration_s=1.0)))
    assert values["simulated"]["p50_ttft_ms"] == 5.0
    assert values["simulated"]["p50_tpot_ms"] == 4.0
    assert values["simulated"]["p50_itl_ms"] is None


def test_a_run_in_virtual_time_reports_it_in_the_rows_of_vllm():
    records = [
        dataclasses.replace(r, wall=None, simulated=t)
        for r, t in zip(
            three_finished(), [timing(0, 100, 20, 30), timing(500, 200, 40), timing(2000, 300)], strict=True
        )
    ]
    summary = summarize(records, duration_s=4.0)
    assert summary.clock == "simulated"
    table = stripped(format_table(BenchResult(info=INFO, summary=summary)))
    assert "Mean TTFT (ms):                          200.00\n" in table
    assert "Peak output token throughput (tok/s):    5.00\n" in table
    assert "wall" not in table
    assert to_json(BenchResult(info=INFO, summary=summary))["simulated"]["p99_itl_ms"] == pytest.approx(39.8)


def test_a_run_in_which_nothing_finished_still_reports():
    result = BenchResult(info=INFO, summary=summarize([unfinished("a", "failed", "timeout")], duration_s=0.0))
    assert "P99 TTFT (ms):                           0.00" in stripped(format_table(result))
    json.dumps(to_json(result, detailed=True), allow_nan=False)
    assert result.exit_code == 1


def test_exit_codes():
    good = BenchResult(info=INFO, summary=summarize(three_finished(), duration_s=1.0))
    aborted = summarize([unfinished("a", "aborted", "cancelled by client")], duration_s=1.0)
    assert good.exit_code == 0
    assert BenchResult(info=INFO, summary=aborted).exit_code == 0
    assert full_result().exit_code == 1
    assert dataclasses.replace(good, held_at_rest={"blocks": 1}).exit_code == 1
    assert dataclasses.replace(good, held_at_rest={"blocks": 0}).exit_code == 0
    assert dataclasses.replace(good, interrupted=True).exit_code == 130


def test_result_files_are_named_as_by_vllm():
    assert result_filename(INFO) == "openai-2.5qps-concurrency8-mini-20250102-030405.json"
    info = RunInfo(date="20250102-030405", backend="openai", label="a/b", model_id="m", num_prompts=1)
    assert result_filename(info) == "a_b-infqps-m-20250102-030405.json"
    ramp_up = RampUp(strategy="linear", start_rps=1.0, end_rps=3.5)
    ramped = dataclasses.replace(INFO, ramp_up=ramp_up, max_concurrency=None)
    assert result_filename(ramped) == "openai-ramp-up-linear-1qps-3.5qps-mini-20250102-030405.json"


def test_every_key_but_metadata_is_reserved():
    assert {*VLLM_KEYS, *OUR_KEYS, "p99_itl_ms", "ttfts"} - {"node"} <= reserved_keys()
