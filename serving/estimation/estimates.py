"""What-if questions to the time model, answered with JSON-ready dictionaries: steps, and the registry of all questions.

Owns: the units and keys of the answers about decode and prefill, the work of a steady state.
Must not know: command lines, what published figures cover, formulas of operators (devices/).
Source: throughput = batch / TPOT and 1 + acceptance tokens per iteration, as in tables 4 and 5 of arXiv 2506.12708v2;
batch and throughput per NPU, which has two dies; degrees count dies.
"""

from collections.abc import Callable, Mapping
from typing import Literal, get_args

from devices.pipeline import StepDetail, StepTimeModel, StepWork
from devices.spec import SupernodeSpec
from model import work
from model.config import ModelConfig
from serving.core.expert_load_model import Balance
from serving.errors import ConfigError
from serving.estimation.estimate_inputs import (
    Hardware,
    Switch,
    check_choice,
    check_counts,
    check_dies,
    check_instance_fits,
    check_shares,
    check_size,
    hardware_of,
    is_on,
    layout_of,
    model_of,
)
from serving.estimation.fabric_estimates import estimate_load_model, estimate_switches, estimate_transfer
from serving.estimation.operator_estimates import Answer, attention, combine, dispatch, gemm
from serving.expert_balance import with_imbalance

