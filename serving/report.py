"""The result of a run as people and scripts read it: one table and one JSON object.

Owns: the table of `vllm bench serve`, row for row, with our sections after its rows; its JSON keys, with ours after
them. `bench`, `run`, `simulate` and `replay` all end here.
Must not know: how the records were measured, files, the terminal.
Source: `vllm bench serve` (table 50 wide, rows `{:<40} {:<10}`; a metric without values prints as 0 there, so
scripts that read it find a number; in our own keys it is null).
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from serving.records import RequestRecord, Timing
from serving.spec_decode import SpecDecodeStats
from serving.summary import ClockName, Summary, summarize
from serving.timings import METRICS, Distribution, Metric
from serving.workloads.arrivals import RampUp

WIDTH = 50
REPORT_PERCENTILES = (50.0, 90.0, 99.0)  # in every JSON file and in our section, whatever else is asked for
SELECTABLE_METRICS: tuple[Metric, ...] = ("ttft", "tpot", "itl", "e2el")
_HEADERS: dict[Metric, str] = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """What was run. `date` is YYYYmmdd-HHMMSS; `request_rate` is infinite unless arrivals have one."""

    date: str
    backend: str
    model_id: str
    num_prompts: int
    endpoint_type: str | None = None  # None: as `backend`
    tokenizer_id: str | None = None
    label: str | None = None  # None: as `backend`
    request_rate: float = math.inf
    burstiness: float = 1.0
    max_concurrency: int | None = None
    ramp_up: RampUp | None = None
    workload: str | None = None
    workload_digest: str | None = None
    metadata: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchResult:
    """A finished run. `held_at_rest` counts what was still held afterwards, by kind; `cluster` is free-form."""

    info: RunInfo
    summary: Summary
    records: tuple[RequestRecord, ...] = ()
    spec_decode: SpecDecodeStats | None = None  # None: nothing was drafted, or nobody says
    percentile_metrics: tuple[Metric, ...] = ("ttft", "tpot", "itl")
    metric_percentiles: tuple[float, ...] = (99.0,)
    held_at_rest: Mapping[str, int] | None = None
    cluster: Mapping[str, float | int | str] | None = None
    expert_load: Mapping[str, Any] | None = None  # serving/expert_load.py; None: no tensors, or nobody says
    rps_change_events: tuple[Mapping[str, Any], ...] = ()
    interrupted: bool = False
    num_not_sent: int = 0

    @property
    def exit_code(self) -> int:
        """0; 1 if a request failed or something is still held; 130 if it was interrupted."""
        if self.interrupted:
            return 130
        return 1 if self.summary.failed or any((self.held_at_rest or {}).values()) else 0


def needed_percentiles(metric_percentiles: Sequence[float]) -> tuple[float, ...]:
    """The percentiles that `summarize` must compute for a report that shows `metric_percentiles`."""
    return tuple(sorted({*REPORT_PERCENTILES, *map(float, metric_percentiles)}))


def format_table(result: BenchResult, *, more_rows: Sequence[str] = ()) -> str:
    """The table, without a newline at the end; `more_rows` come after the outcomes."""
    title = " Serving Benchmark Result (interrupted) " if result.interrupted else " Serving Benchmark Result "
    lines = [title.center(WIDTH, "="), *_vllm_rows(result)]
    for metric in result.percentile_metrics:
        name, values = metric.upper(), _main_distribution(result.summary, metric)
        lines += [
            _HEADERS[metric].center(WIDTH, "-"),
            row(f"Mean {name} (ms):", values.mean_ms if values else 0.0),
            row(f"Median {name} (ms):", values.median_ms if values else 0.0),
        ]
        for p in result.metric_percentiles:
            lines.append(row(f"P{p:g} {name} (ms):", values.percentiles[p] if values else 0.0))
    if result.spec_decode is not None:
        lines.append("Speculative Decoding".center(WIDTH, "-"))
        lines += [label if value is None else row(label, value) for label, value in result.spec_decode.rows()]
    lines += _clock_rows(result.summary)
    lines += [*_outcome_rows(result), *more_rows]
    for title, section in (("Cluster", result.cluster), ("Held at Rest", result.held_at_rest)):
        if section is not None:
            lines += [title.center(WIDTH, "-"), *(row(f"{key}:", value) for key, value in section.items())]
    return "\n".join([*lines, "=" * WIDTH])


def to_json(result: BenchResult, *, detailed: bool = False) -> dict[str, Any]:
    """The result as JSON values. `detailed` adds vLLM's per-request lists, in seconds."""
    info, summary = result.info, result.summary
    values: dict[str, Any] = {
        "date": info.date,
        "endpoint_type": info.endpoint_type or info.backend,
        "backend": info.backend,
        "label": info.label or info.backend,
        "model_id": info.model_id,
        "tokenizer_id": info.tokenizer_id or info.model_id,
        "num_prompts": info.num_prompts,
        **(info.metadata or {}),
        "request_rate": _finite(info.request_rate),
        "burstiness": _finite(info.burstiness),
        "max_concurrency": info.max_concurrency,
    }
    if info.ramp_up is not None:
        values["ramp_up_strategy"] = info.ramp_up.strategy
        values["ramp_up_start_rps"] = info.ramp_up.start_rps
        values["ramp_up_end_rps"] = info.ramp_up.end_rps
    values |= {
        "duration": summary.duration_s,
        "completed": summary.completed,
        "failed": summary.failed,
        "total_input_tokens": summary.total_input_tokens,
        "total_output_tokens": summary.total_output_tokens,
        "request_throughput": summary.request_throughput,
        "request_goodput": summary.request_goodput,
        "output_throughput": summary.output_throughput,
        "total_token_throughput": summary.total_token_throughput,
        "max_output_tokens_per_s": summary.max_output_tokens_per_s,
        "max_concurrent_requests": summary.max_concurrent_requests,
    }
    if result.rps_change_events:
        values["rps_change_events"] = [dict(event) for event in result.rps_change_events]
    percentiles = needed_percentiles(result.metric_percentiles)
    for metric in SELECTABLE_METRICS:
        values |= _statistics(metric, _main_distribution(summary, metric), percentiles, absent=0.0)
    if result.spec_decode is not None:
        values |= result.spec_decode.to_json()
    values |= _our_keys(result, percentiles)
    return values | _details(result) if detailed else values


