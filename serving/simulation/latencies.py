"""Latencies of a run's finished requests, and the phases that they are made of.

Owns: TTFT, TPOT, ITL and E2EL from columns, in milliseconds; the split of a request's time into phases.
Must not know: plots, the table of figures.
Source: definitions as in serving/summary.py.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serving.simulation.columns import MOVE_KINDS, NEVER, RunColumns
from serving.simulation.windows import Floats

POOL_LOAD = MOVE_KINDS.index("pool_load")
PHASES = ("queue", "pool load", "prefill wait", "prefill", "transfer", "decode")


@dataclass(frozen=True, slots=True, kw_only=True)
class Latencies:
    """Of the finished requests, shape (F,) each; in milliseconds. `tpot_ms` is NaN for requests of one token.

    `gap_ms` are the times between a request's chunks, each of which occurred `gap_counts` times; shape (G,).
    """

    arrival_ns: NDArray[np.int64]
    ttft_ms: Floats
    tpot_ms: Floats
    e2el_ms: Floats
    gap_ms: Floats
    gap_counts: Floats


def latencies_of(run: RunColumns) -> Latencies:
    """Of all finished requests."""
    requests, done = run.requests, run.requests.is_finished
    arrival, last = requests.arrival_ns[done], requests.last_token_ns[done]
    ttft = (requests.first_token_ns[done] - arrival) / 1e6
    e2el = (last - arrival) / 1e6
    tokens = requests.num_output_tokens[done]
    tpot = np.where(tokens > 1, (e2el - ttft) / np.maximum(tokens - 1, 1), np.nan)
    gaps, counts = [np.zeros(0)], [np.zeros(0)]
    for instance in run.instances:
        if instance.role == "prefill":
            continue
        ends = instance.start_ns + instance.charged_ns
        followers = (instance.num_seqs - instance.num_joined)[1:]
        gaps += [np.diff(ends)[followers > 0] / 1e6, instance.first_gaps_ns / 1e6]
        counts += [followers[followers > 0].astype(np.float64), np.ones(len(instance.first_gaps_ns))]
    return Latencies(
        arrival_ns=arrival,
        ttft_ms=ttft,
        tpot_ms=tpot,
        e2el_ms=e2el,
        gap_ms=np.concatenate(gaps),
        gap_counts=np.concatenate(counts),
    )


def phases_of(run: RunColumns) -> Mapping[str, Floats]:
    """Milliseconds that each finished request spent in each phase; they add up to its E2EL.

    The blocks of a request are loaded before its prefill starts; without the run's moves that time counts as
    `prefill wait`. What a preemption costs is in `transfer`: the last start of decoding is the one that is known.
    """
    requests, done = run.requests, run.requests.is_finished
    known = [
        column[done].astype(np.float64)
        for column in (
            requests.arrival_ns,
            requests.scheduled_ns,
            requests.prefill_start_ns,
            requests.first_token_ns,
            requests.decode_start_ns,
            requests.last_token_ns,
        )
    ]
    # A request that never came to an instant passed it at once: it had its last token with the first, for example.
    for earlier, later in itertools.pairwise(known):
        later[later == NEVER] = earlier[later == NEVER]
        np.maximum(later, earlier, out=later)
    queue, wait, prefill, transfer, decode = (b - a for a, b in itertools.pairwise(known))
    loading: Floats = np.zeros(len(requests))
    if run.moves is not None:
        loads = run.moves.kind == POOL_LOAD
        lengths = (run.moves.end_ns - run.moves.start_ns)[loads]
        loading = np.bincount(run.moves.request[loads], lengths.astype(np.float64), len(requests)).astype(np.float64)
    load = np.minimum(loading[done], wait)
    return {
        name: values / 1e6
        for name, values in zip(PHASES, (queue, load, wait - load, prefill, transfer, decode), strict=True)
    }
