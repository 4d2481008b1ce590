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

from model.step import DraftingBatch, SamplingBatch, StepInput, StepOutput
from serving.core.batch_scheduler import BatchScheduler
from serving.core.ids import InstanceId
from serving.core.request import Request
from serving.core.scheduled_batch import ScheduledBatch
from serving.drafting import draft_of, drafting_batch, drawn_acceptance, keep_drafts
from serving.messages import SamplingParams, TokenLogprobs
from serving.transport import Transport


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sampled:
    """What a step gave, one entry per row of the batch; a row that does not sample has no tokens."""

    token_ids: Sequence[tuple[int, ...]] | None  # None: a timing shard, whose tokens have no value
    num_accepted: NDArray[np.int64] | None = None  # drafts that were right; None: no speculative decoding
    logprobs: Sequence[tuple[TokenLogprobs, ...] | None] | None = None  # one per token, where they are wanted
    expert_counts: NDArray[np.int64] | None = None  # (num_moe_layers, n_routed_experts), all ranks together


class Shard(Protocol):
    """The ranks of one instance."""

    def step(self, batch: ScheduledBatch, requests: Sequence[Request], *, charged_ns: int) -> Awaitable[Sampled]:
        """Start one step; `requests` has one entry per row. Raises EngineFailure, when awaited, if a rank is lost."""


class TimingShard:
    """Counts work and makes no tensors: its step is over as soon as it is charged.

    `acceptance` is the share of drafts that it takes for right.
    """

    def __init__(self, *, acceptance: float = 0.0) -> None:
        self._acceptance = acceptance

    def step(self, batch: ScheduledBatch, requests: Sequence[Request], *, charged_ns: int) -> Awaitable[Sampled]:
        # A finished future: a coroutine would cost a task and a round of the event loop in every step.
        done: asyncio.Future[Sampled] = asyncio.get_running_loop().create_future()
        num_accepted = None
        if batch.drafts is not None:
            num_accepted = drawn_acceptance(batch, requests, self._acceptance)
        done.set_result(Sampled(token_ids=None, num_accepted=num_accepted))
        return done