def reserved_keys() -> frozenset[str]:
    """The keys of `to_json` itself, which metadata may not take."""
    nothing = summarize((), duration_s=0.0)
    info = RunInfo(date="", backend="", model_id="", num_prompts=0)
    drafts = SpecDecodeStats.of_single_drafts(1, 1)
    return frozenset(to_json(BenchResult(info=info, summary=nothing, spec_decode=drafts), detailed=True))


def result_filename(info: RunInfo) -> str:
    """vLLM's default name of a result file."""
    label = info.label or info.backend
    if info.ramp_up is None:
        rate = f"{_finite(info.request_rate)}qps"
    else:
        ramp = info.ramp_up
        rate = f"ramp-up-{ramp.strategy}-{ramp.start_rps:g}qps-{ramp.end_rps:g}qps"
    concurrency = "" if info.max_concurrency is None else f"-concurrency{info.max_concurrency}"
    name = f"{label}-{rate}{concurrency}-{info.model_id.rsplit('/', 1)[-1]}-{info.date}.json"
    return re.sub(r"[^\w.+-]", "_", name)


def _vllm_rows(result: BenchResult) -> list[str]:
    info, summary = result.info, result.summary
    rows: list[tuple[str, float | int | None]] = [
        ("Successful requests:", summary.completed),
        ("Failed requests:", summary.failed),
        ("Maximum request concurrency:", info.max_concurrency),
        ("Request rate configured (RPS):", info.request_rate if math.isfinite(info.request_rate) else None),
        ("Benchmark duration (s):", summary.duration_s),
        ("Total input tokens:", summary.total_input_tokens),
        ("Total generated tokens:", summary.total_output_tokens),
        ("Request throughput (req/s):", summary.request_throughput),
        ("Request goodput (req/s):", summary.request_goodput),
        ("Output token throughput (tok/s):", summary.output_throughput),
        ("Peak output token throughput (tok/s):", summary.max_output_tokens_per_s),
        ("Peak concurrent requests:", float(summary.max_concurrent_requests)),
        ("Total token throughput (tok/s):", summary.total_token_throughput),
    ]
    return [row(label, value) for label, value in rows if value is not None]