PoolPlane = Literal["ub", "vpc", "none"]


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
    skew: float | None = None,
    attention_aic: int | None = None,
    mtp_pipelined: Switch = "on",
) -> Answer:
    """A decode iteration of `batch_per_npu` requests with `kv_len` tokens each, on every NPU of an instance.

    Keys: tpot_ms, tokens_per_s_per_npu, tokens_per_s_per_tflops (of the INT8 or FP8 peak), iteration_ms, layer_us
    (one mixture layer), attention_stream_us and moe_stream_us (one microbatch; without microbatches the whole batch),
    attention_aic (cube cores of the attention stream, None without streams), breakdown (ms that each operator adds to
    the iteration, `stream.operator` within layers), streams (us that each operator takes in one mixture layer, hidden
    behind another stream or not, all microbatches together).
    `skew` of the experts' load in shares of the load generator's; None: as serving/expert_balance.py has it.
    `mtp` drafts per step, each accepted with probability `acceptance` if those before it were.
    Raises ConfigError, with the sum, if a die's HBM cannot hold it.
    """
    spec, shape = hardware_of(hardware), model_of(model)
    check_counts(1, batch_per_npu=batch_per_npu, kv_len=kv_len, ep=ep)
    check_counts(0, mtp=mtp)
    check_shares(acceptance=acceptance)
    check_choice("balance", balance, get_args(Balance))
    if skew is not None:
        check_size(skew=skew)
    check_counts(1, attention_aic=attention_aic)
    if attention_aic is not None and attention_aic >= spec.npu.die.num_aic:
        raise ConfigError(
            f"attention_aic: {attention_aic} must leave some of the {spec.npu.die.num_aic} cube cores of a die"
        )
    if attention_aic is not None and (spec.rates.decode_overlap != "cores" or not is_on(microbatch=microbatch)):
        raise ConfigError(
            f"attention_aic: {attention_aic} needs streams with cores of their own: microbatch on, and a machine that "
            f"splits its cores, as {spec.name} {'does' if spec.rates.decode_overlap == 'cores' else 'does not'}"
        )
    _check_module(mtp, shape, model)
    layout = layout_of(shape, ep)
    # An odd batch gives the dies of an NPU different numbers of requests.
    dies = spec.npu.num_dies
    batches = [batch_per_npu // dies + (die < batch_per_npu % dies) for die in range(dies)]
    check_dies(spec, ep)
    check_instance_fits(
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
        deployment=with_imbalance(layout, shape, spec.fitted, role="decode", balance=balance, skew=skew),
        microbatch=is_on(microbatch=microbatch),
        num_speculative_tokens=mtp,
        mtp_pipelined=is_on(mtp_pipelined=mtp_pipelined),
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
        "breakdown": _breakdown_ms(step),
        "streams": _streams_us(step),
    }


def prefill(
    *,
    hardware: Hardware = "cloudmatrix384",
    model: str = "deepseek-r1",
    prompt_len: int = 4096,
    tokens_per_npu: int = 16384,
    ep: int = 32,
    mtp: int = 0,
    microbatch: Switch = "on",
    balance: Balance = "eplb",
    skew: float | None = None,
    reuse: float = 0.0,
    pool_plane: PoolPlane = "ub",
) -> Answer:
    """A batch of prompts, `tokens_per_npu` on every NPU of an instance, of which the share `reuse` is in the pool.

    Keys: ttft_ms (load and batch, without queueing), tokens_per_s_per_npu (reused tokens count),
    tokens_per_s_per_tflops, layer_us, pool_load_ms, breakdown and streams as of decode; the breakdown adds up to
    ttft_ms. With `pool_plane` none there is no pool: all is computed, whatever `reuse` says.
    With `mtp` 1 the MTP module runs over the prompts too, so that decode finds its latents; it drafts nothing here.
    Raises ConfigError, with the sum, if a die's HBM cannot hold it.
    """
    spec, shape = hardware_of(hardware), model_of(model)
    check_counts(1, prompt_len=prompt_len, tokens_per_npu=tokens_per_npu, ep=ep)
    check_counts(0, mtp=mtp)
    if mtp > 1:
        raise ConfigError(f"mtp: {mtp} must be at most 1 in prefill, which runs the module once")
    _check_module(mtp, shape, model)
    check_shares(reuse=reuse)
    check_choice("balance", balance, get_args(Balance))
    if skew is not None:
        check_size(skew=skew)
    check_choice("pool_plane", pool_plane, get_args(PoolPlane))
    check_dies(spec, ep)
    layout = layout_of(shape, ep)
    dies = spec.npu.num_dies
    tokens = tokens_per_npu * ep / dies  # of the instance
    is_split = spec.rates.prefill_attention == "split"
    most, where = (tokens, f"{ep / dies:g} NPUs") if is_split else (tokens_per_npu / dies, "a rank, which has it whole")
    if prompt_len > most:
        raise ConfigError(
            f"prompt_len: {prompt_len} exceeds the batch of {most:g} tokens: tokens_per_npu {tokens_per_npu} on {where}"
        )
    prompts = tokens / prompt_len
    cached = 0 if pool_plane == "none" else min(round(prompt_len * reuse), prompt_len - 1)  # the last one is computed
    new = prompt_len - cached
    check_instance_fits(
        spec,
        shape,
        layout,
        is_prefill=True,
        step_tokens=tokens_per_npu / dies,
        # Every die has the latents of all prompts, or those of its own.
        cached_tokens=tokens if is_split else tokens_per_npu / dies,
        has_mtp=mtp > 0,
    )
    step = StepTimeModel(
        shape,
        spec,
        role="prefill",
        deployment=with_imbalance(layout, shape, spec.fitted, role="prefill", balance=balance, skew=skew),
        microbatch=is_on(microbatch=microbatch),
        num_speculative_tokens=mtp,
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
    cached_bytes = tokens_per_npu / dies * cached / prompt_len * work.kv_bytes_per_token(shape, include_mtp=mtp > 0)
    load_s = _pool_load_s(spec, cached_bytes, pool_plane)
    seconds = load_s + step.seconds
    breakdown = _breakdown_ms(step)
    if load_s:
        breakdown["pool_load"] = load_s * 1e3
    return {
        "ttft_ms": seconds * 1e3,
        "tokens_per_s_per_npu": tokens_per_npu / seconds,
        "tokens_per_s_per_tflops": _per_tflops(spec, tokens_per_npu / seconds),
        "layer_us": step.layer_s * 1e6,
        "pool_load_ms": load_s * 1e3,
        "breakdown": breakdown,
        "streams": _streams_us(step),
    }


ESTIMATES: Mapping[str, Callable[..., Answer]] = {
    "decode": decode,
    "prefill": prefill,
    "dispatch": dispatch,
    "combine": combine,
    "gemm": gemm,
    "attention": attention,
    "transfer": estimate_transfer,
    "load_model": estimate_load_model,
    "switches": estimate_switches,
}


def _check_module(mtp: int, shape: ModelConfig, model: str) -> None:
    if mtp and not shape.num_nextn_predict_layers:
        raise ConfigError(f"mtp: {mtp}, but model {model} has no MTP module")


def _pool_load_s(spec: SupernodeSpec, num_bytes: float, plane: PoolPlane) -> float:
    """Cached latents, so many bytes per die, read by all dies at once; a node's dies share its VPC port."""
    if plane == "none" or not num_bytes:
        return 0.0
    told = spec.planes[plane]
    path = told.paths.get(("npu_host", "read", "inter"))
    if path is None:
        raise ConfigError(f"pool_plane: {plane} of {spec.name} has no path from a host's memory")
    bytes_per_s = min(path.bytes_per_s, spec.rates.pool_read_bytes_per_s)
    if told.port_owner == "node":
        share = told.die_port_bytes_per_s / (spec.npus_per_node * spec.npu.num_dies)
        bytes_per_s = min(bytes_per_s, share * spec.fitted.pool_vpc_efficiency)
    return num_bytes / bytes_per_s + path.latency_ns * 1e-9


def _breakdown_ms(step: StepDetail) -> dict[str, float]:
    return {name: seconds * 1e3 for name, seconds in step.exposed.items() if seconds}


def _streams_us(step: StepDetail) -> dict[str, dict[str, float]]:
    return {
        stream: {name: seconds * 1e6 for name, seconds in parts.items() if seconds}
        for stream, parts in step.streams.items()
    }


def _per_tflops(spec: SupernodeSpec, tokens_per_s: float) -> float:
    return tokens_per_s / (spec.npu.num_dies * spec.npu.die.int8_flops_per_s / 1e12)
