"""The ranks of a decode instance where only counts are known: BatchScheduler's rules, without a loop over requests.

Owns: slots, free blocks and known tokens of every rank; the step in which each request ends, fixed when it joins.
Must not know: time, transfers, the shared pool, what a step costs.
Source: the rules are those of core/step_plan.py for rows of one token, with drafts drawn as in core/acceptance.py.

What a request does in each of its steps follows from its lengths and its draws alone, as long as blocks last. So when
it joins, its accepted drafts and its need of blocks are written into two calendars (rank x step), and its end into a
third. A step then reads a column of each: its cost does not grow with the number of requests, nor of tokens.

A rank whose blocks do not last leaves the calendars and is decided row by row (core/pressed_ranks.py) until they do.
"""

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serving.core.acceptance import AcceptanceTable
from serving.core.calendar import Calendar
from serving.core.ids import Counts

Key = tuple[int, int]


@dataclass(slots=True, eq=False)
class DecodeRow:
    """A request at its decode rank. `num_tokens` are known when it joins, or when its rank was last decided by rows."""

    owner: object
    rank: int
    slot: int  # of its rank
    key: Key  # priority and order: the larger, the sooner preempted
    num_tokens: int
    total_limit: int
    num_blocks: int  # held; of a row in the calendars, when it entered them
    draw: int  # its next place in the table of draws
    has_draft: bool = False
    holds_slot: bool = True
    has_run: bool = False  # a step; of a row in the calendars, before it entered them
    first_step: int = -1
    last_step: int = -1  # NEVER in the calendars: not ready, or decided by rows


