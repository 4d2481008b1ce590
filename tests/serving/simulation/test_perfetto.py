"""The trace of a run: what a viewer demands of tracks, slices and arrows, and what the columns say."""

import gzip
import json
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving.config import RunConfig
from serving.simulation.columns import RunColumns
from serving.simulation.perfetto import MAX_LANES, write_trace

MakeRun = Callable[..., RunColumns]
Track = tuple[int, int]


@pytest.fixture
def trace(make_config: Callable[..., RunConfig], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A function: write the trace of a run and read it back, with the message under `message`."""

    def write(run: RunColumns, *, suffix: str = ".json", **more: Any) -> dict[str, Any]:
        path = tmp_path / f"run{suffix}"
        message = write_trace(make_config("disaggregated"), run, path, **more)
        data = gzip.decompress(path.read_bytes()) if suffix.endswith(".gz") else path.read_bytes()
        return json.loads(data) | {"message": message}

    return write


def slices_of(trace: dict[str, Any]) -> dict[Track, list[dict[str, Any]]]:
    slices = defaultdict(list)
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            slices[event["pid"], event["tid"]].append(event)
    return slices


def ns(event: dict[str, Any]) -> tuple[int, int]:
    """Start and end, exactly."""
    start = round(event["ts"] * 1e3)
    return start, start + round(event["dur"] * 1e3)


def check(trace: dict[str, Any]) -> None:
    """All that a viewer wants of a file."""
    events = trace["traceEvents"]
    named = {(e["pid"], e.get("tid")) for e in events if e["ph"] == "M" and e["name"].endswith("_name")}
    for event in events:
        assert event["ph"] in "XCMstf"
        assert (event["pid"], None) in named
        if event["ph"] in "Xstf":
            assert (event["pid"], event["tid"]) in named
    timed = [e["ts"] for e in events if e["ph"] != "M"]
    assert timed == sorted(timed)
    slices = slices_of(trace)
    for track in slices.values():  # in the order of the file
        open_ends: list[int] = []
        for start, end in map(ns, track):
            while open_ends and open_ends[-1] <= start:
                open_ends.pop()
            assert not open_ends or end <= open_ends[-1], "slices overlap and do not nest"
            open_ends.append(end)
    flows = defaultdict(list)
    for event in events:
        if event["ph"] in "stf":
            flows[event["id"]].append(event)
    for flow in flows.values():
        assert [e["ph"] for e in flow] == ["s", *"t" * (len(flow) - 2), "f"]
        for event in flow:
            at = round(event["ts"] * 1e3)
            around = [ns(part) for part in slices[event["pid"], event["tid"]]]
            assert any(start <= at < end for start, end in around), "an arrow ends at no slice"


def names(trace: dict[str, Any], kind: str) -> list[str]:
    return [e["args"]["name"] for e in trace["traceEvents"] if e["name"] == f"{kind}_name"]


def test_a_whole_run_is_on_its_tracks(made_run: MakeRun, trace: Callable[..., dict[str, Any]]) -> None:
    run = made_run(60)
    written = trace(run)
    check(written)
    assert names(written, "process") == ["requests", "prefill-0", "prefill-1", "decode-0", "planes", "pool"]
    threads = names(written, "thread")
    assert {"steps", "attention", "moe", "sdma", "other"} <= set(threads)
    assert {"rdma kv_transfer decode-0", "ub pool_load prefill-0", "ub pool_store prefill-1"} <= set(threads)
    count = Counter(e["name"] for e in written["traceEvents"] if e["ph"] == "X")
    assert count["prefill step"] == 60
    assert count["decode step"] == len(run.instances[-1].start_ns)
    assert run.moves is not None
    assert count["kv_transfer"] + count["pool_load"] + count["pool_store"] == len(run.moves.kind)
    assert sum(count[request] for request in run.requests.request_ids) == 60
    assert "60 of 60 requests" in written["message"]
    assert written["otherData"]["written"] == written["message"]


def test_a_request_is_followed_through_its_steps(made_run: MakeRun, trace: Callable[..., dict[str, Any]]) -> None:
    run = made_run(40)
    written = trace(run)
    steps = {(part["pid"], part["tid"], part["ts"]): part for track in slices_of(written).values() for part in track}
    flows = [e for e in written["traceEvents"] if e["ph"] in "stf"]
    for request in range(40):
        path = [steps[e["pid"], e["tid"], e["ts"]]["name"] for e in flows if e["id"] == request]
        has_decode = run.requests.num_output_tokens[request] > 1
        assert path[1:] == (["prefill step", "kv_transfer", "decode step"] if has_decode else ["prefill step"])


def test_operators_divide_a_step_by_mean_shares(made_run: MakeRun, trace: Callable[..., dict[str, Any]]) -> None:
    run = made_run(20, num_prefill=1)
    written = trace(run)
    lengths: Counter[str] = Counter()
    for track in slices_of(written).values():
        for part in track:
            if part.get("args", {}).get("source") == "mean share of the instance's steps" and part["pid"] == 2:
                lengths[part["name"]] += ns(part)[1] - ns(part)[0]
    prefill = run.instances[0]
    for operator, operator_ns in prefill.breakdown_ns.items():
        assert lengths[operator] == pytest.approx(operator_ns, abs=2 * len(prefill.start_ns))
    assert sum(lengths.values()) == prefill.busy_ns


def test_a_long_run_is_cut_and_says_so(made_run: MakeRun, trace: Callable[..., dict[str, Any]]) -> None:
    run = made_run(2_000)
    short, later = trace(run, max_events=2_000, suffix=".json.gz"), trace(run, max_events=2_000, start_s=100.0)
    for written in (short, later):
        check(written)
        num_events = sum(event["ph"] != "M" for event in written["traceEvents"])
        assert 1_000 < num_events <= 2_000
        assert "of 2,000 requests" in written["message"]
    assert later["otherData"]["start_s"] == 100.0
    assert min(e["ts"] for e in later["traceEvents"] if e["ph"] != "M") >= 100e6


def test_requests_that_are_too_many_at_once_are_sampled(
    made_run: MakeRun, trace: Callable[..., dict[str, Any]]
) -> None:
    run = made_run(1_500, rate_per_s=100.0, output_len=200, num_prefill=4)
    written = trace(run, max_events=100_000)
    check(written)
    process = next(e["pid"] for e in written["traceEvents"] if e.get("args", {}).get("name") == "requests")
    lanes = {tid for pid, tid in slices_of(written) if pid == process}
    assert 20 < len(lanes) <= 1.3 * MAX_LANES


@pytest.mark.parametrize(
    "options",
    [
        {"is_colocated": True},
        {"has_pool": False, "has_moves": False},
        {"num_unfinished": 10},
        {"num_unfinished": 30},
    ],
)
def test_runs_that_lack_something_are_traced(
    made_run: MakeRun, trace: Callable[..., dict[str, Any]], options: dict[str, Any]
) -> None:
    written = trace(made_run(30, **options))
    check(written)
    assert ("pool" in names(written, "process")) == ("num_unfinished" in options)


def test_times_keep_their_nanoseconds(made_run: MakeRun, trace: Callable[..., dict[str, Any]]) -> None:
    run = made_run(50)
    written = slices_of(trace(run))
    found = sorted(ns(part) for track in written.values() for part in track if part["name"] == "prefill step")
    starts = np.concatenate([i.start_ns for i in run.instances if i.role == "prefill"])
    lengths = np.concatenate([i.charged_ns for i in run.instances if i.role == "prefill"])
    assert found == sorted(zip(starts.tolist(), (starts + lengths).tolist(), strict=True))


def test_what_cannot_be_written_is_refused(made_run: MakeRun, trace: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="max_events: 10 is below the limit 1000"):
        trace(made_run(5), max_events=10)
    with pytest.raises(ValueError, match=r"trace run.txt: the suffix must be .json or .json.gz"):
        trace(made_run(5), suffix=".txt")
