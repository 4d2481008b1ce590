"""Runs of a workload in virtual time: arrivals, closed loops, traces, and records that agree with the events."""

import itertools
import json
import math

import pytest

from serving.errors import ConfigError, EngineFailure
from serving.run_info import run_info
from serving.simulator import run_in_virtual_time
from serving.workloads.load import load_workload
from serving.workloads.requests import WorkloadRequest
from serving.workloads.traces import TraceError
from serving.workloads.workload import Workload


def workload_of(*requests, **changes):
    """Requests (prompt tokens, max tokens, arrival)."""
    return Workload(
        name="given",
        requests=tuple(
            WorkloadRequest(
                request_id=f"r{i}",
                num_prompt_tokens=num_prompt,
                max_tokens=max_tokens,
                arrival_ns=arrival_ns,
                prompt_token_ids=tuple(range(16, 16 + num_prompt)),
            )
            for i, (num_prompt, max_tokens, arrival_ns) in enumerate(requests)
        ),
        **changes,
    )


def events_of(result, request_id, *kinds):
    return [event for event in result.log.events if event.subject == request_id and event.kind in kinds]


def test_records_agree_with_the_events(make_config):
    config = make_config("laptop", "workload={num_requests: 20, input_len: 40, output_len: 9, prefix_len: 16}")
    workload = load_workload(config)
    result = run_in_virtual_time(config, workload, keep_events=True)
    records = result.bench.records
    assert [record.request_id for record in records] == [item.request_id for item in workload.requests]
    for item, record in zip(workload.requests, records, strict=True):
        (arrive,) = events_of(result, item.request_id, "arrive")
        (outcome,) = events_of(result, item.request_id, "outcome")
        prefill_done = events_of(result, item.request_id, "done")[0]
        timing = record.simulated
        assert arrive.now_ns == timing.start_ns == item.arrival_ns
        assert timing.ttft_ns == pytest.approx(prefill_done.now_ns - arrive.now_ns)
        assert timing.e2el_ns == pytest.approx(outcome.now_ns - arrive.now_ns)
        assert sum(timing.itl_ns) == pytest.approx(timing.e2el_ns - timing.ttft_ns)
        assert (record.outcome, record.reason) == ("finished", "length")
        assert (record.num_prompt_tokens, record.num_output_tokens) == (item.num_prompt_tokens, item.max_tokens)
        assert len(timing.itl_ns) == item.max_tokens - 1
    assert sum(record.num_cached_tokens for record in records) > 0
    assert not any(result.bench.held_at_rest.values())
    assert result.simulated_s == max(event.now_ns for event in result.log.events) / 1e9
    figures = result.bench.cluster
    assert figures["digest"] == result.digest
    assert figures["pool blocks loaded"] == sum(
        dict(event.details)["blocks"] for event in result.log.events if event.kind == "pool_load"
    )
    assert figures["rdma bytes"] == sum(
        dict(event.details)["bytes"] for event in result.log.events if event.kind == "kv_transfer"
    )
    assert 0 < figures["decode-0 busy share"] <= 1


@pytest.mark.parametrize(
    ("arrivals_ns", "rate"), [((0, 10**9, 4 * 10**9), 0.75), ((0, 0, 0), math.inf), ((None, None, None), math.inf)]
)
def test_the_rate_of_a_result_is_that_of_the_arrivals(make_config, arrivals_ns, rate):
    """Whatever rate the configuration has for a workload of its own."""
    workload = workload_of(*((10, 5, arrival_ns) for arrival_ns in arrivals_ns))
    assert run_info(make_config("laptop", "workload.request_rate=9"), workload).request_rate == rate


def test_without_keeping_events_the_digest_is_the_same(make_config):
    config = make_config("laptop", "workload={num_requests: 5, input_len: 20, output_len: 4, prefix_len: 8}")
    workload = load_workload(config)
    kept, plain = run_in_virtual_time(config, workload, keep_events=True), run_in_virtual_time(config, workload)
    assert plain.digest == kept.digest
    assert plain.log.events == []


def test_a_closed_loop_sends_a_request_when_another_ends(make_config):
    config = make_config("laptop", "workload.max_concurrency=3", "workload.input_len=70", "workload.num_requests=12")
    result = run_in_virtual_time(config, load_workload(config), keep_events=True)
    num_running = 0
    most = 0
    ends = []
    for event in result.log.events:
        if event.kind == "arrive":
            num_running += 1
            most = max(most, num_running)
            assert event.now_ns in (0, *ends)
        elif event.kind == "outcome":
            num_running -= 1
            ends.append(event.now_ns)
    assert (most, len(ends)) == (3, 12)


def test_all_at_once_means_one_instant(make_config):
    config = make_config("colocated", "workload.request_rate=inf", "workload.num_requests=9")
    result = run_in_virtual_time(config, load_workload(config), keep_events=True)
    assert {event.now_ns for event in result.log.events if event.kind == "arrive"} == {0}
    assert all(record.outcome == "finished" for record in result.bench.records)


