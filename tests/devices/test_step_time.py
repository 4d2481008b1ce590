"""Step times: the published points, what each pipeline hides, monotonicity, and the sum of the breakdown."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.deployment import ExpertDeployment, Imbalance
from devices.operators import Operators
from devices.pipeline import Role, StepDetail, StepTimeModel, StepWork
from devices.spec import PlaneName, SupernodeSpec
from model.config import ModelConfig
from tests.machines import with_plane_scaled

PLANES: tuple[PlaneName, ...] = ("ub", "rdma")
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


def time_model(
    model: ModelConfig, supernode: SupernodeSpec, role: Role, *, ep: int, imbalance: float = 1.0, **options: Any
) -> StepTimeModel:
    deployment = ExpertDeployment.published(model, ep=ep, imbalance=Imbalance.constant(imbalance))
    return StepTimeModel(model, supernode, role=role, deployment=deployment, **options)


def milliseconds(model: StepTimeModel, work: StepWork) -> float:
    time = model.step(work)
    assert sum(time.breakdown.values()) == time.ns
    assert min(time.breakdown.values()) >= 0
    return time.ns / 1e6


def test_decode_is_near_the_published_iterations(supernode: SupernodeSpec, deepseek_r1: ModelConfig) -> None:
    """arXiv 2506.12708v2, table 5: TPOT x 1.7 tokens per iteration, 48 and 4 requests per die, MTP on.

    Imbalance as the load generator gives it for 288 slots.
    """
    model = time_model(deepseek_r1, supernode, "decode", ep=320, imbalance=1.9, num_speculative_tokens=1)
    assert milliseconds(model, decode_work(48, 4096)) == pytest.approx(84.0, rel=0.05)
    assert milliseconds(model, decode_work(4, 4096)) == pytest.approx(25.3, rel=0.05)


def test_prefill_is_near_the_published_batches(supernode: SupernodeSpec, deepseek_r1: ModelConfig) -> None:
    """arXiv 2506.12708v2, table 3: 16,384 tokens per NPU of 4 K prompts, perfect and default balance."""
    work = prefill_work(64, 4096)
    assert milliseconds(time_model(deepseek_r1, supernode, "prefill", ep=32), work) == pytest.approx(2450, rel=0.03)
    uneven = time_model(deepseek_r1, supernode, "prefill", ep=32, imbalance=1.66)
    assert milliseconds(uneven, work) == pytest.approx(2897, rel=0.03)


@pytest.mark.parametrize(("role", "ep"), ROLES)
@pytest.mark.parametrize("microbatch", [True, False])
def test_a_detail_adds_up(
    machine: SupernodeSpec, deepseek_r1: ModelConfig, role: Role, ep: int, microbatch: bool
) -> None:
    work = prefill_work(64, 4096, num_ranks=ep) if role == "prefill" else decode_work(48, 4096, num_ranks=ep)
    model = time_model(deepseek_r1, machine, role, ep=ep, microbatch=microbatch)
    detail = model.detail(work)
    assert detail.seconds == pytest.approx(model.step(work).ns / 1e9, abs=1e-9)
    in_layers = {name: seconds for name, seconds in detail.exposed.items() if "." in name}
    assert sum(in_layers.values()) == pytest.approx(58 * detail.layer_s)
    for name, seconds in in_layers.items():  # what is exposed is what the stream did
        stream, operator = name.split(".")
        assert seconds == pytest.approx(58 * detail.streams[stream][operator])
    if not microbatch:
        assert detail.attention_aic is None
        assert detail.layer_s == pytest.approx(busy(detail, *detail.streams))


def busy(detail: StepDetail, *streams: str) -> float:
    return sum(sum(detail.streams[stream].values()) for stream in streams)


def test_decode_streams_are_split_where_the_longer_is_shortest(
    supernode: SupernodeSpec, deepseek_r1: ModelConfig
) -> None:
    work = decode_work(48, 4096, num_ranks=1)

    def layer(attention_aic: int | None) -> StepDetail:
        return time_model(deepseek_r1, supernode, "decode", ep=320, imbalance=1.9, attention_aic=attention_aic).detail(
            work
        )

    tuned = layer(None)
    assert tuned.attention_aic is not None
    assert tuned.layer_s == pytest.approx(max(busy(tuned, "attention"), busy(tuned, "moe")))
    fixed = {aic: layer(aic) for aic in range(1, 24)}
    overlapped = {aic: detail.layer_s for aic, detail in fixed.items() if detail.attention_aic is not None}
    assert tuned.layer_s == min(overlapped.values()) == overlapped[tuned.attention_aic]


def test_prefill_hides_the_all_to_alls(supernode: SupernodeSpec, deepseek_r1: ModelConfig) -> None:
    detail = time_model(deepseek_r1, supernode, "prefill", ep=32).detail(prefill_work(64, 4096))
    assert busy(detail, "sdma") < detail.layer_s == pytest.approx(busy(detail, "attention", "moe"))
    sdma_bound = with_plane_scaled(supernode, "ub", 0.2)
    slow = time_model(deepseek_r1, sdma_bound, "prefill", ep=32).detail(prefill_work(64, 4096))
    assert slow.layer_s >= busy(slow, "sdma")


def test_mtp_costs_less_than_another_step(supernode: SupernodeSpec, deepseek_r1: ModelConfig) -> None:
    off, on = (
        milliseconds(
            time_model(deepseek_r1, supernode, "decode", ep=320, imbalance=1.9, num_speculative_tokens=k),
            decode_work(48, 4096, query_tokens=1 + k),
        )
        for k in (0, 1)
    )
    assert off < on < 1.7 * off  # 1.7 tokens per iteration: otherwise it would not pay


def test_naive_mtp_waits_for_every_launch(supernode: SupernodeSpec, deepseek_r1: ModelConfig) -> None:
    """arXiv 2506.12708v2, section 4.2.4: one bubble of 0.6 to 0.8 ms for each of k + 1 graphs."""
    pipelined, naive = (
        time_model(deepseek_r1, supernode, "decode", ep=320, num_speculative_tokens=2, mtp_pipelined=pipelined).step(
            decode_work(48, 4096, query_tokens=3)
        )
        for pipelined in (True, False)
    )
    assert naive.ns - pipelined.ns == 2 * 700_000
    assert naive.breakdown["launch"] == 3 * 700_000


def test_mtp_in_prefill_is_one_more_block(supernode: SupernodeSpec, deepseek_r1: ModelConfig) -> None:
    """One layer beside 61, without overlap of microbatches, and no head: nothing is drafted there."""
    work = prefill_work(64, 4096)
    off, on = (
        time_model(deepseek_r1, supernode, "prefill", ep=32, num_speculative_tokens=k).step(work) for k in (0, 1)
    )
    assert off.ns / 61 < on.breakdown["mtp"] < 2 * off.ns / 61
    assert on.ns - off.ns == pytest.approx(on.breakdown["mtp"], abs=2)
    more_prompts = dataclasses.replace(prefill_work(128, 2048), num_context_tokens=work.num_context_tokens)
    model = time_model(deepseek_r1, supernode, "prefill", ep=32, num_speculative_tokens=1)
    assert model.step(more_prompts).breakdown["mtp"] == pytest.approx(on.breakdown["mtp"], rel=0.01)


def test_attention_reproduces_the_derived_times(supernode: SupernodeSpec, deepseek_r1: ModelConfig) -> None:
    """One microbatch, 24 requests x 2 query tokens x 4,096: 54.8 GFLOP at 246 TFLOPS = 223 us on the whole die."""
    hidden = dataclasses.replace(supernode, fitted=dataclasses.replace(supernode.fitted, attention_exposed=0.0))
    operators = Operators(deepseek_r1, hidden, ExpertDeployment.published(deepseek_r1, ep=320))
    tokens = 48.0
    for context, kv in (([tokens * 4096], [tokens / 2 * 4096]), ([tokens * 4096, 0], [tokens / 2 * 4096, 0])):
        parts = operators.absorbed_attention(tokens, context, kv, aic=24)
        assert (parts["attention"] - supernode.rates.launch_s) * 1e6 == pytest.approx(223, rel=0.005)


def test_a_step_waits_for_the_slowest_rank(machine: SupernodeSpec, deepseek_r1: ModelConfig) -> None:
    model = time_model(deepseek_r1, machine, "decode", ep=320)
    work = decode_work(16, 1000, num_ranks=4)
    context = work.num_context_tokens.copy()
    context[2] *= 3
    uneven = dataclasses.replace(work, num_context_tokens=context)
    elsewhere = dataclasses.replace(work, num_context_tokens=np.roll(context, 1))
    assert model.step(uneven).ns > model.step(work).ns
    assert model.step(uneven) == model.step(elsewhere)


def test_a_split_head_has_the_rows_of_all_dies(supernode: SupernodeSpec, deepseek_r1: ModelConfig) -> None:
    """Prefill: 128 rows on each of 32 dies are 4,096 rows for each die's 4,040 columns."""
    work = dataclasses.replace(prefill_work(64, 4096), num_samples=np.full(32, 128))
    head_s = time_model(deepseek_r1, supernode, "prefill", ep=32).detail(work).exposed["lm_head"]
    flops = 2 * 4096 * 4040 * 7168
    assert head_s > flops / supernode.npu.die.bf16_flops_per_s


