"""What one instance's scheduler holds: who has which slot and which blocks, who waits.

Owns: the state behind BatchScheduler, the readings of it, and the check that nothing is lost.
Must not know: how a step is decided (step_plan) or how requests come and go (batch_scheduler).
Source: the ruler of a request's tokens is that of slot_table.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from serving.core.block_pool import BlockPool
from serving.core.errors import IllegalCall, UnfitRequest
from serving.core.ids import BlockHash, BlockIds, Counts, RequestId
from serving.core.scheduled_batch import ScheduledBatch
from serving.core.slot_table import SlotTable
from serving.core.waiting_queue import Job, WaitingQueues


class SchedulerState:
    """Slots, block pools and waiting queues of every rank of an instance."""

    def __init__(
        self,
        *,
        num_ranks: int,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        enable_prefix_caching: bool = True,
        policy: Literal["fcfs", "priority"] = "fcfs",
        preempt_to: Literal["self", "caller"] = "self",
        num_speculative_tokens: Literal[0, 1] = 0,
    ) -> None:
        for name, value in (("num_ranks", num_ranks), ("max_num_seqs", max_num_seqs)):
            if value < 1:
                raise UnfitRequest(f"{name} {value} is below 1")
        if max_num_seqs * (1 + num_speculative_tokens) > max_num_batched_tokens:
            drafts = " with a draft each" if num_speculative_tokens else ""
            raise UnfitRequest(
                f"max_num_seqs {max_num_seqs}{drafts} exceeds max_num_batched_tokens {max_num_batched_tokens}"
            )
        self.block_size = block_size
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self._policy = policy
        self._preempt_to = preempt_to
        self._num_speculative_tokens = num_speculative_tokens
        self._pools = [
            BlockPool(num_blocks=num_blocks, block_size=block_size, enable_prefix_caching=enable_prefix_caching)
            for _ in range(num_ranks)
        ]
        self._is_caching = enable_prefix_caching
        max_blocks = min(num_blocks, self._pools[0].blocks_for(max_model_len))
        self._table = SlotTable(
            num_ranks=num_ranks, max_num_seqs=max_num_seqs, max_blocks=max_blocks, block_size=block_size
        )
        self._waiting = WaitingQueues(num_ranks)
        self._held: dict[RequestId, tuple[int, BlockIds]] = {}  # finished: rank and blocks, until released
        self._in_flight: ScheduledBatch | None = None
        self._aborting: dict[int, RequestId] = {}  # by slot: aborted while in flight
        self._next_sequence = 0

    @property
    def num_ranks(self) -> int:
        return len(self._pools)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests that hold a slot, reserved and loading ones among them."""
        return len(self._table)

    @property
    def num_held(self) -> int:
        """Finished requests whose blocks are not released."""
        return len(self._held)

    @property
    def request_ids(self) -> tuple[RequestId, ...]:
        """Every request that the scheduler knows; empty when nothing is held."""
        return (*self._waiting.request_ids, *self._table.occupied, *self._held)

    @property
    def free_blocks(self) -> Counts:
        """Free blocks per rank."""
        return np.array([pool.num_free for pool in self._pools], dtype=np.int64)

    @property
    def num_seqs(self) -> Counts:
        """Taken slots per rank."""
        return self._table.num_seqs

    @property
    def num_tokens(self) -> Counts:
        """Known tokens of the requests that hold a slot, per rank."""
        return self._table.sum_by_rank(self._table.num_tokens)

    @property
    def num_pending_tokens(self) -> Counts:
        """Known tokens that are not computed yet, running and waiting, per rank."""
        table = self._table
        return table.sum_by_rank(table.num_tokens - table.num_computed) + self._waiting.num_tokens

    @property
    def num_waiting_by_rank(self) -> Counts:
        return self._waiting.num_waiting

    def num_prefix_tokens(self, rank: int, hashes: Sequence[BlockHash]) -> int:
        """Tokens of this prefix that the rank's own blocks hold now."""
        return len(self._pools[rank].find_prefix(hashes)) * self.block_size

    def block_table(self, request_id: RequestId) -> BlockIds:
        """The blocks that a running or finished request holds, in order (a copy)."""
        slot = self._table.slot_of(request_id)
        if slot is not None:
            return self._table.blocks_of(slot)
        if request_id in self._held:
            return self._held[request_id][1].copy()
        raise IllegalCall(f"request {request_id} holds no blocks here")

    def block_tables(self, slots: Counts) -> BlockIds:
        """Block tables of a batch's slots, shape (len(slots), longest of them), zeros behind a row's own blocks."""
        return self._table.block_tables(slots)

    def check_invariants(self) -> None:
        """Raise AssertionError unless every block is referenced exactly by the requests that hold it."""
        self._table.check_invariants()
        self._waiting.check_invariants()
        assert len(set(self.request_ids)) == len(self.request_ids)
        held_by_rank: list[list[BlockIds]] = [[] for _ in self._pools]
        for slot in self._table.occupied.values():
            held_by_rank[self._table.rank_of_slot[slot]].append(self._table.blocks_of(slot))
        for rank, block_ids in self._held.values():
            held_by_rank[rank].append(block_ids)
        for pool, held in zip(self._pools, held_by_rank, strict=True):
            pool.check_invariants()
            assert all(len(set(ids.tolist())) == len(ids) for ids in held)
            expected = np.bincount(np.concatenate([np.empty(0, np.int32), *held]), minlength=pool.num_blocks)
            assert expected.tolist() == pool.reference_counts().tolist()
        in_flight = [] if self._in_flight is None else self._in_flight.slots.tolist()
        assert set(self._aborting) <= set(in_flight)
        assert all(self._table.ready[slot] for slot in in_flight)

    def _check_new(self, job: Job) -> None:
        name = f"request {job.request_id}"
        is_known = job.request_id in self._waiting or self._table.slot_of(job.request_id) is not None
        if is_known or job.request_id in self._held:
            raise IllegalCall(f"{name} is known already")
        if not 0 <= job.rank < self.num_ranks:
            raise IllegalCall(f"{name}: rank {job.rank} is not in [0, {self.num_ranks})")
        if not 1 <= job.num_tokens < job.total_limit:
            raise IllegalCall(f"{name}: num_tokens {job.num_tokens} is not in [1, total_limit {job.total_limit})")
        if job.total_limit > self.max_model_len:
            raise UnfitRequest(f"{name}: total_limit {job.total_limit} exceeds max_model_len {self.max_model_len}")
        pool = self._pools[job.rank]
        num_needed = pool.blocks_for(job.total_limit - 1)  # the last token is sampled, but never computed
        if num_needed > pool.num_blocks:
            raise UnfitRequest(
                f"{name}: total_limit {job.total_limit} needs {num_needed} blocks, num_blocks is {pool.num_blocks}"
            )
