"""Predicted against observed: the comparison from literal figures, and a live run without tensors or Ray."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from serving.core.event_log import Event
from serving.errors import ConfigError, ServingError
from serving.records import RequestRecord, Timing
from serving.report import BenchResult, RunInfo, needed_percentiles
from serving.simulation import observe
from serving.simulation.verify import (
    Reasons,
    Row,
    Verification,
    compare,
    figures_of,
    num_other_lengths,
    num_other_outcomes,
    num_same_events,
    num_same_instant,
    shifts_s,
    with_all_instances,
)
from serving.simulation.verify_report import format_verification, to_json
from serving.summary import summarize
from serving.workloads.load import load_workload

ROOT = Path(__file__).parents[3]
REASONS = Reasons(
    scale=4.0,
    wall_s=30.0,
    lag_s=0.6,
    hold_lag_s=0.4,
    lag_ttft_s=0.004,
    lag_e2el_s=0.04,
    http_ttft_s=0.003,
    http_e2el_s=0.005,
    workload_span_s=6.6,
    arrival_span_s=6.0,
    mean_shift_s=-0.3,
    most_early_s=-0.6,
    most_late_s=0.0,
    num_requests=48,
    num_same_instant=1,
    num_other_lengths=0,
    predicted_acceptance=None,
    observed_acceptance=None,
    num_events=851,
    num_same_events=850,
)


def record(request_id, *, ttft_ms, gaps_ms, cached=0, outcome="finished"):
    timing = Timing(
        ttft_ns=ttft_ms * 1e6,
        e2el_ns=(ttft_ms + sum(gaps_ms)) * 1e6,
        itl_ns=[gap * 1e6 for gap in gaps_ms],
    )
    return RequestRecord(
        request_id=request_id,
        outcome=outcome,
        reason="length",
        num_prompt_tokens=10,
        num_output_tokens=1 + len(gaps_ms),
        num_cached_tokens=cached,
        simulated=timing,
    )


def bench_of(*records):
    summary = summarize(records, duration_s=99.0, percentiles=needed_percentiles((99.0,)))
    info = RunInfo(date="", backend="simulated", model_id="m", num_prompts=len(records))
    return BenchResult(info=info, summary=summary, records=records)


def event(now_s, kind, subject, **details):
    return Event(round(now_s * 1e9), kind, subject, tuple(sorted(details.items())))


EVENTS = [
    event(1.0, "arrive", "a"),
    event(1.0, "step", "prefill-0", rows=2, tokens=20),
    event(1.5, "arrive", "b"),
    event(1.5, "step", "decode-0", rows=1, tokens=1),
    event(2.0, "preempt", "a", instance="decode-0"),
    event(2.0, "step", "decode-0", rows=4, tokens=4),
    event(3.0, "outcome", "a"),
    event(5.0, "outcome", "b"),
]


def test_the_figures_of_a_run_are_those_of_its_records_and_its_log():
    bench = bench_of(record("a", ttft_ms=40, gaps_ms=(20, 20), cached=5), record("b", ttft_ms=60, gaps_ms=(10, 20)))
    assert figures_of(bench, EVENTS) == pytest.approx(
        {
            "TTFT mean (ms)": 50.0,
            "TTFT P50 (ms)": 50.0,
            "TTFT P99 (ms)": 59.8,
            "TPOT mean (ms)": 17.5,
            "TPOT P50 (ms)": 17.5,
            "TPOT P99 (ms)": 19.95,
            "ITL mean (ms)": 17.5,
            "ITL P50 (ms)": 20.0,
            "ITL P99 (ms)": 20.0,
            "E2EL mean (ms)": 85.0,
            "E2EL P50 (ms)": 85.0,
            "E2EL P99 (ms)": 89.9,
            "requests (1/s)": 0.5,  # from the first arrival, at 1 s, to the last outcome, at 5 s
            "output tokens (1/s)": 1.5,
            "cache hits (% of prompt)": 25.0,
            "preemptions": 1.0,
            "prefill-0 steps": 1.0,
            "prefill-0 mean batch": 2.0,
            "decode-0 steps": 2.0,
            "decode-0 mean batch": 2.5,
        }
    )


def test_a_run_in_which_nothing_ended_has_figures_too():
    figures = figures_of(bench_of(), [])
    assert set(figures.values()) == {0.0}
    assert len(figures) == 16


def test_an_instance_that_idles_on_one_side_has_zero_there():
    one, other = with_all_instances({"decode-0 steps": 3.0}, {"decode-0 steps": 2.0, "decode-1 steps": 1.0})
    assert one == {"decode-0 steps": 3.0, "decode-1 steps": 0.0}
    assert list(one) == list(other)


def test_a_difference_is_what_the_arrivals_make_and_the_rest():
    (row,) = compare({"TTFT": 50.0}, {"TTFT": 60.0}, {"TTFT": 58.0})
    assert (row.difference, row.by_arrivals, row.rest, row.percent) == (10.0, 8.0, 2.0, 20.0)
    assert row.is_within(20)
    assert not row.is_within(19.99)


@pytest.mark.parametrize(("observed", "percent", "within"), [(0.0, 0.0, True), (3.0, None, False)])
def test_what_was_predicted_as_nothing_is_within_only_if_nothing_came(observed, percent, within):
    row = Row(name="preemptions", predicted=0.0, observed=observed, same_arrivals=0.0)
    assert (row.percent, row.is_within(1e9)) == (percent, within)


def row_of(percent):
    return Row(name=f"row {percent}", predicted=100.0, observed=100.0 + percent, same_arrivals=100.0)


@pytest.mark.parametrize(
    ("tolerance", "failures", "within", "code"),
    [
        (None, (), 2, 0),  # report only; the share is for 5 %
        (3.0, (), 1, 1),
        (4.0, (), 2, 1),
        (8.0, (), 3, 0),
        (None, ("1 blocks still held",), 2, 1),
        (8.0, ("1 blocks still held",), 3, 1),
    ],
)
def test_the_verdict_is_the_share_within_and_the_exit_code(tolerance, failures, within, code):
    rows = (row_of(1.0), row_of(-4.0), row_of(8.0))
    result = Verification(rows=rows, reasons=REASONS, tolerance=tolerance, failures=failures)
    assert (result.num_within, result.exit_code) == (within, code)
    text = format_verification(result)
    assert f"{within} of 3 figures are within {result.limit_percent:g} % of the prediction" in text
    assert ("NOT within the tolerance" in text) == (tolerance is not None and within < 3)
    assert all(f"FAILED: {failure}" in text for failure in failures)
    assert json.loads(json.dumps(to_json(result)))["exit_code"] == code


def test_the_table_has_every_figure_and_every_reason_with_its_size():
    rows = (Row(name="TTFT mean (ms)", predicted=50.0, observed=60.0, same_arrivals=59.9999999),)
    text = format_verification(Verification(rows=rows, reasons=REASONS))
    assert f"{'TTFT mean (ms)':<28}{50:>12.3f}{60:>12.3f}{'+10.000':>12}{'+20.00':>9}{'+10.000':>14}{'0':>13}" in text
    for words in (
        "0.600 s of 30.00 s wall (2.00 %) in which simulated time stood still: 0.400 s",
        "for real compute that was late, 0.200 s",
        "6.000 s simulated from first to last, 6.600 s in the workload (+10.00 % rate)",
        "-300.00 ms on average, -600.00 ms to +0.00 ms",
        "1 of 48 came at the very instant of another or of a step's end",
        "3.00 ms of TTFT and 5.00 ms of E2EL",
        "0 of 48 other than predicted",
        "850 of 851 events",
        "supernode replay gives the predicted figures exactly",
    ):
        assert words in text
    assert "drafts" not in text
    assert "LAG" not in text
    late = dataclasses.replace(REASONS, lag_s=20.0)
    assert "about --scale 12," in format_verification(Verification(rows=(), reasons=late))
    drafted = dataclasses.replace(REASONS, predicted_acceptance=0.7, observed_acceptance=0.25)
    assert "70.0 % accepted as assumed, 25.0 % live" in format_verification(Verification(rows=(), reasons=drafted))
    assert all(len(line) <= 120 for line in text.splitlines())


def test_shifts_count_from_the_first_request():
    assert shifts_s([0, 10**9, 2 * 10**9], [5 * 10**9, 5_500_000_000, 7_250_000_000]) == [0.0, -0.5, 0.25]


def test_arrivals_at_the_instant_of_something_else_are_counted():
    step = event(2.0, "step", "decode-0", rows=1, tokens=1, charged_ns=10**9)
    assert num_same_instant([event(2.0, "arrive", "a"), step, event(2.5, "arrive", "b")]) == 0
    assert num_same_instant([step, event(3.0, "arrive", "a"), event(4.0, "arrive", "b")]) == 1
    assert num_same_instant([event(2.0, "arrive", "a"), event(2.0, "arrive", "b"), event(2.0, "arrive", "c")]) == 2


def test_requests_are_compared_by_their_place():
    one = record("a", ttft_ms=1, gaps_ms=(1, 1)), record("b", ttft_ms=1, gaps_ms=(1,))
    other = record("a", ttft_ms=9, gaps_ms=(1,)), record("b", ttft_ms=1, gaps_ms=(9,), outcome="failed")
    assert num_other_lengths(one, other) == 1
    assert num_other_outcomes(one, other) == 1
    assert num_same_events(EVENTS, [*EVENTS[::-1], event(1.0, "arrive", "c")]) == len(EVENTS)
    assert num_same_events(EVENTS, [e._replace(now_ns=e.now_ns + 1) for e in EVENTS[:3]]) == 0


def test_requests_as_they_arrived_have_the_servers_names_order_and_instants(make_config):
    workload = load_workload(make_config("laptop", "workload.num_requests=3"))
    seen = observe.as_arrived(workload, [("cmpl-synthetic-1-0-7", 5), ("cmpl-synthetic-0-0-8", 5), ("synthetic-2", 9)])
    assert [(r.request_id, r.arrival_ns) for r in seen.requests] == [
        ("cmpl-synthetic-1-0-7", 5),
        ("cmpl-synthetic-0-0-8", 5),
        ("synthetic-2", 9),
    ]
    assert (seen.prompt_token_ids(seen.requests[0]) == workload.prompt_token_ids(workload.requests[1])).all()
    with pytest.raises(ServingError, match="cmpl-stranger-0-1 is not of workload"):
        observe.as_arrived(workload, [("cmpl-stranger-0-1", 5)])


def test_a_clock_without_a_scale_cannot_be_verified(make_config):
    config = make_config("laptop", "clock.scale=0")
    with pytest.raises(ConfigError, match="needs a scale above 0"):
        observe.observe(config, load_workload(config), shards="timing", address=None)


def verify_in_a_process(*arguments):
    """Run `supernode verify` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "serving.cli", "verify", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"},
    )