def test_live_ranks_stand_for_those_of_the_full_instance(machine: SupernodeSpec, deepseek_r1: ModelConfig) -> None:
    model = time_model(deepseek_r1, machine, "decode", ep=320)
    assert model.step(decode_work(48, 4096, num_ranks=4)) == model.step(decode_work(48, 4096, num_ranks=320))


@pytest.mark.parametrize(("role", "ep"), ROLES)
def test_an_idle_step_has_only_fixed_costs(
    machine: SupernodeSpec, deepseek_r1: ModelConfig, role: Role, ep: int
) -> None:
    model = time_model(deepseek_r1, machine, role, ep=ep)
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
    imbalance=st.floats(1, 10),
)
def test_more_work_is_never_faster(
    machine: SupernodeSpec,
    deepseek_r1: ModelConfig,
    role: Role,
    ep: int,
    rows: list[tuple[int, ...]],
    field: str,
    rank: int,
    more: int,
    microbatch: bool,
    num_speculative_tokens: int,
    imbalance: float,
) -> None:
    options: dict[str, Any] = {"microbatch": microbatch, "num_speculative_tokens": num_speculative_tokens}
    model = time_model(deepseek_r1, machine, role, ep=ep, imbalance=imbalance, **options)
    work = make_work(rows)
    grown = getattr(work, field).copy()
    grown[rank % len(rows)] += more
    less, greater = model.step(work), model.step(dataclasses.replace(work, **{field: grown}))
    assert sum(less.breakdown.values()) == less.ns
    assert less.ns <= greater.ns
    assert model.step(work) == less
    assert less.ns <= time_model(deepseek_r1, machine, role, ep=ep, imbalance=imbalance + more, **options).step(work).ns


