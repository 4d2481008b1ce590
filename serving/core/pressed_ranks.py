"""Decode ranks whose blocks do not last, decided row by row.

Owns: which ranks these are; who gets a block, who waits, who is preempted, whose draft is left out.
Must not know: time, the other ranks.
Source: the rules `grow` and `look_ahead` of core/step_plan.py, word for word: a rank has few enough rows for a loop.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from serving.core.decode_ranks import DecodeRanks, DecodeRow

Ints = NDArray[np.int64]
CALM_BLOCKS_PER_ROW = 2  # free ones with which a rank goes back to the calendars: enough for every row's next step


@dataclass(slots=True, eq=False)
class PressedStep:
    """One step of the pressed ranks: the rows that run, and which of them verify a draft."""

    state: DecodeRanks
    rows: list[DecodeRow]
    is_drafted: list[bool]
    preempted: list[DecodeRow]
    num_drafts: int = 0
    num_accepted: int = 0
    brought: list[int] = field(default_factory=list)  # new tokens of each row

    @property
    def num_seqs(self) -> int:
        """Rows that run."""
        return len(self.rows)

    def add_to(self, num_seqs: Ints, tokens: Ints, context: Ints, kv: Ints) -> tuple[Ints, Ints, Ints, Ints]:
        """The work per rank with that of these rows."""
        num_seqs, tokens, context, kv = num_seqs.copy(), tokens.copy(), context.copy(), kv.copy()
        for row, has_draft in zip(self.rows, self.is_drafted, strict=True):
            known = row.num_tokens
            num_seqs[row.rank] += 1
            tokens[row.rank] += 1 + has_draft
            context[row.rank] += known + (known + 1) * has_draft
            kv[row.rank] += known + has_draft
        return num_seqs, tokens, context, kv

    def finish(self) -> list[DecodeRow]:
        """The step is over: count its tokens; returns the rows that ended, which give their slots back."""
        state, ended = self.state, []
        for row, has_draft, brought in zip(self.rows, self.is_drafted, self.brought, strict=True):
            known, capacity = row.num_tokens, row.num_blocks * state.block_size
            row.has_draft = (
                state.acceptance is not None and row.total_limit - known >= 3 and capacity > known + has_draft
            )
            row.num_tokens = known + brought
            row.has_run = True
            if row.num_tokens >= row.total_limit:
                del state.rows_of_rank[row.rank][row.slot]
                state.give_slot_back(row)
                ended.append(row)
        return ended


class PressedRanks:
    """The ranks of one instance that have left the calendars."""

    def __init__(self, state: DecodeRanks) -> None:
        self._state = state
        self._ranks: set[int] = set()
        self.stalled: list[DecodeRow] = []  # wait in place for a block

    @property
    def num_seqs(self) -> int:
        """Ready rows on these ranks."""
        return sum(len(self._state.rows_of_rank[rank]) for rank in self._ranks)

    def takes(self, row: DecodeRow) -> bool:
        """Whether a row that joins is one of theirs."""
        return row.rank in self._ranks

    def take(self, rank: int, rows: list[DecodeRow]) -> None:
        """A rank, whose rows have just left the calendars."""
        assert len(rows) == len(self._state.rows_of_rank[rank])
        self._ranks.add(rank)

    def take_calm_rows(self) -> list[DecodeRow]:
        """Rows of the ranks that have blocks again: they go back to the calendars."""
        state, calm = self._state, []
        for rank in sorted(self._ranks):
            rows = state.rows_of_rank[rank]
            if state.free_blocks[rank] >= CALM_BLOCKS_PER_ROW * len(rows):
                self._ranks.remove(rank)
                self.stalled = [row for row in self.stalled if row.rank != rank]
                joined = {id(row) for row in state.joined}
                calm += [row for _, row in sorted(rows.items()) if id(row) not in joined]
        return calm

    def decide(self) -> PressedStep:
        """Give blocks to rows that have outgrown theirs, then to drafts."""
        state = self._state
        scarce: list[DecodeRow] = []
        for rank in sorted(self._ranks):
            short = [row for _, row in sorted(state.rows_of_rank[rank].items()) if self._lacks(row, row.num_tokens)]
            if state.free_blocks[rank] >= len(short):
                for row in short:
                    self._give_block(row)
            else:
                scarce += short
        stalled: list[DecodeRow] = []
        self.stalled = stalled
        preempted: list[DecodeRow] = []
        for row in sorted(scarce, key=lambda row: row.key):
            self._grow_by_force(row, stalled, preempted)
        step = PressedStep(state, [], [], preempted)
        for rank in sorted(self._ranks):
            ready = [row for _, row in sorted(state.rows_of_rank[rank].items()) if row not in stalled]
            step.rows += ready
            if state.acceptance is None:
                step.is_drafted += [False] * len(ready)
            else:
                step.is_drafted += self._look_ahead(rank, ready)
        for row, has_draft in zip(step.rows, step.is_drafted, strict=True):
            is_right = 0
            if has_draft:
                assert state.acceptance is not None
                is_right = int(state.acceptance.is_accepted[row.draw])
                row.draw += 1
            step.num_drafts += has_draft
            step.num_accepted += is_right
            step.brought.append(1 + is_right)
        return step

    def _look_ahead(self, rank: int, ready: list[DecodeRow]) -> list[bool]:
        state = self._state
        may_draft = [row.has_draft and row.total_limit - row.num_tokens >= 2 for row in ready]
        for _ in range(2):
            for row, drafts in zip(ready, may_draft, strict=True):
                wanted = row.num_tokens + drafts + (row.total_limit - row.num_tokens >= 3)
                if self._lacks(row, wanted) and state.free_blocks[rank]:
                    self._give_block(row)
        return [
            drafts and not self._lacks(row, row.num_tokens + 1) for row, drafts in zip(ready, may_draft, strict=True)
        ]

    def _grow_by_force(self, row: DecodeRow, stalled: list[DecodeRow], preempted: list[DecodeRow]) -> None:
        state = self._state
        rows = state.rows_of_rank[row.rank]
        while row.slot in rows and rows[row.slot] is row and not state.free_blocks[row.rank]:
            if len(rows) == 1:
                stalled.append(row)
                return
            worst = max(rows.values(), key=lambda other: other.key)
            del rows[worst.slot]
            state.release(worst)
            preempted.append(worst)
        if rows.get(row.slot) is row:
            self._give_block(row)

    def _lacks(self, row: DecodeRow, num_tokens: int) -> bool:
        return row.num_blocks * self._state.block_size < num_tokens

    def _give_block(self, row: DecodeRow) -> None:
        row.num_blocks += 1
        self._state.take_blocks(row.rank, 1)