class DecodeRanks:
    """Every rank has `num_blocks` blocks of `block_size` tokens and `max_num_seqs` slots."""

    def __init__(
        self,
        *,
        num_ranks: int,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        acceptance: AcceptanceTable | None,
        free_blocks: Counts,
    ) -> None:
        """`acceptance` None: no speculative decoding. `free_blocks`, (num_ranks,), is kept up to date in place."""
        self.num_ranks = num_ranks
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.acceptance = acceptance
        self.free_blocks = free_blocks
        self.free_blocks[:] = num_blocks
        self.num_used_blocks = 0
        self.free_slots = [list(range(max_num_seqs - 1, -1, -1)) for _ in range(num_ranks)]
        self.step = 0  # the next one
        self.num_seqs = np.zeros(num_ranks, np.int64)  # of rows in the calendars
        self.num_tokens = np.zeros(num_ranks, np.int64)  # known tokens of these rows
        self.total_seqs = 0
        self.growth = Calendar(num_ranks)
        self.accepted = Calendar(num_ranks)
        self.ends: dict[int, list[DecodeRow]] = {}
        self.joined: list[DecodeRow] = []  # rows of the next step that were not in the one before
        self.rows_of_rank: list[dict[int, DecodeRow]] = [{} for _ in range(num_ranks)]  # ready ones, by slot

    def reserve(self, owner: object, *, rank: int, num_tokens: int, total_limit: int, key: Key, draw: int) -> DecodeRow:
        """Take a slot and the blocks of `num_tokens` tokens, for a cache that will come; the caller has checked."""
        num_blocks = -(-num_tokens // self.block_size)
        self.take_blocks(rank, num_blocks)
        slot = self.free_slots[rank].pop()
        return DecodeRow(owner, rank, slot, key, num_tokens, total_limit, num_blocks, draw)

    def activate(self, row: DecodeRow, num_tokens: int) -> None:
        """Its cache has come: it takes part from the next step on, with `num_tokens` known."""
        row.num_tokens = num_tokens
        self.rows_of_rank[row.rank][row.slot] = row
        self.joined.append(row)

    def release(self, row: DecodeRow) -> None:
        """Free the blocks of a row that has ended, once nobody reads them, or of one that never ran."""
        if row.holds_slot:
            self.give_slot_back(row)
        self.take_blocks(row.rank, -row.num_blocks)

    def take_blocks(self, rank: int, num_blocks: int) -> None:
        """Count blocks as used; a negative number as free."""
        self.free_blocks[rank] -= num_blocks
        self.num_used_blocks += num_blocks

    def give_slot_back(self, row: DecodeRow) -> None:
        """It runs no longer."""
        row.holds_slot = False
        self.free_slots[row.rank].append(row.slot)

    def enter(self, row: DecodeRow) -> None:
        """Write what a ready row will do, from the next step on, into the calendars."""
        row.first_step = self.step
        if self.acceptance is None:
            self._enter_plain(row)
        else:
            self._enter_drafting(row, self.acceptance)
        self.ends.setdefault(row.last_step, []).append(row)
        self.num_seqs[row.rank] += 1
        self.num_tokens[row.rank] += row.num_tokens
        self.total_seqs += 1

    def leave(self, rank: int) -> list[DecodeRow]:
        """Take a rank's rows out of the calendars, with what they know and hold now; in order of their slots."""
        rows = [row for _, row in sorted(self.rows_of_rank[rank].items()) if row.last_step >= 0]
        for row in rows:
            self._catch_up(row)
            self.ends[row.last_step].remove(row)
            if not self.ends[row.last_step]:
                del self.ends[row.last_step]
            row.last_step = -1
        self.growth.clear(rank)
        self.accepted.clear(rank)
        self.total_seqs -= int(self.num_seqs[rank])
        self.num_seqs[rank] = self.num_tokens[rank] = 0
        return rows

    def next_end(self, most: int) -> tuple[int, bool]:
        """Steps from the next one to the first in which a row ends, at most `most`; and whether one does."""
        for count in range(1, most + 1):
            if self.step + count - 1 in self.ends:
                return count, True
        return most, False

    def advance(self, num_steps: int) -> list[DecodeRow]:
        """`num_steps` steps are over, and `num_tokens` has what they brought; returns the rows that ended in the last.

        Their slots are free, their blocks are held until `release`. In order of rank and slot.
        """
        self.growth.forget(self.step, num_steps)
        self.accepted.forget(self.step, num_steps)
        self.step += num_steps
        ended = self.ends.pop(self.step - 1, [])
        if len(ended) > 1:
            ended.sort(key=lambda row: (row.rank, row.slot))
        for row in ended:
            rank = row.rank
            self.num_seqs[rank] -= 1
            self.num_tokens[rank] -= self.tokens_at(row, self.step)
            row.num_blocks = max(row.num_blocks, -(-(row.total_limit - 1) // self.block_size))
            del self.rows_of_rank[rank][row.slot]
            self.give_slot_back(row)
        self.total_seqs -= len(ended)
        return ended

    def excess(self, row: DecodeRow) -> int:
        """Tokens that the calendars count beyond the limit of a row that ends: 1 if its last draft is not made."""
        return self.tokens_at(row, row.last_step + 1) - row.total_limit

    def check_invariants(self) -> None:
        """Raise AssertionError unless sums, slots and calendars agree with the rows."""
        num_seqs, num_tokens = np.zeros(self.num_ranks, np.int64), np.zeros(self.num_ranks, np.int64)
        for rank, rows in enumerate(self.rows_of_rank):
            for slot, row in rows.items():
                assert (row.rank, row.slot) == (rank, slot)
                assert slot not in self.free_slots[rank]
                if row.last_step >= 0:
                    assert row in self.ends[row.last_step]
                    num_seqs[rank] += 1
                    num_tokens[rank] += self.tokens_at(row, self.step)
        assert num_seqs.tolist() == self.num_seqs.tolist()
        assert num_tokens.tolist() == self.num_tokens.tolist()
        assert self.total_seqs == int(num_seqs.sum()) == sum(map(len, self.ends.values()))
        assert (self.free_blocks >= 0).all()
        assert self.num_used_blocks == self.num_ranks * self.num_blocks - int(self.free_blocks.sum())
        assert (self.free_blocks <= self.num_blocks).all()
        if not self.total_seqs:
            assert self.growth.is_empty
            assert self.accepted.is_empty

    def tokens_at(self, row: DecodeRow, step: int) -> int:
        """Known tokens before a step, as if drafts were verified to the last: at its end it may count one too many."""
        count = step - row.first_step
        if self.acceptance is None:
            return row.num_tokens + count
        brought = self.acceptance.num_tokens
        if row.has_draft:
            return row.num_tokens + brought[row.draw + count] - brought[row.draw]
        return row.num_tokens + (1 + brought[row.draw + count - 1] - brought[row.draw] if count else 0)

    def _catch_up(self, row: DecodeRow) -> None:
        """Bring a row's own counts from its entry into the calendars to the next step."""
        count = self.step - row.first_step
        if not count:
            return
        row.has_run = True
        wanted = self._wanted(row, self.step - 1)
        num_tokens = self.tokens_at(row, self.step)
        row.num_blocks = max(row.num_blocks, -(-wanted // self.block_size))
        row.num_tokens = num_tokens
        if self.acceptance is not None:
            row.draw += count if row.has_draft else count - 1
            row.has_draft = True

    def _wanted(self, row: DecodeRow, step: int) -> int:
        """Tokens that its blocks must have room for in a step: known ones, a draft, and the MTP module's newest."""
        num_tokens = self.tokens_at(row, step)
        if self.acceptance is None:
            return num_tokens
        if step == row.first_step and not row.has_draft:
            return num_tokens + (row.total_limit - num_tokens >= 3)
        return min(num_tokens + 2, row.total_limit - 1)

    def _enter_plain(self, row: DecodeRow) -> None:
        step, num_tokens = row.first_step, row.num_tokens
        row.last_step = step + row.total_limit - num_tokens - 1
        final = -(-(row.total_limit - 1) // self.block_size)
        self.growth.reach(row.last_step)
        for held in range(row.num_blocks, final):
            self.growth.add(row.rank, step + max(0, held * self.block_size + 1 - num_tokens))

    def _enter_drafting(self, row: DecodeRow, table: AcceptanceTable) -> None:
        brought, draw, step, num_tokens = table.num_tokens, row.draw, row.first_step, row.num_tokens
        base, missing = brought[draw], row.total_limit - num_tokens
        lead = 0 if row.has_draft else 1  # steps before the first with a draft
        found = bisect_left(brought, base + missing - lead, draw, draw + missing + 1)
        num_drafts = found - draw
        row.last_step = step + num_drafts + lead - 1
        self.accepted.reach(row.last_step)
        if num_drafts:
            self.accepted.add_run(row.rank, step + lead, table.is_accepted[draw:found])
        final = -(-(row.total_limit - 1) // self.block_size)
        if row.num_blocks < final:
            self.growth.reach(row.last_step)
            size, low = self.block_size, draw
            wanted = self._wanted(row, step)
            for held in range(row.num_blocks, final):
                at = step
                if held * size >= wanted:  # not in the first step: when its known tokens are two short of the end
                    low = bisect_left(brought, base + held * size - 1 - num_tokens - lead, low, found)
                    at += max(low - draw + lead, lead)
                self.growth.add(row.rank, at)


def fronts(context: NDArray[np.int64], kv: NDArray[np.int64]) -> tuple[list[int], list[int]]:
    """The (context, kv) pairs that no other pair exceeds in both, and perhaps some more."""
    first, second = int(context.argmax()), int(kv.argmax())
    if first == second:
        return [int(context[first])], [int(kv[first])]
    may_decide = (context >= context[second]) & (kv >= kv[first])
    return context[may_decide].tolist(), kv[may_decide].tolist()