@pytest.mark.parametrize(("role", "ep"), ROLES)
@settings(max_examples=25, deadline=None)
@given(rows=st.lists(rank_work, min_size=1, max_size=4), factor=st.floats(0.05, 1.0), cores=st.floats(0.2, 1.0))
def test_slower_hardware_is_never_faster(
    machine: SupernodeSpec,
    deepseek_r1: ModelConfig,
    role: Role,
    ep: int,
    rows: list[tuple[int, ...]],
    factor: float,
    cores: float,
) -> None:
    work = make_work(rows)

    def step_ns(slower: SupernodeSpec) -> int:
        return time_model(deepseek_r1, slower, role, ep=ep, imbalance=1.5).step(work).ns

    def with_die(**changes: float) -> SupernodeSpec:
        die = dataclasses.replace(machine.npu.die, **changes)
        return dataclasses.replace(machine, npu=dataclasses.replace(machine.npu, die=die))

    die = machine.npu.die
    aic = max(2, round(cores * die.num_aic))
    slow_ub, slow_rdma = (with_plane_scaled(machine, plane, factor) for plane in PLANES)
    fewer_cores = with_die(
        num_aic=aic,
        num_aiv=aic * die.num_aiv // die.num_aic,
        int8_flops_per_s=die.int8_flops_per_s * aic / die.num_aic,
        bf16_flops_per_s=die.bf16_flops_per_s * aic / die.num_aic,
    )
    slow_memory = with_die(hbm_bytes_per_s=die.hbm_bytes_per_s * factor)
    slow_cube = with_die(int8_flops_per_s=die.int8_flops_per_s * factor, bf16_flops_per_s=die.bf16_flops_per_s * factor)
    slower = [slow_ub, slow_rdma, slow_memory, slow_cube, fewer_cores]
    assert step_ns(machine) <= min(step_ns(other) for other in slower)


@pytest.mark.parametrize("role", ["decode", "prefill"])
@pytest.mark.parametrize("ep", [16, 32, 64, 128])
def test_more_dies_with_as_many_experts_each_are_never_faster(
    machine: SupernodeSpec, deepseek_r1: ModelConfig, role: Role, ep: int
) -> None:
    """With the model's experts spread thinner a step may well be faster: a die reads fewer weights."""

    def step_ns(dies: int) -> int:
        deployment = ExpertDeployment(ep=dies, num_router_slots=4 * dies, num_shared_slots=0)
        work = prefill_work(4 * dies, 2048, num_ranks=dies) if role == "prefill" else decode_work(48, 4096, num_ranks=1)
        return StepTimeModel(deepseek_r1, machine, role=role, deployment=deployment).step(work).ns

    assert step_ns(ep) <= step_ns(2 * ep)


def test_wrong_arguments_are_named(supernode: SupernodeSpec, deepseek_r1: ModelConfig) -> None:
    with pytest.raises(ValueError, match="num_speculative_tokens: -1"):
        time_model(deepseek_r1, supernode, "decode", ep=8, num_speculative_tokens=-1)
    with pytest.raises(ValueError, match="attention_aic: 24 must leave cores of 24"):
        time_model(deepseek_r1, supernode, "decode", ep=8, attention_aic=24)
    work = decode_work(1, 1, num_ranks=2)
    with pytest.raises(ValueError, match=r"StepWork\.num_seqs: needs int64 of shape \(2,\)"):
        dataclasses.replace(work, num_seqs=np.zeros(3, dtype=np.int64))
    with pytest.raises(ValueError, match=r"StepWork\.num_samples: -1 is negative"):
        dataclasses.replace(work, num_samples=np.array([0, -1]))


def test_a_split_sequence_keeps_its_totals() -> None:
    work = prefill_work(3, 100, num_ranks=7)
    assert work.num_tokens.tolist() == [43, 43, 43, 43, 43, 43, 42]
    assert (work.num_ranks, work.num_samples.sum(), work.num_context_tokens.sum()) == (7, 3, 15150)
