"""Several ranks of one worker as one: their steps merged into one batch, their cache blocks side by side.

Owns: the merging of steps and the splitting of samples; which block of the common cache is which rank's.
Must not know: how the merged rank computes, other workers.

Ranks of one instance have the same weights but for their experts, so k of them are exactly one rank of an instance with
k times fewer ranks: physical experts are numbered rank by rank, so the merged rank's slots are its members', in order.
It makes k times fewer and larger products, which on a CPU is most of a decode step.

    data_parallel     tokens of rank 0 | rank 1 | ...    block b of rank r is block r * num_blocks + b
    sequence_tensor   every rank has the same step and the same blocks: one of them is kept
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from model.layout import RankLayout
from model.step import DraftingBatch, DraftOutput, SamplingBatch, StepInput, StepOutput


def merged_layout(layouts: Sequence[RankLayout]) -> RankLayout:
    """Layout of the rank that stands for consecutive ranks. Raises ValueError if they do not divide their instance."""
    first, num_ranks = layouts[0], len(layouts)
    if first.world_size % num_ranks or first.rank % num_ranks:
        raise ValueError(f"{num_ranks} ranks from rank {first.rank} on do not divide {first.world_size} ranks")
    is_replicated = first.attention == "sequence_tensor"
    return dataclasses.replace(
        first,
        rank=first.rank // num_ranks,
        world_size=first.world_size // num_ranks,
        max_num_tokens=first.max_num_tokens * (1 if is_replicated else num_ranks),
    )


def merge_steps(steps: Sequence[StepInput], *, num_blocks: int) -> StepInput:
    """One step of all requests of data-parallel ranks with `num_blocks` blocks each, rank by rank."""
    busy = [(rank, step) for rank, step in enumerate(steps) if step.num_seqs]
    if not busy:
        return steps[0]
    width = max(step.block_tables.shape[1] for _, step in busy)
    tables = [
        np.pad(step.block_tables + rank * num_blocks, ((0, 0), (0, width - step.block_tables.shape[1])))
        for rank, step in busy
    ]
    first_rows = np.concatenate([[0], np.cumsum([step.num_tokens for _, step in busy])])
    return StepInput(
        token_ids=np.concatenate([step.token_ids for _, step in busy]),
        positions=np.concatenate([step.positions for _, step in busy]),
        query_start=np.concatenate(
            [[0], *(step.query_start[1:] + first for (_, step), first in zip(busy, first_rows, strict=False))]
        ),
        seq_lens=np.concatenate([step.seq_lens for _, step in busy]),
        block_tables=np.concatenate(tables),
        sample_rows=np.concatenate(
            [step.sample_rows + first for (_, step), first in zip(busy, first_rows, strict=False)]
        ),
        sampling=SamplingBatch(
            **{
                field.name: np.concatenate([getattr(step.sampling, field.name) for _, step in busy])
                for field in dataclasses.fields(SamplingBatch)
            }
        ),
        drafting=_merge_drafting([step for _, step in busy]),
    )


def _merge_drafting(steps: Sequence[StepInput]) -> DraftingBatch | None:
    drafting = [step.drafting for step in steps if step.drafting is not None]
    if not drafting:
        return None
    first_ids = np.concatenate([[0], np.cumsum([step.num_seqs for step in steps])[:-1]])
    columns = {
        field.name: np.concatenate([getattr(part, field.name) for part in drafting])
        for field in dataclasses.fields(DraftingBatch)
        if field.name != "carried_ids"
    }
    ids = [part.carried_ids + first for part, first in zip(drafting, first_ids, strict=True)]
    return DraftingBatch(carried_ids=np.concatenate(ids), **columns)


def split_output(output: StepOutput, steps: Sequence[StepInput]) -> list[StepOutput]:
    """The samples of a merged step, per rank. Expert counts, which no rank tells apart, go with the first."""
    ends = np.cumsum([step.num_samples for step in steps])
    seq_ends = np.cumsum([step.num_seqs for step in steps])
    outputs = []
    for rank, (step, end) in enumerate(zip(steps, ends, strict=True)):
        first = int(end) - step.num_samples
        own = np.flatnonzero((output.sample_ids >= first) & (output.sample_ids < end))
        outputs.append(
            StepOutput(
                sample_ids=output.sample_ids[own] - np.int32(first),
                token_ids=output.token_ids[own],
                logprobs=tuple(output.logprobs[i] for i in own.tolist()),
                expert_counts=output.expert_counts if rank == 0 else np.zeros_like(output.expert_counts),
                drafts=_part_of(output.drafts, int(seq_ends[rank]) - step.num_seqs, int(seq_ends[rank])),
            )
        )
    return outputs


def _part_of(drafts: DraftOutput | None, first: int, end: int) -> DraftOutput | None:
    """Of the requests [first, end) of a merged step."""
    if drafts is None:
        return None
    drafted = (drafts.draft_ids >= first) & (drafts.draft_ids < end)
    hidden = (drafts.hidden_ids >= first) & (drafts.hidden_ids < end)
    return DraftOutput(
        draft_ids=drafts.draft_ids[drafted] - np.int32(first),
        token_ids=drafts.token_ids[drafted],
        hidden_ids=drafts.hidden_ids[hidden] - np.int32(first),
        hidden=drafts.hidden[hidden],
    )


def share_output(output: StepOutput, num_ranks: int) -> list[StepOutput]:
    """The samples of a merged sequence_tensor step: all are the first rank's."""
    none = np.zeros(0, np.int32)
    rest = StepOutput(
        sample_ids=none,
        token_ids=none.astype(np.int64),
        logprobs=(),
        expert_counts=np.zeros_like(output.expert_counts),
        drafts=_part_of(output.drafts, 0, 0),
    )
    return [output, *[rest] * (num_ranks - 1)]


def shifted(block_ids: NDArray[np.int32], *, rank: int, num_blocks: int) -> NDArray[np.int32]:
    """Blocks of a member rank as blocks of the merged cache."""
    return block_ids + np.int32(rank * num_blocks)
