"""The life of a request, from its arrival to its one outcome.

Owns: admission (a bounded queue, in order), the sequence place - prefill - hand over - decode, and that everything a
request holds is given back however it ends.
Must not know: HTTP, Ray, tensors, whether time is virtual.

A disaggregated request, as in arXiv 2506.12708 sections 4.1 and 4.3.3: a decode rank and its KV space are reserved
first; the least-loaded prefill instance computes the prompt, of which the pool gives the cached prefix; new full blocks
go to the pool and the latent KV goes to the decode rank, both at once; then it decodes. A decode rank that runs out of
blocks sends a request back to the start, with the tokens that it has.
"""

import asyncio
import contextlib
import dataclasses
import hashlib
import heapq
import logging
import time
from collections.abc import Callable

from devices.clock import Clock
from model.tokenizer import Tokenizer
from serving.cluster import Cluster
from serving.core.block_hash import hash_prompt
from serving.core.ids import RequestId
from serving.core.request import OutcomeReason, Request
from serving.engine_run import RunEnd
from serving.errors import Draining, EngineFailure, PromptTooLong, QueueFull, RequestRejected
from serving.life import FINISH_REASON, Life, OnToken
from serving.messages import GenerateRequest, RequestTimes
from serving.placed import Placed
from serving.stream import TokenStream

logger = logging.getLogger(__name__)
RETRY_AFTER_S = 1.0  # a place in the queue is free as soon as any running request ends

OnOutcome = Callable[[Request, RequestTimes, str], None]  # and the instance that ended it


