"""One step of a scheduler while it is being decided.

Owns: the four rules by which a step's blocks and token budget are given out, and the batch that comes of them.
Must not know: how requests come and go between steps.
Source: vLLM v1 sched/scheduler.py, with one change: a request is admitted with the blocks of all its known tokens,
so a prefill that runs never lacks a block, and only rows that have outgrown theirs can cause a preemption.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from serving.core.block_pool import BlockPool
from serving.core.ids import Counts, Mask
from serving.core.scheduled_batch import Admitted, BatchDrafts, Load, Preempted, ScheduledBatch
from serving.core.slot_table import SlotTable
from serving.core.waiting_queue import Job, Key, WaitingQueues


class StepPlan:
    """
    1. `grow`: a row whose known tokens outgrow its blocks gets one more. Where the rank has none, the ready request
       with the worst key (priority, then order) is preempted, if need be the row itself. A row that is the only
       ready one waits in place: the blocks are held by requests that load, are reserved or are finished.
    2. `take_single_tokens`: rows with one token to compute take it; the budget covers all slots. With speculative
       decoding they `look_ahead`: a draft is verified, and the next one made, if the rank has free blocks for it.
       Nobody is preempted for that.
    3. `continue_prefills`: what is left of the budget goes to longer rows, by key, in chunks.
    4. `admit`: then to the waiting, by key. The first that does not fit ends it, and a rank that was short of a
       block admits nobody. A request whose prefix is loaded first needs blocks, but no budget.

    Nobody starves: the best key of a rank is preempted for nobody and gets budget in every step, a request alone
    always fits, and nobody passes the head of the queue.
    """

    def __init__(
        self,
        *,
        table: SlotTable,
        pools: Sequence[BlockPool],
        waiting: WaitingQueues,
        max_num_batched_tokens: int,
        requeue_preempted: bool,
        num_speculative_tokens: int = 0,
    ) -> None:
        self._table = table
        self._pools = pools
        self._waiting = waiting
        self._max_num_batched_tokens = max_num_batched_tokens
        self._requeue_preempted = requeue_preempted
        self._is_speculating = num_speculative_tokens > 0
        self._budget: list[int] = []  # tokens left, by rank
        self._stalled: list[int] = []  # slots that wait in place for a block
        self._scarce_ranks: set[int] = set()
        self._single_slots: Counts = np.empty(0, dtype=np.int64)
        self._single_sizes = np.empty(0, dtype=np.int32)  # tokens of each, drafts among them
        self._chunks: list[tuple[int, int]] = []  # (slot, number of tokens)
        self._preempted: list[Preempted] = []
        self._admitted: list[Admitted] = []
        self._loads: list[Load] = []

    def decide(self) -> ScheduledBatch | None:
        """The batch of the step. None if there is nothing to do and nothing to report."""
        table = self._table
        self.grow()
        self.take_single_tokens()
        if len(self._single_slots) + len(self._stalled) < table.num_ready or len(self._waiting):
            ranks = table.rank_of_slot[self._single_slots]
            used = np.bincount(ranks, weights=self._single_sizes, minlength=table.num_ranks)
            self._budget = (self._max_num_batched_tokens - used.astype(np.int64)).tolist()
            self.continue_prefills()
            self.admit()
        if not (len(self._single_slots) or self._chunks or self._preempted or self._admitted):
            return None
        return self._assemble()

    def grow(self) -> None:
        table = self._table
        slots = np.flatnonzero(table.ready & (table.num_tokens > table.capacity))
        if not len(slots):
            return
        block_ids = np.empty(len(slots), dtype=np.int32)
        is_served = np.ones(len(slots), dtype=np.bool_)
        for pool, start, end in self._by_rank(slots):
            if pool.num_free >= end - start:
                block_ids[start:end] = pool.allocate(end - start)
            else:
                is_served[start:end] = False
        if is_served.all():
            table.append_blocks(slots, block_ids)
            return
        table.append_blocks(slots[is_served], block_ids[is_served])
        scarce_slots = slots[~is_served].tolist()
        self._scarce_ranks = set(table.rank_of_slot[scarce_slots].tolist())
        for slot in sorted(scarce_slots, key=self._key_of):
            self._grow_by_force(slot)

    def take_single_tokens(self) -> None:
        table = self._table
        is_single = table.ready & (table.num_tokens - table.num_computed == 1)
        is_single[self._stalled] = False
        self._single_slots = np.flatnonzero(is_single)
        self._single_sizes = np.ones(len(self._single_slots), dtype=np.int32)
        if self._is_speculating:
            self.look_ahead()

    def look_ahead(self) -> None:
        """Add drafts to single rows, and blocks for them while there are any.

        num_tokens slots are there; a draft needs one more, and so does the newest token's row of the MTP module.
        A request of which the last token comes next needs neither, and none lasts beyond the limit.
        """
        table, slots = self._table, self._single_slots
        num_tokens, room = table.num_tokens[slots], table.total_limit[slots] - table.num_tokens[slots]
        is_drafted = table.has_draft[slots] & (room >= 2)
        wanted = num_tokens + is_drafted + (room >= 3)
        for _ in range(2):  # with blocks of one slot, a row needs two of them
            short = slots[table.capacity[slots] < wanted]
            if not len(short):
                break
            for pool, start, end in self._by_rank(short):
                served = short[start : min(end, start + pool.num_free)]
                table.append_blocks(served, pool.allocate(len(served)))
        self._single_sizes += is_drafted & (table.capacity[slots] > num_tokens)

    def continue_prefills(self) -> None:
        table = self._table
        is_long = table.ready & (table.num_tokens - table.num_computed > 1)
        is_long[self._stalled] = False
        for slot in sorted(np.flatnonzero(is_long).tolist(), key=self._key_of):
            self._give_tokens(slot)

    def admit(self) -> None:
        for rank in self._waiting.ranks():
            if rank not in self._scarce_ranks:
                while self._table.has_free_slot(rank):
                    job = self._waiting.head(rank)
                    if job is None or not self._try_admit(job):
                        break

    def _grow_by_force(self, slot: int) -> None:
        """Give the slot a block of a pool that may have none left; it may lose its place or have to wait."""
        table = self._table
        rank = int(table.rank_of_slot[slot])
        pool = self._pools[rank]
        start = rank * table.max_num_seqs
        while table.ready[slot] and not pool.num_free:
            ready = (np.flatnonzero(table.ready[start : start + table.max_num_seqs]) + start).tolist()
            if ready == [slot]:
                self._stalled.append(slot)
                return
            self._preempt(max(ready, key=self._key_of))
        if table.ready[slot]:
            table.append_blocks(np.array([slot]), pool.allocate(1))

    def _preempt(self, slot: int) -> None:
        job = self._table.job_of(slot)
        job.num_tokens = int(self._table.num_tokens[slot])
        self._pools[job.rank].free(self._table.vacate(slot))
        if self._requeue_preempted:
            self._waiting.push(job)
        self._preempted.append(Preempted(request_id=job.request_id, rank=job.rank, num_tokens=job.num_tokens))

    def _give_tokens(self, slot: int) -> None:
        table = self._table
        rank = int(table.rank_of_slot[slot])
        num_tokens = min(int(table.num_tokens[slot] - table.num_computed[slot]), self._budget[rank])
        if num_tokens:
            self._chunks.append((slot, num_tokens))
            self._budget[rank] -= num_tokens

    def _try_admit(self, job: Job) -> bool:
        """Admit the request if blocks and budget last.

        [0, num_cached)                          found in the rank's own blocks
        [num_cached, num_cached + num_external)  to be loaded from the shared pool
        [num_cached + num_external, num_tokens)  to be computed: one token at least, so that one is sampled
        """
        has_budget = self._budget[job.rank] > 0
        external = job.num_external_tokens
        if not has_budget and external == 0:
            return False
        pool = self._pools[job.rank]
        block_size = pool.block_size
        num_usable_blocks = (job.num_tokens - 1) // block_size
        prefix = pool.find_prefix(job.block_hashes[:num_usable_blocks])
        num_cached = len(prefix) * block_size
        found = external() if callable(external) else external
        assert found >= 0, f"request {job.request_id}: num_external_tokens {found} is negative"
        num_external = max(0, min(found // block_size, num_usable_blocks) * block_size - num_cached)
        if not has_budget and not num_external:
            return False
        num_new_blocks = pool.blocks_for(job.num_tokens) - len(prefix)
        if num_new_blocks > pool.num_free_beside(prefix):
            return False
        self._waiting.remove(job.request_id)
        block_ids = pool.allocate(num_new_blocks, prefix=prefix)
        slot = self._table.take(job, block_ids, num_computed=num_cached, is_ready=not num_external)
        self._admitted.append(Admitted(request_id=job.request_id, rank=job.rank, num_cached_tokens=num_cached))
        if not num_external:
            self._give_tokens(slot)
            return True
        load = Load(
            request_id=job.request_id,
            rank=job.rank,
            num_cached_tokens=num_cached,
            num_external_tokens=num_external,
            block_ids=block_ids[len(prefix) : len(prefix) + num_external // block_size],
        )
        self._loads.append(load)
        return True

    def _by_rank(self, slots: Counts) -> Iterator[tuple[BlockPool, int, int]]:
        """Pool and bounds of each rank's part of ascending slots."""
        ranks = self._table.rank_of_slot[slots]
        for start, end in pairwise(np.flatnonzero(np.diff(ranks, prepend=-1, append=-1)).tolist()):
            yield self._pools[ranks[start]], start, end

    def _key_of(self, slot: int) -> Key:
        return self._table.job_of(slot).key

    def _assemble(self) -> ScheduledBatch:
        table = self._table
        slots = self._single_slots
        num_scheduled = self._single_sizes
        if self._chunks:
            chunk_slots, chunk_sizes = np.array(self._chunks, dtype=np.int64).T
            slots = np.concatenate([slots, chunk_slots])
            num_scheduled = np.concatenate([num_scheduled, chunk_sizes.astype(np.int32)])
            by_rank = np.argsort(table.rank_of_slot[slots], kind="stable")
            slots, num_scheduled = slots[by_rank], num_scheduled[by_rank]
        ranks = table.rank_of_slot[slots]
        num_computed = table.num_computed[slots]
        if self._chunks:
            samples = num_computed + num_scheduled >= table.num_tokens[slots]
        else:
            samples = np.ones(len(slots), dtype=np.bool_)
        return ScheduledBatch(
            slots=slots,
            ranks=ranks,
            num_scheduled_tokens=num_scheduled,
            num_computed_tokens=num_computed,
            samples=samples,
            request_ids=table.request_ids[slots],
            rank_starts=np.searchsorted(ranks, np.arange(table.num_ranks + 1)),
            preempted=tuple(self._preempted),
            admitted=tuple(self._admitted),
            loads=tuple(self._loads),
            drafts=self._drafts(slots, num_computed + num_scheduled, samples) if self._is_speculating else None,
        )

    def _drafts(self, slots: Counts, ends: NDArray[np.int32], samples: Mask) -> BatchDrafts:
        """Rows that end beyond the known tokens have a draft. `ends`: computed and scheduled tokens of each row."""
        table = self._table
        num_tokens = table.num_tokens[slots]
        num_drafts = np.maximum(ends - num_tokens, 0)
        has_room = table.total_limit[slots] - num_tokens >= 3
        return BatchDrafts(
            num_drafts=num_drafts,
            makes_draft=samples & has_room & (table.capacity[slots] > num_tokens + num_drafts),
            is_behind=~table.has_draft[slots],
        )
