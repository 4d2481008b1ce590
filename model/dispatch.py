"""Dispatch and combine: token copies to the ranks of their experts, and the outputs back.

Owns: the choice among an expert's copies, the format of a message row, the order of rows, the weighted sum.
Must not know: which experts a token wants or why, what experts compute, how rows travel.
Source: FusedDispatch and FusedCombine of arXiv 2506.12708 section 4.2.1; DeepEP for the pair of calls.

One row per token copy, rows for one rank contiguous, in the order of physical slots:

    float32   | payload: H x float32 (as int32 bits)  | slot: int32 |
    int8      | payload: H x int8 | scale: float32 | slot: int32    |

Combine returns H x float32 per copy, in the order in which dispatch sent it.
"""

# Shapes: t tokens of this rank, H hidden_size, K experts per token, J copies per token (K, or K + 1 with a
# dispatched shared expert), W ranks, M received token copies

from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.collectives import AllToAll, Collective, Reply
from model.config import ModelConfig
from model.layout import RankLayout, copy_table
from model.matrix import QuantizedRows, Rows
from model.quant import quantize_rows

_WORD = 4  # bytes of a float32 or an int32


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Received:
    """What dispatch delivered, and what combine needs to send it back."""

    rows: Rows  # (M, H) token copies by source rank, in float32 or as they came in INT8
    slots: Tensor  # (M,) expert of this rank, counted from its first slot
    source_counts: list[int]  # (W,) rows received from each rank
    sent_order: Tensor  # (t J,) sent row -> copy number, token-major
    num_tokens: int


class ExpertExchange:
    """Dispatch and combine of one layer on one rank."""

    def __init__(self, config: ModelConfig, layout: RankLayout, physical_to_logical: NDArray[np.int64]) -> None:
        is_dispatched = layout.shared_expert == "dispatched"
        slots, num_copies = copy_table(physical_to_logical, config.n_routed_experts + is_dispatched)
        self._layout = layout
        self._shared_id = config.n_routed_experts if is_dispatched else None
        self._slots = torch.from_numpy(slots)
        self._num_copies = torch.from_numpy(num_copies) if slots.shape[1] > 1 else None
        self._max_rows = layout.max_rows_per_peer(config)
        self._hidden_size = config.hidden_size

    def physical_slots(self, experts: Tensor) -> Tensor:
        """Slot (t, J) that each token copy goes to, for logical experts (t, K).

        Rule: token i of rank r uses copy (r + i) mod copies of every expert it chose, copies in order of
        slot. It needs no communication, spreads any batch evenly, and gives the same answer on every run.
        """
        if self._shared_id is not None:
            experts = torch.cat([experts, experts.new_full((len(experts), 1), self._shared_id)], dim=1)
        if self._num_copies is None:
            return self._slots[:, 0][experts]
        turn = torch.arange(len(experts)).unsqueeze(1) + self._layout.rank
        return self._slots[experts, turn % self._num_copies[experts]]

    def dispatch(self, x: Tensor, experts: Tensor) -> Generator[Collective, Reply, Received]:
        """Send the copies of this rank's tokens x (t, H) to their experts (t, K); receive the copies of all ranks."""
        layout = self._layout
        assert len(x) <= layout.max_local_tokens, f"{len(x)} tokens exceed the buffers' {layout.max_local_tokens}"
        slots = self.physical_slots(experts)
        order = torch.argsort(slots.view(-1), stable=True)
        slots_sent = slots.view(-1)[order]
        counts = torch.bincount(slots_sent // layout.slots_per_rank, minlength=layout.world_size).tolist()
        assert max(counts) <= self._max_rows, f"{max(counts)} rows for one rank exceed the buffer's {self._max_rows}"
        tokens = order // slots.shape[1]
        reply = yield AllToAll(list(self._pack(x, tokens, slots_sent).split_with_sizes(counts)))
        rows, slots_received = self._unpack(torch.cat(reply))
        return Received(
            rows=rows,
            slots=slots_received - layout.rank * layout.slots_per_rank,
            source_counts=[len(part) for part in reply],
            sent_order=order,
            num_tokens=len(x),
        )

    def combine(
        self, outputs: Tensor, received: Received, expert_weights: Tensor
    ) -> Generator[Collective, Reply, Tensor]:
        """Return outputs (M, H) to their sources; the sum (t, H) of this rank's copies weighted by (t, K).

        The sum runs over the gate's order of experts, so it does not depend on where they are. A dispatched
        shared expert comes last with weight 1, as a local one is added last.
        """
        reply = yield AllToAll(list(outputs.split_with_sizes(received.source_counts)))
        returned = torch.cat(reply)
        copies = torch.empty_like(returned).index_copy_(0, received.sent_order, returned)
        num_copies = expert_weights.shape[1] + (self._shared_id is not None)
        by_token = copies.view(received.num_tokens, num_copies, self._hidden_size)
        total = outputs.new_zeros(received.num_tokens, self._hidden_size)
        for k in range(expert_weights.shape[1]):
            total.addcmul_(by_token[:, k], expert_weights[:, k : k + 1])
        return total if self._shared_id is None else total + by_token[:, -1]

    def _pack(self, x: Tensor, tokens: Tensor, slots: Tensor) -> Tensor:
        """Message rows of the token copies (token, slot)."""
        width = self._hidden_size
        if self._layout.dispatch_dtype == "float32":
            rows = torch.empty(len(tokens), width + 1, dtype=torch.int32)
            rows[:, :width] = x.view(torch.int32).index_select(0, tokens)
            rows[:, width] = slots
            return rows
        values, scale = quantize_rows(x)
        packed = torch.empty(len(tokens), width + 2 * _WORD, dtype=torch.int8)
        packed[:, :width] = values.index_select(0, tokens)
        packed[:, width : width + _WORD] = scale.view(torch.int8).index_select(0, tokens)
        packed[:, width + _WORD :] = slots.to(torch.int32).unsqueeze(1).view(torch.int8)
        return packed

    def _unpack(self, rows: Tensor) -> tuple[Rows, Tensor]:
        """Payload (M, H) and slots (M,) of message rows."""
        width = self._hidden_size
        if self._layout.dispatch_dtype == "float32":
            return rows[:, :width].view(torch.float32), rows[:, width].to(torch.long)
        scale = rows[:, width : width + _WORD].contiguous().view(torch.float32)
        slots = rows[:, width + _WORD :].contiguous().view(torch.int32)
        return QuantizedRows(rows[:, :width], scale), slots.view(-1).to(torch.long)
