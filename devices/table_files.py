"""What the columns of each measured table mean, and where its file lies.

Owns: the reading of every table: which rows are DeepSeek-V3's, which columns are sizes, in which unit, per rank or
global.
Must not know: how files are read (devices/measured_tables.py), how operators form a step (devices/measured_step.py).
Source: ai-dynamo/aiconfigurator, `systems/data` and, for the meaning of columns, `collector/` (Apache-2.0).
docs/timing_tables.md gives the evidence for each reading.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

__all__ = ["GPUS_PER_NODE", "OPERATORS", "TableFile"]

Row: TypeAlias = Mapping[str, Any]
Column: TypeAlias = Callable[[Row], Any]

GPUS_PER_NODE = 8  # HGX H100 and H200: the multi-node DeepEP tables were taken with 8 processes per node
MILLISECOND, MICROSECOND = 1e-3, 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class TableFile:
    """One operator: its file in both layouts, the rows that count, and the meaning of columns.

    `file` completes aic_dsv3_{gpu}_{file}.parquet in a folder of extracts, `package_file` is relative to {gpu}_sxm in
    the package. A row counts if it has the values of `rows`, as far as the file has those columns. `categories` must
    match exactly; between `sizes` we interpolate. The columns `values` are added.
    """

    file: str
    package_file: str
    rows: Mapping[str, Any] = field(default_factory=dict)
    categories: Mapping[str, Column] = field(default_factory=dict)
    sizes: Mapping[str, Column]
    values: tuple[str, ...] = ("latency",)
    unit_s: float = MILLISECOND


def _column(name: str) -> Column:
    return lambda row: row[name]


def _kv_len_before(row: Row) -> int:
    """The kernel's `step` is the history before the token: its grid is 1, 3, 7, ..., 131071."""
    return int(row["step"]) + 1


def _tokens_per_rank(row: Row) -> float:
    """Global tokens over ranks: with DeepEP the collector multiplies a rank's batch by the EP degree."""
    return float(row["num_tokens"] / row["moe_ep_size"])


DEEPSEEK_MOE = {"moe_dtype": "fp8_block", "hidden_size": 7168, "inter_size": 2048, "topk": 8, "num_experts": 256}
MODULE = {"mla_dtype": "bfloat16", "model": "deepseek-ai/DeepSeek-V3"}
MODULE_CATEGORIES = {
    "heads": _column("num_heads"),
    "kv_dtype": _column("kv_cache_dtype"),
    "gemm_dtype": _column("gemm_type"),
}
DISTRIBUTION = {"distribution": _column("distribution")}
DEEPEP_MOE_SIZES = {"ep": _column("moe_ep_size"), "tokens": _tokens_per_rank}
GLOBAL_MOE_SIZES = {"ep": _column("moe_ep_size"), "global_tokens": _column("num_tokens")}


def _low_latency(value: str) -> TableFile:
    return TableFile(
        file="deepep_ll_1to8nodes",
        package_file="comm/sglang/0.5.6.post2/wideep_deepep_ll_perf",
        rows={"hidden_size": 7168, "num_topk": 8},
        categories={"experts": _column("num_experts")},
        sizes={"nodes": _column("node_num"), "tokens": _column("num_token")},
        values=(value,),
        unit_s=MICROSECOND,
    )


def _low_latency_one_node(value: str) -> TableFile:
    return TableFile(
        file="deepep_ll_1node",
        package_file="comm/sglang/0.5.12/wideep_deepep_ll_perf",
        rows={"hidden_size": 7168, "node_num": 1},
        categories={"experts": _column("num_experts"), "topk": _column("num_topk")},
        sizes={"tokens": _column("num_token")},
        values=(value,),
        unit_s=MICROSECOND,
    )


def _normal(phase: str) -> TableFile:
    return TableFile(
        file="deepep_normal_1to8nodes",
        package_file="comm/sglang/0.5.6.post2/wideep_deepep_normal_perf",
        rows={"hidden_size": 7168, "num_topk": 8, "num_experts": 256},
        sizes={"nodes": _column("node_num"), "sms": _column(f"{phase}_sms"), "tokens": _column("num_token")},
        values=(f"{phase}_transmit_us", f"{phase}_notify_us"),
        unit_s=MICROSECOND,
    )


OPERATORS: Mapping[str, TableFile] = {
    "gemm_fp8": TableFile(
        file="gemm_fp8",
        package_file="gemm/sglang/0.5.14/gemm_perf",
        rows={"gemm_dtype": "fp8_block"},
        sizes={"m": _column("m"), "n": _column("n"), "k": _column("k")},
    ),
    "mla_decode_kernel": TableFile(
        file="mla_decode_kernel",
        package_file="mla/sglang/0.5.14/generation_mla_perf",
        rows={"num_heads": 128, "tp_size": 1},
        categories={"kv_dtype": _column("kv_cache_dtype")},
        sizes={"batch": _column("batch_size"), "kv_len": _kv_len_before},
    ),
    "mla_decode_module": TableFile(
        file="mla_decode_module",
        package_file="mla/vllm/0.24.0/mla_generation_module_perf",
        rows=MODULE,
        categories=MODULE_CATEGORIES,
        sizes={"batch": _column("batch_size"), "kv_len": _column("step")},
    ),
    "mla_prefill_module": TableFile(
        file="mla_prefill_module",
        package_file="mla/vllm/0.24.0/mla_context_module_perf",
        rows={**MODULE, "step": 0},
        categories=MODULE_CATEGORIES,
        sizes={"batch": _column("batch_size"), "prompt_len": _column("isl")},
    ),
    "moe_decode": TableFile(
        file="moe_decode_deepep",
        package_file="moe/sglang/0.5.10/wideep_generation_moe_perf",
        rows=DEEPSEEK_MOE,
        categories=DISTRIBUTION,
        sizes=DEEPEP_MOE_SIZES,
    ),
    "moe_prefill": TableFile(
        file="moe_prefill_deepep",
        package_file="moe/sglang/0.5.10/wideep_context_moe_perf",
        rows=DEEPSEEK_MOE,
        categories=DISTRIBUTION,
        sizes=DEEPEP_MOE_SIZES,
    ),
    "moe_fused": TableFile(
        file="moe_fused",
        package_file="moe/sglang/0.5.14/moe_perf",
        rows={**DEEPSEEK_MOE, "kernel_source": "sglang_fused_moe_triton"},
        categories={**DISTRIBUTION, "tp": _column("moe_tp_size")},
        sizes=GLOBAL_MOE_SIZES,
    ),
    "moe_eplb": TableFile(
        file="moe_wideep_eplb",
        package_file="moe/trtllm/1.3.0rc10/wideep_moe_perf",
        rows=DEEPSEEK_MOE,
        categories={**DISTRIBUTION, "slots": _column("num_slots")},
        sizes=GLOBAL_MOE_SIZES,
    ),
    "dispatch_low_latency": _low_latency("dispatch_avg_t_us"),
    "combine_low_latency": _low_latency("combine_avg_t_us"),
    "dispatch_one_node": _low_latency_one_node("dispatch_avg_t_us"),
    "combine_one_node": _low_latency_one_node("combine_avg_t_us"),
    "dispatch_normal": _normal("dispatch"),
    "combine_normal": _normal("combine"),
    "nccl": TableFile(
        file="nccl",
        package_file="comm/nccl/2.29.2/nccl_perf",
        # The extract lacks op_name: four collectives share each key, so only the package can serve this operator.
        categories={"collective": _column("op_name"), "dtype": _column("nccl_dtype")},
        sizes={"gpus": _column("num_gpus"), "elements": _column("message_size")},
    ),
}
