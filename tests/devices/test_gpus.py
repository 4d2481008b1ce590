"""GPUs: published kernels of DeepEP and DeepGEMM, how microbatches overlap, what a node's peers relay."""

import dataclasses
import statistics

import pytest

from devices.deployment import ExpertDeployment
from devices.expert_parallel import ExpertParallel
from devices.gemm import Gemm
from devices.operators import Operators, Parts
from devices.pipeline import StepDetail, StepTimeModel, StepWork
from devices.rates import Rates
from devices.spec import SpecError, SupernodeSpec
from model.config import ModelConfig
from tests.machines import with_plane_scaled

# deepseek-ai/DeepGEMM README (2025-03, H800): groups, m per group, n, k, TFLOPS.
DEEP_GEMM = [
    *[(1, 64, 2112, 7168, 206), (1, 64, 24576, 1536, 289), (1, 64, 32768, 512, 219), (1, 64, 7168, 16384, 336)],
    *[(1, 64, 4096, 7168, 287), (1, 64, 7168, 2048, 295), (1, 128, 2112, 7168, 352), (1, 128, 24576, 1536, 535)],
    *[(1, 128, 32768, 512, 358), (1, 128, 7168, 16384, 645), (1, 128, 4096, 7168, 533), (1, 128, 7168, 2048, 510)],
    *[(1, 4096, 2112, 7168, 1058), (1, 4096, 24576, 1536, 990), (1, 4096, 32768, 512, 590)],
    *[(1, 4096, 7168, 16384, 1358), (1, 4096, 4096, 7168, 1304), (1, 4096, 7168, 2048, 1025)],
    *[(4, 8192, 4096, 7168, 1297), (4, 8192, 7168, 2048, 1099), (8, 4096, 4096, 7168, 1288)],
    *[(8, 4096, 7168, 2048, 1093), (1, 1024, 4096, 7168, 1233), (1, 1024, 7168, 2048, 925)],
    *[(2, 512, 4096, 7168, 1040), (2, 512, 7168, 2048, 916), (4, 256, 4096, 7168, 932), (4, 256, 7168, 2048, 815)],
]


def total(parts: Parts) -> float:
    return sum(parts.values())


def decode_work(num_seqs: int, context: int) -> StepWork:
    counts = {"num_tokens": num_seqs, "num_seqs": num_seqs, "num_samples": num_seqs}
    return StepWork.uniform(1, num_context_tokens=num_seqs * context, num_kv_tokens=num_seqs * context, **counts)


def prefill_work(prompts_per_rank: list[int], length: int) -> StepWork:
    pairs = length * (length + 1) // 2
    return StepWork.of_ranks(
        num_tokens=[prompts * length for prompts in prompts_per_rank],
        num_context_tokens=[prompts * pairs for prompts in prompts_per_rank],
        num_kv_tokens=[prompts * length for prompts in prompts_per_rank],
        num_seqs=prompts_per_rank,
        num_samples=prompts_per_rank,
    )


@pytest.mark.parametrize(
    ("ep", "dispatch_us", "combine_us"), [(8, 163, 318), (32, 182, 350), (64, 186, 353), (256, 194, 360)]
)
def test_low_latency_kernels(
    h800: SupernodeSpec, deepseek_r1: ModelConfig, ep: int, dispatch_us: float, combine_us: float
) -> None:
    """DeepEP README, 2025-04, as in arXiv 2506.12708v2, table 7: 128 tokens per GPU."""
    pair = ExpertParallel(deepseek_r1, h800, ExpertDeployment(ep=ep, num_router_slots=256, num_shared_slots=0))
    for aiv in (2, 132):  # the NIC does not care
        assert pair.combine(128, aiv=aiv) * 1e6 == pytest.approx(combine_us, rel=0.015)
    assert pair.dispatch(128, aiv=132) * 1e6 == pytest.approx(dispatch_us, rel=0.015)