def _clock_rows(summary: Summary) -> list[str]:
    """Wall and simulated time of each metric, one under the other."""
    clocks: tuple[tuple[ClockName, Mapping[Metric, Distribution]], ...] = (
        ("wall", summary.wall),
        ("simulated", summary.simulated),
    )
    rows = []
    for metric in METRICS:
        for clock, distributions in clocks:
            if metric in distributions:
                # The wait that a client can see is its own, for a free slot or for its processor.
                name = "Queue" if metric == "queue" else metric.upper()
                label = "Queue client" if (metric, clock) == ("queue", "wall") else f"{name} {clock}"
                values = distributions[metric].percentiles
                rows.append(f"{label:<20}" + "".join(f"{values[p]:>10.2f}" for p in REPORT_PERCENTILES))
    if not rows:
        return []
    head = " " * 20 + "".join(f"{f'P{p:g}':>10}" for p in REPORT_PERCENTILES)
    return ["Latency by Clock (ms)".center(WIDTH, "-"), head, *rows]


def _outcome_rows(result: BenchResult) -> list[str]:
    summary = result.summary
    rows = ["Requests by Outcome".center(WIDTH, "-")]
    rows += [row(f"{outcome.capitalize()}:", count) for outcome, count in summary.outcomes.items()]
    rows += [row(f"  {reason}"[:40], count) for reason, count in summary.reasons.items()]
    if result.interrupted:
        rows.append(row("Not sent (interrupted):", result.num_not_sent))
    if summary.num_without_usage:
        rows.append(row("Tokens counted by chunks (no usage):", summary.num_without_usage))
    if summary.cache_hit_rate is not None:
        rows.append(row("Cache hit rate (% of prompt tokens):", 100 * summary.cache_hit_rate))
    for clock, share in summary.slo_attainment.items():
        if share is not None:
            rows.append(row(f"Within SLO, {clock} time (%):", 100 * share))
    return rows


def _our_keys(result: BenchResult, percentiles: Sequence[float]) -> dict[str, Any]:
    summary = result.summary
    simulated: dict[str, Any] = {}
    for metric in METRICS if summary.simulated else ():
        simulated |= _statistics(metric, summary.simulated.get(metric), percentiles, absent=None)
    return {
        "workload": result.info.workload,
        "workload_digest": result.info.workload_digest,
        "clock": summary.clock,
        "outcomes": dict(summary.outcomes),
        "outcome_reasons": dict(summary.reasons),
        "not_sent": result.num_not_sent,
        "interrupted": result.interrupted,
        "num_without_usage": summary.num_without_usage,
        "cached_tokens": summary.num_cached_tokens,
        "cache_hit_rate": summary.cache_hit_rate,
        "slo_attainment": dict(summary.slo_attainment),
        "simulated": simulated or None,
        "held_at_rest": None if result.held_at_rest is None else dict(result.held_at_rest),
        "cluster": None if result.cluster is None else dict(result.cluster),
        "expert_load": None if result.expert_load is None else dict(result.expert_load),
    }


def _details(result: BenchResult) -> dict[str, Any]:
    records = result.records
    timings = [r.simulated if result.summary.clock == "simulated" else r.wall for r in records]
    return {
        "input_lens": [record.num_prompt_tokens for record in records],
        "output_lens": [record.num_output_tokens for record in records],
        "ttfts": [timing.ttft_ns / 1e9 if timing else 0.0 for timing in timings],
        "itls": [_gaps_s(timing) for timing in timings],
        "generated_texts": [record.text or "" for record in records],
        "errors": [record.error or "" for record in records],
        "request_ids": [record.request_id for record in records],
        "request_outcomes": [record.outcome for record in records],
    }


def _gaps_s(timing: Timing | None) -> list[float]:
    if timing is None or timing.itl_ns is None:
        return []
    gaps: Sequence[float] = timing.itl_ns  # type: ignore[assignment]
    return [float(gap) / 1e9 for gap in gaps]


def _main_distribution(summary: Summary, metric: Metric) -> Distribution | None:
    return (summary.simulated if summary.clock == "simulated" else summary.wall).get(metric)


def _statistics(
    metric: Metric, values: Distribution | None, percentiles: Sequence[float], *, absent: float | None
) -> dict[str, float | None]:
    keys: dict[str, float | None] = {
        f"mean_{metric}_ms": values.mean_ms if values else absent,
        f"median_{metric}_ms": values.median_ms if values else absent,
        f"std_{metric}_ms": values.std_ms if values else absent,
    }
    for p in percentiles:
        keys[f"p{p:g}_{metric}_ms"] = values.percentiles[p] if values else absent
    return keys


def row(label: str, value: float | int | str) -> str:
    """One row of the table."""
    return f"{label:<40} {value:<10.2f}" if isinstance(value, float) else f"{label:<40} {value:<10}"


def _finite(value: float) -> float | str:
    """JSON has no infinity; vLLM writes "inf"."""
    return value if math.isfinite(value) else "inf"
