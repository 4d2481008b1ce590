"""What computes an instance's steps: torch shards on devices, or timing shards that count and make no tensors.

Owns: the translation of a scheduled batch into the arrays that ranks read, and of their samples back.
Must not know: time, routing, how a device is reached (serving/transport.py).
"""

import asyncio
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from model.step import SamplingBatch, StepInput, StepOutput
from serving.core.batch_scheduler import BatchScheduler
from serving.core.ids import InstanceId
from serving.core.request import Request
from serving.core.scheduled_batch import ScheduledBatch
from serving.messages import SamplingParams, TokenLogprobs
from serving.transport import Transport


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sampled:
    """The new tokens of a step, one per row of the batch that samples, in row order."""

    token_ids: NDArray[np.int64] | None  # None: a timing shard, whose tokens have no value
    logprobs: Sequence[TokenLogprobs | None] | None = None
    expert_counts: NDArray[np.int64] | None = None  # (num_moe_layers, n_routed_experts), all ranks together


class Shard(Protocol):
    """The ranks of one instance."""

    def step(self, batch: ScheduledBatch, requests: Sequence[Request], *, charged_ns: int) -> Awaitable[Sampled]:
        """Start one step; `requests` has one entry per row. Raises EngineFailure, when awaited, if a rank is lost."""


class TimingShard:
    """Counts work and makes no tensors: its step is over as soon as it is charged."""

    def step(self, batch: ScheduledBatch, requests: Sequence[Request], *, charged_ns: int) -> Awaitable[Sampled]:
        # A finished future: a coroutine would cost a task and a round of the event loop in every step.
        done: asyncio.Future[Sampled] = asyncio.get_running_loop().create_future()
        done.set_result(Sampled(token_ids=None))
        return done


class TorchShard:
    """Real tokens, from ranks that a transport reaches.

    With `is_replicated`, every rank gets the same packed batch (prefill: SP-TP-SP); otherwise each gets its own rows.
    """

    def __init__(
        self,
        *,
        instance_id: InstanceId,
        transport: Transport,
        scheduler: BatchScheduler,
        world_size: int,
        is_replicated: bool,
    ) -> None:
        self._instance_id = instance_id
        self._transport = transport
        self._scheduler = scheduler
        self._world_size = world_size
        self._is_replicated = is_replicated

    def step(self, batch: ScheduledBatch, requests: Sequence[Request], *, charged_ns: int) -> Awaitable[Sampled]:
        inputs = [
            self._rank_input(batch, requests, int(batch.rank_starts[rank]), int(batch.rank_starts[rank + 1]))
            for rank in range(batch.num_ranks)
        ]
        if self._is_replicated:
            inputs = inputs * self._world_size
        # The order to the devices leaves now; only the reply is awaited later.
        outputs = self._transport.step(self._instance_id, inputs, charged_ns=charged_ns)
        return self._collect(inputs, outputs)

    def _rank_input(self, batch: ScheduledBatch, requests: Sequence[Request], first: int, end: int) -> StepInput:
        if first == end:
            return StepInput.idle()
        computed = batch.num_computed_tokens[first:end]
        scheduled = batch.num_scheduled_tokens[first:end]
        token_ids, positions = [], []
        for row in range(first, end):
            start, stop = int(computed[row - first]), int(computed[row - first] + scheduled[row - first])
            token_ids.append(requests[row].token_ids(start, stop))
            positions.append(np.arange(start, stop))
        query_start = np.concatenate([[0], np.cumsum(scheduled)])
        sampling_rows = np.flatnonzero(batch.samples[first:end])
        return StepInput(
            token_ids=np.concatenate(token_ids),
            positions=np.concatenate(positions),
            query_start=query_start,
            seq_lens=computed + scheduled,
            block_tables=self._scheduler.block_tables(batch.slots[first:end]),
            sample_rows=query_start[1:][sampling_rows] - 1,
            sampling=self._sampling([requests[first + row] for row in sampling_rows.tolist()]),
        )

    def _sampling(self, requests: Sequence[Request]) -> SamplingBatch:
        params = [_params(request) for request in requests]
        pairs = list(zip(requests, params, strict=True))
        return SamplingBatch(
            temperature=np.array([p.temperature for p in params], np.float32),
            top_p=np.array([p.top_p for p in params], np.float32),
            top_k=np.array([p.top_k for p in params], np.int32),
            seed=np.array([p.seed for p in params], np.uint64),
            position=np.array([request.num_tokens for request in requests], np.int64),
            suppress_eos=np.array([r.num_output_tokens < p.min_tokens for r, p in pairs], np.bool_),
            want_logprobs=np.array([p.logprobs is not None for p in params], np.bool_),
            num_logprobs=np.array([p.logprobs or 0 for p in params], np.int32),
        )

    async def _collect(self, inputs: Sequence[StepInput], outputs: Awaitable[list[StepOutput]]) -> Sampled:
        by_rank = await outputs
        num_samples = [step.num_samples for step in inputs]
        # Ranks of a replicated batch share one numbering of the samples; otherwise each rank's follow the last one's.
        offsets = [0] * len(inputs) if self._is_replicated else np.concatenate([[0], np.cumsum(num_samples)[:-1]])
        total = num_samples[0] if self._is_replicated else sum(num_samples)
        token_ids = np.full(total, -1, np.int64)
        logprobs: list[TokenLogprobs | None] = [None] * total
        for offset, output in zip(offsets, by_rank, strict=True):
            token_ids[output.sample_ids + offset] = output.token_ids
            for sample_id, entry in zip(output.sample_ids, output.logprobs, strict=True):
                if entry is not None:
                    logprobs[sample_id + offset] = entry
        assert (token_ids >= 0).all(), "a sampled row was answered by no rank"
        return Sampled(
            token_ids=token_ids,
            logprobs=logprobs if any(entry is not None for entry in logprobs) else None,
            expert_counts=np.sum([output.expert_counts for output in by_rank], axis=0),
        )


def _params(request: Request) -> SamplingParams:
    assert isinstance(request.sampling, SamplingParams)
    assert request.sampling.seed is not None
    return request.sampling
