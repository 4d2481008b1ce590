"""What decides a step: the reduction of its work loses nothing, and what the model remembers changes nothing."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.deployment import ExpertDeployment, Imbalance
from devices.operators import Operators
from devices.pipeline import Role, StepLoad, StepTime, StepTimeModel, StepWork
from devices.spec import SupernodeSpec
from devices.step_load import slowest_ranks
from devices.step_work import BreakdownSum
from model.config import ModelConfig

ROLES: list[tuple[Role, int]] = [("prefill", 32), ("decode", 320), ("colocated", 4)]
# Few values make ties likely, many ranks take the path through arrays.
rank_pairs = st.lists(
    st.one_of(
        st.tuples(st.integers(0, 3), st.integers(0, 3)),
        st.tuples(st.integers(0, 10**9), st.integers(0, 10**8)),
    ),
    min_size=1,
    max_size=60,
)


def time_model(model: ModelConfig, supernode: SupernodeSpec, role: Role, ep: int, **options: Any) -> StepTimeModel:
    deployment = ExpertDeployment.published(model, ep=ep, imbalance=Imbalance.constant(1.9))
    return StepTimeModel(model, supernode, role=role, deployment=deployment, **options)


def random_work(rng: np.random.Generator, num_ranks: int) -> StepWork:
    """A decode step: as many requests as `most` on a rank, contexts of any length, with or without a draft."""
    most, longest, per_request = rng.integers(1, 130), rng.integers(1, 30_000), rng.integers(1, 3)
    seqs = rng.integers(most // 2, most + 1, num_ranks)
    kv = seqs * rng.integers(1, longest + 1, num_ranks)
    queries = seqs * per_request
    return StepWork(
        num_tokens=queries, num_context_tokens=kv * per_request, num_kv_tokens=kv, num_seqs=seqs, num_samples=queries
    )


def test_the_slowest_by_hand() -> None:
    context, kv = np.array([5, 9, 7, 9, 1, 7]), np.array([30, 10, 20, 8, 30, 20])
    assert slowest_ranks(context, kv) == ([9, 7, 5], [10, 20, 30])
    # The same through arrays: more ranks than a loop is worth.
    assert slowest_ranks(np.tile(context, 9), np.tile(kv, 9)) == ([9, 7, 5], [10, 20, 30])
    assert slowest_ranks(np.zeros(40, dtype=np.int64), np.zeros(40, dtype=np.int64)) == ([0], [0])


@given(pairs=rank_pairs)
def test_the_slowest_are_those_that_no_other_exceeds(pairs: list[tuple[int, int]]) -> None:
    def exceeds(pair: tuple[int, int], other: tuple[int, int]) -> bool:
        return pair != other and pair[0] >= other[0] and pair[1] >= other[1]

    front = {pair for pair in pairs if not any(exceeds(other, pair) for other in pairs)}
    context, kv = slowest_ranks(*np.array(pairs, dtype=np.int64).T)
    assert list(zip(context, kv, strict=True)) == sorted(front, reverse=True)


@given(pairs=rank_pairs, halved=st.booleans())
def test_a_rank_left_out_never_decides(
    machine: SupernodeSpec, deepseek_r1: ModelConfig, pairs: list[tuple[int, int]], halved: bool
) -> None:
    """To the last bit: one token more or less outweighs any rounding up to 10 ** 12 of them."""
    operators = Operators(deepseek_r1, machine, ExpertDeployment.published(deepseek_r1, ep=320))
    scale = 0.5 if halved else 1.0

    def attention_s(context: list[int], kv: list[int]) -> float:
        ranks = [value * scale for value in context], [value * scale for value in kv]
        return operators.absorbed_attention(48.0, *ranks, aic=12)["attention"]

    array = np.array(pairs, dtype=np.int64)
    assert attention_s(*slowest_ranks(array[:, 0], array[:, 1])) == attention_s(*array.T.tolist())


@pytest.mark.parametrize(("role", "ep"), ROLES)
@given(
    num_ranks=st.integers(1, 40),
    totals=st.tuples(*(st.integers(0, most) for most in (10**6, 10**10, 10**7, 5000, 5000))),
)
@settings(max_examples=60, deadline=None)
def test_a_sequence_needs_no_arrays(
    machine: SupernodeSpec, deepseek_r1: ModelConfig, role: Role, ep: int, num_ranks: int, totals: tuple[int, ...]
) -> None:
    model = time_model(deepseek_r1, machine, role, ep)
    given = dict(zip([field.name for field in dataclasses.fields(StepWork)], totals, strict=True))
    work = StepWork.split_sequence(num_ranks, **given)
    load = StepLoad.of_sequence(num_ranks, **given, is_split=model.is_split)
    assert load == StepLoad.of(work, is_split=model.is_split)
    assert model.decided(load) == model.step(work)


@pytest.mark.parametrize(("role", "ep"), ROLES)
def test_what_is_remembered_changes_nothing(
    machine: SupernodeSpec, deepseek_r1: ModelConfig, role: Role, ep: int
) -> None:
    """One model that has seen all other steps, and a fresh one for each."""
    rng = np.random.default_rng(1)
    works = [random_work(rng, int(rng.choice([1, 4, 40]))) for _ in range(40)]
    options: dict[str, Any] = {"num_speculative_tokens": 1}
    old = time_model(deepseek_r1, machine, role, ep, **options)
    for index in rng.integers(0, len(works), 300):
        old.step(works[index])
    for work in works:
        fresh = time_model(deepseek_r1, machine, role, ep, **options)
        assert fresh.step(work) == old.step(work)
        assert fresh.detail(work) == old.detail(work)


@pytest.mark.parametrize("ep", [8, 320])
def test_the_split_is_the_best_of_all(supernode: SupernodeSpec, deepseek_r1: ModelConfig, ep: int) -> None:
    """Wherever the search starts: against every split, in an order in which the best one jumps."""
    rng = np.random.default_rng(2)
    tuned = time_model(deepseek_r1, supernode, "decode", ep)
    every = [time_model(deepseek_r1, supernode, "decode", ep, attention_aic=aic) for aic in range(1, 24)]
    chosen = set()
    for _ in range(300):
        work = random_work(rng, 4)
        detail = tuned.detail(work)
        if detail.attention_aic is None:  # one batch is faster
            continue
        layers = [model.detail(work).layer_s for model in every]
        assert detail.layer_s == min(layers)
        assert detail.attention_aic == 1 + layers.index(min(layers))
        assert tuned.step(work) == every[detail.attention_aic - 1].step(work)
        chosen.add(detail.attention_aic)
    assert len(chosen) > 5


def test_breakdowns_add_up_over_steps(supernode: SupernodeSpec, deepseek_r1: ModelConfig) -> None:
    model, rng = time_model(deepseek_r1, supernode, "decode", 320), np.random.default_rng(3)
    times = [model.step(random_work(rng, 40)) for _ in range(20)]
    together = BreakdownSum()
    for time in times:
        together.add(time)
    totals = together.total
    assert sum(totals.values()) == sum(time.ns for time in times)
    assert totals["launch"] == pytest.approx(20 * 700_000, abs=20)
    for name, total_ns in totals.items():
        assert total_ns == pytest.approx(sum(time.breakdown.get(name, 0) for time in times), abs=30 * len(times))


def test_the_longest_part_takes_what_rounding_leaves() -> None:
    time = StepTime.of_seconds({"a": 1.6e-9, "b": 2.7e-9, "hidden": 0.0})
    assert (time.ns, dict(time.breakdown)) == (4, {"a": 1, "b": 3})
    assert time == StepTime(ns=4, breakdown={"a": 1, "b": 3})
    assert StepTime.of_seconds({}) == StepTime(ns=0, breakdown={})


@pytest.mark.parametrize("options", [{}, {"num_speculative_tokens": 1}, {"mtp_pipelined": False}])
@pytest.mark.parametrize("ep", [8, 320])
def test_steps_with_known_counts_are_sums_of_their_details(
    supernode: SupernodeSpec, deepseek_r1: ModelConfig, ep: int, options: dict[str, Any]
) -> None:
    """Bit by bit: only attention's core is worked out again."""
    rng, model = np.random.default_rng(4), time_model(deepseek_r1, supernode, "decode", ep, **options)
    work = random_work(rng, 40)
    for _ in range(60):
        factor = float(rng.uniform(0.2, 5))
        work = dataclasses.replace(
            work,
            num_context_tokens=np.rint(work.num_context_tokens * factor).astype(np.int64),
            num_kv_tokens=np.rint(work.num_kv_tokens * factor).astype(np.int64),
        )
        if work.num_kv_tokens.max() > 10**8 or not work.num_kv_tokens.any():
            work = random_work(rng, int(rng.choice([1, 4, 40])))
        detail, time = model.detail(work), model.step(work)
        assert time == StepTime.of_seconds(detail.exposed)
        assert list(time.breakdown) == list(StepTime.of_seconds(detail.exposed).breakdown)
