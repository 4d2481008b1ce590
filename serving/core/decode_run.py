"""Steps of a decode instance that are decided at once, since nobody joins or leaves between them.

Owns: what each step of such a run computes, rank by rank; what is given back when the run is cut short.
Must not know: time, what a step costs.

A run ends with the step in which a request ends. It may be cut at any step that has begun, when a request joins or
takes blocks that the run counted on; what it had decided beyond is forgotten.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from serving.core.decode_ranks import DecodeRanks, DecodeRow, fronts
from serving.core.pressed_ranks import PressedRanks, PressedStep

Ints = NDArray[np.int64]


@dataclass(slots=True, eq=False)
class RunStep:
    """What one step computes, all ranks together or of the rank that has most."""

    num_seqs: int
    max_seqs: int
    num_tokens: int  # computed; each gives a sample
    max_tokens: int
    context: list[int]  # token pairs, and cached tokens to read, of the ranks that can be the slowest
    kv: list[int]
    num_drafts: int
    num_accepted: int
    num_sampled: int  # new tokens that count


@dataclass(slots=True, eq=False)
class DecodeRun:
    """Consecutive steps, in order."""

    state: DecodeRanks
    steps: list[RunStep]
    joined: list[DecodeRow]  # were not in the step before the first
    ranks: Ints | None  # whose columns follow; None: all of them
    brought: Ints  # (ranks, steps) tokens that each step brings, as the calendars count them
    growth: Ints  # (ranks, steps) blocks that each step takes
    total_growth: list[int]  # of all ranks, by step
    pressed: PressedStep | None
    used_blocks: list[int] = field(
        default_factory=list
    )  # of the instance, at the beginning of each step that has begun

    def begin(self, num_steps: int) -> None:
        """So many of its steps have begun: take their blocks."""
        state = self.state
        for i in range(len(self.used_blocks), num_steps):
            if self.total_growth[i]:  # most steps take none
                column = self.growth[:, i]
                if self.ranks is None:
                    state.free_blocks -= column
                else:
                    state.free_blocks[self.ranks] -= column
                state.num_used_blocks += self.total_growth[i]
            self.used_blocks.append(state.num_used_blocks)

    def has_room(self, rank: int, num_steps: int) -> bool:
        """Whether a rank has the blocks that the first `num_steps` of the run will still take."""
        index = rank if self.ranks is None else int(np.searchsorted(self.ranks, rank))
        if self.ranks is not None and (index == len(self.ranks) or self.ranks[index] != rank):
            return True
        growth = self.growth[index, len(self.used_blocks) : num_steps]
        return bool(self.state.free_blocks[rank] >= np.add.reduce(growth))

    def finish(self, num_steps: int) -> list[DecodeRow]:
        """So many of its steps, all that have begun, are over; returns the rows that ended in the last."""
        self.begin(num_steps)
        state = self.state
        brought = self.brought[:, 0] if num_steps == 1 else np.add.reduce(self.brought[:, :num_steps], axis=1)
        if self.ranks is None:
            state.num_tokens += brought
        else:
            state.num_tokens[self.ranks] += brought
        ended = state.advance(num_steps)
        if self.pressed is not None:
            ended = sorted(ended + self.pressed.finish(), key=lambda row: (row.rank, row.slot))
        return ended


class DecodePlanner:
    """Decides the runs of one decode instance."""

    def __init__(self, state: DecodeRanks, *, max_steps: int) -> None:
        """`max_steps`: the longest run."""
        self._state = state
        self._max_steps = max_steps
        self._pressed = PressedRanks(state)

    @property
    def stalled(self) -> list[DecodeRow]:
        """Rows that wait in place for a block, as of the last plan."""
        return self._pressed.stalled

    def plan(self) -> DecodeRun | None:
        """The next run; None if there is nothing to do and nothing to report."""
        state = self._state
        leading = self._pressed.take_calm_rows()
        for row in state.joined:
            if not self._pressed.takes(row):
                leading.append(row)
        joined, state.joined = state.joined, []
        for row in leading:
            state.enter(row)
        if not state.total_seqs and not self._pressed.num_seqs:
            return None
        num_steps, has_end = state.next_end(1 if self._pressed.num_seqs else self._max_steps)
        if num_steps > 1:
            run = self._plan_many(num_steps, has_end, leading)
            if run is not None:
                run.joined = joined
                return run
        return self._plan_one(leading, joined)

    def _plan_one(self, leading: list[DecodeRow], joined: list[DecodeRow]) -> DecodeRun | None:
        state, step = self._state, self._state.step
        growth = state.growth.column(step)
        short = state.free_blocks < growth
        if short.any():
            for rank in np.flatnonzero(short).tolist():
                self._pressed.take(rank, state.leave(rank))
            leading = [row for row in leading if row.last_step >= 0]
        pressed = self._pressed.decide() if self._pressed.num_seqs else None
        num_seqs, num_tokens, total_seqs = state.num_seqs, state.num_tokens, state.total_seqs
        brought = num_seqs.copy()
        if state.acceptance is None:
            tokens, context, kv, total_drafts, total_accepted = num_seqs, num_tokens, num_tokens, 0, 0
        else:
            accepted = state.accepted.column(step)
            brought += accepted
            drafted, context = num_seqs, 2 * num_tokens
            undrafted = self._undrafted(leading, step)
            if undrafted:
                drafted = num_seqs.copy()
                for rank, row_tokens in undrafted:
                    drafted[rank] -= 1
                    context[rank] -= row_tokens
            context += drafted
            kv, tokens = num_tokens + drafted, num_seqs + drafted
            total_drafts = total_seqs - len(undrafted)
            total_accepted = int(np.add.reduce(accepted)) - sum(state.excess(row) for row in state.ends.get(step, ()))
        if pressed is not None:
            num_seqs, tokens, context, kv = pressed.add_to(num_seqs, tokens, context, kv)
            total_seqs += pressed.num_seqs
            total_drafts += pressed.num_drafts
            total_accepted += pressed.num_accepted
        steps = []
        if total_seqs:
            contexts, kvs = fronts(context, kv)
            steps.append(
                RunStep(
                    total_seqs,
                    int(num_seqs.max()),
                    total_seqs + total_drafts,
                    int(tokens.max()),
                    contexts,
                    kvs,
                    total_drafts,
                    total_accepted,
                    total_seqs + total_accepted,
                )
            )
        elif pressed is None or not pressed.preempted:
            return None
        total_growth = [int(np.add.reduce(growth))]
        columns = brought[:, None], growth.astype(np.int64)[:, None], total_growth
        return DecodeRun(state, steps, joined, None, *columns, pressed)

    def _plan_many(self, num_steps: int, has_end: bool, leading: list[DecodeRow]) -> DecodeRun | None:
        """None if not even one step can be taken this way."""
        state, step = self._state, self._state.step
        ranks = state.num_seqs.nonzero()[0]
        growth = state.growth.columns(step, num_steps, ranks)
        total_growth: list[int] = np.add.reduce(growth, axis=0).tolist()
        free_blocks = state.free_blocks[ranks]
        if any(total_growth) and (np.add.reduce(growth, axis=1) > free_blocks).any():
            lacks = (growth.cumsum(axis=1) > free_blocks[:, None]).any(axis=0)
            num_steps, has_end = int(lacks.argmax()), False
            if num_steps == 0:
                return None
            growth = growth[:, :num_steps]
        num_seqs = state.num_seqs[ranks][:, None]
        known = state.num_tokens[ranks][:, None]
        total_seqs, max_seqs = state.total_seqs, int(num_seqs.max())
        if state.acceptance is None:
            brought = num_seqs.repeat(num_steps, axis=1)
            context = kv = known + num_seqs * np.arange(num_steps)
            none = [0] * num_steps
            max_tokens, total_drafts, total_accepted = [max_seqs] * num_steps, none, none
        else:
            accepted = state.accepted.columns(step, num_steps, ranks)
            brought = accepted + num_seqs
            kv = brought.cumsum(axis=1)
            kv += known + num_seqs  # what is known before the step, and a draft of every row
            kv -= brought
            context = 2 * kv
            context -= num_seqs
            max_tokens, total_drafts = [2 * max_seqs] * num_steps, [total_seqs] * num_steps
            last = self._undrafted([], step + num_steps - 1) if has_end else []
            for column, rows in ((0, self._undrafted(leading, None)), (num_steps - 1, last)):
                if rows:
                    tokens = 2 * num_seqs[:, 0]
                    for rank, row_tokens in rows:
                        index = int(ranks.searchsorted(rank))
                        tokens[index] -= 1
                        kv[index, column] -= 1
                        context[index, column] -= row_tokens + 1
                    max_tokens[column] = int(tokens.max())
                    total_drafts[column] -= len(rows)
            total_accepted = np.add.reduce(accepted, axis=0).tolist()
            if has_end:
                total_accepted[-1] -= sum(state.excess(row) for row in state.ends[step + num_steps - 1])
        first_ranks, second_ranks = context.argmax(axis=0).tolist(), kv.argmax(axis=0).tolist()
        steps = []
        for i, (most_context, most_kv) in enumerate(zip(first_ranks, second_ranks, strict=True)):
            if most_context == most_kv:
                contexts, kvs = [int(context[most_context, i])], [int(kv[most_kv, i])]
            else:
                contexts, kvs = fronts(context[:, i], kv[:, i])
            drafts, right = total_drafts[i], total_accepted[i]
            steps.append(
                RunStep(
                    total_seqs,
                    max_seqs,
                    total_seqs + drafts,
                    max_tokens[i],
                    contexts,
                    kvs,
                    drafts,
                    right,
                    total_seqs + right,
                )
            )
        return DecodeRun(state, steps, [], ranks, brought, growth, total_growth, None)

    def _undrafted(self, leading: list[DecodeRow], last_step: int | None) -> list[tuple[int, int]]:
        """Rank and known tokens of rows that verify no draft: new ones; those that lack one token in `last_step`."""
        state = self._state
        rows = [(row.rank, row.num_tokens) for row in leading if not row.has_draft]
        if last_step is not None:
            for row in state.ends.get(last_step, ()):
                num_tokens = state.tokens_at(row, last_step)
                if num_tokens == row.total_limit - 1 and (row.has_draft or row.first_step != last_step):
                    rows.append((row.rank, num_tokens))
        return rows
