"""One run in virtual time as a process of its own, for the benchmarks: reads what to run, prints what it cost.

Owns: the workload of a run, and what is measured while it runs.
Must not know: which runs there are, bars.

`python -m tests.bench.simulated_run '{"config": "cloudmatrix384-full", "rate": 200, "duration_s": 120}'`
"""

import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.config_file import load_config
from serving.simulation.columns import RunColumns
from serving.simulation.run import simulate
from serving.workloads.arrivals import Arrivals, generator_for
from serving.workloads.requests import RequestTable
from serving.workloads.workload import Workload

# Means and medians of a day of DeepSeek-R1 requests, arXiv:2505.09999 (ServeGen), data/reason/deepseek-r1.
REASONING_INPUT = (1268.0, 208.0)
REASONING_OUTPUT = (1527.0, 792.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Poisson arrivals at `rate` per second until `duration_s`, or `num_requests` of them if that is set.

    Lengths are those of reasoning, or equal ones where `input_len` is set.
    """

    config: str
    rate: float
    overrides: tuple[str, ...] = ()
    duration_s: float = math.inf
    num_requests: int | None = None
    input_len: int | None = None
    output_len: int = 256

    def workload(self, max_model_len: int) -> Workload:
        """Prompts share nothing."""
        count = self.num_requests if self.num_requests is not None else math.ceil(1.05 * self.rate * self.duration_s)
        if self.input_len is not None:
            prompts, outputs = np.full(count, self.input_len), np.full(count, self.output_len)
        else:
            prompts = _lognormal("input_len", count, *REASONING_INPUT, limit=max_model_len // 2)
            outputs = _lognormal("output_len", count, *REASONING_OUTPUT, limit=max_model_len // 2)
        table = RequestTable.of_pieces("bench", num_prompt_tokens=prompts, max_tokens=outputs, arrival_ns=None)
        workload = Workload(name="bench", requests=table).with_arrivals(Arrivals.from_request_rate(self.rate))
        return workload.limited(duration_s=self.duration_s) if math.isfinite(self.duration_s) else workload


def _lognormal(name: str, count: int, mean: float, median: float, *, limit: int) -> NDArray[np.int64]:
    sigma = math.sqrt(2 * math.log(mean / median))
    drawn = median * np.exp(sigma * generator_for(0, name).standard_normal(count))
    return np.clip(np.rint(drawn), 1, limit).astype(np.int64)


def measured(run: Run) -> dict[str, Any]:
    """Simulate, and tell wall seconds, what was produced, and how the system stood while requests arrived."""
    config = load_config(run.config, run.overrides)
    workload = run.workload(config.model.max_model_len)
    progress: list[tuple[int, float]] = [(0, 0.0)]
    started, started_cpu = time.perf_counter(), time.process_time()
    columns = simulate(
        config, workload, on_progress=lambda num_over: progress.append((num_over, time.perf_counter() - started))
    )
    assert workload.arrival_ns is not None
    until_s = run.duration_s if math.isfinite(run.duration_s) else float(workload.arrival_ns[-1]) / 1e9
    requests = columns.requests
    over_at_end = np.count_nonzero(requests.last_token_ns <= until_s * 1e9)
    decodes = [instance for instance in columns.instances if instance.role == "decode"]
    num_decode_steps = sum(len(instance.start_ns) for instance in decodes)
    num_decode_tokens = sum(int(instance.num_tokens.sum(dtype=np.int64)) for instance in decodes)
    return {
        "num_requests": len(requests),
        "num_output_tokens": int(requests.num_output_tokens.sum(dtype=np.int64)),
        "num_steps": sum(len(instance.start_ns) for instance in columns.instances),
        "num_decode_steps": num_decode_steps,
        "tokens_per_decode_step": num_decode_tokens / num_decode_steps if num_decode_steps else 0.0,
        "num_preemptions": int(requests.num_preemptions.sum(dtype=np.int64)),
        "simulated_s": columns.simulated_s,
        "simulation_s": columns.wall_s,
        "simulation_cpu_s": time.process_time() - started_cpu,
        "arrivals_end_s": until_s,
        # The driver tells how many requests are over; when how many were is known now.
        "simulation_until_arrivals_end_s": float(np.interp(over_at_end, *zip(*progress, strict=True))),
        "standing": [_standing(columns, share * until_s) for share in (0.5, 0.75, 1.0)],
        "roles": {role: _role_figures(columns, role, until_s) for role in ("prefill", "decode")},
    }


def _standing(columns: RunColumns, at_s: float) -> dict[str, float]:
    """How many requests were where at one instant."""
    at_ns, requests = at_s * 1e9, columns.requests

    def between(start_ns: NDArray[np.int64], end_ns: NDArray[np.int64]) -> int:
        return int(np.count_nonzero((start_ns <= at_ns) & (end_ns > at_ns)))

    return {
        "at_s": at_s,
        "no_place": between(requests.arrival_ns, requests.scheduled_ns),
        "prefill_queue": between(requests.scheduled_ns, requests.prefill_start_ns),
        "hand_over": between(requests.first_token_ns, requests.decode_start_ns),
        "decoding": between(requests.decode_start_ns, requests.last_token_ns),
    }


def _role_figures(columns: RunColumns, role: str, until_s: float) -> dict[str, float]:
    """Of the time in which requests arrive: busy shares of the least and most busy instance, slots and KV in use."""
    busy, slots, kv, tokens = [], [], [], 0
    for instance in (instance for instance in columns.instances if instance.role == role):
        ends_ns = np.minimum(instance.start_ns + instance.charged_ns, until_s * 1e9)
        seen = instance.start_ns < until_s * 1e9
        spent_ns = (ends_ns - instance.start_ns)[seen]
        busy.append(float(spent_ns.sum() / (until_s * 1e9)))
        if not spent_ns.sum():
            continue
        num_slots = instance.num_ranks * instance.max_num_seqs
        slots.append(float(spent_ns @ instance.num_seqs[seen] / spent_ns.sum() / num_slots))
        kv.append(float(spent_ns @ instance.num_used_blocks[seen] / spent_ns.sum() / instance.num_blocks))
        tokens += int((instance.num_tokens if role == "prefill" else instance.num_sampled)[seen].sum(dtype=np.int64))
    num_npus = sum(instance.num_npus for instance in columns.instances if instance.role == role)
    return {
        "least_busy": min(busy),
        "most_busy": max(busy),
        "slots_used": sum(slots) / len(slots) if slots else 0.0,
        "kv_used": sum(kv) / len(kv) if kv else 0.0,
        "tokens_per_s_per_npu": tokens / until_s / num_npus,
    }


def as_argument(run: Run) -> str:
    """The inverse of what `main` reads."""
    return json.dumps({name: value for name, value in asdict(run).items() if value != math.inf})


def main() -> None:
    values = json.loads(sys.argv[1])
    values["overrides"] = tuple(values.get("overrides", ()))
    print(json.dumps(measured(Run(**values))))


if __name__ == "__main__":
    main()
