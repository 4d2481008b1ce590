"""The tokens of one step on their way to the requests: which are kept, who hears of them, how long they took.

Owns: the cut behind a stop token, and the gaps between a request's tokens.
Must not know: schedulers, clocks, how a step was made.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from serving.core.ids import Mask, RequestId
from serving.core.request import Request
from serving.core.scheduled_batch import ScheduledBatch
from serving.engine_run import Run
from serving.shard import Sampled

Stops = Callable[[Request, Sequence[int]], int | None]
"""How many of its new tokens a request keeps, if one of them ends it; None if none does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptTokens:
    """Of a step, per row of its batch; as `BatchScheduler.update` takes them."""

    stop_mask: Mask | None  # None: nothing stops a timing shard's requests
    num_accepted: NDArray[np.int64] | None  # drafts that are kept; None: no speculative decoding


@dataclass(slots=True)
class StepTokens:
    """What the requests of a step got. Gaps are those between steps: the tokens of one step come together."""

    num_tokens: int = 0
    simulated_itl_ns: list[int] = field(default_factory=list)
    itl_rows: list[int] = field(default_factory=list)  # of the batch, one per simulated gap
    wall_itl_ns: list[int] = field(default_factory=list)


def kept_tokens(batch: ScheduledBatch, sampled: Sampled, runs: Mapping[RequestId, Run], stops: Stops) -> KeptTokens:
    """Drop what comes behind a stop token."""
    num_accepted = sampled.num_accepted
    if sampled.token_ids is None:
        return KeptTokens(stop_mask=None, num_accepted=num_accepted)
    stop_mask = np.zeros(batch.num_rows, np.bool_)
    for row in np.flatnonzero(batch.samples).tolist():
        run = runs.get(batch.request_ids[row])  # None: released during the step
        if run is None or run.request.is_over:
            continue
        num_kept = stops(run.request, sampled.token_ids[row])
        if num_kept is None:
            continue
        stop_mask[row] = True
        if num_kept < len(sampled.token_ids[row]):
            assert num_accepted is not None
            num_accepted = num_accepted.copy()
            num_accepted[row] = num_kept - 1
    return KeptTokens(stop_mask=stop_mask, num_accepted=num_accepted)


def hand_out(
    batch: ScheduledBatch,
    sampled: Sampled,
    kept: KeptTokens,
    rows: NDArray[np.int64],
    runs: Mapping[RequestId, Run],
    *,
    now_ns: int,
    wall_ns: int,
) -> StepTokens:
    """Give the tokens of `rows`, those whose tokens count, to their requests and to who listens."""
    tokens = StepTokens()
    num_accepted = None if kept.num_accepted is None else kept.num_accepted.tolist()
    for row in rows.tolist():
        run = runs[batch.request_ids[row]]
        request = run.request
        if request.is_over:  # at this very instant; it is released next
            continue
        num_tokens = 1 if num_accepted is None else 1 + num_accepted[row]
        if request.last_token_ns is not None:
            tokens.simulated_itl_ns.append(now_ns - request.last_token_ns)
            tokens.itl_rows.append(row)
        if run.sink.last_token_wall_ns is not None:
            tokens.wall_itl_ns.append(wall_ns - run.sink.last_token_wall_ns)
        token_ids: tuple[int, ...] = ()
        logprobs = None
        if sampled.token_ids is not None:
            token_ids = sampled.token_ids[row][:num_tokens]
            entries = None if sampled.logprobs is None else sampled.logprobs[row]
            logprobs = None if entries is None else entries[:num_tokens]
        request.record_tokens(num_tokens, now_ns, token_ids=token_ids)
        run.sink(request, num_tokens, token_ids, logprobs)
        tokens.num_tokens += num_tokens
    return tokens
