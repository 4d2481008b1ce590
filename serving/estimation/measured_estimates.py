"""What-if questions to measured H100 and H200 operators, answered with JSON-ready dictionaries.

Owns: how measured operators answer, under the arguments and keys of the time model (serving/estimation/estimates.py,
operator_estimates.py), and what is said about their reach. An NPU here is one GPU, with one die.
Must not know: command lines, how steps are put together (devices/measured_step.py).
Source: throughput = batch * tokens per step / step time; peak rate and message bytes are the machine's
description's (configs/hardware/), sizes the model's.

Every function raises TableError (a ValueError) where the tables do not reach; nothing is extrapolated. ConfigError is
for what no machine can do.
"""

from collections.abc import Callable, Mapping
from typing import Any, get_args

from devices.measured_step import BALANCE, Balance, MeasuredStep, decode_step, nodes_of, prefill_step
from devices.measured_tables import MeasuredTables
from model import work
from serving.errors import ConfigError
from serving.estimation.coverage import Coverage
from serving.estimation.estimate_inputs import (
    Switch,
    check_choice,
    check_counts,
    check_instance_fits,
    check_shares,
    hardware_of,
    is_on,
    layout_of,
    model_of,
)

__all__ = ["MEASURED", "measured_combine", "measured_decode", "measured_dispatch", "measured_gemm", "measured_prefill"]

MODEL = "deepseek-r1"  # whose shapes were measured

NOT_COUNTED = "not in the tables, hence not counted: norms, SwiGLU outside experts, top-k, sampling, launch gaps, host"
SAME_NETWORK = "DeepEP across nodes: one measurement stands for H100 and H200, with balanced routing"
SLOW_EIGHT_NODES = (
    "DeepEP normal on 8 nodes was measured at about 3 times the dispatch time of 4 nodes, with erratic waits"
)
DOUBLED_BATCH = "two query tokens per request are taken as two requests by attention, which reads the cache twice"


def measured_decode(
    tables: MeasuredTables,
    *,
    batch_per_npu: int,
    kv_len: int,
    ep: int,
    mtp: int,
    acceptance: float,
    microbatch: Switch,
    balance: Balance,
) -> dict[str, Any]:
    """A decode step of `batch_per_npu` requests with `kv_len` tokens each on every GPU of `ep`.

    `acceptance` is the share of drafts that count, used with `mtp` 1 only. Keys: tpot_ms, tokens_per_s_per_npu,
    tokens_per_s_per_tflops (of the FP8 peak), iteration_ms, layer_us (one layer with experts), breakdown (ms by
    operator, adding up to the iteration; what overlap hides is below zero), coverage.
    """
    check_counts(1, batch_per_npu=batch_per_npu, kv_len=kv_len, ep=ep)
    check_counts(0, mtp=mtp)
    check_shares(acceptance=acceptance)
    check_choice("balance", balance, get_args(Balance))
    if mtp > 1:
        raise ConfigError(f"mtp: {mtp} must be at most 1 with measured tables")
    overlap, shape = is_on(microbatch=microbatch), model_of(MODEL)
    check_instance_fits(
        hardware_of(tables.gpu),
        shape,
        layout_of(shape, ep),
        is_prefill=False,
        step_tokens=batch_per_npu * (1 + mtp),
        cached_tokens=batch_per_npu * kv_len,
        has_mtp=mtp > 0,
    )
    step = decode_step(
        tables, batch_per_gpu=batch_per_npu, kv_len=kv_len, ep=ep, mtp=mtp > 0, overlap=overlap, balance=balance
    )
    tokens_per_step = 1 + acceptance * mtp
    notes = [NOT_COUNTED, SAME_NETWORK, _routing(balance), *([DOUBLED_BATCH] if mtp else [])]
    return {
        "tpot_ms": step.seconds * 1e3 / tokens_per_step,
        **_throughput(tables, batch_per_npu * tokens_per_step / step.seconds),
        "iteration_ms": step.seconds * 1e3,
        **_step_answer(step, notes),
    }


