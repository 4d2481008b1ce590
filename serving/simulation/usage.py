"""How much of everything a simulated run used: instances, queues, planes, the pool, and a request's time by phase.

Owns: the figures of each, as JSON values.
Must not know: configurations, how a run is driven, how figures are shown.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.simulation.columns import NEVER, Ints, PlaneTotals, PoolColumns, RunColumns
from serving.simulation.latencies import phases_of
from serving.timings import distribution, weighted_quantiles

Figures = dict[str, Any]


def instance_figures(run: RunColumns, index: int) -> Figures:
    """One instance.

    `queue` are the requests that have their place here and do not run yet: until their prefill begins, or until their
    KV has arrived; over the simulated time, without preempted requests. What was seen at the start of steps, the KV
    occupancy, those who found no room in the step, and how full the batch was of what its cap allows, is weighted by
    the steps' times. A prefill instance is full by tokens, not by requests: its fill is None.
    """
    instance, simulated_s = run.instances[index], run.simulated_s
    num_steps, busy_ns = len(instance.start_ns), instance.busy_ns
    by_time = sorted(instance.breakdown_ns.items(), key=lambda item: (-item[1], item[0]))
    return {
        "instance_id": instance.instance_id,
        "role": instance.role,
        "num_npus": instance.num_npus,
        "num_ranks": instance.num_ranks,
        "steps": num_steps,
        "busy_share": busy_ns / 1e9 / simulated_s if simulated_s else 0.0,
        "mean_step_ms": busy_ns / 1e6 / num_steps if num_steps else 0.0,
        "tokens": int(instance.num_tokens.sum(dtype=np.int64)),
        "output_tokens": int(instance.num_sampled.sum(dtype=np.int64)),
        "mean_batch": float(instance.num_seqs.mean()) if num_steps else 0.0,
        "max_batch": int(instance.num_seqs.max(initial=0)),
        "mean_batch_per_rank": float(instance.num_seqs.mean()) / instance.num_ranks if num_steps else 0.0,
        "batch_fill": None
        if instance.role == "prefill"
        else _level(instance.num_seqs / (instance.max_num_seqs * instance.num_ranks), instance.charged_ns),
        "queue": _depth(*_waits_at(run, index), simulated_s),
        "waiting_at_steps": _level(instance.num_waiting, instance.charged_ns),
        "kv_occupancy": _level(instance.num_used_blocks / instance.num_blocks, instance.charged_ns),
        "max_kv_tokens_of_a_rank": int(instance.max_kv_tokens.max(initial=0)),
        "breakdown": {
            name: {"ms_per_step": ns / 1e6 / num_steps, "share": ns / busy_ns} for name, ns in by_time if busy_ns
        },
    }


def admission_figures(run: RunColumns) -> Figures:
    """Requests that have arrived and have no place yet, before their first one; over the simulated time."""
    requests = run.requests
    waited = np.flatnonzero(requests.scheduled_ns > requests.arrival_ns)
    depth = _depth(requests.arrival_ns[waited], requests.scheduled_ns[waited], run.simulated_s)
    return depth | {"waited_requests": int(waited.size)}


def phase_figures(run: RunColumns) -> Figures:
    """Where the time of a request goes, in milliseconds: phases that follow each other from arrival to last token.

    Of finished requests that were not preempted. `hand_over`, the way of the KV to the decode rank, is absent on
    colocated instances; a request of one token has neither that nor `decode`. What is loaded from the pool is part of
    `prefill_queue`: not every run keeps its movements.
    """
    requests = run.requests
    counted = requests.is_finished & (requests.num_preemptions == 0)
    members = {
        "hand_over": (requests.decode_start_ns != NEVER)[counted],
        "decode": (requests.num_output_tokens > 1)[counted],
    }
    figures: Figures = {}
    for name, phase_ms in phases_of(requests, counted).items():
        chosen = phase_ms[members[name]] if name in members else phase_ms
        if chosen.size and name != "pool_load":
            values = distribution(chosen, None, (50.0, 90.0, 99.0))
            figures[name] = {"mean": values.mean_ms} | {f"p{p:g}": value for p, value in values.percentiles.items()}
    return figures


def plane_figures(totals: PlaneTotals, simulated_s: float) -> Figures:
    """One plane. `busy_bytes_per_s` is per port that sends: what a transfer gets."""
    return {
        "bytes": totals.num_bytes,
        "transfers": totals.num_transfers,
        "busy_s": totals.busy_ns / 1e9,
        "mean_bytes_per_s": totals.num_bytes / simulated_s if simulated_s else 0.0,
        "busy_bytes_per_s": totals.num_bytes / (totals.busy_ns / 1e9) if totals.busy_ns else 0.0,
    }


def pool_figures(pool: PoolColumns, simulated_s: float) -> Figures:
    """The shared pool; its occupancy is over the simulated time.

    Hits and misses count blocks that loads asked for. A request of which the pool has nothing asks for none, so the
    share of its prompt that a workload found is under `cache`, not here.
    """
    end_ns = max(round(simulated_s * 1e9), int(pool.time_ns.max(initial=0)))
    instants = np.concatenate([[0], pool.time_ns, [end_ns]])
    used = np.concatenate([[0], pool.used_bytes])
    return {
        "capacity_bytes": pool.capacity_bytes,
        "block_bytes": pool.block_bytes,
        "used_bytes": int(pool.host_used_bytes.sum()),
        "occupancy": {key: value / pool.capacity_bytes for key, value in _level(used, np.diff(instants)).items()},
        "host_used_bytes": {"min": int(pool.host_used_bytes.min()), "max": int(pool.host_used_bytes.max())},
        "hits": pool.num_hits,
        "misses": pool.num_misses,
        "evicted": pool.num_evicted,
        "loaded": pool.num_loaded_blocks,
        "stored": pool.num_stored_blocks,
    }


def _waits_at(run: RunColumns, index: int) -> tuple[Ints, Ints]:
    """From when until when requests were at an instance without running there."""
    requests, role = run.requests, run.instances[index].role
    if role == "decode":
        here, start_ns, end_ns = requests.decode_instance, requests.first_token_ns, requests.decode_start_ns
    else:
        here, start_ns, end_ns = requests.prefill_instance, requests.scheduled_ns, requests.prefill_start_ns
    waited = np.flatnonzero((here == index) & (requests.num_preemptions == 0) & (end_ns > start_ns))
    return start_ns[waited], end_ns[waited]


def _depth(start_ns: Ints, end_ns: Ints, simulated_s: float) -> Figures:
    """Of a queue in which somebody stands over each [start, end)."""
    ones = np.ones(start_ns.size, np.int64)
    instants = np.concatenate([[0], start_ns, end_ns, [round(simulated_s * 1e9)]])
    changes = np.concatenate([[0], ones, -ones, [0]])
    order = np.argsort(instants, kind="stable")
    return _level(np.cumsum(changes[order])[:-1], np.diff(instants[order]))


def _level(values: NDArray[Any], weights: NDArray[np.int64]) -> Figures:
    """Mean, 99th percentile and maximum of a level that held for so long; zero if it was never seen."""
    held = np.flatnonzero(weights)
    if not held.size:
        return {"mean": 0.0, "p99": 0.0, "max": 0}
    seen, times = values[held].astype(np.float64), weights[held].astype(np.float64)
    return {
        "mean": float(seen @ times / times.sum()),
        "p99": float(weighted_quantiles(seen, times, 0.99)),
        "max": values[held].max().item(),
    }