def test_a_request_that_is_refused_has_a_record_too(make_config):
    config = make_config(
        "disaggregated", "instances.decode.npus=1", "instances.decode.max_num_seqs=1", "scheduler.max_queued_requests=1"
    )
    workload = workload_of((10, 5, 0), (10, 5, 0), (10, 5, 0), (120, 9, 10**10), (10, 5, 2 * 10**10))
    result = run_in_virtual_time(config, workload)
    assert [(record.outcome, record.reason) for record in result.bench.records] == [
        ("finished", "length"),
        ("finished", "length"),
        ("rejected", "queue_full"),
        ("rejected", "prompt_too_long"),
        ("finished", "length"),
    ]
    assert result.bench.records[2].error == "1 requests wait already, scheduler.max_queued_requests is 1"
    assert result.bench.records[3].error == "129 tokens exceed max_model_len 128"


def test_a_trace_keeps_its_shared_prefixes(make_config, tmp_path):
    """Mooncake's format: blocks of 512 tokens, here divided by 64."""
    trace = tmp_path / "trace.jsonl"
    rows = [
        {"timestamp": 0, "input_length": 2048, "output_length": 256, "hash_ids": [1, 2, 3, 4]},
        {"timestamp": 4000, "input_length": 2500, "output_length": 64, "hash_ids": [1, 2, 3, 4, 5]},
        {"timestamp": 8000, "input_length": 1024, "output_length": 10**6, "hash_ids": [7, 8]},
    ]
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = make_config("disaggregated")
    workload = load_workload(config, trace=trace, trace_divisor=64)
    assert [(item.num_prompt_tokens, item.max_tokens) for item in workload.requests] == [(32, 4), (40, 1), (16, 64)]
    result = run_in_virtual_time(config, workload, keep_events=True)
    assert [record.num_cached_tokens for record in result.bench.records] == [0, 32, 0]
    arrivals = [event.now_ns for event in result.log.events if event.kind == "arrive"]
    assert all(later - earlier >= 1e9 for earlier, later in itertools.pairwise(arrivals))
    assert all(record.outcome == "finished" for record in result.bench.records)


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("trace.txt", "", TraceError),
        ("trace.jsonl", "{", TraceError),
        ("trace.jsonl", '{"timestamp": 0, "input_length": 0, "output_length": 1, "hash_ids": []}', TraceError),
    ],
)
def test_a_trace_that_is_none_is_refused(make_config, tmp_path, name, text, error):
    (tmp_path / name).write_text(text)
    with pytest.raises(error, match=name):
        load_workload(make_config("disaggregated"), trace=tmp_path / name)
    with pytest.raises(ConfigError, match="length_divisor"):
        load_workload(make_config("disaggregated"), trace=tmp_path / "trace.jsonl", trace_divisor=7)


class Door:
    """A transport that is opened and closed once."""

    def __init__(self, make_transport):
        self.calls = []
        self._make_transport = make_transport

    def open(self):
        self.calls.append("open")
        return self._make_transport()

    async def close(self):
        self.calls.append("close")


def test_a_run_over_devices_ends_by_closing_them_even_if_they_are_lost(make_config, fake_devices):
    config = make_config("disaggregated")
    workload = workload_of((10, 5, 0), (12, 5, 0), (10, 5, 10**9))
    devices = fake_devices(config, faults={"step": [EngineFailure("npu 1 is lost")]})
    door = Door(lambda: devices)
    result = run_in_virtual_time(config, workload, open_transport=door.open, close_transport=door.close)
    assert door.calls == ["open", "close"]
    assert [record.outcome for record in result.bench.records] == ["failed"] * 3
    assert {record.error for record in result.bench.records} == {"instance prefill-0: npu 1 is lost"}
    assert not any(result.bench.held_at_rest.values())


def test_devices_that_cannot_be_opened_are_no_result(make_config):
    def refuse():
        raise EngineFailure("nobody listens")

    with pytest.raises(EngineFailure, match="nobody listens"):
        run_in_virtual_time(make_config("disaggregated"), workload_of((10, 5, 0)), open_transport=refuse)


def test_a_prefill_instance_is_free_for_the_next_prompt_once_the_last_is_handed_over(make_config):
    """It has blocks for one of the prompts: they decode together nevertheless."""
    config = make_config("laptop", "instances.prefill.num_blocks=16")
    result = run_in_virtual_time(config, workload_of(*[(200, 50, 0)] * 3), keep_events=True)
    ends = [events_of(result, f"r{i}", "outcome")[0].now_ns for i in range(3)]
    prefilled = [events_of(result, f"r{i}", "done")[0].now_ns for i in range(3)]
    transfers = [events_of(result, f"r{i}", "kv_transfer")[0].now_ns for i in range(3)]
    assert transfers[0] < prefilled[1] <= transfers[1] < prefilled[2] <= transfers[2] < min(ends)
