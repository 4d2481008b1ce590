"""What `supernode estimate` prints: the figures, what they are made of, how far they can be trusted.

Owns: words and units of the keys, what the text looks like.
Must not know: how an answer is computed, options.
"""

import textwrap
from collections.abc import Mapping
from typing import Any

from serving.estimation.reproduction import format_number

_FIGURES: Mapping[str, tuple[str, str]] = {  # key -> words, unit; "%" of a share
    "tpot_ms": ("TPOT", "ms"),
    "ttft_ms": ("TTFT", "ms"),
    "tokens_per_s_per_npu": ("throughput per NPU", "tokens/s"),
    "tokens_per_s_per_tflops": ("throughput per TFLOPS", "tokens/s"),
    "iteration_ms": ("iteration", "ms"),
    "layer_us": ("mixture layer", "us"),
    "attention_stream_us": ("attention stream, a microbatch", "us"),
    "moe_stream_us": ("MoE stream, a microbatch", "us"),
    "attention_aic": ("cube cores of attention stream", ""),
    "pool_load_ms": ("load from the pool", "ms"),
    "latency_us": ("latency", "us"),
    "time_us": ("time", "us"),
    "tops": ("rate", "TOPS"),
    "tflops": ("rate", "TFLOPS"),
    "utilization": ("utilization", "%"),
    "bandwidth_gb_per_s": ("bandwidth", "GB/s"),
    "memory_utilization": ("utilization of HBM", "%"),
    "cold_start_s": ("cold start", "s"),
    "warm_start_s": ("warm start", "s"),
    "dram_copies": ("copies in DRAM", ""),
    "hit_rate": ("hit rate of a switch", "%"),
    "switch_s": ("switch, mean", "s"),
    "nodes": ("nodes", ""),
    "logical_switches": ("logical switches", ""),
}
_WIDTH = 34  # of words
_NUMBER_WIDTH = 12


def format_answer(name: str, arguments: Mapping[str, Any], answer: Mapping[str, Any]) -> str:
    """The question with all its arguments, the figures, the breakdown and the streams if any, the coverage."""
    asked = ", ".join(f"{argument} {value}" for argument, value in arguments.items() if value is not None)
    lines = [
        textwrap.fill(f"{name}: {asked}", 100, subsequent_indent="  "),
        "",
        *(_figure(key, answer[key]) for key in _FIGURES if key in answer),
    ]
    if "breakdown" in answer:
        lines += ["", *_breakdown(answer["breakdown"])]
    if "streams" in answer:
        lines += ["", *_streams(answer["streams"])]
    return "\n".join([*lines, "", *_coverage(answer["coverage"])])


def _figure(key: str, value: float | None) -> str:
    words, unit = _FIGURES[key]
    if value is None:
        return f"{words:<{_WIDTH}}{'none':>{_NUMBER_WIDTH}}"
    return _line(words, value * 100 if unit == "%" else value, unit)


def _breakdown(breakdown: Mapping[str, float]) -> list[str]:
    whole = sum(breakdown.values())
    lines = [f"{'breakdown':<{_WIDTH}}{'ms':>{_NUMBER_WIDTH}}{'%':>8}"]
    for part, value in sorted(breakdown.items(), key=lambda item: -item[1]):
        lines.append(f"{_line(f'  {part}', value)}{100 * value / whole:>8.1f}")
    return lines


def _streams(streams: Mapping[str, Mapping[str, float]]) -> list[str]:
    lines = [f"{'streams, one mixture layer':<{_WIDTH}}{'us':>{_NUMBER_WIDTH}}{'%':>8}"]
    for stream, parts in streams.items():
        whole = sum(parts.values())
        lines.append(_line(f"  {stream}", whole))
        for part, value in sorted(parts.items(), key=lambda item: -item[1]):
            lines.append(f"{_line(f'    {part}', value)}{100 * value / whole:>8.1f}")
    return lines


def _coverage(coverage: Mapping[str, Any]) -> list[str]:
    told = "every argument is inside what was published or measured" if coverage["inside"] else "extrapolated"
    return [f"coverage: {told}", *(f"  {note}" for note in coverage["notes"])]


def _line(words: str, value: float, unit: str = "") -> str:
    return f"{words:<{_WIDTH}}{format_number(value):>{_NUMBER_WIDTH}} {unit}".rstrip()