@pytest.mark.parametrize("preset", ["laptop", "colocated"])
def test_given_its_arrivals_a_live_run_is_what_the_simulation_says(tmp_path, preset):
    """Over HTTP, on a clock that a busy machine makes late, without tensors."""
    for _ in range(6):  # an arrival at the very instant of another event, where chance decides, is rare
        values = verified(preset, tmp_path / "result.json")
        if values["reasons"]["num_same_events"] == values["reasons"]["num_events"]:
            break
    else:
        pytest.fail(f"six runs took other decisions than the simulation: {values}")
    assert all(figure["rest"] == pytest.approx(0, abs=1e-5) for figure in values["figures"])


def verified(preset, path):
    """The JSON of a live run, as far as it does not depend on the machine as it should be."""
    workload = "workload={num_requests: 10, input_len: 40, output_len: 9, prefix_len: 16, request_rate: 20}"
    ended = verify_in_a_process(
        *(preset, "--shards", "timing", "--set", workload, "--set", "model.checkpoint=random"),
        *("--scale", "1", "--tolerance", "1e9", "--json", str(path)),
    )
    assert ended.returncode == 0, ended.stderr
    assert "simulated 10 requests, " in ended.stderr
    assert "they take 1 s after the boot" in ended.stderr
    values = json.loads(path.read_text())
    reasons = values["reasons"]
    assert (values["config"], values["workload"], values["failures"]) == (preset, "synthetic", [])
    assert (reasons["num_requests"], reasons["num_other_lengths"]) == (10, 0)
    assert reasons["http_ttft_s"] > 0
    assert 0 <= reasons["hold_lag_s"] <= reasons["lag_s"] < reasons["wall_s"]
    assert {figure["name"] for figure in values["figures"]} >= {"TTFT P99 (ms)", "preemptions"}
    assert all(figure["name"] in ended.stdout for figure in values["figures"])
    return values


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("laptop", "--scale", "0"), ("--scale: 0", "above 0")),
        (("laptop", "--scale", "nan"), ("--scale: nan", "above 0")),
        (("laptop", "--scale", "inf"), ("clock.scale",)),
        (("nope",), ("nope: no such preset",)),
        (("laptop", "--trace", "nope.jsonl"), ("nope.jsonl: no such file",)),
        (("laptop", "--tolerance", "-1"), ("--tolerance", "greater than or equal to 0")),
    ],
)
def test_a_mistake_is_told_before_anything_runs(supernode, arguments, words):
    code, text, err = supernode("verify", *arguments)
    assert (code, text) == (2, "")
    assert all(word in err for word in words)
