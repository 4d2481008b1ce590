"""Time of one DeepSeek-V3/R1 step on H100 or H200, put together from measured operators alone.

Owns: which operators a layer and a step consist of, and how two microbatches overlap.
Must not know: requests, published throughputs. There is no fitted constant here.
Source: operators from devices/measured_tables.py; shapes from DeepSeek-V3's config.json; overlap of two microbatches
from github.com/deepseek-ai/profile-data and DeepEP's README (low latency: a hook receives without SMs; normal:
kernels hold SMs).

A layer's operators are compute C (attention, gate, shared expert, experts) or communication M (dispatch, combine). Two
microbatches take turns on both, so that in the steady state a layer takes, with C and M of both microbatches together,

    decode    max(C, M)              the hook of DeepEP's low-latency kernels leaves every SM to compute
    prefill   max(C + s M, M)        normal kernels hold the share s of the SMs while they run

Without overlap it takes C + M on the whole batch. Dense layers, the MTP projection and the head overlap with nothing.
Not measured, hence not counted: norms and residuals between modules, SwiGLU of the shared expert and dense layers,
top-k selection, sampling, launch gaps and the host, the wait for a slower rank, the pipeline's ramp at both ends.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from devices.measured_tables import MeasuredTables, UnknownEntry
from devices.table_files import GPUS_PER_NODE

__all__ = ["BALANCE", "Balance", "MeasuredStep", "decode_step", "nodes_of", "prefill_step"]

Balance = Literal["balanced", "eplb", "none"]

HIDDEN, HEADS, VOCAB = 7168, 128, 129280  # DeepSeek-V3's config.json
NUM_LAYERS, NUM_DENSE_LAYERS, DENSE_INTERMEDIATE = 61, 3, 18432  # DeepSeek-V3's config.json
NUM_EXPERTS, MOE_INTERMEDIATE = 256, 2048  # DeepSeek-V3's config.json

NUM_SMS = 132  # NVIDIA H100 and H200 SXM5 datasheets
DEEPEP_SMS = 20  # DeepEP: default of Buffer.num_sms

# Routing of the measured expert tables, by the load of the hottest of 32 ranks over the mean as it shows in times of
# the compute-bound prefill table (16,384 tokens per rank): 2.56 under power_law_1.01, 1.68 under power_law_0.6.
# DeepSeek-R1 has 2.56 without EPLB, 1.11 with it (TensorRT-LLM tech blog 4, table 1): 0.6 is the mildest measured skew.
BALANCE: Mapping[Balance, str] = {"balanced": "uniform", "eplb": "power_law_0.6", "none": "power_law_1.01"}


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredStep:
    """What a step takes, in seconds; `breakdown_s` adds up to `seconds`.

    Each part is the busy time of one operator in all layers and microbatches, and `hidden_by_overlap` is what of them
    runs at the same time, below zero.
    """

    seconds: float
    moe_layer_s: float
    breakdown_s: Mapping[str, float]


def decode_step(
    tables: MeasuredTables,
    *,
    batch_per_gpu: float,
    kv_len: float,
    ep: int,
    mtp: bool,
    overlap: bool,
    balance: Balance,
    kv_dtype: str = "bfloat16",
) -> MeasuredStep:
    """One decode step of `batch_per_gpu` requests with `kv_len` tokens each, the new one included.

    Attention is data parallel.
    `mtp`: every request has two query tokens, which count as two requests to attention (its table has one query token;
    at 128 heads the H100 kernel is compute-bound, so that reading the cache twice costs little), and one more layer
    of the MTP module with its projection and a head follows.
    Raises OutOfGrid, UnknownEntry, TablesUnavailable.
    """
    nodes, distribution = nodes_of(ep), _distribution(balance)
    rows = batch_per_gpu * (2 if mtp else 1)
    num_microbatches = 2 if overlap else 1
    tokens = rows / num_microbatches
    attention = tables.seconds(
        "mla_decode_module", batch=tokens, kv_len=kv_len, heads=HEADS, kv_dtype=kv_dtype, gemm_dtype="fp8_block"
    )
    low_latency = {"nodes": nodes, "tokens": tokens, "experts": NUM_EXPERTS}
    moe_layer = {
        "attention": attention,
        "gate": _gate(tables, tokens),
        "shared_expert": _mlp(tables, tokens, MOE_INTERMEDIATE),
        "experts": tables.seconds("moe_decode", ep=ep, tokens=tokens, distribution=distribution),
        "dispatch": tables.seconds("dispatch_low_latency", **low_latency),
        "combine": tables.seconds("combine_low_latency", **low_latency),
    }
    extra = {"lm_head": _lm_head(tables, rows)}
    if mtp:
        # eh_proj: the token's embedding and the hidden state side by side to one hidden state.
        extra["mtp_projection"] = _gemm(tables, m=rows, n=HIDDEN, k=2 * HIDDEN)
        extra["lm_head"] *= 2
    return _step(
        moe_layer,
        dense_mlp_s=_mlp(tables, tokens, DENSE_INTERMEDIATE),
        num_moe_layers=NUM_LAYERS - NUM_DENSE_LAYERS + (1 if mtp else 0),
        num_microbatches=num_microbatches,
        held_sms=0.0,
        extra=extra,
    )


def prefill_step(
    tables: MeasuredTables,
    *,
    prompt_len: float,
    tokens_per_gpu: float,
    ep: int,
    overlap: bool,
    balance: Balance,
    kv_dtype: str = "bfloat16",
    sms: float = DEEPEP_SMS,
) -> MeasuredStep:
    """One prefill step of whole prompts, `tokens_per_gpu` in all. Attention is data parallel; DeepEP runs on `sms` SMs.

    Raises OutOfGrid, UnknownEntry, TablesUnavailable.
    """
    nodes, distribution = nodes_of(ep), _distribution(balance)
    num_microbatches = 2 if overlap else 1
    tokens = tokens_per_gpu / num_microbatches
    attention = tables.seconds(
        "mla_prefill_module",
        batch=tokens / prompt_len,
        prompt_len=prompt_len,
        heads=HEADS,
        kv_dtype=kv_dtype,
        gemm_dtype="fp8_block",
    )
    moe_layer = {
        "attention": attention,
        "gate": _gate(tables, tokens),
        "shared_expert": _mlp(tables, tokens, MOE_INTERMEDIATE),
        "experts": tables.seconds("moe_prefill", ep=ep, tokens=tokens, distribution=distribution),
        "dispatch": tables.seconds("dispatch_normal", nodes=nodes, sms=sms, tokens=tokens),
        "combine": tables.seconds("combine_normal", nodes=nodes, sms=sms, tokens=tokens),
    }
    return _step(
        moe_layer,
        dense_mlp_s=_mlp(tables, tokens, DENSE_INTERMEDIATE),
        num_moe_layers=NUM_LAYERS - NUM_DENSE_LAYERS,
        num_microbatches=num_microbatches,
        held_sms=sms / NUM_SMS,
        extra={"lm_head": _lm_head(tables, tokens_per_gpu / prompt_len)},
    )


def nodes_of(ep: int) -> int:
    """Nodes of `ep` GPUs. The DeepEP tables were taken with all GPUs of each node, so ValueError for other degrees."""
    if ep < 1 or ep % GPUS_PER_NODE:
        raise ValueError(f"ep {ep} is not a multiple of the {GPUS_PER_NODE} GPUs of a node, as DeepEP was measured")
    return ep // GPUS_PER_NODE


def _distribution(balance: Balance) -> str:
    if balance not in get_args(Balance):
        raise UnknownEntry("measured step", "balance", balance, get_args(Balance))
    return BALANCE[balance]


def _step(
    moe_layer: Mapping[str, float],
    *,
    dense_mlp_s: float,
    num_moe_layers: int,
    num_microbatches: int,
    held_sms: float,
    extra: Mapping[str, float],
) -> MeasuredStep:
    """Layers and what is outside them; `moe_layer` holds the operators of one microbatch."""
    communication_s = num_microbatches * (moe_layer["dispatch"] + moe_layer["combine"])
    busy_s = num_microbatches * sum(moe_layer.values())
    layer_s = busy_s
    if num_microbatches > 1:
        layer_s = max(busy_s - communication_s + held_sms * communication_s, communication_s)
    breakdown = {name: num_moe_layers * num_microbatches * seconds for name, seconds in moe_layer.items()}
    breakdown["attention"] += NUM_DENSE_LAYERS * num_microbatches * moe_layer["attention"]
    breakdown["dense_mlp"] = NUM_DENSE_LAYERS * num_microbatches * dense_mlp_s
    breakdown.update(extra)
    breakdown["hidden_by_overlap"] = num_moe_layers * (layer_s - busy_s)
    return MeasuredStep(seconds=sum(breakdown.values()), moe_layer_s=layer_s, breakdown_s=breakdown)


def _gemm(tables: MeasuredTables, *, m: float, n: int, k: int) -> float:
    """FP8 product; a wider or deeper one than was measured is cut into equal pieces that were, one after the other."""
    n_pieces = math.ceil(n / tables.limits("gemm_fp8", "n")[1])
    k_pieces = math.ceil(k / tables.limits("gemm_fp8", "k")[1])
    return n_pieces * k_pieces * tables.seconds("gemm_fp8", m=m, n=n / n_pieces, k=k / k_pieces)


def _mlp(tables: MeasuredTables, tokens: float, intermediate: int) -> float:
    gate_and_up = _gemm(tables, m=tokens, n=2 * intermediate, k=HIDDEN)
    return gate_and_up + _gemm(tables, m=tokens, n=HIDDEN, k=intermediate)


def _gate(tables: MeasuredTables, tokens: float) -> float:
    return _bf16_gemm(tables, m=tokens, n=NUM_EXPERTS, k=HIDDEN)


def _lm_head(tables: MeasuredTables, rows: float) -> float:
    """Logits on every GPU for its own rows."""
    return _bf16_gemm(tables, m=rows, n=VOCAB, k=HIDDEN)


def _bf16_gemm(tables: MeasuredTables, *, m: float, n: int, k: int) -> float:
    """BF16 product as FP8 with twice the columns: as many weight bytes, and as many cycles at half the peak rate."""
    return _gemm(tables, m=m, n=2 * n, k=k)
