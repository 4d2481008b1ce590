"""What attention needs to know about one step, computed once and used by every layer.

Owns: where new latents go, which cache slots each query reads, the causal masks, the rotary turns, and the
bound on memory.
Must not know: weights, collectives.
Source: vLLM's slot_mapping; grouping by equal query count is ours.

Queries are cut into pieces of one request whose scores fit the budget. Pieces of equal query count and
similar context become one group, padded to its longest context: a decode step is one group, a prefill chunk
is a group of its own.
"""

# Shapes: T tokens, R requests, r pieces of a group, q queries per piece, K context slots per piece (padded)

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.config import ModelConfig
from model.layers import rope_inverse_frequencies, rope_magnitude, rope_turns
from model.step import StepInput

# Attention scores (pieces x heads x queries x context) held at once: 32 MiB in float32.
MAX_SCORES = 2**23
# Slots that a piece may be padded by beyond its own length: fewer cost less than another group's operator calls.
_CHEAP_PADDING = 64


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QueryGroup:
    """Pieces of r requests with q queries each, attended together over K slots."""

    rows: Tensor  # (r q,) rows of T
    slots: Tensor  # (r K,) cache slots; padding repeats the piece's last slot, which holds a finite latent
    mask: Tensor  # (r, q, 1, K) 0 where the query may look, -inf where it may not
    num_pieces: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttentionBatch:
    """One step as attention sees it."""

    slot_mapping: Tensor  # (T,) slot that each token's latent is written to
    turns: Tensor  # (T, R / 2) rotary turns of each token's position
    groups: tuple[QueryGroup, ...]

    @property
    def num_tokens(self) -> int:
        return len(self.slot_mapping)


@dataclass(frozen=True, slots=True)
class _Piece:
    request: int
    start: int  # first row of T
    num_queries: int
    num_context: int  # context that its last query sees


class AttentionPlanner:
    """Makes an AttentionBatch of each step."""

    def __init__(self, config: ModelConfig, *, num_heads: int, block_size: int, max_scores: int = MAX_SCORES) -> None:
        self._num_heads = num_heads
        self._block_size = block_size
        self._max_scores = max_scores
        self._inverse_frequencies = rope_inverse_frequencies(config)
        self._magnitude = rope_magnitude(config)

    def plan(self, step: StepInput) -> AttentionBatch:
        """Lay out one step. Cost grows with requests, not with tokens, in Python."""
        owners = np.repeat(np.arange(step.num_seqs), np.diff(step.query_start))
        blocks = step.block_tables[owners, step.positions // self._block_size]
        slot_mapping = blocks.astype(np.int64) * self._block_size + step.positions % self._block_size
        positions = torch.from_numpy(step.positions)
        return AttentionBatch(
            slot_mapping=torch.from_numpy(slot_mapping),
            turns=rope_turns(positions, self._inverse_frequencies, self._magnitude),
            groups=tuple(self._group(step, pieces) for pieces in self._batches(self._pieces(step))),
        )

    def _pieces(self, step: StepInput) -> list[_Piece]:
        pieces = []
        starts, lens = step.query_start.tolist(), step.seq_lens.tolist()
        for request, seq_len in enumerate(lens):
            start, stop = starts[request], starts[request + 1]
            most = max(1, self._max_scores // (self._num_heads * seq_len))
            for first in range(start, stop, most):
                count = min(most, stop - first)
                pieces.append(_Piece(request, first, count, seq_len - (stop - first - count)))
        return pieces

    def _batches(self, pieces: list[_Piece]) -> list[list[_Piece]]:
        """Group pieces of equal query count, longest context first, while padding and memory stay in bounds."""
        batches: list[list[_Piece]] = []
        for piece in sorted(pieces, key=lambda p: (p.num_queries, -p.num_context, p.start)):
            head = batches[-1][0] if batches else None
            fits = (
                head is not None
                and head.num_queries == piece.num_queries
                and head.num_context <= 2 * piece.num_context + _CHEAP_PADDING
                and (len(batches[-1]) + 1) * self._num_heads * head.num_queries * head.num_context <= self._max_scores
            )
            if fits:
                batches[-1].append(piece)
            else:
                batches.append([piece])
        return batches

    def _group(self, step: StepInput, pieces: Sequence[_Piece]) -> QueryGroup:
        num_queries, num_context = pieces[0].num_queries, pieces[0].num_context
        requests = np.array([piece.request for piece in pieces])
        starts = np.array([piece.start for piece in pieces])
        last = np.array([piece.num_context - 1 for piece in pieces])
        rows = (starts[:, None] + np.arange(num_queries)).reshape(-1)
        context = np.arange(num_context)
        readable = np.minimum(context, last[:, None])  # (r, K)
        blocks = step.block_tables[requests[:, None], readable // self._block_size].astype(np.int64)
        slots = (blocks * self._block_size + readable % self._block_size).reshape(-1)
        hidden = context > step.positions[rows].reshape(len(pieces), num_queries, 1)
        mask: NDArray[np.float32] = np.where(hidden, np.float32(-np.inf), np.float32(0))
        return QueryGroup(
            rows=torch.from_numpy(rows),
            slots=torch.from_numpy(slots),
            mask=torch.from_numpy(mask).unsqueeze(2),
            num_pieces=len(pieces),
        )
