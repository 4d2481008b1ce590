"""Workloads: what is asked for is what comes out, and nothing depends on chance."""

import dataclasses

import numpy as np
import pytest

from serving.errors import ConfigError
from serving.workloads.arrivals import Arrivals
from serving.workloads.requests import Piece, WorkloadRequest
from serving.workloads.synthetic import synthetic_workload, words_from_token_ids
from serving.workloads.workload import Workload


def request(request_id="r0", **changes):
    values = {"num_prompt_tokens": 3, "max_tokens": 2, "prompt_token_ids": (5, 6, 7)} | changes
    return WorkloadRequest(request_id=request_id, **values)


# Synthetic prompts


def test_synthetic_lengths_are_uniform_in_the_range_asked_for():
    workload = synthetic_workload(num_requests=4000, input_len=100, output_len=40, range_ratio=0.25, seed=1)
    inputs = np.array([r.num_prompt_tokens for r in workload.requests])
    outputs = np.array([r.max_tokens for r in workload.requests])
    assert (inputs.min(), inputs.max()) == (75, 125)
    assert (outputs.min(), outputs.max()) == (30, 50)
    assert inputs.mean() == pytest.approx(100, abs=1)
    assert abs(np.corrcoef(inputs, outputs)[0, 1]) < 0.05


def test_prompts_with_the_same_prefix_share_its_tokens_and_nothing_else():
    workload = synthetic_workload(num_requests=6, input_len=48, output_len=4, num_prefixes=3, prefix_len=32)
    prompts = [workload.prompt_token_ids(r).tolist() for r in workload.requests]
    prefixes = [r.pieces[0].stream for r in workload.requests]
    assert sorted(prefixes) == [0, 0, 2, 2, 4, 4]
    for i in range(6):
        for j in range(i):
            assert (prompts[i][:32] == prompts[j][:32]) == (prefixes[i] == prefixes[j])
            assert prompts[i][32:] != prompts[j][32:]


def test_a_prompt_has_a_token_of_its_own_and_never_exceeds_the_range():
    workload = synthetic_workload(
        num_requests=200, input_len=10, output_len=2, range_ratio=0.5, num_prefixes=2, prefix_len=9
    )
    lengths = {r.num_prompt_tokens for r in workload.requests}
    assert min(lengths) == 10
    assert max(lengths) == 15


def test_token_ids_stay_in_the_vocabulary_and_use_all_of_it():
    workload = synthetic_workload(num_requests=1, input_len=5000, output_len=1, vocabulary=range(10, 30))
    token_ids = workload.prompt_token_ids(workload.requests[0])
    assert token_ids.dtype == np.int64
    counts = np.bincount(token_ids, minlength=30)
    assert counts[:10].sum() == 0
    assert counts[10:].min() > 180
    assert counts[10:].max() < 320  # 250 expected of each, standard deviation 16


def test_a_synthetic_workload_is_the_same_on_every_machine():
    workload = synthetic_workload(
        num_requests=3, input_len=20, output_len=8, range_ratio=0.5, num_prefixes=1, prefix_len=4, seed=7
    )
    assert [(r.num_prompt_tokens, r.max_tokens) for r in workload.requests] == [(12, 11), (30, 9), (15, 9)]
    assert workload.prompt_token_ids(workload.requests[0])[:6].tolist() == [140, 243, 199, 75, 28, 53]
    assert workload.digest == "8f9bb2abafa4a302a2e8f766b957f9c7"


def test_one_changed_seed_changes_prompts_and_digest():
    a, b = (synthetic_workload(num_requests=2, input_len=20, output_len=8, seed=seed) for seed in (1, 2))
    assert a.digest != b.digest
    assert a.prompt_token_ids(a.requests[0]).tolist() != b.prompt_token_ids(b.requests[0]).tolist()
    assert a.requests[0].seed != b.requests[0].seed


def test_another_arrival_process_leaves_prompts_and_lengths_alone():
    closed = synthetic_workload(num_requests=5, input_len=20, output_len=8, range_ratio=0.5)
    open_loop = synthetic_workload(
        num_requests=5, input_len=20, output_len=8, range_ratio=0.5, arrivals=Arrivals(rate_per_s=2.0)
    )
    assert not closed.has_arrivals
    assert open_loop.has_arrivals
    assert open_loop.with_arrivals(None) == closed
    assert open_loop.digest != closed.digest


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(WorkloadRequest)])
def test_the_digest_covers_every_field_of_a_request(field):
    old = request(arrival_ns=3, seed=1)
    changed = {
        "request_id": "other",
        "num_prompt_tokens": 2,
        "max_tokens": 9,
        "arrival_ns": 4,
        "prompt_token_ids": (5, 6, 8),
        "pieces": (Piece(0, 3),),
        "hash_ids": (4,),
        "priority": 1,
        "seed": 2,
    }
    values = {field: changed[field]}
    if field == "num_prompt_tokens":
        values["prompt_token_ids"] = (5, 6)
    if field in ("pieces", "hash_ids"):
        values["prompt_token_ids"] = None
    new = dataclasses.replace(old, **values)
    workloads = [Workload(name="w", requests=(r,), hash_block_size=16) for r in (old, new)]
    assert workloads[0].digest != workloads[1].digest
    assert dataclasses.replace(workloads[0], name="renamed").digest == workloads[0].digest