@pytest.mark.parametrize(
    ("ep", "dispatch_us", "combine_us"), [(16, 118, 195), (32, 155, 273), (64, 173, 314), (256, 194, 360)]
)
def test_nvlink_inside_a_node_makes_them_faster(
    h800: SupernodeSpec, deepseek_r1: ModelConfig, ep: int, dispatch_us: float, combine_us: float
) -> None:
    """DeepEP README, 2025-06-05. Only its EP8 entered the description; dispatch at EP16 is 19 % too fast."""
    deployment = ExpertDeployment(ep=ep, num_router_slots=256, num_shared_slots=0)
    june = dataclasses.replace(h800, rates=dataclasses.replace(h800.rates, ep_near="node"))
    before, after = (ExpertParallel(deepseek_r1, machine, deployment) for machine in (h800, june))
    assert after.dispatch(128, aiv=132) < before.dispatch(128, aiv=132)
    assert after.dispatch(128, aiv=132) * 1e6 == pytest.approx(dispatch_us, rel=0.2)
    assert after.combine(128, aiv=132) * 1e6 == pytest.approx(combine_us, rel=0.06)


def test_matrix_products(h800: SupernodeSpec) -> None:
    gemm = Gemm(h800)
    errors = []
    for groups, m, n, k, tflops in DEEP_GEMM:
        seconds = gemm.launched(m, n, k, groups=groups, aic=132)
        errors.append(abs(2e-12 * groups * m * n * k / seconds / tflops - 1))
    assert statistics.median(errors) < 0.05
    assert max(errors) < 0.3


def test_attention_halves(h800: SupernodeSpec, deepseek_r1: ModelConfig) -> None:
    """Measured modules of H100, FP8 (ai-dynamo/aiconfigurator, tables mla_decode_module and mla_prefill_module)."""
    operators = Operators(deepseek_r1, h800, ExpertDeployment.published(deepseek_r1, ep=1))
    for batch, kv, microseconds in ((16, 4096, 214.9), (64, 4096, 304.7), (128, 4096, 456.5), (128, 1024, 299.1)):
        parts = operators.absorbed_attention(batch, [batch * kv], [batch * kv], aic=132)
        assert total(parts) * 1e6 == pytest.approx(microseconds, rel=0.1)
    for prompts, length, milliseconds in ((8, 1024, 5.056), (4, 2048, 5.364), (4, 4096, 12.004)):
        tokens = prompts * length
        parts = operators.naive_attention(tokens, [tokens * (length + 1) / 2], [tokens], aic=132)
        assert total(parts) * 1e3 == pytest.approx(milliseconds, rel=0.1)


def test_narrow_tiles_keep_every_sm_busy(h800: SupernodeSpec) -> None:
    """128 x 2,112 is 17 tiles of 128 columns, or 132 of 16."""
    die = dataclasses.replace(h800.npu.die, hbm_bytes_per_s=1e15)  # so that compute alone decides
    narrow = dataclasses.replace(h800, npu=dataclasses.replace(h800.npu, die=die))
    wide = dataclasses.replace(narrow, rates=dataclasses.replace(h800.rates, gemm_tile_n_step=128))
    tile_s = h800.fitted.gemm_tile_s
    core_flops_per_s = h800.fitted.gemm_utilization * 1.979e15 / 132
    inner_s = 2 * 128 * 128 * 100_000 / core_flops_per_s
    assert Gemm(wide).product(128, 2112, 100_000).seconds(132) == pytest.approx(inner_s + tile_s)
    assert Gemm(narrow).product(128, 2112, 100_000).seconds(132) == pytest.approx(inner_s / 8 + tile_s)


def test_decode_hides_communication_on_all_cores(h800: SupernodeSpec, deepseek_r1: ModelConfig) -> None:
    """A layer takes max(compute, communication) of both microbatches, and what is hidden is left over once, halved."""
    deployment = ExpertDeployment.published(deepseek_r1, ep=128)

    def detail(machine: SupernodeSpec, *, microbatch: bool = True) -> StepDetail:
        model = StepTimeModel(deepseek_r1, machine, role="decode", deployment=deployment, microbatch=microbatch)
        return model.detail(decode_work(128, 4096))

    bound_by_compute, bound_by_nic = detail(h800), detail(with_plane_scaled(h800, "rdma", 0.2))
    for step in (bound_by_compute, bound_by_nic):
        communication = total(step.streams["communication"])
        compute = total(step.streams["attention"]) + total(step.streams["moe"])
        assert step.layer_s == pytest.approx(max(compute, communication))
        assert step.exposed["pipeline_ramp"] == pytest.approx(min(compute, communication) / 2)
        assert (step.num_microbatches, step.attention_aic) == (2, None)
    assert bound_by_nic.exposed["communication.combine"] > 0
    assert "attention.attention" not in bound_by_nic.exposed
    plain = detail(h800, microbatch=False)
    assert plain.num_microbatches == 1
    assert plain.layer_s > bound_by_compute.layer_s
    with pytest.raises(ValueError, match="attention_aic: 8, but microbatches on h800 share all cores"):
        StepTimeModel(deepseek_r1, h800, role="decode", deployment=deployment, attention_aic=8)