def measured_prefill(
    tables: MeasuredTables,
    *,
    prompt_len: int,
    tokens_per_npu: int,
    ep: int,
    microbatch: Switch,
    balance: Balance,
) -> dict[str, Any]:
    """A prefill step of whole prompts, `tokens_per_npu` on every GPU of `ep`.

    Keys: ttft_ms (the step alone, without queueing), tokens_per_s_per_npu, tokens_per_s_per_tflops, layer_us, breakdown
    (ms, adding up to ttft_ms), coverage.
    """
    check_counts(1, prompt_len=prompt_len, tokens_per_npu=tokens_per_npu, ep=ep)
    check_choice("balance", balance, get_args(Balance))
    shape = model_of(MODEL)
    check_instance_fits(
        hardware_of(tables.gpu),
        shape,
        layout_of(shape, ep),
        is_prefill=True,
        step_tokens=tokens_per_npu,
        cached_tokens=tokens_per_npu,  # attention is data parallel
        has_mtp=False,
    )
    step = prefill_step(
        tables,
        prompt_len=prompt_len,
        tokens_per_gpu=tokens_per_npu,
        ep=ep,
        overlap=is_on(microbatch=microbatch),
        balance=balance,
    )
    notes = [NOT_COUNTED, SAME_NETWORK, _routing(balance), *([SLOW_EIGHT_NODES] if nodes_of(ep) > 4 else [])]
    return {
        "ttft_ms": step.seconds * 1e3,
        **_throughput(tables, tokens_per_npu / step.seconds),
        **_step_answer(step, notes),
    }


def measured_gemm(tables: MeasuredTables, *, groups: int, m: int, n: int, k: int) -> dict[str, Any]:
    """`groups` FP8 products of m x k by k x n with BF16 output, one after the other.

    Keys: time_us, tops, utilization (of the dense FP8 peak), bandwidth_gb_per_s (inputs, weights and output once),
    coverage.
    """
    check_counts(1, groups=groups, m=m, n=n, k=k)
    seconds = groups * tables.seconds("gemm_fp8", m=m, n=n, k=k)
    flops_per_s = groups * 2 * m * n * k / seconds
    notes = ["single products were measured: a grouped kernel can overlap its groups"] if groups > 1 else []
    return {
        "time_us": seconds * 1e6,
        "tops": flops_per_s * 1e-12,
        "utilization": flops_per_s / _fp8_flops_per_s(tables),
        "bandwidth_gb_per_s": groups * (m * k + n * k + 2 * m * n) / seconds * 1e-9,
        "coverage": _inside(notes),
    }


def measured_dispatch(tables: MeasuredTables, *, ep: int, tokens: int) -> dict[str, Any]:
    """DeepEP's low-latency dispatch of `tokens` per GPU to 256 experts, top-8, FP8.

    Keys: latency_us, bandwidth_gb_per_s (bytes sent by one GPU), coverage.
    """
    scale_bytes = hardware_of(tables.gpu).rates.ep_scale_bytes
    message_bytes = work.dispatch_message_bytes(model_of(MODEL), scale_bytes=scale_bytes)
    return _exchange(tables, "dispatch_low_latency", ep, tokens, message_bytes)


def measured_combine(tables: MeasuredTables, *, ep: int, tokens: int) -> dict[str, Any]:
    """DeepEP's low-latency combine, the way back in BF16, with the same keys."""
    return _exchange(tables, "combine_low_latency", ep, tokens, work.combine_message_bytes(model_of(MODEL)))


def _exchange(tables: MeasuredTables, operator: str, ep: int, tokens: int, message_bytes: int) -> dict[str, Any]:
    check_counts(1, ep=ep, tokens=tokens)
    shape = model_of(MODEL)
    seconds = tables.seconds(operator, nodes=nodes_of(ep), tokens=tokens, experts=shape.n_routed_experts)
    return {
        "latency_us": seconds * 1e6,
        "bandwidth_gb_per_s": tokens * shape.num_experts_per_tok * message_bytes / seconds * 1e-9,
        "coverage": _inside([SAME_NETWORK]),
    }


def _throughput(tables: MeasuredTables, tokens_per_s: float) -> dict[str, float]:
    return {
        "tokens_per_s_per_npu": tokens_per_s,
        "tokens_per_s_per_tflops": tokens_per_s / (_fp8_flops_per_s(tables) / 1e12),
    }


def _fp8_flops_per_s(tables: MeasuredTables) -> float:
    npu = hardware_of(tables.gpu).npu
    return npu.num_dies * npu.die.int8_flops_per_s


def _step_answer(step: MeasuredStep, notes: list[str]) -> dict[str, Any]:
    return {
        "layer_us": step.moe_layer_s * 1e6,
        "breakdown": {name: seconds * 1e3 for name, seconds in step.breakdown_s.items() if seconds},
        "coverage": _inside(notes),
    }


def _routing(balance: Balance) -> str:
    return f"experts: the hottest rank under routing {BALANCE[balance]}, which stands for balance {balance}"


def _inside(notes: list[str]) -> dict[str, Any]:
    return Coverage(notes=notes).as_json()


MEASURED: Mapping[str, Callable[..., dict[str, Any]]] = {
    "decode": measured_decode,
    "prefill": measured_prefill,
    "dispatch": measured_dispatch,
    "combine": measured_combine,
    "gemm": measured_gemm,
}
