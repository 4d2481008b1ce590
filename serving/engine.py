"""The step loop of one instance: schedule, charge, run, account.

Owns: when steps happen, what they are charged, and who waits for a request's run on this instance.
Must not know: routing, the pool's contents, HTTP; whether its shard makes tensors or only counts.

One await per step. A step takes its charged time on the clock; the shard's real work, if any, runs meanwhile and is
awaited at the step's end with time standing still. Blocks never move inside the loop: a request whose blocks are on
their way is in the scheduler but not ready.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from devices.clock import Clock
from devices.pipeline import StepTime
from serving.core.batch_scheduler import BatchScheduler
from serving.core.event_log import EventLog
from serving.core.ids import BlockIds, InstanceId, RequestId
from serving.core.request import Request
from serving.core.router import Room
from serving.core.scheduled_batch import Load, ScheduledBatch
from serving.engine_run import Run, RunEnd, StepRecord, TokenSink
from serving.engine_tokens import StepTokens, Stops, hand_out, kept_tokens
from serving.errors import EngineFailure
from serving.shard import Sampled, Shard

logger = logging.getLogger(__name__)


class Engine:
    """One instance. `run` is its task; everything else is called from the same event loop."""

    def __init__(
        self,
        *,
        instance_id: InstanceId,
        scheduler: BatchScheduler,
        max_num_seqs: int,
        requeues_preempted: bool,
        shard: Shard,
        charge: Callable[[ScheduledBatch], StepTime],
        stops: Stops,
        clock: Clock,
        log: EventLog,
        on_step: Callable[[StepRecord], None],
        on_capacity: Callable[[], None],
    ) -> None:
        """`max_num_seqs` and `requeues_preempted` are those of the scheduler.

        `charge(batch)` is the time of a step; `stops` says which of a step's tokens ends a request.

        `on_capacity` is called when blocks or slots came free.
        """
        self.instance_id = instance_id
        self.scheduler = scheduler
        self._max_num_seqs = max_num_seqs
        self._requeues_preempted = requeues_preempted
        self._num_blocks = scheduler.free_blocks
        self._shard = shard
        self._charge = charge
        self._stops = stops
        self._clock = clock
        self._log = log
        self._on_step = on_step
        self._on_capacity = on_capacity
        self._runs: dict[RequestId, Run] = {}
        self._known: set[RequestId] = set()  # to the scheduler
        self._wake = asyncio.Event()
        self._in_flight: ScheduledBatch | None = None
        self._is_stopping = False
        self.expert_load: NDArray[np.int64] | None = None  # tokens so far, (num_moe_layers, n_routed_experts)
        self._lost: str | None = None
        self._failure: str | None = None
        self.busy_ns = 0
        self.num_steps = 0
        self.num_drafts = 0  # verified
        self.num_accepted = 0  # of them

    @property
    def failure(self) -> EngineFailure | None:
        """Why the instance is lost, or None while it serves."""
        return None if self._failure is None else EngineFailure(self._failure)

    @property
    def room(self) -> Room:
        """What every rank has free for requests that are to come."""
        taken = self.scheduler.num_seqs + self.scheduler.num_waiting_by_rank
        return Room(free_blocks=self.scheduler.free_blocks, free_slots=self._max_num_seqs - taken)

    @property
    def num_used_blocks(self) -> int:
        """Blocks that requests hold, all ranks together."""
        return int((self._num_blocks - self.scheduler.free_blocks).sum())

    @property
    def cache_usage(self) -> float:
        """Share of the KV space that requests hold."""
        return self.num_used_blocks / int(self._num_blocks.sum())

    @property
    def num_runs(self) -> int:
        """Requests that wait for this instance."""
        return len(self._runs)

    def knows(self, request_id: RequestId) -> bool:
        """Whether a request of this name holds anything here."""
        return request_id in self._known

    def add(
        self,
        request: Request,
        *,
        rank: int,
        sink: TokenSink,
        limit: int,
        order: int,
        find_external: Callable[[], int] | None = None,
        load: Callable[[Load], None] | None = None,
    ) -> "asyncio.Future[RunEnd]":
        """Queue a request for its prefill here; the future ends when `limit` tokens are known, or before.

        `find_external` tells how many of its tokens the pool holds; if it is admitted with some of them, `load` is
        called and has to be answered by `activate`. Its blocks are held until `release`. Raises UnfitRequest.
        """
        future = self._register(request, sink, load)
        try:
            self.scheduler.add(
                request_id=request.request_id,
                rank=rank,
                num_tokens=request.num_tokens,
                total_limit=limit,
                priority=request.priority,
                order=order,
                block_hashes=request.block_hashes,
                num_external_tokens=find_external or 0,
            )
        except ValueError:
            del self._runs[request.request_id]
            raise
        self._known.add(request.request_id)
        return future

    def reserve(self, request: Request, *, rank: int, order: int) -> BlockIds:
        """Take a slot, and blocks for the known tokens, for a cache that will come from elsewhere.

        Held until `release`. Raises OutOfBlocks, NoSlot, UnfitRequest.
        """
        block_ids = self.scheduler.reserve(
            request_id=request.request_id,
            rank=rank,
            num_tokens=request.num_tokens,
            total_limit=request.num_tokens_limit,
            priority=request.priority,
            order=order,
        )
        self._known.add(request.request_id)
        return block_ids

    def resume(self, request: Request, *, sink: TokenSink) -> "asyncio.Future[RunEnd]":
        """Run a reserved request, whose cache has arrived for all its tokens but the last."""
        future = self._register(request, sink, None)
        self._activate(request, request.num_tokens - 1)
        return future

    def activate(self, request: Request, *, num_cached_tokens: int, num_pool_tokens: int) -> None:
        """Answer to `load`: run the request, of which so many tokens are in the cache by now."""
        request.start_prefill(
            self._clock.now_ns(), num_cached_tokens=num_cached_tokens, num_pool_tokens=num_pool_tokens
        )
        self._activate(request, num_cached_tokens)

    def release(self, request_id: RequestId) -> None:
        """Give back what the request holds here, at whatever stage; nothing happens if it holds nothing.

        Transfers into its blocks must be over.
        """
        run = self._runs.pop(request_id, None)
        if run is not None:
            run.done.cancel()
        if request_id in self._known and self.scheduler.abort(request_id):
            self._known.remove(request_id)
            self._notify_capacity()

    def fail_run(self, request_id: RequestId, message: str) -> None:
        """End a run because of something that happened to its blocks."""
        run = self._runs.pop(request_id, None)
        if run is not None:
            run.fail(message)

    async def run(self) -> None:
        """Step until `stop`; when a device is lost, or anything else breaks, fail every run and end."""
        try:
            while not self._is_stopping:
                if self._lost is not None:
                    raise EngineFailure(self._lost)
                batch = self.scheduler.schedule()
                if batch is None:
                    self._wake.clear()
                    await self._wake.wait()
                    continue
                self._in_flight = batch if batch.num_rows else None
                self._apply_decisions(batch)
                if batch.num_rows:
                    await self._step(batch)
        except EngineFailure as failure:
            self._fail(str(failure))
        except Exception as error:  # the task boundary: nobody would step for these requests any more
            logger.exception("instance %s", self.instance_id)
            self._fail(f"{type(error).__name__}: {error}")

    def lose(self, message: str) -> None:
        """A device of the instance is gone: fail every run, now or once the step that is under way has failed too."""
        self._lost = message
        self._wake.set()

    def stop(self) -> None:
        """Let `run` end once the step that is under way is over."""
        self._is_stopping = True
        self._wake.set()

    def _fail(self, message: str) -> None:
        self._failure = f"instance {self.instance_id}: {message}"
        if self._in_flight is not None:  # so that its requests can be released; nobody will see what it computed
            self._forget(self.scheduler.update(self._in_flight).aborted)
            self._in_flight = None
        runs, self._runs = self._runs, {}
        for run in runs.values():
            run.fail(self._failure)
        self._on_capacity()  # whoever waits for room has to hear of it

    def _register(
        self, request: Request, sink: TokenSink, load: Callable[[Load], None] | None
    ) -> "asyncio.Future[RunEnd]":
        if self._failure is not None:
            raise EngineFailure(self._failure)
        future: asyncio.Future[RunEnd] = asyncio.get_running_loop().create_future()
        self._runs[request.request_id] = Run(request, sink, load, future)
        self._wake.set()
        return future

    def _activate(self, request: Request, num_computed_tokens: int) -> None:
        self.scheduler.activate(
            request_id=request.request_id, num_computed_tokens=num_computed_tokens, num_tokens=request.num_tokens
        )
        self._wake.set()

    def _notify_capacity(self) -> None:
        if self._runs:  # one of them may have waited for the blocks
            self._wake.set()
        self._on_capacity()

    def _forget(self, request_ids: Sequence[RequestId]) -> None:
        self._known.difference_update(request_ids)

    def _apply_decisions(self, batch: ScheduledBatch) -> None:
        """Tell requests what the scheduler has decided. One that ended at this instant, and is not released yet,
        may be among them.
        """
        now_ns = self._clock.now_ns()
        for preempted in batch.preempted:
            self._log.append(now_ns, "preempt", preempted.request_id, instance=self.instance_id, rank=preempted.rank)
            run = self._runs[preempted.request_id]
            if not run.request.is_over:
                run.request.preempt(now_ns)
            if not self._requeues_preempted:
                self._known.remove(preempted.request_id)
                self._runs.pop(preempted.request_id).end(RunEnd.PREEMPTED)
        loads = {load.request_id: load for load in batch.loads}
        for admitted in batch.admitted:
            run = self._runs[admitted.request_id]
            cached = admitted.num_cached_tokens
            self._log.append(
                now_ns, "admit", admitted.request_id, instance=self.instance_id, rank=admitted.rank, cached=cached
            )
            if run.request.is_over:
                continue
            load = loads.get(admitted.request_id)
            if load is None:
                run.request.start_prefill(now_ns, num_cached_tokens=cached)
            else:
                assert run.load is not None, "a load was scheduled that nobody announced"
                run.load(load)

    async def _step(self, batch: ScheduledBatch) -> None:
        requests = [self._runs[request_id].request for request_id in batch.request_ids]
        start_ns, start_wall_ns = self._clock.now_ns(), time.monotonic_ns()
        num_waiting, num_used_blocks = self.scheduler.num_waiting, self.num_used_blocks
        cost = self._charge(batch)
        pending = asyncio.ensure_future(self._shard.step(batch, requests, charged_ns=cost.ns))
        self._log.append(
            start_ns, "step", self.instance_id, rows=batch.num_rows, tokens=batch.num_tokens, charged_ns=cost.ns
        )
        await self._clock.sleep_until(start_ns + cost.ns)
        sampled = await self._clock.external(pending)
        if sampled.expert_counts is not None:
            self.expert_load = sampled.expert_counts + (0 if self.expert_load is None else self.expert_load)
        end_wall_ns = time.monotonic_ns()
        tokens = self._account(batch, sampled, end_wall_ns)
        self.busy_ns += cost.ns
        self.num_steps += 1
        num_drafts = 0 if batch.drafts is None else int(batch.drafts.num_drafts.sum())
        num_accepted = 0 if sampled.num_accepted is None else int(sampled.num_accepted.sum())
        self.num_drafts += num_drafts
        self.num_accepted += num_accepted
        self._on_step(
            StepRecord(
                instance_id=self.instance_id,
                start_ns=start_ns,
                end_ns=start_ns + cost.ns,
                time=cost,
                batch=batch,
                num_waiting=num_waiting,
                num_used_blocks=num_used_blocks,
                num_tokens=batch.num_tokens,
                num_sampled=tokens.num_tokens,
                num_drafts=num_drafts,
                num_accepted=num_accepted,
                num_preemptions=len(batch.preempted),
                wall_ns=end_wall_ns - start_wall_ns,
                simulated_itl_ns=np.array(tokens.simulated_itl_ns, np.float64),
                itl_rows=tokens.itl_rows,
                wall_itl_ns=np.array(tokens.wall_itl_ns, np.float64),
            )
        )

    def _account(self, batch: ScheduledBatch, sampled: Sampled, wall_ns: int) -> StepTokens:
        """Hand out the step's tokens and end what has ended."""
        now_ns = self._clock.now_ns()
        kept = kept_tokens(batch, sampled, self._runs, self._stops)
        result = self.scheduler.update(batch, kept.stop_mask, kept.num_accepted)
        self._in_flight = None
        tokens = hand_out(batch, sampled, kept, result.sampled_rows, self._runs, now_ns=now_ns, wall_ns=wall_ns)
        for request_id, stopped in zip(result.finished, result.stopped.tolist(), strict=True):
            self._log.append(now_ns, "done", request_id, instance=self.instance_id, stopped=int(stopped))
            self._runs.pop(request_id).end(RunEnd.STOP if stopped else RunEnd.LENGTH)
        if result.aborted:
            self._forget(result.aborted)
            self._notify_capacity()
        return tokens
