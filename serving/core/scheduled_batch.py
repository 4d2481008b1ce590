"""What a scheduler decides for one step, and what came of it: frozen values.

Owns: the shape of the messages between scheduler and engine.
Must not know: how they are made, what executes them.
Source: vLLM v1 sched/output.py; arrays in place of dictionaries by request.
"""

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from serving.core.ids import BlockIds, Counts, Mask, RequestId


@dataclass(frozen=True, slots=True, kw_only=True)
class Preempted:
    """A request that lost its slot and blocks. `num_tokens` are known; all are to be computed again."""

    request_id: RequestId
    rank: int
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted:
    """A request that left the waiting queue: `num_cached_tokens` of it were found in its rank's own blocks."""

    request_id: RequestId
    rank: int
    num_cached_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """A prefix to fetch from the shared pool: tokens [num_cached_tokens, num_cached_tokens + num_external_tokens).

    They go into `block_ids`, in order. The request runs once `activate` says how far its cache is complete.
    """

    request_id: RequestId
    rank: int
    num_cached_tokens: int
    num_external_tokens: int
    block_ids: BlockIds


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BatchDrafts:
    """What each of N rows has to do with drafts. A draft is the last of the row's scheduled tokens."""

    num_drafts: NDArray[np.int32]  # (N,) 0 or 1 draft to verify
    makes_draft: Mask  # (N,) the next draft is wanted, and there is a slot for the newest token
    is_behind: Mask  # (N,) no draft was made after the token before: the MTP module has one more row to compute

    def __post_init__(self) -> None:
        for field in fields(self):
            getattr(self, field.name).flags.writeable = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScheduledBatch:
    """One step: N rows, in order of rank; within a rank rows of one token first, then prefill chunks by key.

    Row i computes tokens [num_computed_tokens[i], num_computed_tokens[i] + num_scheduled_tokens[i]) of its request.
    The arrays are read-only. A batch without rows only reports decisions: there is no step to run, no update to do.
    """

    slots: Counts  # (N,) index into the slot table
    ranks: NDArray[np.int32]  # (N,)
    num_scheduled_tokens: NDArray[np.int32]  # (N,)
    num_computed_tokens: NDArray[np.int32]  # (N,) before the step
    samples: Mask  # (N,) the last known token is computed, so a new one comes out
    request_ids: NDArray[np.object_]  # (N,) of RequestId
    rank_starts: Counts  # (num_ranks + 1,) rank r has the rows [rank_starts[r], rank_starts[r + 1])
    preempted: tuple[Preempted, ...] = ()
    admitted: tuple[Admitted, ...] = ()
    loads: tuple[Load, ...] = ()  # each is also among the admitted
    drafts: BatchDrafts | None = None  # None: no speculative decoding

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.ndarray):
                value.flags.writeable = False

    @property
    def num_rows(self) -> int:
        return len(self.slots)

    @property
    def num_ranks(self) -> int:
        return len(self.rank_starts) - 1

    @property
    def num_tokens(self) -> int:
        """Tokens computed in this step, all ranks together, drafts among them."""
        return int(self.num_scheduled_tokens.sum())

    @property
    def num_samples(self) -> NDArray[np.int32] | Mask:
        """(N,) tokens that are sampled in each row: one if it samples, and one after its draft."""
        return self.samples if self.drafts is None else self.samples + self.drafts.num_drafts

    def sums_by_rank(self, *values: NDArray[np.integer] | Mask) -> Counts:
        """Sums of values per row over each rank's rows, shape (len(values), num_ranks); exact, 0 for an idle rank."""
        sums = np.zeros((len(values), self.num_rows + 1), dtype=np.int64)
        np.cumsum(values, axis=1, dtype=np.int64, out=sums[:, 1:])
        at_starts = sums[:, self.rank_starts]
        by_rank: Counts = at_starts[:, 1:] - at_starts[:, :-1]  # np.diff, of which half the cost is checking arguments
        return by_rank


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepResult:
    """What a step did to the requests of its batch. Rows are indices into the batch, ascending.

    A finished request's blocks are held until `release`. An aborted one holds nothing any more.
    """

    sampled_rows: Counts  # rows whose new token counts; those of aborted requests do not
    finished_rows: Counts  # among the sampled
    finished: tuple[RequestId, ...]  # one per finished row
    stopped: Mask  # one per finished row: True for the stop mask, False for total_limit alone
    aborted: tuple[RequestId, ...] = ()
