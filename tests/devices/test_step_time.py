"""Step times: the published points, monotonicity, and the sum of the breakdown."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.operators import Operators
from devices.pipeline import Role, StepTimeModel, StepWork
from devices.rates import MOE_STREAM, WHOLE_DIE, ExpertDeployment, Rates
from devices.spec import SupernodeSpec
from model.config import ModelConfig

ROLES: list[tuple[Role, int]] = [("prefill", 32), ("decode", 320), ("colocated", 4)]


def decode_work(num_seqs: int, context: int, *, query_tokens: int = 2, num_ranks: int = 320) -> StepWork:
    num_tokens = num_seqs * query_tokens
    return StepWork.uniform(
        num_ranks,
        num_tokens=num_tokens,
        num_context_tokens=num_tokens * context,
        num_kv_tokens=num_seqs * context,
        num_seqs=num_seqs,
        num_samples=num_tokens,
    )


def prefill_work(num_prompts: int, length: int, *, num_ranks: int = 32) -> StepWork:
    return StepWork.split_sequence(
        num_ranks,
        num_tokens=num_prompts * length,
        num_context_tokens=num_prompts * length * (length + 1) // 2,
        num_kv_tokens=num_prompts * length,
        num_seqs=num_prompts,
        num_samples=num_prompts,
    )


def milliseconds(model: StepTimeModel, work: StepWork) -> float:
    time = model.step(work)
    assert sum(time.breakdown.values()) == time.ns
    assert min(time.breakdown.values()) >= 0
    return time.ns / 1e6


def test_decode_is_near_the_published_iterations(supernode: SupernodeSpec, deepseek_r1: ModelConfig) -> None:
    """arXiv 2506.12708, table 5: TPOT x 1.7 tokens per iteration, 48 and 64 requests per die, MTP on."""
    model = StepTimeModel(deepseek_r1, supernode, role="decode", represents_ep=320, num_speculative_tokens=1)
    assert milliseconds(model, decode_work(48, 4096)) == pytest.approx(84.0, rel=0.25)
    assert milliseconds(model, decode_work(64, 1536)) == pytest.approx(79.6, rel=0.25)


def test_prefill_is_near_the_published_batches(supernode: SupernodeSpec, deepseek_r1: ModelConfig) -> None:
    """arXiv 2506.12708, table 3: 16,384 tokens per NPU of 4 K prompts, default and perfect balance."""
    work = prefill_work(64, 4096)
    model = StepTimeModel(deepseek_r1, supernode, role="prefill", represents_ep=32)
    assert milliseconds(model, work) == pytest.approx(2900, rel=0.25)
    balanced = ExpertDeployment.published(deepseek_r1, ep=32, imbalance=1.0)
    model = StepTimeModel(deepseek_r1, supernode, role="prefill", represents_ep=32, deployment=balanced)
    assert milliseconds(model, work) == pytest.approx(2450, rel=0.25)


def test_microbatches_help_both_phases(supernode: SupernodeSpec, deepseek_r1: ModelConfig) -> None:
    for role, ep, work in (("prefill", 32, prefill_work(64, 4096)), ("decode", 320, decode_work(48, 4096))):
        on, off = (
            milliseconds(StepTimeModel(deepseek_r1, supernode, role=role, represents_ep=ep, microbatch=m), work)  # type: ignore[arg-type]
            for m in (True, False)
        )
        assert on < off


def test_mtp_costs_less_than_another_step(supernode: SupernodeSpec, deepseek_r1: ModelConfig) -> None:
    off, on = (
        milliseconds(
            StepTimeModel(deepseek_r1, supernode, role="decode", represents_ep=320, num_speculative_tokens=k),
            decode_work(48, 4096, query_tokens=1 + k),
        )
        for k in (0, 1)
    )
    assert off < on < 1.7 * off  # 1.7 tokens per iteration: otherwise it would not pay


def test_mtp_in_prefill_is_one_more_block(supernode: SupernodeSpec, deepseek_r1: ModelConfig) -> None:
    """One layer beside 61, without overlap of microbatches, and no head: nothing is drafted there."""
    off, on = (
        StepTimeModel(deepseek_r1, supernode, role="prefill", represents_ep=32, num_speculative_tokens=k).step(
            prefill_work(64, 4096)
        )
        for k in (0, 1)
    )
    assert off.ns / 61 < on.breakdown["mtp"] < 2 * off.ns / 61
    launch_ns = on.breakdown["launch"] - off.breakdown["launch"]
    assert on.ns - off.ns == pytest.approx(on.breakdown["mtp"] + launch_ns, abs=2)
    more_prompts = prefill_work(128, 2048)
    work = dataclasses.replace(more_prompts, num_context_tokens=prefill_work(64, 4096).num_context_tokens)
    model = StepTimeModel(deepseek_r1, supernode, role="prefill", represents_ep=32, num_speculative_tokens=1)
    assert model.step(work).breakdown["mtp"] == pytest.approx(on.breakdown["mtp"], rel=0.01)


def test_the_published_deployments(deepseek_r1: ModelConfig) -> None:
    """arXiv 2506.12708, section 5.1: 32 shared + 256 + 32 redundant; 1 shared + 8 + 1 redundant per die."""
    decode = ExpertDeployment.published(deepseek_r1, ep=320, imbalance=1.0)
    assert (decode.num_router_slots, decode.num_shared_slots, decode.router_slots_per_die) == (288, 32, 1)
    prefill = ExpertDeployment.published(deepseek_r1, ep=32, imbalance=1.0)
    assert (prefill.num_router_slots, prefill.num_shared_slots, prefill.router_slots_per_die) == (288, 0, 9)
    alone = ExpertDeployment.published(deepseek_r1, ep=1, imbalance=2.0)
    assert (alone.num_router_slots, alone.imbalance) == (256, 1.0)


@pytest.mark.parametrize(("ep", "dispatch_us", "combine_us"), [(8, 116, 118), (32, 133, 146), (256, 152, 149)])
def test_dispatch_and_combine_reproduce_table_7(
    supernode: SupernodeSpec, deepseek_r1: ModelConfig, ep: int, dispatch_us: float, combine_us: float
) -> None:
    deployment = ExpertDeployment.published(deepseek_r1, ep=ep, imbalance=1.0)
    operators = Operators(deepseek_r1, supernode, deployment)
    assert operators.dispatch(128, WHOLE_DIE) * 1e6 == pytest.approx(dispatch_us)
    assert operators.combine(128, WHOLE_DIE) * 1e6 == pytest.approx(combine_us)
    assert operators.dispatch(48, WHOLE_DIE) < operators.dispatch(48, MOE_STREAM) < operators.dispatch(128, MOE_STREAM)


def test_attention_reproduces_the_derived_times(supernode: SupernodeSpec, deepseek_r1: ModelConfig) -> None:
    """One microbatch, 24 requests x 2 query tokens x 4,096: 54.8 GFLOP at 246 TFLOPS = 223 us."""
    deployment = ExpertDeployment.published(deepseek_r1, ep=320, imbalance=1.0)
    operators = Operators(deepseek_r1, supernode, deployment, Rates(attention_launch_s=0.0))
    tokens = np.array([48.0])
    parts = operators.absorbed_attention(tokens, tokens * 4096, tokens / 2 * 4096, WHOLE_DIE)
    assert parts["attention"][0] * 1e6 == pytest.approx(223, rel=0.005)


def test_a_step_waits_for_the_slowest_rank(supernode: SupernodeSpec, deepseek_r1: ModelConfig) -> None:
    model = StepTimeModel(deepseek_r1, supernode, role="decode", represents_ep=320)
    work = decode_work(16, 1000, num_ranks=4)
    context = work.num_context_tokens.copy()
    context[2] *= 3
    uneven = dataclasses.replace(work, num_context_tokens=context)
    elsewhere = dataclasses.replace(work, num_context_tokens=np.roll(context, 1))
    assert model.step(uneven).ns > model.step(work).ns
    assert model.step(uneven) == model.step(elsewhere)


def test_live_ranks_stand_for_those_of_the_full_instance(supernode: SupernodeSpec, deepseek_r1: ModelConfig) -> None:
    model = StepTimeModel(deepseek_r1, supernode, role="decode", represents_ep=320)
    assert model.step(decode_work(48, 4096, num_ranks=4)) == model.step(decode_work(48, 4096, num_ranks=320))


@pytest.mark.parametrize(("role", "ep"), ROLES)
def test_an_idle_step_has_only_fixed_costs(
    supernode: SupernodeSpec, deepseek_r1: ModelConfig, role: Role, ep: int
) -> None:
    model = StepTimeModel(deepseek_r1, supernode, role=role, represents_ep=ep)
    idle = StepWork.uniform(2, num_tokens=0, num_context_tokens=0, num_kv_tokens=0, num_seqs=0, num_samples=0)
    assert 0 < milliseconds(model, idle) < milliseconds(model, decode_work(1, 100, query_tokens=1, num_ranks=2))


FIELDS = [field.name for field in dataclasses.fields(StepWork)]
rank_work = st.tuples(
    st.integers(0, 3000), st.integers(0, 10**7), st.integers(0, 10**6), st.integers(0, 200), st.integers(0, 200)
)


def make_work(rows: list[tuple[int, ...]]) -> StepWork:
    columns: dict[str, Any] = {
        name: np.array([row[i] for row in rows], dtype=np.int64) for i, name in enumerate(FIELDS)
    }
    return StepWork(**columns)


@pytest.mark.parametrize(("role", "ep"), ROLES)
@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(rank_work, min_size=1, max_size=5),
    field=st.sampled_from(FIELDS),
    rank=st.integers(0, 4),
    more=st.integers(1, 10**6),
    microbatch=st.booleans(),
    num_speculative_tokens=st.integers(0, 2),
)
def test_more_work_is_never_faster(
    supernode: SupernodeSpec,
    deepseek_r1: ModelConfig,
    role: Role,
    ep: int,
    rows: list[tuple[int, ...]],
    field: str,
    rank: int,
    more: int,
    microbatch: bool,
    num_speculative_tokens: int,
) -> None:
    model = StepTimeModel(
        deepseek_r1,
        supernode,
        role=role,
        represents_ep=ep,
        microbatch=microbatch,
        num_speculative_tokens=num_speculative_tokens,
    )
    work = make_work(rows)
    grown = getattr(work, field).copy()
    grown[rank % len(rows)] += more
    less, greater = model.step(work), model.step(dataclasses.replace(work, **{field: grown}))
    assert sum(less.breakdown.values()) == less.ns
    assert less.ns <= greater.ns
    assert model.step(work) == less


@pytest.mark.parametrize(("role", "ep"), ROLES)
@settings(max_examples=25, deadline=None)
@given(rows=st.lists(rank_work, min_size=1, max_size=4), factor=st.floats(0.05, 1.0))
def test_slower_hardware_is_never_faster(
    supernode: SupernodeSpec,
    deepseek_r1: ModelConfig,
    role: Role,
    ep: int,
    rows: list[tuple[int, ...]],
    factor: float,
) -> None:
    work = make_work(rows)

    def step_ns(machine: SupernodeSpec) -> int:
        return StepTimeModel(deepseek_r1, machine, role=role, represents_ep=ep).step(work).ns

    ub = supernode.planes["ub"]
    slow_paths = {k: dataclasses.replace(p, bytes_per_s=p.bytes_per_s * factor) for k, p in ub.paths.items()}
    slow_ub = dataclasses.replace(ub, paths=slow_paths, die_port_bytes_per_s=ub.die_port_bytes_per_s * factor)
    fabric = dataclasses.replace(supernode, planes={**supernode.planes, "ub": slow_ub})
    die = supernode.npu.die
    slow_die = dataclasses.replace(die, hbm_bytes_per_s=die.hbm_bytes_per_s * factor)
    memory = dataclasses.replace(supernode, npu=dataclasses.replace(supernode.npu, die=slow_die))
    assert step_ns(supernode) <= min(step_ns(fabric), step_ns(memory))


def test_wrong_arguments_are_named(supernode: SupernodeSpec, deepseek_r1: ModelConfig) -> None:
    with pytest.raises(ValueError, match="represents_ep 0"):
        StepTimeModel(deepseek_r1, supernode, role="decode", represents_ep=0)
    deployment = ExpertDeployment.published(deepseek_r1, ep=8, imbalance=1.0)
    with pytest.raises(ValueError, match="deployment has ep 8, represents_ep is 9"):
        StepTimeModel(deepseek_r1, supernode, role="decode", represents_ep=9, deployment=deployment)
    with pytest.raises(ValueError, match="imbalance"):
        ExpertDeployment(ep=8, num_router_slots=8, num_shared_slots=0, imbalance=0.5)
    work = decode_work(1, 1, num_ranks=2)
    with pytest.raises(ValueError, match=r"StepWork\.num_seqs: needs int64 of shape \(2,\)"):
        dataclasses.replace(work, num_seqs=np.zeros(3, dtype=np.int64))
    with pytest.raises(ValueError, match=r"StepWork\.num_samples: -1 is negative"):
        dataclasses.replace(work, num_samples=np.array([0, -1]))


def test_a_split_sequence_keeps_its_totals() -> None:
    work = prefill_work(3, 100, num_ranks=7)
    assert work.num_tokens.tolist() == [43, 43, 43, 43, 43, 43, 42]
    assert (work.num_ranks, work.num_samples.sum(), work.num_context_tokens.sum()) == (7, 3, 15150)