class TorchShard:
    """Real tokens, from ranks that a transport reaches.

    With `is_replicated`, every rank gets the same packed batch (prefill: SP-TP-SP); otherwise each gets its own rows.
    `hidden_size` is that of the MTP module's inputs; None: there is no module.
    """

    def __init__(
        self,
        *,
        instance_id: InstanceId,
        transport: Transport,
        scheduler: BatchScheduler,
        world_size: int,
        is_replicated: bool,
        hidden_size: int | None = None,
    ) -> None:
        self._instance_id = instance_id
        self._transport = transport
        self._scheduler = scheduler
        self._world_size = world_size
        self._is_replicated = is_replicated
        self._hidden_size = hidden_size

    def step(self, batch: ScheduledBatch, requests: Sequence[Request], *, charged_ns: int) -> Awaitable[Sampled]:
        inputs = [
            self._rank_input(batch, requests, int(batch.rank_starts[rank]), int(batch.rank_starts[rank + 1]))
            for rank in range(batch.num_ranks)
        ]
        if self._is_replicated:
            inputs = inputs * self._world_size
        # The order to the devices leaves now; only the reply is awaited later.
        outputs = self._transport.step(self._instance_id, inputs, charged_ns=charged_ns)
        return self._collect(batch, requests, inputs, outputs)

    def _rank_input(self, batch: ScheduledBatch, requests: Sequence[Request], first: int, end: int) -> StepInput:
        if first == end:
            return StepInput.idle(None if self._hidden_size is None else DraftingBatch.idle(self._hidden_size))
        computed = batch.num_computed_tokens[first:end]
        scheduled = batch.num_scheduled_tokens[first:end]
        num_drafts = np.zeros(end - first, np.int32) if batch.drafts is None else batch.drafts.num_drafts[first:end]
        token_ids, positions = [], []
        for i in range(end - first):
            start, stop = int(computed[i]), int(computed[i] + scheduled[i])
            token_ids.append(requests[first + i].token_ids(start, stop - int(num_drafts[i])))
            if num_drafts[i]:
                token_ids[i].append(draft_of(requests[first + i], start))
            positions.append(np.arange(start, stop))
        query_start = np.concatenate([[0], np.cumsum(scheduled)])
        is_sampled = np.zeros(query_start[-1], np.bool_)
        is_sampled[query_start[1:][batch.samples[first:end]] - 1] = True
        is_sampled[query_start[1:][num_drafts > 0] - 2] = True
        drafting = None
        if self._hidden_size is not None:
            drafting = drafting_batch(batch, requests, range(first, end), hidden_size=self._hidden_size)
        return StepInput(
            token_ids=np.concatenate(token_ids),
            positions=np.concatenate(positions),
            query_start=query_start,
            seq_lens=computed + scheduled,
            block_tables=self._scheduler.block_tables(batch.slots[first:end]),
            sample_rows=np.flatnonzero(is_sampled).astype(np.int32),
            sampling=self._sampling(batch, requests, first, end),
            drafting=drafting,
        )

    def _sampling(self, batch: ScheduledBatch, requests: Sequence[Request], first: int, end: int) -> SamplingBatch:
        counts = batch.num_samples[first:end].tolist()
        # Of each sample, its request and how many tokens the step samples before it.
        entries = [(requests[first + i], j) for i, count in enumerate(counts) for j in range(count)]
        params = [_params(request) for request, _ in entries]
        outputs = [request.num_output_tokens + j for request, j in entries]
        return SamplingBatch(
            temperature=np.array([p.temperature for p in params], np.float32),
            top_p=np.array([p.top_p for p in params], np.float32),
            top_k=np.array([p.top_k for p in params], np.int32),
            seed=np.array([p.seed for p in params], np.uint64),
            position=np.array([request.num_tokens + j for request, j in entries], np.int64),
            suppress_eos=np.array([n < p.min_tokens for n, p in zip(outputs, params, strict=True)], np.bool_),
            want_logprobs=np.array([p.logprobs is not None for p in params], np.bool_),
            num_logprobs=np.array([p.logprobs or 0 for p in params], np.int32),
        )

    async def _collect(
        self,
        batch: ScheduledBatch,
        requests: Sequence[Request],
        inputs: Sequence[StepInput],
        outputs: Awaitable[list[StepOutput]],
    ) -> Sampled:
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
        counts = batch.num_samples.astype(np.int64)
        ends = np.cumsum(counts)
        num_accepted = None if batch.drafts is None else _accepted(batch, requests, token_ids, ends)
        if self._hidden_size is not None:
            accepted = np.zeros(batch.num_rows, np.int64) if num_accepted is None else num_accepted
            for rank, output in enumerate(by_rank):
                assert output.drafts is not None, "a rank of this instance runs no MTP module"
                first_row = 0 if self._is_replicated else int(batch.rank_starts[rank])
                keep_drafts(batch, requests, first_row, output.drafts, num_accepted=accepted)
        num_new = batch.samples.astype(np.int64) if num_accepted is None else batch.samples + num_accepted
        starts = (ends - counts).tolist()
        spans = [slice(start, start + count) for start, count in zip(starts, num_new.tolist(), strict=True)]
        tokens = token_ids.tolist()
        entries = None
        if any(entry is not None for entry in logprobs):
            entries = [tuple(e for e in logprobs[span] if e is not None) or None for span in spans]
        return Sampled(
            token_ids=[tuple(tokens[span]) for span in spans],
            num_accepted=num_accepted,
            logprobs=entries,
            expert_counts=np.sum([output.expert_counts for output in by_rank], axis=0),
        )


def _accepted(
    batch: ScheduledBatch, requests: Sequence[Request], token_ids: NDArray[np.int64], ends: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Drafts per row that are what was sampled before them; `ends` are those of the rows' samples."""
    assert batch.drafts is not None
    num_accepted = np.zeros(batch.num_rows, np.int64)
    for row in np.flatnonzero(batch.drafts.num_drafts).tolist():
        draft = draft_of(requests[row], int(batch.num_computed_tokens[row]))
        num_accepted[row] = token_ids[ends[row] - 2] == draft
    return num_accepted


def _params(request: Request) -> SamplingParams:
    assert isinstance(request.sampling, SamplingParams)
    assert request.sampling.seed is not None
    return request.sampling
