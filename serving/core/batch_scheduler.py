"""The scheduler of one instance: what each of its ranks computes in the next step.

Owns: how requests come to an instance, run step by step, and leave it.
Must not know: time, transfers, the shared pool, what a token is.
Source: vLLM v1 sched/scheduler.py ("no prefill phase, no decode phase"), vectorized over the ranks.
"""

from collections.abc import Callable

import numpy as np

from serving.core.errors import IllegalCall, NoSlot, OutOfBlocks
from serving.core.ids import BlockHash, BlockIds, Counts, Mask, RequestId
from serving.core.scheduled_batch import ScheduledBatch, StepResult
from serving.core.scheduler_state import SchedulerState
from serving.core.step_plan import StepPlan
from serving.core.waiting_queue import Job


class BatchScheduler(SchedulerState):
    """Continuous batching with chunked prefill, prefix caching and preemption by recomputation.

    Every rank has `num_blocks` blocks, `max_num_seqs` slots and `max_num_batched_tokens` per step.
    `preempt_to` says where a preempted request goes: "self", back into its rank's queue, or "caller", out of the
    instance (a decode instance cannot prefill; whoever called routes the request anew). Under "fcfs" priorities
    are ignored. An illegal call raises and changes nothing.
    """

    def add(
        self,
        *,
        request_id: RequestId,
        rank: int,
        num_tokens: int,
        total_limit: int,
        priority: int,
        order: int,
        block_hashes: tuple[BlockHash, ...] = (),
        num_external_tokens: int | Callable[[], int] = 0,
    ) -> None:
        """Let a request wait for its admission. It finishes when `total_limit` tokens are known.

        `block_hashes` are those of the full blocks of its first tokens. `num_external_tokens` is the length of the
        prefix that the shared pool holds, or a function that is asked at each attempt to admit it; a promise that
        turns out false is corrected by `activate`. Raises UnfitRequest if it could not run even alone.
        """
        job = Job(
            request_id=request_id,
            rank=rank,
            num_tokens=num_tokens,
            total_limit=total_limit,
            priority=priority if self._policy == "priority" else 0,
            order=order,
            sequence=self._next_sequence,
            block_hashes=block_hashes,
            num_external_tokens=num_external_tokens,
        )
        self._check_new(job)
        self._next_sequence += 1
        self._waiting.push(job)

    def reserve(
        self,
        *,
        request_id: RequestId,
        rank: int,
        num_tokens: int,
        total_limit: int,
        priority: int,
        order: int,
    ) -> BlockIds:
        """Take a slot and the blocks of `num_tokens` tokens now, for a cache that comes from elsewhere.

        Returns the block ids. The request runs after `activate`. Raises NoSlot, OutOfBlocks, UnfitRequest.
        """
        job = Job(
            request_id=request_id,
            rank=rank,
            num_tokens=num_tokens,
            total_limit=total_limit,
            priority=priority if self._policy == "priority" else 0,
            order=order,
            sequence=self._next_sequence,
        )
        self._check_new(job)
        if not self._table.has_free_slot(rank):
            raise NoSlot(rank=rank, max_num_seqs=self._table.max_num_seqs)
        pool = self._pools[rank]
        num_needed = pool.blocks_for(num_tokens)
        if num_needed > pool.num_free:
            raise OutOfBlocks(num_needed=num_needed, num_free=pool.num_free, where=f"rank {rank}")
        block_ids = pool.allocate(num_needed)
        self._table.take(job, block_ids, num_computed=0, is_ready=False)
        self._next_sequence += 1
        return block_ids

    def activate(self, *, request_id: RequestId, num_computed_tokens: int, num_tokens: int | None = None) -> None:
        """The cache of a reserved or loading request is complete up to `num_computed_tokens`: let it run.

        `num_tokens` is how many tokens are known by now, at most one more than its blocks have room for
        (the first token, sampled where the prompt was prefilled). At least one is left to compute.
        """
        table = self._table
        slot = table.slot_of(request_id)
        if slot is None or table.ready[slot]:
            raise IllegalCall(f"request {request_id} is neither reserved nor loading")
        known, computed = int(table.num_tokens[slot]), int(table.num_computed[slot])
        num_tokens = known if num_tokens is None else num_tokens
        most = min(int(table.capacity[slot]) + 1, int(table.total_limit[slot]) - 1)
        if not known <= num_tokens <= most:
            raise IllegalCall(f"request {request_id}: num_tokens {num_tokens} is not in [{known}, {most}]")
        if not computed <= num_computed_tokens < num_tokens:
            raise IllegalCall(
                f"request {request_id}: num_computed_tokens {num_computed_tokens} is not in [{computed}, {num_tokens})"
            )
        table.num_tokens[slot] = num_tokens
        table.num_computed[slot] = num_computed_tokens
        table.set_ready(slot)
        self._cache_full_blocks(np.array([slot]))

    def schedule(self) -> ScheduledBatch | None:
        """Decide the next step by the rules of StepPlan. None if there is nothing to do and nothing to report.

        A batch with rows is in flight until `update`; meanwhile there is no other `schedule`.
        """
        if self._in_flight is not None:
            raise IllegalCall("schedule: a batch is in flight, update it first")
        plan = StepPlan(
            table=self._table,
            pools=self._pools,
            waiting=self._waiting,
            max_num_batched_tokens=self.max_num_batched_tokens,
            requeue_preempted=self._preempt_to == "self",
            num_speculative_tokens=self._num_speculative_tokens,
        )
        batch = plan.decide()
        if batch is not None and batch.num_rows:
            self._in_flight = batch
        return batch

    def update(
        self, batch: ScheduledBatch, stop_mask: Mask | None = None, num_accepted: Counts | None = None
    ) -> StepResult:
        """The step has run: count what it computed, add the sampled tokens, and let go of what has ended.

        `stop_mask`, one flag per row of the batch, ends rows that sampled a stop token. `num_accepted`, one number
        per row, counts the drafts that were right and are kept; the slots of the others are computed again. A draft
        behind a stop token is not kept.
        """
        if batch is not self._in_flight:
            raise IllegalCall("update: this batch is not in flight")
        if stop_mask is not None and stop_mask.shape != batch.slots.shape:
            raise IllegalCall(f"update: stop_mask of {stop_mask.shape} for {batch.num_rows} rows")
        if num_accepted is not None and batch.drafts is None:
            raise IllegalCall("update: no drafts were scheduled, none can be accepted")
        self._in_flight = None
        table, slots = self._table, batch.slots
        table.num_computed[slots] = batch.num_computed_tokens + batch.num_scheduled_tokens
        if batch.drafts is not None:
            num_accepted = np.zeros(len(slots), np.int64) if num_accepted is None else num_accepted
            table.num_computed[slots] -= batch.drafts.num_drafts - num_accepted
            table.has_draft[slots] = batch.drafts.makes_draft
        self._cache_full_blocks(slots)
        counts = batch.samples
        aborted: tuple[RequestId, ...] = ()
        if self._aborting:
            counts = counts & ~np.isin(slots, list(self._aborting))
            aborted = tuple(self._aborting.values())
            for slot in self._aborting:
                self._pools[table.rank_of_slot[slot]].free(table.vacate(slot))
            self._aborting = {}
        sampled_rows = np.flatnonzero(counts)
        sampled_slots = slots if len(sampled_rows) == len(slots) else slots[sampled_rows]
        num_tokens = table.num_tokens[sampled_slots] + 1
        if num_accepted is not None:
            num_tokens += num_accepted[sampled_rows]
        is_over = num_tokens >= table.total_limit[sampled_slots]
        if stop_mask is not None:
            is_over |= stop_mask[sampled_rows]
        table.num_tokens[sampled_slots] = num_tokens
        finished_rows = sampled_rows[is_over]
        finished: list[RequestId] = []
        for slot in slots[finished_rows].tolist():
            job = table.job_of(slot)
            self._held[job.request_id] = (job.rank, table.vacate(slot))
            finished.append(job.request_id)
        stopped = np.zeros(len(finished), dtype=np.bool_) if stop_mask is None else stop_mask[finished_rows]
        return StepResult(
            sampled_rows=sampled_rows,
            finished_rows=finished_rows,
            finished=tuple(finished),
            stopped=stopped,
            aborted=aborted,
        )

    def abort(self, request_id: RequestId) -> bool:
        """Drop a request at any stage. Transfers into its blocks must have been stopped before.

        True if it holds nothing from now on; False if it is in the batch in flight, then `update` frees its blocks.
        """
        slot = self._table.slot_of(request_id)
        if slot is None:
            if request_id in self._held:
                self.release(request_id)
            else:
                self._waiting.remove(request_id)
            return True
        if slot in self._aborting:
            raise IllegalCall(f"request {request_id} is aborted already")
        if self._in_flight is not None and bool((self._in_flight.slots == slot).any()):
            self._aborting[slot] = request_id
            return False
        self._pools[self._table.rank_of_slot[slot]].free(self._table.vacate(slot))
        return True

    def release(self, request_id: RequestId) -> None:
        """Free the blocks of a finished request, once nobody reads them any more."""
        if request_id not in self._held:
            raise IllegalCall(f"request {request_id} is not finished, or was released before")
        rank, block_ids = self._held.pop(request_id)
        self._pools[rank].free(block_ids)

    def _cache_full_blocks(self, slots: Counts) -> None:
        """Let others find the blocks that these slots have filled with hashed tokens."""
        if not self._is_caching:
            return
        table = self._table
        num_full = np.minimum(table.num_computed[slots] // self.block_size, table.num_hashes[slots])
        for i in np.flatnonzero(num_full > table.num_hashed_blocks[slots]).tolist():
            slot, start, end = int(slots[i]), int(table.num_hashed_blocks[slots[i]]), int(num_full[i])
            hashes = table.job_of(slot).block_hashes[start:end]
            pool = self._pools[table.rank_of_slot[slot]]
            pool.cache_full_blocks(table.block_table[slot, start:end], hashes)
            table.num_hashed_blocks[slot] = end
