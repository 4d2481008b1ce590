"""What-if questions to single operators, answered with JSON-ready dictionaries.

Owns: the units and keys of the answers, and how bandwidth and utilization are counted.
Must not know: command lines, formulas of operators (devices/).
Source: arXiv 2506.12708v2, tables 7 (dispatch and combine), 8 and 9 (attention) and 10 (products), for what is counted.

The arguments are those of `supernode estimate`. All raise ConfigError, with the sum where a die's HBM cannot hold the
operands.
"""

import math
from dataclasses import replace
from typing import Any, get_args

from devices.deployment import ExpertDeployment
from devices.expert_parallel import ExpertParallel
from devices.gemm import Gemm
from devices.operators import Operators
from devices.rates import EpNear
from model import work
from serving.estimation.estimate_inputs import (
    Hardware,
    check_choice,
    check_counts,
    check_dies,
    check_hbm,
    hardware_of,
    model_of,
)

Answer = dict[str, Any]
GB = 1e9


def dispatch(
    *,
    hardware: Hardware = "cloudmatrix384",
    model: str = "deepseek-r1",
    ep: int = 64,
    tokens: int = 128,
    near: EpNear | None = None,
) -> Answer:
    """Fused dispatch of `tokens` per die by all its vector cores, balanced routing; bandwidth as table 7 counts it.

    `near`: the dies that copies reach over a nearer link, package or node; None: those of the hardware's kernels.
    """
    return _exchange(hardware, model, "dispatch", ep, tokens, near)


def combine(
    *,
    hardware: Hardware = "cloudmatrix384",
    model: str = "deepseek-r1",
    ep: int = 64,
    tokens: int = 128,
    near: EpNear | None = None,
) -> Answer:
    """Fused combine, the same way."""
    return _exchange(hardware, model, "combine", ep, tokens, near)


def gemm(*, hardware: Hardware = "cloudmatrix384", groups: int = 1, m: int, n: int, k: int) -> Answer:
    """`groups` INT8 (FP8) products of m x k by k x n with BF16 output on one die. Each matrix is counted once."""
    spec = hardware_of(hardware)
    check_counts(1, groups=groups, m=m, n=n, k=k)
    inputs_bytes, output_bytes = groups * (m * k + n * k), 2 * groups * m * n
    check_hbm(spec.name, spec.npu.die.hbm_bytes, inputs=inputs_bytes, output=output_bytes)
    seconds = Gemm(spec).launched(m, n, k, groups=groups, aic=spec.npu.die.num_aic)
    flops_per_s = 2 * groups * m * n * k / seconds
    return {
        "time_us": seconds * 1e6,
        "tops": flops_per_s / 1e12,
        "utilization": flops_per_s / spec.npu.die.int8_flops_per_s,
        "bandwidth_gb_per_s": (inputs_bytes + output_bytes) / seconds / GB,
    }


def attention(
    *,
    hardware: Hardware = "cloudmatrix384",
    model: str = "deepseek-r1",
    requests_per_die: int = 48,
    kv_len: int = 4096,
    query_tokens: int = 1,
    num_heads: int = 128,
) -> Answer:
    """Fused decode attention of one layer alone on a whole die, BF16; utilization of its peak and of HBM bandwidth.

    Alone it hides the shorter of compute and memory time, as in the operator tables; inside a step it does not quite.
    """
    spec = hardware_of(hardware)
    check_counts(1, requests_per_die=requests_per_die, kv_len=kv_len, query_tokens=query_tokens, num_heads=num_heads)
    shape = replace(model_of(model), num_attention_heads=num_heads)
    values_per_token = num_heads * (shape.latent_dim + shape.kv_lora_rank)
    check_hbm(
        spec.name,
        spec.npu.die.hbm_bytes,
        latent_cache=2 * requests_per_die * kv_len * shape.latent_dim,
        queries_and_outputs=2 * requests_per_die * query_tokens * values_per_token,
    )
    alone = replace(spec, fitted=replace(spec.fitted, attention_exposed=0.0))
    operators = Operators(shape, alone, ExpertDeployment.published(shape, ep=1))
    tokens, kv = requests_per_die * query_tokens, requests_per_die * kv_len
    die = spec.npu.die
    seconds = operators.absorbed_attention(tokens, [tokens * kv_len], [kv], aic=die.num_aic)["attention"]
    flops_per_s = tokens * kv_len * work.operator_flops(shape).attention_absorbed_per_context_token / seconds
    bytes_per_s = kv * shape.latent_dim * 2 / seconds
    return {
        "time_us": seconds * 1e6,
        "tflops": flops_per_s / 1e12,
        "utilization": flops_per_s / die.bf16_flops_per_s,
        "bandwidth_gb_per_s": bytes_per_s / GB,
        "memory_utilization": bytes_per_s / die.hbm_bytes_per_s,
    }


def _exchange(hardware: Hardware, model: str, operator: str, ep: int, tokens: int, near: EpNear | None) -> Answer:
    spec, shape = hardware_of(hardware), model_of(model)
    if near is not None:
        check_choice("near", near, get_args(EpNear))
        spec = replace(spec, rates=replace(spec.rates, ep_near=near))
    check_counts(2, ep=ep)
    check_counts(1, tokens=tokens)
    check_dies(spec, ep)
    copies = tokens * shape.num_experts_per_tok
    # Every die has its shared expert, so that a token is sent to the chosen experts alone, as in the published table.
    slots = ep * math.ceil(shape.n_routed_experts / ep)
    experts = ExpertParallel(shape, spec, ExpertDeployment(ep=ep, num_router_slots=slots, num_shared_slots=0))
    aiv = spec.npu.die.num_aiv
    if operator == "dispatch":
        seconds = experts.dispatch(tokens, aiv=aiv)
        message_bytes = work.dispatch_message_bytes(shape, scale_bytes=spec.rates.ep_scale_bytes)
    else:
        seconds, message_bytes = experts.combine(tokens, aiv=aiv), work.combine_message_bytes(shape)
    check_hbm(spec.name, spec.npu.die.hbm_bytes, messages=copies * message_bytes)
    num_bytes = copies * message_bytes * spec.rates.ep_wire_factor
    return {"latency_us": seconds * 1e6, "bandwidth_gb_per_s": num_bytes / seconds / GB}
