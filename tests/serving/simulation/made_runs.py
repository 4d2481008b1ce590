"""Columns of runs that nobody simulated, of any size, but with the relations that a run's columns have.

A prefill instance takes its requests in order, one step each; a decode instance steps all the time while it has
requests, and a request's tokens come one per step. Latencies therefore follow from the steps, not from a formula.
"""

import dataclasses

import numpy as np

from serving.simulation.columns import (
    NEVER,
    InstanceColumns,
    MoveColumns,
    PlaneTotals,
    PoolColumns,
    RequestColumns,
    RunColumns,
)

BLOCK, BLOCK_BYTES, STEP_NS, TOKEN_NS = 16, 16 * 70_272, 50_000_000, 20_000
OPERATORS = {
    "prefill": {"attention.attention": 5, "attention.up_proj": 3, "moe.experts": 4, "sdma.dispatch": 1, "launch": 1},
    "decode": {"moe.dispatch": 2, "moe.experts": 4, "moe.combine": 2, "lm_head": 1, "mtp": 1},
    "colocated": {"attention.attention": 2, "moe.experts": 4, "launch": 1},
}


def made_run(
    num_requests: int = 300,
    *,
    num_prefill: int = 2,
    num_decode: int = 1,
    rate_per_s: float = 8.0,
    output_len: int = 20,
    input_len: int = 400,
    seed: int = 0,
    is_colocated: bool = False,
    has_pool: bool = True,
    has_moves: bool = True,
    num_unfinished: int = 0,  # the last ones: still waiting when the run was interrupted
    step_ns: int = STEP_NS,
) -> RunColumns:
    """A run of `num_requests` whose prefill instances serve in arrival order."""
    rng = np.random.default_rng(seed)
    n, has_pool = num_requests, has_pool and not is_colocated
    num_done = n - num_unfinished
    arrival = np.sort(rng.integers(0, max(int(n / rate_per_s * 1e9), 1), n))
    prompts = rng.integers(max(input_len // 4, 1), 2 * input_len, n)
    outputs = rng.integers(1, 2 * output_len, n)
    pooled = np.where(rng.random(n) < 0.4, prompts // 2 // BLOCK * BLOCK, 0) if has_pool else np.zeros(n, np.int64)
    own = np.minimum(np.where(rng.random(n) < 0.2, BLOCK, 0), prompts - 1 - pooled)
    cached = pooled + own

    # Prefill: one request after the other on each instance, each a step; end = running maximum over what came before.
    if is_colocated:
        num_prefill = num_decode
    prefill = np.arange(n) % num_prefill
    length = 2_000_000 + (prompts - cached) * TOKEN_NS
    start = np.zeros(n, np.int64)
    for instance in range(num_prefill):
        mine = np.flatnonzero(prefill == instance)
        worked = np.cumsum(length[mine])
        begin = np.maximum.accumulate(arrival[mine] + 3_000_000 - (worked - length[mine]))
        start[mine] = begin + worked - length[mine]
    scheduled = np.minimum(np.maximum(arrival, start - 40_000_000), start - 3_000_000)
    first = start + length
    ready = first + 1_500_000
    decode = np.arange(n) % num_decode
    # Decode: the instance's steps are a grid of step_ns, so a request's first step is the next one on the grid.
    joined = -(-ready // step_ns)
    last = np.where(outputs > 1, (joined + outputs - 1) * step_ns, first)
    done = np.arange(n) < num_done

    def instants(values: np.ndarray) -> np.ndarray:
        return np.where(done, values, NEVER).astype(np.int64)

    def ints(values: np.ndarray) -> np.ndarray:
        return np.where(done, values, 0).astype(np.int32)

    requests = RequestColumns(
        request_ids=[f"r{i}" for i in range(n)],
        outcome=np.where(done, 0, 2).astype(np.int16),
        reason=np.where(done, 0, 1).astype(np.int16),
        reasons=("length", "shutdown"),
        arrival_ns=arrival.astype(np.int64),
        scheduled_ns=instants(scheduled),
        prefill_start_ns=instants(start),
        first_token_ns=instants(first),
        decode_start_ns=instants(np.where(outputs > 1, ready, NEVER)),
        last_token_ns=instants(last),
        num_prompt_tokens=prompts.astype(np.int32),
        max_tokens=outputs.astype(np.int32),
        num_output_tokens=ints(outputs),
        num_cached_tokens=ints(cached),
        num_pool_tokens=ints(pooled),
        num_preemptions=np.zeros(n, np.int32),
        prefill_instance=np.where(done, prefill, NEVER).astype(np.int16),
        decode_instance=np.where(done, decode + (0 if is_colocated else num_prefill), NEVER).astype(np.int16),
        decode_rank=np.where(done, np.arange(n) % 4, NEVER).astype(np.int16),
    )
    prefills = [
        _prefill_instance(i, np.flatnonzero((prefill == i) & done), requests, length) for i in range(num_prefill)
    ]
    decodes = [
        _decode_instance(i, np.flatnonzero((decode == i) & done & (outputs > 1)), requests, joined, step_ns)
        for i in range(num_decode)
    ]
    if is_colocated:
        decodes = [
            dataclasses.replace(c, instance_id=f"colocated-{i}", role="colocated") for i, c in enumerate(decodes)
        ]
        prefills = []
    loads = np.flatnonzero((pooled > 0) & done)
    hand_overs = np.flatnonzero(done & (outputs > 1)) if not is_colocated else np.zeros(0, np.int64)
    stores = np.flatnonzero(done) if has_pool else np.zeros(0, np.int64)
    moves = _moves(requests, loads, hand_overs, stores)
    end_ns = int(max(requests.last_token_ns.max(initial=0), requests.arrival_ns.max(initial=0)))
    return RunColumns(
        requests=requests,
        instances=(*prefills, *decodes),
        planes={
            plane: PlaneTotals(
                num_bytes=int(moves.num_bytes[kinds].sum()),
                num_transfers=int(kinds.sum()),
                busy_ns=int((moves.end_ns - moves.start_ns)[kinds].sum()),
            )
            for plane, kinds in (("rdma", moves.kind == 0), ("ub", moves.kind > 0))
        },
        pool=_pool(requests, stores, loads) if has_pool else None,
        moves=moves if has_moves else None,
        simulated_s=end_ns / 1e9,
        wall_s=0.5,
        peak_rss_bytes=200 * 2**20,
        interrupted=num_unfinished > 0,
    )


def _prefill_instance(index: int, mine: np.ndarray, requests: RequestColumns, length: np.ndarray) -> InstanceColumns:
    start, scheduled = requests.prefill_start_ns[mine], np.sort(requests.scheduled_ns[mine])
    ones = np.ones(len(mine), np.int32)
    computed = requests.num_prompt_tokens[mine] - requests.num_cached_tokens[mine]
    waiting = np.searchsorted(scheduled, start, side="right") - np.arange(len(mine)) - 1
    return InstanceColumns(
        instance_id=f"prefill-{index}",
        role="prefill",
        num_npus=16,
        num_ranks=1,
        max_num_seqs=32,
        num_blocks=1_000,
        start_ns=start,
        charged_ns=length[mine],
        num_seqs=ones,
        num_tokens=computed,
        num_sampled=ones,
        num_joined=ones,
        num_waiting=np.maximum(waiting, 0).astype(np.int32),
        num_used_blocks=(-(-requests.num_prompt_tokens[mine] // BLOCK)).astype(np.int32),
        max_kv_tokens=requests.num_prompt_tokens[mine],
        breakdown_ns=_split(int(length[mine].sum()), OPERATORS["prefill"]),
        first_gaps_ns=np.zeros(0, np.int64),
    )


def _decode_instance(
    index: int, mine: np.ndarray, requests: RequestColumns, joined: np.ndarray, step_ns: int
) -> InstanceColumns:
    first, num_steps = joined[mine], requests.num_output_tokens[mine].astype(np.int64) - 1
    length = int((first + num_steps).max(initial=0)) + 1
    rows = np.cumsum(np.bincount(first, minlength=length) - np.bincount(first + num_steps, minlength=length))
    kept = np.flatnonzero(rows)
    seqs = rows[kept].astype(np.int32)
    return InstanceColumns(
        instance_id=f"decode-{index}",
        role="decode",
        num_npus=160,
        num_ranks=4,
        max_num_seqs=max(int(seqs.max(initial=1)), 1),
        num_blocks=max(int(seqs.max(initial=1)), 1) * 60,
        start_ns=kept * step_ns,
        charged_ns=np.full(len(kept), step_ns, np.int64),
        num_seqs=seqs,
        num_tokens=seqs,
        num_sampled=seqs,
        num_joined=np.bincount(first, minlength=length)[kept].astype(np.int32),
        num_waiting=np.zeros(len(kept), np.int32),
        num_used_blocks=seqs * 40,
        max_kv_tokens=np.full(len(kept), 640, np.int32),
        breakdown_ns=_split(len(kept) * step_ns, OPERATORS["decode"]),
        first_gaps_ns=(first + 1) * step_ns - requests.first_token_ns[mine],
    )


def _moves(requests: RequestColumns, loads: np.ndarray, hand_overs: np.ndarray, stores: np.ndarray) -> MoveColumns:
    prompts = requests.num_prompt_tokens.astype(np.int64)
    parts = (
        (0, hand_overs, requests.first_token_ns, 1_500_000, prompts * 70_272, requests.decode_instance),
        (1, loads, requests.prefill_start_ns - 2_000_000, 2_000_000, requests.num_pool_tokens * 70_272, None),
        (2, stores, requests.first_token_ns, 900_000, prompts // BLOCK * BLOCK_BYTES, None),
    )
    rows = [
        np.column_stack(
            [
                np.full(len(which), kind),
                which,
                starts[which],
                starts[which] + duration,
                num_bytes[which],
                (requests.prefill_instance if where is None else where)[which],
            ]
        )
        for kind, which, starts, duration, num_bytes, where in parts
    ]
    table = np.concatenate(rows).astype(np.int64)
    table = table[np.argsort(table[:, 2], kind="stable")]
    return MoveColumns(
        kind=table[:, 0].astype(np.int16),
        request=table[:, 1].astype(np.int32),
        start_ns=table[:, 2],
        end_ns=table[:, 3],
        num_bytes=table[:, 4],
        instance=table[:, 5].astype(np.int16),
    )


def _pool(requests: RequestColumns, stores: np.ndarray, loads: np.ndarray) -> PoolColumns:
    blocks = requests.num_prompt_tokens[stores].astype(np.int64) // BLOCK
    order = np.argsort(requests.first_token_ns[stores])
    capacity = max(int(blocks.sum()) * BLOCK_BYTES * 2 // 3, BLOCK_BYTES)
    used = np.minimum(np.cumsum(blocks[order]) * BLOCK_BYTES, capacity)
    num_loaded = int(requests.num_pool_tokens[loads].sum()) // BLOCK
    return PoolColumns(
        capacity_bytes=capacity,
        block_bytes=BLOCK_BYTES,
        num_hits=num_loaded,
        num_misses=int(blocks.sum()) - num_loaded,
        num_evicted=0,
        num_loaded_blocks=num_loaded,
        num_stored_blocks=int(blocks.sum()),
        time_ns=requests.first_token_ns[stores][order],
        used_bytes=used,
        host_used_bytes=np.array([used[-1] // 2, used[-1] - used[-1] // 2] if len(used) else [0, 0]),
    )


def _split(total_ns: int, weights: dict[str, int]) -> dict[str, int]:
    parts = {name: total_ns * weight // sum(weights.values()) for name, weight in weights.items()}
    parts[next(iter(parts))] += total_ns - sum(parts.values())
    return parts
