"""Requests that wait for a place in the batch of their rank.

Owns: the order in which each rank's waiting requests are admitted, and how many tokens wait.
Must not know: slots, blocks, budgets.
Source: vLLM v1 sched/request_queue.py (FCFS and priority queues); one heap serves both, as under FCFS all
priorities are equal.
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from serving.core.errors import IllegalCall
from serving.core.ids import BlockHash, Counts, RequestId

Key = tuple[int, int, int]


@dataclass(slots=True, kw_only=True, eq=False)
class Job:
    """What a scheduler knows of a request, wherever the request is.

    `num_tokens` counts while it waits; in a slot, the slot's count does. `sequence` breaks ties of `order`.
    `num_external_tokens` is how long a prefix the shared pool holds, from token 0, or a function that says so.
    """

    request_id: RequestId
    rank: int
    num_tokens: int
    total_limit: int
    priority: int
    order: int
    sequence: int
    block_hashes: tuple[BlockHash, ...] = ()
    num_external_tokens: int | Callable[[], int] = 0

    @property
    def key(self) -> Key:
        """The smaller, the sooner served and the later preempted."""
        return self.priority, self.order, self.sequence


class WaitingQueues:
    """One queue per rank, ordered by key. A preempted request keeps its key, so it is ahead of later ones."""

    def __init__(self, num_ranks: int) -> None:
        self._heaps: list[list[tuple[Key, RequestId]]] = [[] for _ in range(num_ranks)]
        self._jobs: dict[RequestId, Job] = {}
        self._num_waiting = np.zeros(num_ranks, dtype=np.int64)
        self._num_tokens = np.zeros(num_ranks, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._jobs)

    def __contains__(self, request_id: RequestId) -> bool:
        return request_id in self._jobs

    @property
    def request_ids(self) -> tuple[RequestId, ...]:
        return tuple(self._jobs)

    @property
    def num_waiting(self) -> Counts:
        """Waiting requests per rank (a copy)."""
        return self._num_waiting.copy()

    @property
    def num_tokens(self) -> Counts:
        """Tokens of the waiting requests per rank (a copy)."""
        return self._num_tokens.copy()

    def ranks(self) -> list[int]:
        """Ranks where somebody waits, ascending."""
        ranks: list[int] = np.flatnonzero(self._num_waiting).tolist()
        return ranks

    def push(self, job: Job) -> None:
        if job.request_id in self._jobs:
            raise IllegalCall(f"request {job.request_id} waits already")
        self._jobs[job.request_id] = job
        heapq.heappush(self._heaps[job.rank], (job.key, job.request_id))
        self._num_waiting[job.rank] += 1
        self._num_tokens[job.rank] += job.num_tokens

    def head(self, rank: int) -> Job | None:
        """The next to be admitted on this rank."""
        heap = self._heaps[rank]
        while heap:
            key, request_id = heap[0]
            job = self._jobs.get(request_id)
            if job is not None and job.key == key:
                return job
            heapq.heappop(heap)  # it was removed while it waited
        return None

    def remove(self, request_id: RequestId) -> Job:
        """Take a request out, from any position; behind the head, its heap entry goes when it comes to the top."""
        job = self._jobs.pop(request_id, None)
        if job is None:
            raise IllegalCall(f"request {request_id} does not wait here")
        heap = self._heaps[job.rank]
        if heap[0] == (job.key, request_id):
            heapq.heappop(heap)
        self._num_waiting[job.rank] -= 1
        self._num_tokens[job.rank] -= job.num_tokens
        return job

    def check_invariants(self) -> None:
        """Raise AssertionError unless the counts and the heaps agree with the jobs."""
        for rank, heap in enumerate(self._heaps):
            jobs = [job for job in self._jobs.values() if job.rank == rank]
            assert self._num_waiting[rank] == len(jobs)
            assert self._num_tokens[rank] == sum(job.num_tokens for job in jobs)
            live = [entry for entry in heap if entry[1] in self._jobs and self._jobs[entry[1]].key == entry[0]]
            assert sorted(live) == sorted((job.key, job.request_id) for job in jobs)
