"""The lives of requests in virtual time: when each arrives, and its one outcome.

Owns: arrivals, refusals, outcomes.
Must not know: asyncio, tensors, real time; places (admission), what happens there (stages).

The live control plane makes one coroutine per request; a million of them would take hours. Here a request is an object
that callbacks pass on. Decisions are made by the same router, pool and planes, and by schedulers that follow the same
rules with counts in place of blocks. Both ways note the same events (tests/serving/simulation).
"""

from collections.abc import Callable
from typing import cast

from serving.config import RunConfig
from serving.core.acceptance import first_draw
from serving.core.event_log import EventLog
from serving.core.ids import BlockHash, RequestId
from serving.core.request import OutcomeReason
from serving.simulation.admission import Admission
from serving.simulation.event_loop import EventLoop
from serving.simulation.life import Life, LifeNotes
from serving.simulation.stages import Stages
from serving.workloads.workload import Workload

PROGRESS_REQUESTS = 1024  # are over between two words of progress


class Driver:
    """One run of a disaggregated configuration."""

    def __init__(
        self,
        *,
        config: RunConfig,
        workload: Workload,
        loop: EventLoop,
        log: EventLog | None,
        admission: Admission,
        stages: Stages,
        notes: LifeNotes,
        on_progress: Callable[[int], None],
    ) -> None:
        self._admission = admission
        self._stages = stages
        self._workload = workload
        self._loop = loop
        self._log = log
        self._notes = notes
        self._on_progress = on_progress
        self._block_size = config.cache.block_size
        self._max_model_len = config.model.max_model_len
        self._max_queued = config.scheduler.max_queued_requests
        self._max_concurrency = config.workload.max_concurrency
        self._has_priorities = config.scheduler.policy == "priority"
        self._needs_hashes = config.kv_pool.enabled or config.instances["prefill"].prefix_caching
        self._has_drafts = config.is_speculative
        self.end_ns = 0  # the last outcome
        self._num_over = 0
        self._num_sent = 0
        self._lives: dict[int, Life] = {}
        # Views that give plain integers: reading single numbers out of arrays costs three times as much.
        columns = workload.columns
        self._request_ids = columns.request_ids
        self._arrival_ns = None if columns.arrival_ns is None else columns.arrival_ns.data
        self._num_prompt_tokens = columns.num_prompt_tokens.data
        self._max_tokens = columns.max_tokens.data
        self._priority = columns.priority.data
        self._seeds = columns.seeds.data  # NO_SEED is negative, and drawn as 0

    @property
    def num_lives(self) -> int:
        """Requests without an outcome."""
        return len(self._lives)

    def start(self) -> None:
        """Send the first requests."""
        if self._max_concurrency is not None or self._arrival_ns is None:
            count = len(self._workload)
            if self._max_concurrency is not None:
                count = min(count, self._max_concurrency)
            self._num_sent = count
            for index in range(count):
                self._loop.call_soon(self._arrive, index)
        elif len(self._workload):
            self._loop.call_at(self._arrival_ns[0], self._arrive_on_time, 0, gives_way=False)

    def abort_all(self) -> None:
        """The run is interrupted: whoever has no outcome is aborted."""
        for life in list(self._lives.values()):
            self._close(life, OutcomeReason.ABORT)

    def on_finished(self, life: Life) -> None:
        """A request has all its tokens."""
        self._admission.leave_router(life)
        self._admission.leave_prefill(life)
        self._admission.release_decode(life)
        self._close(life, OutcomeReason.LENGTH)
        if self._max_concurrency is not None:
            self._send_next(3)

    def _arrive_on_time(self, index: int) -> None:
        arrivals = self._arrival_ns
        assert arrivals is not None
        self._num_sent = index + 1
        if index + 1 < len(arrivals):
            self._loop.call_at(arrivals[index + 1], self._arrive_on_time, index + 1, gives_way=False)
        self._arrive(index)

    def _arrive(self, index: int) -> None:
        loop, request_id = self._loop, RequestId(self._request_ids[index])
        self._notes.num_arrived += 1
        life = Life(
            index,
            request_id,
            (self._priority[index] if self._has_priorities else 0, self._notes.num_arrived),
            self._num_prompt_tokens[index],
            self._max_tokens[index],
            loop.now_ns,
            first_draw(request_id, max(0, self._seeds[index])) if self._has_drafts else 0,
        )
        if self._needs_hashes:
            life.block_hashes = cast(list[BlockHash], self._workload.block_hashes(index, self._block_size))
        self._lives[index] = life
        if self._log is not None:
            self._log.append(loop.now_ns, "arrive", request_id, prompt=life.num_prompt_tokens, limit=life.max_tokens)
        if life.num_tokens_limit > self._max_model_len:
            self._reject(life, OutcomeReason.PROMPT_TOO_LONG)
        elif self._admission.try_admit(life):
            loop.call_soon(self._stages.start_prefill, life)
        elif self._admission.num_queued > self._max_queued:
            self._admission.withdraw(life)
            self._reject(life, OutcomeReason.QUEUE_FULL)

    def _reject(self, life: Life, reason: OutcomeReason) -> None:
        self._close(life, reason)
        if self._max_concurrency is not None:
            self._send_next(1)

    def _send_next(self, num_rounds: int) -> None:
        """Send the next request, after so many rounds of the event loop in which the client hears of the end."""
        if num_rounds:
            self._loop.call_soon(self._send_next, num_rounds - 1)
        elif self._num_sent < len(self._workload):
            self._num_sent += 1
            self._loop.call_soon(self._arrive, self._num_sent - 1)

    def _close(self, life: Life, reason: OutcomeReason) -> None:
        now_ns = self._loop.now_ns
        if self._log is not None:
            self._log.append(now_ns, "outcome", life.request_id, reason=str(reason), tokens=life.num_output_tokens)
        self._notes.write(life, reason)
        life.row = None  # it knows its owner: a cycle would keep both until a garbage collection
        self.end_ns = now_ns
        self._num_over += 1
        if not self._num_over % PROGRESS_REQUESTS:
            self._on_progress(self._num_over)
        del self._lives[life.index]
