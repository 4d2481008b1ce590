"""What a run in virtual time gives: one column per quantity, so that a million requests fit in memory.

Owns: the layout of the columns, and what every entry means.
Must not know: how a run is driven, how its result is shown.

Instants are integer nanoseconds of simulated time since the start of the run; NEVER where something did not happen.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from serving.config import Role
from serving.records import OUTCOMES

NEVER = -1
FINISHED = OUTCOMES.index("finished")

Ints = NDArray[np.int64]
SmallInts = NDArray[np.int32]
Codes = NDArray[np.int16]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RequestColumns:
    """One entry per request, in the workload's order; shape (N,) each. Requests that never arrived are left out.

    A preempted request keeps the first of each instant but `decode_start_ns`, and the places of its last attempt.
    """

    request_ids: Sequence[str]
    outcome: Codes  # index into records.OUTCOMES
    reason: Codes  # index into `reasons`
    reasons: tuple[str, ...]  # core.request.OutcomeReason values
    arrival_ns: Ints
    scheduled_ns: Ints  # a place was found: a decode rank with KV space, and a prefill instance
    prefill_start_ns: Ints  # the first step that computes its prompt begins, or its blocks have come from the pool
    first_token_ns: Ints  # its prompt is computed
    decode_start_ns: Ints  # its KV has arrived at the decode rank
    last_token_ns: Ints
    num_prompt_tokens: SmallInts
    max_tokens: SmallInts
    num_output_tokens: SmallInts  # of a request that an interrupt ended at least those before its last hand-over
    num_cached_tokens: SmallInts  # of the prompt, at the first prefill; from the pool or the instance's own blocks
    num_pool_tokens: SmallInts  # of them, those that came from the pool
    num_preemptions: SmallInts
    prefill_instance: Codes  # index into RunColumns.instances; NEVER: not placed
    decode_instance: Codes
    decode_rank: Codes

    def __len__(self) -> int:
        return len(self.arrival_ns)

    @property
    def is_finished(self) -> NDArray[np.bool_]:
        """Which requests have all their tokens."""
        finished: NDArray[np.bool_] = self.outcome == FINISHED
        return finished


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class InstanceColumns:
    """One instance, and one entry per step of it, in order; shape (S,) each."""

    instance_id: str
    role: Role
    num_npus: int
    num_ranks: int  # with a KV space of their own
    max_num_seqs: int  # per rank
    num_blocks: int  # of KV space, all ranks together
    start_ns: Ints
    charged_ns: Ints  # its end is start + charged
    num_seqs: SmallInts  # rows of the batch
    num_tokens: SmallInts  # computed, drafts among them
    num_sampled: SmallInts  # new tokens that came out
    num_joined: SmallInts  # rows that were not in the step before it: their token's gap is not this step's length
    num_waiting: SmallInts  # requests that wait at the instance when the step begins
    num_used_blocks: SmallInts  # of KV space when the step begins
    max_kv_tokens: SmallInts  # context of the rank that has most
    breakdown_ns: Mapping[str, int]  # operator, or stream.operator, to the time it adds; over all steps
    first_gaps_ns: Ints  # of rows that joined: from the token before to the one of their first step here; any order

    @property
    def busy_ns(self) -> int:
        """Charged time of all steps."""
        return int(self.charged_ns.sum())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MoveColumns:
    """Movements of KV blocks, in the order of their starts; shape (M,) each."""

    kind: Codes  # index into pool_moves.MOVE_KINDS
    request: SmallInts  # index into the requests
    start_ns: Ints
    end_ns: Ints
    num_bytes: Ints
    instance: Codes  # where the blocks are needed or come from: the decode instance of a kv_transfer, else prefill


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PoolColumns:
    """The shared pool: totals, and its fill over time."""

    capacity_bytes: int
    block_bytes: int
    num_hits: int  # blocks that were asked for and there
    num_misses: int
    num_evicted: int  # blocks
    num_loaded_blocks: int
    num_stored_blocks: int
    time_ns: Ints  # (P,) after changes, rising; not necessarily every one
    used_bytes: Ints  # (P,)
    host_used_bytes: Ints  # (hosts,) in the end


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaneTotals:
    """What one plane carried."""

    num_bytes: int
    num_transfers: int
    busy_ns: int  # summed over its out ports


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RunColumns:
    """All of a run. `moves` only where they were asked for."""

    requests: RequestColumns
    instances: tuple[InstanceColumns, ...]
    planes: Mapping[str, PlaneTotals]
    pool: PoolColumns | None
    moves: MoveColumns | None = None
    num_drafts: int = 0  # verified
    num_accepted: int = 0
    held_at_rest: Mapping[str, int] = field(default_factory=dict)
    simulated_s: float = 0.0
    wall_s: float = 0.0
    peak_rss_bytes: int = 0
    digest: str | None = None  # of the events, where they were kept
    num_not_arrived: int = 0  # requests of the workload that an interrupt kept from arriving
    interrupted: bool = False
