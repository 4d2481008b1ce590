"""What speculative decoding keeps of a request between its steps, and how it gets to the ranks and back.

Owns: the draft, or the hidden state from which the MTP module goes on, of every request; whether a draft that nobody
computed is right (`simulate`).
Must not know: time, routing, tensors; the module itself (model/speculation.py).

Ranks keep nothing. So a request can be preempted, or handed over from prefill to decode, with its state, a few hundred
numbers at most, in the control plane beside its first token; the latents move with the blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.step import DraftingBatch, DraftOutput
from serving.core.acceptance import acceptance_table, first_draw
from serving.core.request import Request
from serving.core.scheduled_batch import ScheduledBatch
from serving.messages import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftState:
    """Of a request of which `num_computed_tokens` have been computed; at any other moment it says nothing."""

    num_computed_tokens: int
    draft: int | None  # for the position after the newest token
    hidden: NDArray[np.float32] | None  # (H,) of the last computed position, where there is no draft


@dataclass(slots=True)
class _Draws:
    """Of a request without a model: its next place in the table of draws."""

    next_draw: int


def draft_of(request: Request, num_computed_tokens: int) -> int:
    """The draft that a scheduled row is to verify."""
    state = request.drafting
    assert isinstance(state, DraftState), f"request {request.request_id}: a draft is scheduled that was never made"
    assert state.num_computed_tokens == num_computed_tokens, f"request {request.request_id}: an outdated draft"
    assert state.draft is not None, f"request {request.request_id}: no draft was made"
    return state.draft


def drafting_batch(
    batch: ScheduledBatch, requests: Sequence[Request], rows: range, *, hidden_size: int
) -> DraftingBatch:
    """The MTP module's part of one rank's step: rows `rows` of the batch."""
    own = slice(rows.start, rows.stop)
    carried_ids: list[int] = []
    carried: list[NDArray[np.float32]] = []
    is_behind = np.ones(len(rows), np.bool_) if batch.drafts is None else batch.drafts.is_behind[own]
    for i in np.flatnonzero(is_behind).tolist():
        state = requests[rows[i]].drafting
        if not isinstance(state, DraftState) or state.num_computed_tokens != batch.num_computed_tokens[rows[i]]:
            continue
        if state.hidden is not None:
            carried_ids.append(i)
            carried.append(state.hidden)
    none = np.zeros(len(rows), np.int32)
    return DraftingBatch(
        num_drafts=none if batch.drafts is None else batch.drafts.num_drafts[own],
        is_behind=is_behind,
        makes_draft=none.astype(np.bool_) if batch.drafts is None else batch.drafts.makes_draft[own],
        eos_position=np.array([_eos_position(requests[row]) for row in rows], np.int64),
        carried_ids=np.array(carried_ids, np.int32),
        carried=np.stack(carried) if carried else np.zeros((0, hidden_size), np.float32),
    )


def keep_drafts(
    batch: ScheduledBatch,
    requests: Sequence[Request],
    first_row: int,
    output: DraftOutput,
    *,
    num_accepted: NDArray[np.int64],
) -> None:
    """Keep what one rank's step gave; request i of the rank is row first_row + i, `num_accepted` has all rows."""
    end = batch.num_computed_tokens + batch.num_scheduled_tokens + num_accepted
    if batch.drafts is not None:
        end = end - batch.drafts.num_drafts
    for i, token_id in zip(output.draft_ids.tolist(), output.token_ids.tolist(), strict=True):
        requests[first_row + i].drafting = DraftState(
            num_computed_tokens=int(end[first_row + i]), draft=token_id, hidden=None
        )
    for i, hidden in zip(output.hidden_ids.tolist(), output.hidden, strict=True):
        requests[first_row + i].drafting = DraftState(
            num_computed_tokens=int(end[first_row + i]), draft=None, hidden=hidden
        )


def drawn_acceptance(batch: ScheduledBatch, requests: Sequence[Request], acceptance: float) -> NDArray[np.int64]:
    """Accepted drafts per row where no model says: each is right with probability `acceptance`.

    Drawn by request and by how many drafts of it were verified, so it does not depend on the batch.
    """
    assert batch.drafts is not None
    num_accepted = np.zeros(batch.num_rows, np.int64)
    rows = np.flatnonzero(batch.drafts.num_drafts)
    if len(rows):
        num_accepted[rows] = [_is_accepted(requests[row], acceptance) for row in rows.tolist()]
    return num_accepted


def _eos_position(request: Request) -> int:
    assert isinstance(request.sampling, SamplingParams)
    return request.num_prompt_tokens + request.sampling.min_tokens


def _is_accepted(request: Request, acceptance: float) -> bool:
    """Whether the request's next draft is right."""
    state = request.drafting
    if not isinstance(state, _Draws):
        seed = request.sampling.seed if isinstance(request.sampling, SamplingParams) else None
        state = request.drafting = _Draws(first_draw(request.request_id, seed))
    state.next_draw += 1
    return bool(acceptance_table(acceptance).is_accepted[state.next_draw - 1])