# Changing a workload


def timed(*arrivals_s):
    requests = tuple(request(f"r{i}", arrival_ns=int(when * 1e9)) for i, when in enumerate(arrivals_s))
    return Workload(name="timed", requests=requests)


def test_a_rate_factor_divides_arrival_times():
    assert [r.arrival_ns for r in timed(0, 1, 3).with_rate_factor(2.0).requests] == [0, 500_000_000, 1_500_000_000]


def test_limits_keep_the_first_requests_before_an_instant():
    workload = timed(0, 1, 2, 3)
    assert [r.request_id for r in workload.limited(duration_s=2.0).requests] == ["r0", "r1"]
    assert [r.request_id for r in workload.limited(num_requests=3).requests] == ["r0", "r1", "r2"]
    assert [r.request_id for r in workload.limited(num_requests=3, duration_s=1.5).requests] == ["r0", "r1"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: request(num_prompt_tokens=0, prompt_token_ids=()), "request r0: num_prompt_tokens: 0 is below"),
        (lambda: request(max_tokens=0), "request r0: max_tokens: 0 is below the limit 1"),
        (lambda: request(arrival_ns=-1), "request r0: arrival_ns: -1 is below the limit 0"),
        (lambda: request(num_prompt_tokens=4), "num_prompt_tokens: 4 is not len(prompt_token_ids)"),
        (lambda: request(prompt_token_ids=None), "needs exactly one of prompt_token_ids, pieces, hash_ids"),
        (lambda: request(pieces=(Piece(0, 3),)), "needs exactly one of prompt_token_ids, pieces, hash_ids"),
        (lambda: request(prompt_token_ids=None, pieces=(Piece(0, 2),)), "is not the sum of its pieces"),
        (lambda: timed(1, 0), "requests are not in arrival order"),
        (lambda: Workload(name="w", requests=(request(), request())), "request ids are not unique"),
        (
            lambda: Workload(name="w", requests=(request("a", arrival_ns=1), request("b"))),
            "arrival_ns is set for some requests and not for others",
        ),
        (
            lambda: Workload(name="w", requests=(request(prompt_token_ids=None, hash_ids=(1, 2)),), hash_block_size=16),
            "2 hash_ids do not fit 3 prompt tokens in blocks of 16",
        ),
        (
            lambda: Workload(name="w", requests=(request(prompt_token_ids=None, hash_ids=(1,)),)),
            "hash_block_size: None is below the limit 1",
        ),
        (lambda: Workload(name="w", requests=(), vocabulary=range(0)), "vocabulary: range(0, 0)"),
        (lambda: timed(0).with_rate_factor(0.0), "rate factor: 0.0 must be finite and above"),
        (lambda: timed(0).limited(num_requests=0), "num_requests: 0 is below the limit 1"),
        (lambda: timed(0).limited(duration_s=0), "duration_s: 0 must be above the limit 0"),
        (lambda: timed(0).with_arrivals(None).limited(duration_s=1), "a closed loop has no arrival times"),
        (lambda: synthetic_workload(num_requests=0, input_len=1, output_len=1), "num_requests: 0 is below the limit 1"),
        (lambda: synthetic_workload(num_requests=1, input_len=1, output_len=0), "output_len: 0 is below the limit 1"),
        (
            lambda: synthetic_workload(num_requests=1, input_len=8, output_len=1, num_prefixes=1, prefix_len=8),
            "prefix_len: 8 must be below input_len 8",
        ),
        (
            lambda: synthetic_workload(num_requests=1, input_len=8, output_len=1, range_ratio=1.0),
            "range_ratio: 1.0 is not in [0, 1)",
        ),
    ],
)
def test_values_that_contradict_each_other_are_named(make, message):
    with pytest.raises(ConfigError) as caught:
        make()
    assert message in str(caught.value)


def test_words_follow_token_ids_one_for_one():
    text = words_from_token_ids([16, 17, 16])
    first, second, third = text.split(" ")
    assert first == third != second
