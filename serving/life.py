"""What only the outside of a request knows: its reader, its task, its wall clock.

Owns: the wall instants of a request, and its latencies by both clocks.
Must not know: admission, instances.
"""

import asyncio
import time
from collections.abc import Callable
from itertools import pairwise

from serving.core.request import OutcomeReason, Request
from serving.messages import FinishReason, Latencies, RequestTimes, SamplingParams, TokenLogprobs
from serving.stream import TokenStream

FINISH_REASON: dict[OutcomeReason, FinishReason] = {
    OutcomeReason.STOP: "stop",
    OutcomeReason.LENGTH: "length",
    OutcomeReason.ABORT: "abort",
    OutcomeReason.ERROR: "error",
}
CERTAIN = TokenLogprobs(logprob=0.0, top=())
OnToken = Callable[[Request, int, tuple[int, ...], tuple[TokenLogprobs, ...] | None], None]  # a TokenSink's call


class Life:
    """One request on its way. Implements engine_run.TokenSink."""

    def __init__(self, request: Request, *, order: int) -> None:
        self.request = request
        self.order = order
        self.stream: TokenStream | None = None
        self.filler: tuple[int, ...] = ()  # what its reader gets for a timing shard's token, which has no value
        self.listener: OnToken | None = None
        self.task: asyncio.Task[None] | None = None
        self.is_running = False
        self.instance_id = "frontend"  # where it is now
        self.start_wall_ns = time.monotonic_ns()
        self.scheduled_wall_ns: int | None = None
        self.first_token_wall_ns: int | None = None
        self.last_token_wall_ns: int | None = None
        self.token_instants_ns: list[int] = []  # simulated, one per step that gave it tokens

    def __call__(
        self,
        request: Request,
        num_tokens: int,
        token_ids: tuple[int, ...],
        logprobs: tuple[TokenLogprobs, ...] | None,
    ) -> None:
        """The new tokens of one step."""
        self.last_token_wall_ns = time.monotonic_ns()
        assert request.last_token_ns is not None
        self.token_instants_ns.append(request.last_token_ns)
        if self.listener is not None:
            self.listener(request, num_tokens, token_ids, logprobs)
        if self.first_token_wall_ns is None:
            self.first_token_wall_ns = self.last_token_wall_ns
        if self.stream is not None:
            if not token_ids:
                assert isinstance(request.sampling, SamplingParams)
                token_ids = self.filler * num_tokens
                logprobs = None if request.sampling.logprobs is None else (CERTAIN,) * len(token_ids)
            self.stream.push(token_ids, logprobs)

    def stop_token(self, reason: OutcomeReason) -> int | None:
        """The token of `stop_token_ids` that ended it, if one did."""
        request = self.request
        if reason is not OutcomeReason.STOP or not request.output_token_ids:
            return None
        assert isinstance(request.sampling, SamplingParams)
        last = request.output_token_ids[-1]
        return last if last in request.sampling.stop_token_ids else None

    def times(self) -> RequestTimes:
        """Its latencies so far, simulated and wall."""
        request = self.request
        end_ns = request.updated_ns if request.last_token_ns is None else request.last_token_ns
        return RequestTimes(
            simulated=Latencies.between(
                arrival_ns=request.arrival_ns,
                scheduled_ns=request.scheduled_ns,
                first_token_ns=request.first_token_ns,
                end_ns=end_ns,
                num_tokens=request.num_output_tokens,
            ),
            wall=Latencies.between(
                arrival_ns=self.start_wall_ns,
                scheduled_ns=self.scheduled_wall_ns,
                first_token_ns=self.first_token_wall_ns,
                end_ns=self.last_token_wall_ns or time.monotonic_ns(),
                num_tokens=request.num_output_tokens,
            ),
            num_cached_tokens=request.num_cached_tokens,
            simulated_itl_ms=tuple((later - earlier) / 1e6 for earlier, later in pairwise(self.token_instants_ns)),
        )
