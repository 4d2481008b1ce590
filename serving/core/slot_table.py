"""The requests that hold a slot on an instance, as a structure of arrays.

Owns: one row per slot, which slots are free, the block tables.
Must not know: pools, budgets, who comes next.
Source: vLLM v1 worker/gpu_input_batch.py keeps such arrays for the model; here the decisions are made on them too,
so that a step over thousands of rows has no loop in Python.
"""

import numpy as np
from numpy.typing import NDArray

from serving.core.errors import NoSlot
from serving.core.ids import BlockIds, Counts, Mask, RequestId
from serving.core.waiting_queue import Job


class SlotTable:
    """Slot s belongs to rank s // max_num_seqs, so per-rank sums are row sums of a (num_ranks, max_num_seqs) view.

        [0, num_computed)           in the cache
        [num_computed, num_tokens)  known, still to be computed
        [num_tokens, capacity)      room in the blocks that it holds; capacity = num_blocks * block_size

    A slot is `ready` when its cache is complete up to num_computed, that is, when no transfer is under way.
    """

    def __init__(self, *, num_ranks: int, max_num_seqs: int, max_blocks: int, block_size: int) -> None:
        self.num_ranks = num_ranks
        self.max_num_seqs = max_num_seqs
        self.block_size = block_size
        size = num_ranks * max_num_seqs
        self.rank_of_slot = np.repeat(np.arange(num_ranks, dtype=np.int32), max_num_seqs)
        self.num_tokens = np.zeros(size, dtype=np.int32)
        self.num_computed = np.zeros(size, dtype=np.int32)
        self.capacity = np.zeros(size, dtype=np.int32)
        self.total_limit = np.zeros(size, dtype=np.int32)
        self.num_hashed_blocks = np.zeros(size, dtype=np.int32)  # of the request's hashes, how many are in the pool
        self.num_hashes = np.zeros(size, dtype=np.int32)
        self.ready = np.zeros(size, dtype=np.bool_)
        self.has_draft = np.zeros(size, dtype=np.bool_)  # of the token at num_tokens; only with speculative decoding
        self.block_table = np.zeros((size, max_blocks), dtype=np.int32)
        self.request_ids: NDArray[np.object_] = np.full(size, None, dtype=object)
        self.jobs: list[Job | None] = [None] * size
        self.num_ready = 0
        self._slot_by_request: dict[RequestId, int] = {}
        self._free = [
            list(range((rank + 1) * max_num_seqs - 1, rank * max_num_seqs - 1, -1)) for rank in range(num_ranks)
        ]
        self._num_seqs = np.zeros(num_ranks, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._slot_by_request)

    @property
    def occupied(self) -> dict[RequestId, int]:
        """Slot by request (a copy)."""
        return dict(self._slot_by_request)

    @property
    def num_seqs(self) -> Counts:
        """Taken slots per rank (a copy)."""
        return self._num_seqs.copy()

    def slot_of(self, request_id: RequestId) -> int | None:
        return self._slot_by_request.get(request_id)

    def job_of(self, slot: int) -> Job:
        job = self.jobs[slot]
        assert job is not None, f"slot {slot} is free"
        return job

    def has_free_slot(self, rank: int) -> bool:
        return bool(self._free[rank])

    def take(self, job: Job, block_ids: BlockIds, *, num_computed: int, is_ready: bool) -> int:
        """Put a request into a free slot of its rank, with the blocks of all its known tokens."""
        if not self._free[job.rank]:
            raise NoSlot(rank=job.rank, max_num_seqs=self.max_num_seqs)
        slot = self._free[job.rank].pop()
        self._num_seqs[job.rank] += 1
        self._slot_by_request[job.request_id] = slot
        self.jobs[slot] = job
        self.request_ids[slot] = job.request_id
        self.num_tokens[slot] = job.num_tokens
        self.num_computed[slot] = num_computed
        self.total_limit[slot] = job.total_limit
        self.capacity[slot] = len(block_ids) * self.block_size
        self.num_hashes[slot] = len(job.block_hashes)
        self.num_hashed_blocks[slot] = num_computed // self.block_size
        self.block_table[slot, : len(block_ids)] = block_ids
        if is_ready:
            self.set_ready(slot)
        return slot

    def set_ready(self, slot: int) -> None:
        self.ready[slot] = True
        self.num_ready += 1

    def blocks_of(self, slot: int) -> BlockIds:
        """The slot's blocks in order (a copy)."""
        blocks: BlockIds = self.block_table[slot, : self.capacity[slot] // self.block_size].copy()
        return blocks

    def append_blocks(self, slots: Counts, block_ids: BlockIds) -> None:
        """Give block i to slot i."""
        self.block_table[slots, self.capacity[slots] // self.block_size] = block_ids
        self.capacity[slots] += self.block_size

    def vacate(self, slot: int) -> BlockIds:
        """Free the slot; returns its blocks, which are now the caller's."""
        job = self.job_of(slot)
        block_ids = self.blocks_of(slot)
        self.block_table[slot, : len(block_ids)] = 0
        for column in (self.num_tokens, self.num_computed, self.capacity, self.total_limit):
            column[slot] = 0
        self.num_hashes[slot] = self.num_hashed_blocks[slot] = 0
        self.has_draft[slot] = False
        if self.ready[slot]:
            self.ready[slot] = False
            self.num_ready -= 1
        self.jobs[slot] = None
        self.request_ids[slot] = None
        del self._slot_by_request[job.request_id]
        self._free[job.rank].append(slot)
        self._num_seqs[job.rank] -= 1
        return block_ids

    def block_tables(self, slots: Counts) -> BlockIds:
        """Block tables of the slots, shape (len(slots), longest of them); zeros behind a row's own blocks."""
        width = int(self.capacity[slots].max()) // self.block_size if len(slots) else 0
        tables: BlockIds = self.block_table[slots, :width]
        return tables

    def sum_by_rank(self, column: NDArray[np.int32] | Mask) -> Counts:
        """Sum of a column over each rank's slots, shape (num_ranks,)."""
        sums: Counts = column.reshape(self.num_ranks, self.max_num_seqs).sum(axis=1, dtype=np.int64)
        return sums

    def check_invariants(self) -> None:
        """Raise AssertionError unless rows, free lists and counts agree, and the lengths are in order."""
        taken = sorted(self._slot_by_request.values())
        free = sorted(slot for slots in self._free for slot in slots)
        assert sorted(taken + free) == list(range(len(self.jobs)))
        assert all(self.rank_of_slot[slot] == rank for rank, slots in enumerate(self._free) for slot in slots)
        assert self.num_ready == np.count_nonzero(self.ready)
        assert self._num_seqs.tolist() == [self.max_num_seqs - len(slots) for slots in self._free]
        for slot in free:
            assert self.jobs[slot] is None
            assert self.request_ids[slot] is None
            assert not self.ready[slot]
            assert not self.has_draft[slot]
            assert self.num_tokens[slot] == self.num_computed[slot] == self.capacity[slot] == 0
            assert not self.block_table[slot].any()
        for request_id, slot in self._slot_by_request.items():
            job = self.job_of(slot)
            assert job.request_id == request_id == self.request_ids[slot]
            assert job.rank == self.rank_of_slot[slot]
            assert self.num_tokens[slot] < self.total_limit[slot] == job.total_limit
            assert 0 <= self.num_computed[slot] <= min(self.num_tokens[slot], self.capacity[slot])
            assert self.num_tokens[slot] <= self.capacity[slot] + 1
            assert self.num_hashed_blocks[slot] * self.block_size <= max(self.num_computed[slot], 0)
            assert not self.block_table[slot, self.capacity[slot] // self.block_size :].any()
