"""The figures of a simulated run, as JSON values: those of the load generator, and what only a simulator can see.

Owns: the summary of columns, and the names and the order of the keys.
Must not know: how a run is driven, how figures are shown (serving/simulation/table.py).
Source: keys of `vllm bench serve` (serving/report.py); tokens per second per TFLOPS of INT8 as arXiv 2506.12708v2
counts them in tables 3 and 4: per NPU of the instances of that role.

The same configuration, workload and seed give the same values, but for those under `machine`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.config import Role, RunConfig
from serving.records import OUTCOMES, Goodput
from serving.report import BenchResult, needed_percentiles, to_json
from serving.run_info import run_info
from serving.simulation.columns import InstanceColumns, RunColumns
from serving.simulation.latencies import column_timings
from serving.simulation.usage import admission_figures, instance_figures, phase_figures, plane_figures, pool_figures
from serving.spec_decode import SpecDecodeStats
from serving.summary import RequestCounts, Summary, summary_of
from serving.workloads.workload import Workload

METRIC_PERCENTILES = (99.0,)


def summarize_columns(
    run: RunColumns, *, percentiles: Sequence[float] = (50.0, 90.0, 99.0), goodput: Goodput | None = None
) -> Summary:
    """As `summarize` of one record per request. All times are simulated.

    Gaps between tokens and the peak of tokens per second are counted by steps, everything else by finished requests.
    The two differ in a run that was interrupted: all steps so far count, whoever's tokens they were, since without
    those of requests that were cut short the gaps of short requests would be left. The two tokens of a step with an
    accepted draft, one chunk, count as two at its end.
    """
    requests = run.requests
    finished = np.flatnonzero(requests.is_finished)
    outcomes = np.bincount(requests.outcome, minlength=len(OUTCOMES)).tolist()
    num_prompt = int(requests.num_prompt_tokens[finished].sum(dtype=np.int64))
    return summary_of(
        RequestCounts(
            outcomes=dict(zip(OUTCOMES, outcomes, strict=True)),
            reasons={f"{outcome}: {reason}": count for (outcome, reason), count in unfinished_reasons(run).items()},
            num_input_tokens=num_prompt,
            num_output_tokens=int(requests.num_output_tokens[finished].sum(dtype=np.int64)),
            num_cached_tokens=int(requests.num_cached_tokens[finished].sum(dtype=np.int64)) if finished.size else None,
            num_reported_prompt_tokens=num_prompt,
        ),
        wall=column_timings(run, np.empty(0, np.int64)),
        simulated=column_timings(run, finished),
        duration_s=run.simulated_s,
        percentiles=percentiles,
        goodput=goodput,
    )


def unfinished_reasons(run: RunColumns) -> dict[tuple[str, str], int]:
    """How many requests ended by each outcome and reason but finished, most first."""
    requests, num_reasons = run.requests, len(run.requests.reasons)
    codes = requests.outcome.astype(np.int64) * num_reasons + requests.reason
    counts = np.bincount(codes[~requests.is_finished], minlength=len(OUTCOMES) * num_reasons)
    order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)].tolist()
    return {(OUTCOMES[code // num_reasons], requests.reasons[code % num_reasons]): int(counts[code]) for code in order}


def bench_result(
    config: RunConfig, workload: Workload, run: RunColumns, *, goodput: Goodput | None = None
) -> BenchResult:
    """The run as the load generator would have seen it, for its table and its keys."""
    return BenchResult(
        info=run_info(config, workload),
        summary=summarize_columns(run, percentiles=needed_percentiles(METRIC_PERCENTILES), goodput=goodput),
        spec_decode=SpecDecodeStats.of_single_drafts(run.num_drafts, run.num_accepted),
        metric_percentiles=METRIC_PERCENTILES,
        held_at_rest=dict(run.held_at_rest),
        interrupted=run.interrupted,
        num_not_sent=run.num_not_arrived,
    )


def figures(
    config: RunConfig, workload: Workload, run: RunColumns, *, goodput: Goodput | None = None
) -> dict[str, Any]:
    """Everything about a run. What depends on this machine and its clock is under `machine`."""
    return figures_of(config, run, bench_result(config, workload, run, goodput=goodput))


def figures_of(config: RunConfig, run: RunColumns, result: BenchResult) -> dict[str, Any]:
    """The same for a `bench_result` that is there already."""
    summary, requests = result.summary, run.requests
    values = to_json(result)
    for absent in ("cluster", "expert_load"):  # of systems that run live
        del values[absent]
    date = values.pop("date")
    num_preempted = int(np.count_nonzero(requests.num_preemptions))
    return values | {
        "simulated_s": run.simulated_s,
        "digest": run.digest,
        "rejected_by_reason": {
            reason: count for (outcome, reason), count in unfinished_reasons(run).items() if outcome == "rejected"
        },
        "preemptions": int(requests.num_preemptions.sum(dtype=np.int64)),
        "preempted_requests": num_preempted,
        "slo": _slo(run, summary),
        "throughput": throughput(config, run),
        "cache": _cache(config, run),
        "admission_queue": admission_figures(run),
        "phases_ms": phase_figures(run),
        "instances": [instance_figures(run, index) for index in range(len(run.instances))],
        "planes": {plane: plane_figures(totals, run.simulated_s) for plane, totals in sorted(run.planes.items())},
        "pool": None if run.pool is None else pool_figures(run.pool, run.simulated_s),
        "machine": {
            "date": date,
            "wall_s": run.wall_s,
            "peak_rss_bytes": run.peak_rss_bytes,
            "simulated_s_per_wall_s": run.simulated_s / run.wall_s if run.wall_s else None,
            "output_tokens_per_wall_s": summary.total_output_tokens / run.wall_s if run.wall_s else None,
        },
    }


def throughput(config: RunConfig, run: RunColumns) -> dict[str, Any]:
    """Tokens per second per NPU and per TFLOPS of INT8: new tokens over all NPUs, and by role what the role is for.

    Prefill counts the tokens that it computed, decode those that came out. `busy` is per second in which the role's
    instances step: what idle time, a ramp and the last requests do not thin out.
    """

    def rates(instances: Sequence[InstanceColumns], num_tokens: int) -> dict[str, float | int | None]:
        npus = sum(instance.num_npus for instance in instances)
        dies = sum(instance.num_npus * config.dies_per_npu(instance.role) for instance in instances)
        tflops = dies * config.hardware.npu.die.int8_flops_per_s / 1e12
        busy_npu_s = sum(instance.busy_ns * instance.num_npus for instance in instances) / 1e9
        tokens_per_s = num_tokens / run.simulated_s if run.simulated_s else 0.0
        return {
            "num_npus": npus,
            "num_tokens": num_tokens,
            "tokens_per_s": tokens_per_s,
            "tokens_per_s_per_npu": tokens_per_s / npus,
            "tokens_per_s_per_tflops": tokens_per_s / tflops,
            "busy_tokens_per_s_per_npu": num_tokens / busy_npu_s if busy_npu_s else None,
        }

    def total(instances: Sequence[InstanceColumns], name: str) -> int:
        return sum(int(getattr(instance, name).sum(dtype=np.int64)) for instance in instances)

    values: dict[str, Any] = {"output": rates(run.instances, total(run.instances, "num_sampled"))}
    roles: tuple[tuple[Role, str], ...] = (("prefill", "num_tokens"), ("decode", "num_sampled"))
    for role, counted in roles:
        instances = [instance for instance in run.instances if instance.role == role]
        if instances:
            values[role] = rates(instances, total(instances, counted))
    return values


def _slo(run: RunColumns, summary: Summary) -> dict[str, float | None] | None:
    """Of the finished requests, the share that meets each objective and all; and so many per second."""
    goodput = summary.goodput
    if goodput is None:
        return None
    timings = column_timings(run, np.flatnonzero(run.requests.is_finished))
    values: dict[str, float | None] = {}
    for name in ("ttft_ms", "tpot_ms", "e2el_ms"):
        limit = getattr(goodput, name)
        if limit is not None:
            values[name] = limit
            values[f"{name.removesuffix('_ms')}_attainment"] = timings.attainment(Goodput(**{name: limit}))
    return values | {
        "attainment": summary.slo_attainment["simulated"],
        "request_goodput": summary.request_goodput,
    }


def _cache(config: RunConfig, run: RunColumns) -> dict[str, float | int | None]:
    """Of the finished requests' prompts; blocks are full ones. `pool` is the part that came from the shared pool."""
    requests, block_size = run.requests, config.cache.block_size
    finished = requests.is_finished
    prompt, cached = requests.num_prompt_tokens[finished], requests.num_cached_tokens[finished]
    prompt_blocks, cached_blocks = prompt // block_size, cached // block_size

    def total(values: NDArray[np.int32]) -> int:
        return int(values.sum(dtype=np.int64))

    def share(part: NDArray[np.int32], whole: NDArray[np.int32]) -> float | None:
        return total(part) / total(whole) if total(whole) else None

    return {
        "block_size": block_size,
        "prompt_tokens": total(prompt),
        "cached_tokens": total(cached),
        "pool_tokens": total(requests.num_pool_tokens[finished]),
        "hit_rate_tokens": share(cached, prompt),
        "prompt_blocks": total(prompt_blocks),
        "cached_blocks": total(cached_blocks),
        "hit_rate_blocks": share(cached_blocks, prompt_blocks),
        "requests_with_hits": int(np.count_nonzero(cached)),
    }
