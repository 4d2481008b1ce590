"""Driving a workload through a frontend without HTTP: what `simulate` and `replay` do.

Owns: when each request of a workload arrives on the clock, and the record of how it ended.
Must not know: what serves the requests.
"""

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from devices.clock import Clock
from serving.core.ids import BlockHash, RequestId
from serving.core.request import Request, RequestState
from serving.frontend import Frontend
from serving.messages import SamplingParams, TokenLogprobs
from serving.records import Outcome, RequestRecord, Timing
from serving.workloads.requests import WorkloadRequest
from serving.workloads.workload import Workload

OUTCOME_OF_STATE: dict[RequestState, Outcome] = {
    RequestState.FINISHED: "finished",
    RequestState.REJECTED: "rejected",
    RequestState.ABORTED: "aborted",
    RequestState.FAILED: "failed",
}


@dataclass(slots=True)
class TokenTimes:
    """Instants at which a request's tokens came, one per step. Implements life.OnToken."""

    clock: Clock
    instants_ns: list[int] = field(default_factory=list)

    def __call__(
        self,
        request: Request,
        num_tokens: int,
        token_ids: tuple[int, ...],
        logprobs: tuple[TokenLogprobs, ...] | None,
    ) -> None:
        self.instants_ns.append(self.clock.now_ns())


class WorkloadRun:
    """One pass of a workload; afterwards `records` has one entry per request, in the workload's order."""

    def __init__(
        self,
        workload: Workload,
        *,
        frontend: Frontend,
        clock: Clock,
        block_size: int,
        closed_loop: int | None,
        reads_tokens: bool,
    ):
        """`closed_loop`: so many requests at a time, each sent when another ends; None: arrivals decide.

        Prompts get their tokens only if something `reads_tokens`; the names of blocks follow from the content.
        """
        self._workload = workload
        self._frontend = frontend
        self._clock = clock
        self._block_size = block_size
        self._reads_tokens = reads_tokens
        self._slots = None if closed_loop is None else asyncio.Semaphore(closed_loop)
        self._records: list[RequestRecord | None] = [None] * len(workload)
        self.requests: list[Request] = []  # that have arrived, in the workload's order
        self.token_ids: dict[RequestId, list[int]] = {}

    @property
    def records(self) -> list[RequestRecord]:
        """Records of the requests that have ended."""
        return [record for record in self._records if record is not None]

    async def drive(self) -> None:
        """Send every request and wait for all."""
        start_ns = self._clock.now_ns()
        async with asyncio.TaskGroup() as group:
            for index, item in enumerate(self._workload.requests):
                if self._slots is not None:
                    await self._slots.acquire()
                elif item.arrival_ns is not None:
                    await self._clock.sleep_until(start_ns + item.arrival_ns)
                group.create_task(self._serve(index, item))

    async def _serve(self, index: int, item: WorkloadRequest) -> None:
        request = self._request(index, item)
        self.requests.append(request)
        times = TokenTimes(self._clock)
        await self._frontend.serve(request, on_token=times)
        self.token_ids[request.request_id] = request.output_token_ids
        self._records[index] = _record(request, times.instants_ns)
        if self._slots is not None:
            self._slots.release()

    def _request(self, index: int, item: WorkloadRequest) -> Request:
        token_ids = tuple(self._workload.prompt_token_ids(item).tolist()) if self._reads_tokens else None
        names = self._workload.block_hashes(index, self._block_size)
        return Request(
            request_id=RequestId(item.request_id),
            arrival_ns=self._clock.now_ns(),
            num_prompt_tokens=item.num_prompt_tokens,
            max_tokens=item.max_tokens,
            prompt_token_ids=token_ids,
            block_hashes=tuple(BlockHash(name) for name in names),
            priority=item.priority,
            sampling=SamplingParams(max_tokens=item.max_tokens, temperature=0.0, ignore_eos=True, seed=item.seed or 0),
        )


def _record(request: Request, token_ns: Sequence[int]) -> RequestRecord:
    assert request.outcome is not None
    timing = None
    if request.first_token_ns is not None:
        assert request.last_token_ns is not None
        timing = Timing(
            ttft_ns=request.first_token_ns - request.arrival_ns,
            e2el_ns=request.last_token_ns - request.arrival_ns,
            start_ns=request.arrival_ns,
            itl_ns=[later - earlier for earlier, later in itertools.pairwise(token_ns)],
            queue_ns=None if request.scheduled_ns is None else request.scheduled_ns - request.arrival_ns,
        )
    return RequestRecord(
        request_id=request.request_id,
        outcome=OUTCOME_OF_STATE[request.outcome.state],
        reason=str(request.outcome.reason),
        num_prompt_tokens=request.num_prompt_tokens,
        num_output_tokens=request.num_output_tokens,
        num_cached_tokens=request.num_cached_tokens,
        simulated=timing,
        error=request.outcome.message or None,
    )