class Frontend:
    """Takes requests, drives each through the cluster, ends each exactly once. Implements `messages.Frontend`."""

    def __init__(self, cluster: Cluster, *, tokenizer: Tokenizer | None, on_outcome: OnOutcome) -> None:
        """`tokenizer` is for HTTP; a workload brings token ids."""
        self._cluster = cluster
        self._tokenizer = tokenizer
        self._clock: Clock = cluster.clock
        self._on_outcome = on_outcome
        self._max_queued = cluster.config.scheduler.max_queued_requests
        self._queue: list[tuple[tuple[int, int], Life, asyncio.Future[Placed]]] = []
        self._lives: dict[RequestId, Life] = {}
        self._num_requests = 0
        self._is_draining = False
        self._filler = () if tokenizer is None else tuple(tokenizer.encode("~")[:1])
        cluster.on_capacity = self._admit_waiting

    @property
    def model_name(self) -> str:
        """The name that requests ask for."""
        return self._cluster.config.model.served_model_name

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and output together."""
        return self._cluster.config.model.max_model_len

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self._cluster.config.shape.vocab_size

    @property
    def tokenizer(self) -> Tokenizer:
        """Text to token ids and back."""
        assert self._tokenizer is not None, "this frontend takes token ids only"
        return self._tokenizer

    @property
    def num_waiting(self) -> int:
        """Requests in the admission queue."""
        return len(self._queue)

    @property
    def num_lives(self) -> int:
        """Requests without an outcome, or that still hold something."""
        return len(self._lives)

    def health(self) -> bool:
        """Whether every instance serves."""
        return not self._is_draining and self._cluster.failure is None

    def drain(self) -> None:
        """Take no new requests from now on."""
        self._is_draining = True

    def submit(self, generate: GenerateRequest) -> TokenStream:
        """Admit a request with real tokens. Raises RequestRejected before anything is held."""
        generate.check_fits(max_model_len=self.max_model_len, vocab_size=self.vocab_size)
        prompt = generate.prompt_token_ids
        seed = generate.sampling.seed
        request = Request(
            request_id=RequestId(generate.request_id),
            arrival_ns=self._clock.now_ns(),
            num_prompt_tokens=len(prompt),
            max_tokens=generate.sampling.max_tokens,
            prompt_token_ids=prompt,
            block_hashes=hash_prompt(prompt, self._cluster.config.cache.block_size, generate.cache_salt or ""),
            priority=generate.priority,
            sampling=dataclasses.replace(generate.sampling, seed=self._draw_seed() if seed is None else seed),
        )
        life = Life(request, order=self._next_order())
        life.filler = self._filler
        self._start(life)
        life.stream = TokenStream(
            lambda stop: self._end(life, OutcomeReason.ABORT if stop is None else OutcomeReason.STOP)
        )
        return life.stream

    async def serve(self, request: Request, *, on_token: OnToken) -> RequestTimes:
        """Drive a request to its outcome, which is never raised but told by the request."""
        life = Life(request, order=self._next_order())
        life.listener = on_token
        with contextlib.suppress(RequestRejected, EngineFailure):  # the outcome tells
            self._start(life)
        if life.task is not None:
            try:
                await asyncio.shield(life.task)
            except asyncio.CancelledError:
                self._end(life, OutcomeReason.ABORT)
                raise
        return life.times()

    async def abort_all(self) -> None:
        """End every request that is left as aborted, and wait until nothing is held."""
        lives = list(self._lives.values())
        for life in lives:
            self._end(life, OutcomeReason.ABORT)
        await asyncio.gather(*(life.task for life in lives if life.task is not None), return_exceptions=True)
        await self._cluster.wait_for_moves()

    def _next_order(self) -> int:
        self._num_requests += 1
        return self._num_requests

    def _draw_seed(self) -> int:
        """A seed for a request that brought none: it follows from the configuration and the order of arrival."""
        name = f"sampling/{self._cluster.config.seed}/{self._num_requests}"
        return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")

    def _start(self, life: Life) -> None:
        """Place the request or queue it. Raises RequestRejected, and EngineFailure when an instance is lost; then the
        request has its outcome, and nothing is held.
        """
        request = life.request
        if request.request_id in self._lives or self._cluster.knows(request.request_id):
            raise ValueError(f"request id {request.request_id!r} is in flight already")
        self._cluster.log.append(
            request.arrival_ns, "arrive", request.request_id, prompt=request.num_prompt_tokens, limit=request.max_tokens
        )
        try:
            admission = self._admit(life)
        except RequestRejected as rejection:
            self._close(life, OutcomeReason(rejection.reason), str(rejection))
            raise
        except EngineFailure as failure:
            self._close(life, OutcomeReason.ERROR, str(failure))
            raise
        self._lives[request.request_id] = life
        life.task = asyncio.get_running_loop().create_task(
            self._live(life, admission), name=f"life {request.request_id}"
        )

    def _admit(self, life: Life) -> "asyncio.Future[Placed]":
        request = life.request
        if self._is_draining:
            raise Draining("the server is shutting down")
        if request.num_tokens_limit > self.max_model_len:  # of a workload; `submit` has checked its own
            raise PromptTooLong(f"{request.num_tokens_limit} tokens exceed max_model_len {self.max_model_len}")
        failure = self._cluster.failure
        if failure is not None:
            raise failure
        admission = self._enqueue(life)
        self._admit_waiting()
        if not admission.done() and len(self._queue) > self._max_queued:
            self._dequeue(life)
            raise QueueFull(
                f"{len(self._queue)} requests wait already, scheduler.max_queued_requests is {self._max_queued}",
                retry_after_s=RETRY_AFTER_S,
            )
        return admission

    def _enqueue(self, life: Life) -> "asyncio.Future[Placed]":
        future: asyncio.Future[Placed] = asyncio.get_running_loop().create_future()
        by_priority = self._cluster.config.scheduler.policy == "priority"
        key = (life.request.priority if by_priority else 0, life.order)
        heapq.heappush(self._queue, (key, life, future))
        return future

    def _dequeue(self, life: Life) -> None:
        self._queue = [entry for entry in self._queue if entry[1] is not life]
        heapq.heapify(self._queue)

    def _admit_waiting(self) -> None:
        """Place waiting requests in order, as far as there is room; nobody passes the first. Once an instance is lost,
        none waits in vain.
        """
        if self._cluster.failure is not None:
            self._fail_waiting(self._cluster.failure)
        while self._queue:
            _, life, future = self._queue[0]
            if not future.done():
                placed = self._cluster.place(life.request, order=life.order)
                if placed is None:
                    return
                future.set_result(placed)
            heapq.heappop(self._queue)

    def _fail_waiting(self, failure: EngineFailure) -> None:
        queue, self._queue = self._queue, []
        for _, _, future in queue:
            if not future.done():
                future.set_exception(EngineFailure(str(failure)))

    async def _live(self, life: Life, admission: "asyncio.Future[Placed]") -> None:
        request = life.request
        life.is_running = True
        try:
            while True:
                placed = await self._await_place(life, admission)
                request.mark_scheduled(self._clock.now_ns())
                life.instance_id = placed.placement.prefill
                if life.scheduled_wall_ns is None:
                    life.scheduled_wall_ns = time.monotonic_ns()
                try:
                    end = await self._attempt(life, placed)
                finally:
                    self._cluster.unplace(placed)
                if end is not RunEnd.PREEMPTED:
                    break
                await placed.released()  # the same request may not be at an instance twice
                admission = self._enqueue(life)
                self._admit_waiting()
            self._close(life, OutcomeReason.STOP if end is RunEnd.STOP else OutcomeReason.LENGTH)
        except asyncio.CancelledError:
            if not request.is_over:  # canceled from outside, not by `_end`
                self._close(life, OutcomeReason.ABORT)
                raise
        except EngineFailure as failure:
            self._close(life, OutcomeReason.ERROR, str(failure))
        except Exception as error:
            logger.exception("request %s", request.request_id)
            self._close(life, OutcomeReason.ERROR, f"{type(error).__name__}: {error}")
        finally:
            del self._lives[request.request_id]

    async def _await_place(self, life: Life, admission: "asyncio.Future[Placed]") -> Placed:
        try:
            if life.request.is_over:  # ended before its task had begun
                raise asyncio.CancelledError
            return await admission
        except asyncio.CancelledError:
            if admission.done() and not admission.cancelled() and admission.exception() is None:
                self._cluster.unplace(admission.result())  # placed and canceled at the same instant
            self._dequeue(life)
            self._admit_waiting()
            raise

    async def _attempt(self, life: Life, placed: Placed) -> RunEnd:
        """One way through the instances."""
        request, cluster = life.request, self._cluster
        end = await cluster.prefill(request, placed, order=life.order, sink=life)
        if not placed.is_disaggregated or end is not RunEnd.LENGTH or request.num_output_tokens >= request.max_tokens:
            return end
        request.start_transfer(self._clock.now_ns())
        await cluster.kv_transfer(request, placed)
        request.start_decode(self._clock.now_ns())
        life.instance_id = placed.placement.decode
        return await cluster.decode(request, placed, sink=life)

    def _end(self, life: Life, reason: OutcomeReason) -> RequestTimes:
        """End a request in the name of its reader; what it holds is given back by its task."""
        if life.request.is_over:
            return life.times()
        if reason is OutcomeReason.STOP and not life.request.num_output_tokens:
            reason = OutcomeReason.ABORT
        self._close(life, reason)
        if life.task is not None and life.is_running:  # one that has not begun would be canceled without its `finally`
            life.task.cancel()
        return life.times()

    def _close(self, life: Life, reason: OutcomeReason, message: str = "") -> None:
        request, now_ns = life.request, self._clock.now_ns()
        if request.is_over:
            return
        request.close(reason, now_ns, message)
        self._cluster.log.append(
            now_ns, "outcome", request.request_id, reason=str(reason), tokens=request.num_output_tokens
        )
        times = life.times()
        if life.stream is not None:
            finish = FINISH_REASON[reason]
            life.stream.close(finish, stop_reason=life.stop_token(reason), times=times, error=message or None)
        self._on_outcome(request, times, life.instance_id)
