"""What-if questions to the time model, answered with JSON-ready dictionaries.

Owns: the units and keys of the answers, the work of a steady state, what does not fit in HBM.
Must not know: command lines, formulas of operators (devices/).
Source: throughput = batch / TPOT and 1 + acceptance tokens per iteration, as in tables 4 and 5 of arXiv 2506.12708v2;
batch and throughput per NPU, which has two dies; degrees count dies.

`hardware` is a shipped name, a YAML file, or a description as such a file holds it; `model` a shipped name or a file.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, Literal

from devices.deployment import ExpertDeployment
from devices.expert_parallel import ExpertParallel
from devices.gemm import Gemm
from devices.operators import Operators
from devices.pipeline import StepDetail, StepTimeModel, StepWork
from devices.rates import EpNear
from devices.spec import SupernodeSpec
from model import work
from model.config import ModelConfig
from serving.config_file import load_part
from serving.core.expert_load_model import Balance
from serving.die_memory import die_memory
from serving.errors import ConfigError
from serving.estimation import fabric_estimates
from serving.expert_balance import with_imbalance

Hardware = str | Mapping[str, Any]
Switch = Literal["on", "off"]
Answer = dict[str, Any]
GB = 1e9
GIB = 2**30


def decode(
    *,
    hardware: Hardware = "cloudmatrix384",
    model: str = "deepseek-r1",
    batch_per_npu: int = 96,
    kv_len: int = 4096,
    ep: int = 320,
    mtp: int = 1,
    acceptance: float = 0.7,
    microbatch: Switch = "on",
    balance: Balance = "eplb",
    attention_aic: int | None = None,
    mtp_pipelined: Switch = "on",
) -> Answer:
    """A decode iteration of `batch_per_npu` requests with `kv_len` tokens each, on every NPU of an instance.

    Keys: tpot_ms, tokens_per_s_per_npu, tokens_per_s_per_tflops (of the INT8 or FP8 peak), iteration_ms, layer_us
    (one mixture layer), attention_stream_us and moe_stream_us (one microbatch; without microbatches the whole batch),
    attention_aic (cube cores of the attention stream, None without streams), breakdown (ms, adds up to the iteration).
    `mtp` drafts per step, each accepted with probability `acceptance` if those before it were.
    Raises ConfigError, with the sum, if a die's HBM cannot hold it.
    """
    spec, shape = hardware_of(hardware), model_of(model)
    _at_least(1, batch_per_npu=batch_per_npu, kv_len=kv_len, ep=ep)
    _at_least(0, mtp=mtp)
    _share(acceptance=acceptance)
    if mtp and not shape.num_nextn_predict_layers:
        raise ConfigError(f"mtp: {mtp}, but model {model} has no MTP module")
    layout = _layout(shape, ep)
    # An odd batch gives the dies of an NPU different numbers of requests.
    dies = spec.npu.num_dies
    batches = [batch_per_npu // dies + (die < batch_per_npu % dies) for die in range(dies)]
    _check_fits(
        spec,
        shape,
        layout,
        is_prefill=False,
        step_tokens=batches[0] * (1 + mtp),
        cached_tokens=batches[0] * kv_len,
        has_mtp=mtp > 0,
    )
    step = StepTimeModel(
        shape,
        spec,
        role="decode",
        deployment=with_imbalance(layout, shape, spec.fitted, role="decode", balance=balance),
        microbatch=_is_on(microbatch=microbatch),
        num_speculative_tokens=mtp,
        mtp_pipelined=_is_on(mtp_pipelined=mtp_pipelined),
        attention_aic=attention_aic,
    ).detail(
        StepWork.of_ranks(
            num_tokens=[batch * (1 + mtp) for batch in batches],
            num_context_tokens=[batch * (1 + mtp) * kv_len for batch in batches],
            num_kv_tokens=[batch * kv_len for batch in batches],
            num_seqs=batches,
            num_samples=[batch * (1 + mtp) for batch in batches],
        )
    )
    tokens_per_iteration = sum(acceptance**i for i in range(1 + mtp))
    tokens_per_s = batch_per_npu * tokens_per_iteration / step.seconds
    return {
        "tpot_ms": step.seconds * 1e3 / tokens_per_iteration,
        "tokens_per_s_per_npu": tokens_per_s,
        "tokens_per_s_per_tflops": _per_tflops(spec, tokens_per_s),
        "iteration_ms": step.seconds * 1e3,
        "layer_us": step.layer_s * 1e6,
        "attention_stream_us": sum(step.streams["attention"].values()) * 1e6 / step.num_microbatches,
        "moe_stream_us": sum(step.streams["moe"].values()) * 1e6 / step.num_microbatches,
        "attention_aic": step.attention_aic,
        **_breakdown(step),
    }


def prefill(
    *,
    hardware: Hardware = "cloudmatrix384",
    model: str = "deepseek-r1",
    prompt_len: int = 4096,
    tokens_per_npu: int = 16384,
    ep: int = 32,
    microbatch: Switch = "on",
    balance: Balance = "eplb",
    reuse: float = 0.0,
    pool_plane: Literal["ub", "vpc", "none"] = "none",
) -> Answer:
    """A batch of prompts, `tokens_per_npu` on every NPU of an instance, of which the share `reuse` is in the pool.

    Keys: ttft_ms (load and batch, without queueing), tokens_per_s_per_npu (reused tokens count),
    tokens_per_s_per_tflops, layer_us, pool_load_ms, breakdown (ms, adds up to ttft_ms). With `pool_plane` none there is
    no pool: all is computed.
    Raises ConfigError, with the sum, if a die's HBM cannot hold it.
    """
    spec, shape = hardware_of(hardware), model_of(model)
    _at_least(1, prompt_len=prompt_len, tokens_per_npu=tokens_per_npu, ep=ep)
    _share(reuse=reuse)
    layout = _layout(shape, ep)
    dies = spec.npu.num_dies
    tokens = tokens_per_npu * ep / dies  # of the instance
    prompts = tokens / prompt_len
    cached = 0 if pool_plane == "none" else min(round(prompt_len * reuse), prompt_len - 1)  # the last one is computed
    new = prompt_len - cached
    _check_fits(
        spec,
        shape,
        layout,
        is_prefill=True,
        step_tokens=math.ceil(tokens_per_npu / dies),
        # Every die has the latents of all prompts, or those of its own.
        cached_tokens=math.ceil(tokens if spec.rates.prefill_attention == "split" else tokens_per_npu / dies),
        has_mtp=False,
    )
    step = StepTimeModel(
        shape,
        spec,
        role="prefill",
        deployment=with_imbalance(layout, shape, spec.fitted, role="prefill", balance=balance),
        microbatch=_is_on(microbatch=microbatch),
    ).detail(
        StepWork.split_sequence(
            ep,
            num_tokens=round(prompts * new),
            num_context_tokens=round(prompts * (new * cached + new * (new + 1) / 2)),
            num_kv_tokens=round(tokens),
            num_seqs=max(1, round(prompts)),
            num_samples=max(1, round(prompts)),
        )
    )
    load_s = _pool_load_s(spec, shape, tokens_per_npu / dies * cached / prompt_len, pool_plane)
    seconds = load_s + step.seconds
    breakdown = _breakdown(step)["breakdown"]
    if load_s:
        breakdown["pool_load"] = load_s * 1e3
    return {
        "ttft_ms": seconds * 1e3,
        "tokens_per_s_per_npu": tokens_per_npu / seconds,
        "tokens_per_s_per_tflops": _per_tflops(spec, tokens_per_npu / seconds),
        "layer_us": step.layer_s * 1e6,
        "pool_load_ms": load_s * 1e3,
        "breakdown": breakdown,
    }


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
    _at_least(1, groups=groups, m=m, n=n, k=k)
    seconds = Gemm(spec).launched(m, n, k, groups=groups, aic=spec.npu.die.num_aic)
    flops_per_s = 2 * groups * m * n * k / seconds
    return {
        "time_us": seconds * 1e6,
        "tops": flops_per_s / 1e12,
        "utilization": flops_per_s / spec.npu.die.int8_flops_per_s,
        "bandwidth_gb_per_s": groups * (m * k + n * k + 2 * m * n) / seconds / GB,
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
    _at_least(1, requests_per_die=requests_per_die, kv_len=kv_len, query_tokens=query_tokens, num_heads=num_heads)
    shape = replace(model_of(model), num_attention_heads=num_heads)
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


def transfer(*, hardware: Hardware = "cloudmatrix384", **arguments: Any) -> Answer:
    """See `fabric_estimates.estimate_transfer`."""
    return fabric_estimates.estimate_transfer(hardware=hardware_of(hardware), **arguments)


def load_model(*, hardware: Hardware = "cloudmatrix384", **arguments: Any) -> Answer:
    """See `fabric_estimates.estimate_load_model`."""
    return fabric_estimates.estimate_load_model(hardware=hardware_of(hardware), **arguments)


def switches(*, hardware: Hardware = "cloudmatrix384", npus: int) -> Answer:
    """See `fabric_estimates.estimate_switches`."""
    return fabric_estimates.estimate_switches(hardware=hardware_of(hardware), npus=npus)


ESTIMATES: Mapping[str, Callable[..., Answer]] = {
    "decode": decode,
    "prefill": prefill,
    "dispatch": dispatch,
    "combine": combine,
    "gemm": gemm,
    "attention": attention,
    "transfer": transfer,
    "load_model": load_model,
    "switches": switches,
}


def hardware_of(hardware: Hardware) -> SupernodeSpec:
    """Raises ConfigError naming the file or the field."""
    if isinstance(hardware, str):
        return _named_hardware(hardware)
    return SupernodeSpec.from_dict(hardware)


def model_of(model: str) -> ModelConfig:
    """Raises ConfigError naming the file or the field."""
    return _named_model(model)


@lru_cache(maxsize=8)
def _named_hardware(name: str) -> SupernodeSpec:
    spec: SupernodeSpec = _part(name, "hardware", SupernodeSpec.from_dict)
    return spec


@lru_cache(maxsize=8)
def _named_model(name: str) -> ModelConfig:
    shape: ModelConfig = _part(name, "model", ModelConfig.from_dict)
    return shape


def _part(name: str, folder: str, parse: Callable[[dict[str, Any]], Any]) -> Any:
    path = name if name.endswith((".yaml", ".yml", ".json")) else f"{folder}/{name}.yaml"
    try:
        return parse(load_part(path))
    except ConfigError as error:
        raise ConfigError(f"{folder}: {error}") from None
    except ValueError as error:
        raise ConfigError(f"{folder} {path}: {error}") from None


def _layout(shape: ModelConfig, ep: int) -> ExpertDeployment:
    try:
        return ExpertDeployment.published(shape, ep=ep)
    except ValueError as error:
        raise ConfigError(f"ep: {error}") from None


def _check_fits(
    spec: SupernodeSpec,
    shape: ModelConfig,
    layout: ExpertDeployment,
    *,
    is_prefill: bool,
    step_tokens: int,
    cached_tokens: int,
    has_mtp: bool,
) -> None:
    if layout.ep > spec.num_dies:
        raise ConfigError(f"ep: {layout.ep}, {spec.name} has {spec.num_dies} dies")
    memory = die_memory(
        shape,
        layout,
        spec.rates,
        is_prefill=is_prefill,
        step_tokens=step_tokens,
        cache_bytes=cached_tokens * work.kv_bytes_per_token(shape, include_mtp=has_mtp),
        has_mtp=has_mtp,
    )
    hbm_bytes = spec.npu.die.hbm_bytes
    if memory.used_bytes > hbm_bytes:
        raise ConfigError(
            f"does not fit in HBM: {memory.weight_bytes / GIB:.1f} GiB of weights + "
            f"{memory.buffer_bytes / GIB:.1f} GiB of buffers + {memory.cache_bytes / GIB:.1f} GiB of latent cache = "
            f"{memory.used_bytes / GIB:.1f} GiB, a die of {spec.name} has {hbm_bytes / GIB:.1f} GiB"
        )


def _pool_load_s(spec: SupernodeSpec, shape: ModelConfig, tokens: float, plane: str) -> float:
    """Cached latents of `tokens` per die, read by all dies at once; a node's dies share its VPC port."""
    if plane == "none" or not tokens:
        return 0.0
    if plane not in ("ub", "vpc"):
        raise ConfigError(f"pool_plane: {plane!r} is none of ub, vpc, none")
    told = spec.planes[plane]  # type: ignore[index]
    path = told.paths.get(("npu_host", "read", "inter"))
    if path is None:
        raise ConfigError(f"pool_plane: {plane} of {spec.name} joins no hosts of other nodes, so it reaches no pool")
    bytes_per_s = min(path.bytes_per_s, spec.rates.pool_read_bytes_per_s)
    if told.port_owner == "node":
        share = told.die_port_bytes_per_s / (spec.npus_per_node * spec.npu.num_dies)
        bytes_per_s = min(bytes_per_s, share * spec.fitted.pool_vpc_efficiency)
    return tokens * work.kv_bytes_per_token(shape) / bytes_per_s + path.latency_ns * 1e-9


