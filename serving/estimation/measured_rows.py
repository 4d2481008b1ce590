"""Published throughputs of DeepSeek-V3/R1 on H800 and H100 beside what measured operators give.

Owns: the published rows, their settings, and where the tables do not reach them.
Must not know: how steps are put together.
Source: SGLang's blog on large-scale expert parallelism (lmsys.org, 2025-05-05) and github.com/deepseek-ai/profile-data.

No row has been used to choose anything: all are validation rows. Tokens/s per node of 8 GPUs, as published.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from devices.measured_tables import MeasuredTables
from devices.table_files import GPUS_PER_NODE
from serving.estimation.measured_estimates import measured_decode, measured_prefill

__all__ = ["measured_rows"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    name: str
    published: float  # tokens/s per node
    settings: Mapping[str, Any]
    note: str = ""


PREFILL = {"tokens_per_npu": 16384, "ep": 32, "microbatch": "on"}
# DeepEP's low-latency kernels were measured on up to 8 nodes.
DECODE = {"ep": 64, "microbatch": "on", "mtp": 0, "acceptance": 0.0}
NINE_NODES = (
    "published on 9 nodes (EP72, 288 slots); the tables end at 8 (EP64, 256 experts): 4 experts per GPU on both"
)
H800 = "H800: an H100 with less NVLink"

PREFILL_ROWS = (
    _Row(name="SGLang, 1K prompts", published=57_674, settings={"prompt_len": 1024, "balance": "eplb"}),
    _Row(name="SGLang, 2K prompts", published=54_543, settings={"prompt_len": 2048, "balance": "eplb"}),
    _Row(name="SGLang, 4K prompts", published=50_302, settings={"prompt_len": 4096, "balance": "eplb"}),
    _Row(name="SGLang, 4K, perfect EPLB", published=59_337, settings={"prompt_len": 4096, "balance": "balanced"}),
    _Row(
        name="DeepSeek profile, 4K",
        published=62_713,
        settings={"prompt_len": 4096, "balance": "balanced"},
        note=H800,
    ),
)
DECODE_ROWS = (
    _Row(
        name="SGLang, batch 256, 2K",
        published=22_282,
        settings={"batch_per_npu": 256, "kv_len": 2000, "balance": "eplb"},
        note=NINE_NODES,
    ),
    _Row(
        name="SGLang, simulated MTP, batch 128, 4K",
        published=17_373,
        settings={"batch_per_npu": 128, "kv_len": 4000, "balance": "eplb", "mtp": 1, "acceptance": 0.6},
        note=NINE_NODES + "; acceptance 60 % as in the blog (arXiv 2506.12708 gives 70 % for the row)",
    ),
    _Row(
        name="DeepSeek profile, batch 128, 4K",
        published=18_598,
        settings={"batch_per_npu": 128, "kv_len": 4096, "balance": "balanced"},
        note=H800
        + "; published on 16 nodes (EP128, 2 experts per GPU), the tables end at 8 (EP64); MTP unknown, taken as off",
    ),
)


def measured_rows(tables: MeasuredTables) -> list[dict[str, Any]]:
    """One dictionary per published row: group, row, quantity, unit, published, ours, error (relative), role, note."""
    rows = []
    for row in PREFILL_ROWS:
        ours = measured_prefill(tables, **{**PREFILL, **row.settings})
        rows.append(_beside("prefill", row, ours["tokens_per_s_per_npu"], tables.gpu))
    for row in DECODE_ROWS:
        ours = measured_decode(tables, **{**DECODE, **row.settings})
        rows.append(_beside("decode", row, ours["tokens_per_s_per_npu"], tables.gpu))
    return rows


def _beside(phase: str, row: _Row, tokens_per_s_per_gpu: float, gpu: str) -> dict[str, Any]:
    ours = GPUS_PER_NODE * tokens_per_s_per_gpu
    return {
        "group": f"measured operators, {gpu.upper()}, {phase}",
        "row": row.name,
        "quantity": "throughput per node",
        "unit": "tokens/s",
        "published": row.published,
        "ours": ours,
        "error": ours / row.published - 1,
        "role": "validation",
        "note": row.note,
    }