def test_prefill_lacks_the_cores_that_communicate(h800: SupernodeSpec, deepseek_r1: ModelConfig) -> None:
    deployment = ExpertDeployment.published(deepseek_r1, ep=32)

    def layer_s(bulk_cores: int, *, microbatch: bool = True) -> float:
        machine = dataclasses.replace(h800, rates=dataclasses.replace(h800.rates, bulk_cores=bulk_cores))
        model = StepTimeModel(deepseek_r1, machine, role="prefill", deployment=deployment, microbatch=microbatch)
        return model.detail(prefill_work([4] * 32, 4096)).layer_s

    assert layer_s(1) < layer_s(24) < layer_s(66)
    assert layer_s(24, microbatch=False) == layer_s(1, microbatch=False) > layer_s(24)
    with pytest.raises(SpecError, match=r"rates\.bulk_cores: 132 must leave cores of 132"):
        layer_s(132)


def test_data_parallel_prefill_waits_for_the_rank_with_most_prompts(
    h800: SupernodeSpec, supernode: SupernodeSpec, deepseek_r1: ModelConfig
) -> None:
    """Whole prompts are a rank's own; split attention has every die share all of them."""
    deployment = ExpertDeployment.published(deepseek_r1, ep=32)

    def attention_s(machine: SupernodeSpec, prompts: list[int]) -> float:
        model = StepTimeModel(deepseek_r1, machine, role="prefill", deployment=deployment, microbatch=False)
        return model.detail(prefill_work(prompts, 4096)).streams["attention"]["attention"]

    even, uneven = [4] * 32, [8, 0] * 16
    assert attention_s(h800, uneven) == pytest.approx(2 * attention_s(h800, even), rel=0.01)
    assert attention_s(supernode, uneven) == pytest.approx(attention_s(supernode, even))


def test_bulk_copies_are_relayed_inside_a_node(h800: SupernodeSpec, deepseek_r1: ModelConfig) -> None:
    """DeepEP README, 2025-04-22, EP32: 58 GB/s for 4,096 tokens to 3.61 nodes each. A GPU receives over NVLink."""
    pair = ExpertParallel(deepseek_r1, h800, ExpertDeployment(ep=32, num_router_slots=256, num_shared_slots=0))
    assert pair.bulk_dispatch(4096) == pytest.approx(4096 * 3.61 * 7392 / 58e9, rel=0.01)
    slower = ExpertParallel(
        deepseek_r1,
        with_plane_scaled(h800, "ub", 0.2),
        ExpertDeployment(ep=32, num_router_slots=256, num_shared_slots=0),
    )
    assert slower.bulk_dispatch(4096) == pytest.approx(4096 * 8 * 7408 / (0.2 * 160e9), rel=0.01)


def test_layouts_of_gpu_clusters(deepseek_r1: ModelConfig) -> None:
    """open-infra-index, day 6: 2 routed slots, 32 of them redundant, and a shared expert on each of 144 GPUs."""
    for ep, per_die in ((144, 2), (72, 4)):  # SGLang: 288 slots on 72
        deployment = ExpertDeployment.published(deepseek_r1, ep=ep)
        assert (deployment.num_router_slots, deployment.router_slots_per_die) == (288, per_die)
        assert deployment.num_shared_slots == 0


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("decode_overlap", "streams", "decode_overlap: 'streams' is none of cores, communication"),
        ("prefill_attention", "tp", "prefill_attention: 'tp' is none of split, data_parallel"),
        ("ep_near", "rack", "ep_near: 'rack' is none of package, node"),
        ("bulk_cores", -1, "bulk_cores: -1 must be at least 0"),
        ("gemm_tile_n_step", 256, "gemm_tile_n_step: 256 exceeds gemm_tile_n 128"),
    ],
)
def test_a_wrong_rate_is_named(h800: SupernodeSpec, field: str, value: object, message: str) -> None:
    values = {part.name: getattr(h800.rates, part.name) for part in dataclasses.fields(Rates)}
    with pytest.raises(ValueError, match=message):
        Rates(**{**values, field: value})
