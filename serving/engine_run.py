"""A request's run on one instance: who hears of its tokens, how it ends; and the record of one step.

Owns: the values and interfaces between the step loop (serving/engine.py) and those who use it.
Must not know: how steps are made.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from devices.pipeline import StepTime
from serving.core.ids import InstanceId
from serving.core.request import Request
from serving.core.scheduled_batch import Load, ScheduledBatch
from serving.errors import EngineFailure
from serving.messages import TokenLogprobs


class RunEnd(Enum):
    """How a request's run on one instance ended."""

    STOP = "stop"  # end-of-sequence or a stop token
    LENGTH = "length"  # the token limit of this run
    PREEMPTED = "preempted"  # its blocks were taken; its tokens are to be computed again elsewhere


class TokenSink(Protocol):
    """Who hears of a request's tokens, on whatever instance they are made."""

    last_token_wall_ns: int | None  # when it last heard of one

    def __call__(
        self,
        request: Request,
        num_tokens: int,
        token_ids: tuple[int, ...],
        logprobs: tuple[TokenLogprobs, ...] | None,
    ) -> None:
        """The new tokens of one step; `token_ids` is empty where a timing shard made them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One engine step, for metrics and traces."""

    instance_id: InstanceId
    start_ns: int
    end_ns: int
    time: StepTime
    batch: ScheduledBatch
    num_waiting: int  # requests at the instance when it began
    num_used_blocks: int  # when it began
    num_tokens: int
    num_sampled: int  # new tokens
    num_drafts: int  # verified, of one token each
    num_accepted: int  # of them
    num_preemptions: int
    wall_ns: int  # from its start to its end on the machine's clock
    simulated_itl_ns: NDArray[np.float64]  # of the tokens that followed another
    itl_rows: Sequence[int]  # of the batch, one per such token
    wall_itl_ns: NDArray[np.float64]


@dataclass(slots=True)
class Run:
    """A request while it is on one instance."""

    request: Request
    sink: TokenSink
    load: Callable[[Load], None] | None
    done: "asyncio.Future[RunEnd]"

    def end(self, how: RunEnd) -> None:
        """Tell whoever waits, unless that was canceled at this very instant."""
        if not self.done.done():
            self.done.set_result(how)

    def fail(self, message: str) -> None:
        """End it with an EngineFailure."""
        if not self.done.done():
            self.done.set_exception(EngineFailure(message))
            self.done.exception()  # whoever waits may be canceled before it hears of it