def _exchange(hardware: Hardware, model: str, operator: str, ep: int, tokens: int, near: EpNear | None) -> Answer:
    spec, shape = hardware_of(hardware), model_of(model)
    if near is not None:
        spec = replace(spec, rates=replace(spec.rates, ep_near=near))
    _at_least(2, ep=ep)
    _at_least(1, tokens=tokens)
    # Every die has its shared expert, so that a token is sent to the chosen experts alone, as in the published table.
    slots = ep * math.ceil(shape.n_routed_experts / ep)
    experts = ExpertParallel(shape, spec, ExpertDeployment(ep=ep, num_router_slots=slots, num_shared_slots=0))
    aiv = spec.npu.die.num_aiv
    if operator == "dispatch":
        seconds = experts.dispatch(tokens, aiv=aiv)
        message_bytes = work.dispatch_message_bytes(shape, scale_bytes=spec.rates.ep_scale_bytes)
    else:
        seconds, message_bytes = experts.combine(tokens, aiv=aiv), work.combine_message_bytes(shape)
    num_bytes = tokens * shape.num_experts_per_tok * message_bytes * spec.rates.ep_wire_factor
    return {"latency_us": seconds * 1e6, "bandwidth_gb_per_s": num_bytes / seconds / GB}


def _breakdown(step: StepDetail) -> Answer:
    return {"breakdown": {name: seconds * 1e3 for name, seconds in step.exposed.items() if seconds}}


def _per_tflops(spec: SupernodeSpec, tokens_per_s: float) -> float:
    return tokens_per_s / (spec.npu.num_dies * spec.npu.die.int8_flops_per_s / 1e12)


def _at_least(least: int, **values: float) -> None:
    for name, value in values.items():
        if value < least:
            raise ConfigError(f"{name}: {value} must be at least {least}")


def _share(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ConfigError(f"{name}: {value} must be from 0 to 1")


def _is_on(**values: str) -> bool:
    ((name, value),) = values.items()
    if value not in ("on", "off"):
        raise ConfigError(f"{name}: {value!r} is neither on nor off")
    return value == "on"
