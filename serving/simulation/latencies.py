"""Latencies of a run's finished requests, and the phases that they are made of.

Owns: TTFT, TPOT, ITL and E2EL from columns; the split of a request's time into phases.
Must not know: plots, the table of figures.
Source: definitions as in serving/timings.py.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serving.pool_moves import MOVE_KINDS
from serving.simulation.columns import NEVER, InstanceColumns, Ints, MoveColumns, RequestColumns, RunColumns
from serving.timings import Floats, Timings, TokenTimes, tpot_of

POOL_LOAD = MOVE_KINDS.index("pool_load")
# From each instant of `phase_instants` to the next; `pool_load` is the end of what would else be `prefill_queue`.
PHASES = ("admission", "prefill_queue", "pool_load", "prefill", "hand_over", "decode")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ColumnTimings(Timings):
    """Of requests whose tokens came at the ends of steps. `start_ns` counts from `origin_ns`, their first arrival."""

    run: RunColumns
    origin_ns: int

    def token_times(self) -> TokenTimes:
        """Of all steps, whoever's tokens they were: those of requests that did not finish too."""
        ends_ns = [instance.start_ns + instance.charged_ns for instance in self.run.instances]
        return TokenTimes(
            seconds=np.maximum(np.concatenate(ends_ns) - self.origin_ns, 0) / 1e9,
            num_tokens=np.concatenate([i.num_sampled for i in self.run.instances]).astype(np.float64),
        )


def column_timings(run: RunColumns, finished: NDArray[np.int64]) -> ColumnTimings:
    """Of the requests with these indices, all finished; with any, the gaps of all steps."""
    requests = run.requests
    arrival_ns = requests.arrival_ns[finished]
    num_tokens = requests.num_output_tokens[finished].astype(np.float64)
    ttft_ns = (requests.first_token_ns[finished] - arrival_ns).astype(np.float64)
    e2el_ns = (requests.last_token_ns[finished] - arrival_ns).astype(np.float64)
    origin_ns = int(arrival_ns.min()) if finished.size else 0
    gaps_ns, gap_counts = _gaps(run) if finished.size else (np.empty(0), np.empty(0))
    return ColumnTimings(
        num_tokens=num_tokens,
        ttft_ns=ttft_ns,
        e2el_ns=e2el_ns,
        tpot_ns=tpot_of(num_tokens=num_tokens, first_ns=ttft_ns, last_ns=e2el_ns),
        queue_ns=(requests.scheduled_ns[finished] - arrival_ns).astype(np.float64),
        start_ns=(arrival_ns - origin_ns).astype(np.float64),
        gaps_ns=gaps_ns,
        gap_counts=gap_counts,
        run=run,
        origin_ns=origin_ns,
    )


def phase_instants(requests: RequestColumns) -> tuple[Ints, ...]:
    """Where a request's phases begin and the last one ends; NEVER where it did not come to that. Shape (N,) each."""
    return (
        requests.arrival_ns,
        requests.scheduled_ns,
        requests.prefill_start_ns,
        requests.first_token_ns,
        requests.decode_start_ns,
        requests.last_token_ns,
    )


def phases_of(
    requests: RequestColumns, chosen: NDArray[np.bool_], moves: MoveColumns | None = None
) -> Mapping[str, Floats]:
    """Milliseconds that each of the `chosen` requests, all finished, spent in each phase; they add up to its E2EL.

    The blocks of a request are loaded before its prefill starts; without `moves` that time counts as `prefill_queue`.
    A request of one token has no `hand_over` and no `decode`, and one on a colocated instance no `hand_over`: 0. What a
    preemption costs is in `hand_over`: the last start of decoding is the one that is known.
    """
    known = [column[chosen].astype(np.float64) for column in phase_instants(requests)]
    # A request that never came to an instant passed it at once: it had its last token with the first, for example.
    for earlier, later in itertools.pairwise(known):
        later[later == NEVER] = earlier[later == NEVER]
        np.maximum(later, earlier, out=later)
    admission, wait, prefill, hand_over, decode = (b - a for a, b in itertools.pairwise(known))
    loading: Floats = np.zeros(len(requests))
    if moves is not None:
        loads = moves.kind == POOL_LOAD
        lengths = (moves.end_ns - moves.start_ns)[loads]
        loading = np.bincount(moves.request[loads], lengths.astype(np.float64), len(requests)).astype(np.float64)
    load = np.minimum(loading[chosen], wait)
    return {
        name: values / 1e6
        for name, values in zip(PHASES, (admission, wait - load, load, prefill, hand_over, decode), strict=True)
    }


def phase_label(name: str) -> str:
    """As people read it."""
    return name.replace("_", " ")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepGaps:
    """Gaps that are the length of a step and of the pause before it; `counts` rows had each, at `end_ns`. (G,) each."""

    end_ns: NDArray[np.int64]
    gap_ns: NDArray[np.int64]
    counts: NDArray[np.int64]


def step_gaps(instance: InstanceColumns) -> StepGaps:
    """Of rows that were in the step before: they had a token at its end.

    On a prefill instance of its own no row goes on: it is handed over after its token.
    """
    if instance.role == "prefill":
        none = np.empty(0, np.int64)
        return StepGaps(end_ns=none, gap_ns=none, counts=none)
    end_ns = instance.start_ns + instance.charged_ns
    followers = (instance.num_seqs - instance.num_joined)[1:]
    steps = np.flatnonzero(followers)
    return StepGaps(end_ns=end_ns[1:][steps], gap_ns=np.diff(end_ns)[steps], counts=followers[steps].astype(np.int64))


def _gaps(run: RunColumns) -> tuple[Floats, Floats]:
    """Gaps between the tokens of one request, in nanoseconds, and how often each occurred."""
    gaps, counts = [], []
    for instance in run.instances:
        later = step_gaps(instance)
        gaps += [instance.first_gaps_ns, later.gap_ns]
        counts += [np.ones(instance.first_gaps_ns.size, np.int64), later.counts]
    return np.concatenate(gaps).astype(np.float64), np.concatenate(counts).astype(np.float64)
