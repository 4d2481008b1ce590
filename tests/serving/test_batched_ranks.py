"""Ranks merged into one batch: the same requests, apart again afterwards."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.config import ModelConfig
from model.layout import make_layouts
from model.step import DraftingBatch, DraftOutput, SamplingBatch, StepInput, StepOutput, TokenLogprobs
from serving.batched_ranks import merge_steps, merged_layout, share_output, split_output
from serving.config_file import load_config

NUM_BLOCKS = 8


def step(lengths: list[int], samples: list[bool], seed: int) -> StepInput:
    """A step whose requests compute `lengths` tokens each; those in `samples` want a next token."""
    if not lengths:
        return StepInput.idle()
    rng = np.random.default_rng(seed)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    rows = starts[1:][samples] - 1
    width = int(rng.integers(1, 4))
    return StepInput(
        token_ids=rng.integers(0, 100, starts[-1]),
        positions=np.concatenate([np.arange(n) for n in lengths]),
        query_start=starts,
        seq_lens=np.array(lengths),
        block_tables=rng.integers(0, NUM_BLOCKS, (len(lengths), width)),
        sample_rows=rows,
        sampling=SamplingBatch.greedy(np.array(lengths)[samples]),
    )


steps_of_ranks = st.lists(
    st.lists(st.tuples(st.integers(1, 5), st.booleans()), max_size=4), min_size=1, max_size=4
).map(lambda ranks: [step([n for n, _ in rank], [s for _, s in rank], i) for i, rank in enumerate(ranks)])


def test_two_ranks_become_one_batch_with_their_blocks_side_by_side():
    last = step([1, 3], [False, True], 2)
    merged = merge_steps([step([2], [True], 0), StepInput.idle(), last], num_blocks=NUM_BLOCKS)
    assert merged.query_start.tolist() == [0, 2, 3, 6]
    assert merged.seq_lens.tolist() == [2, 1, 3]
    assert merged.sample_rows.tolist() == [1, 5]
    assert (merged.block_tables[0] < NUM_BLOCKS).all()
    own_blocks = last.block_tables + 2 * NUM_BLOCKS
    assert merged.block_tables[1:, : own_blocks.shape[1]].tolist() == own_blocks.tolist()


@given(steps_of_ranks)
def test_a_merged_batch_keeps_every_row_and_gives_every_rank_its_samples(steps):
    merged = merge_steps(steps, num_blocks=NUM_BLOCKS)
    assert merged.token_ids.tolist() == [token for s in steps for token in s.token_ids.tolist()]
    assert merged.sampling.position.tolist() == [p for s in steps for p in s.sampling.position.tolist()]
    # Each sample answers with the token that stands in its row, so a swap would show.
    output = StepOutput(
        sample_ids=np.arange(merged.num_samples, dtype=np.int32),
        token_ids=merged.token_ids[merged.sample_rows],
        logprobs=tuple(TokenLogprobs(logprob=float(i), top=()) for i in range(merged.num_samples)),
        expert_counts=np.ones((2, 3), np.int64),
    )
    outputs = split_output(output, steps)
    for own, s in zip(outputs, steps, strict=True):
        assert own.sample_ids.tolist() == list(range(s.num_samples))
        assert own.token_ids.tolist() == s.token_ids[s.sample_rows].tolist()
        assert len(own.logprobs) == s.num_samples
    assert sum(int(own.expert_counts.sum()) for own in outputs) == 6


def test_samples_of_a_replicated_batch_are_counted_once():
    output = StepOutput(
        sample_ids=np.array([0, 2], np.int32),
        token_ids=np.array([7, 8]),
        logprobs=(None, None),
        expert_counts=np.ones((1, 2), np.int64),
    )
    first, *rest = share_output(output, 3)
    assert first is output
    assert [len(r.sample_ids) for r in rest] == [0, 0]
    assert sum(int(r.expert_counts.sum()) for r in rest) == 0


def shape() -> ModelConfig:
    return load_config("laptop").shape


def test_the_merged_rank_holds_the_experts_of_its_members_in_order():
    layouts = make_layouts(shape(), world_size=4, max_num_tokens=8)
    merged = merged_layout(layouts[2:])
    assert (merged.rank, merged.world_size, merged.max_num_tokens) == (1, 2, 16)
    members = np.concatenate([layout.local_experts for layout in layouts[2:]], axis=1)
    assert merged.local_experts.tolist() == members.tolist()


@pytest.mark.parametrize("ranks", [slice(0, 3), slice(1, 3)])
def test_ranks_that_do_not_divide_their_instance_are_refused(ranks):
    layouts = make_layouts(shape(), world_size=4, max_num_tokens=8)
    with pytest.raises(ValueError, match="do not divide 4 ranks"):
        merged_layout(layouts[ranks])


def drafting_step(num_seqs: int, *, carried: list[int], seed: int) -> StepInput:
    """A step of single rows, of which some have a hidden state carried to them."""
    plain = step([1] * num_seqs, [True] * num_seqs, seed)
    rng = np.random.default_rng(seed)
    drafting = DraftingBatch(
        num_drafts=np.zeros(num_seqs),
        is_behind=np.arange(num_seqs) % 2,
        makes_draft=np.ones(num_seqs),
        eos_position=rng.integers(0, 9, num_seqs),
        carried_ids=np.array(carried),
        carried=rng.random((len(carried), 8)),
    )
    return dataclasses.replace(plain, drafting=drafting)


def test_what_the_mtp_module_needs_is_merged_and_what_it_gives_is_split():
    steps = [
        drafting_step(2, carried=[1], seed=0),
        StepInput.idle(DraftingBatch.idle(8)),
        drafting_step(3, carried=[0, 2], seed=1),
    ]
    merged = merge_steps(steps, num_blocks=NUM_BLOCKS).drafting
    assert merged.carried_ids.tolist() == [1, 2, 4]
    assert merged.carried.tolist() == [row for s in steps for row in s.drafting.carried.tolist()]
    assert merged.is_behind.tolist() == [False, True, False, True, False]
    output = StepOutput(
        sample_ids=np.arange(5, dtype=np.int32),
        token_ids=np.arange(5),
        logprobs=(None,) * 5,
        expert_counts=np.zeros((1, 1), np.int64),
        drafts=DraftOutput(
            draft_ids=np.array([0, 3, 4], np.int32),
            token_ids=np.array([70, 73, 74]),
            hidden_ids=np.array([1, 2], np.int32),
            hidden=np.array([[1.0] * 8, [2.0] * 8], np.float32),
        ),
    )
    first, idle, last = (part.drafts for part in split_output(output, steps))
    assert (first.draft_ids.tolist(), first.token_ids.tolist()) == ([0], [70])
    assert (first.hidden_ids.tolist(), first.hidden[:, 0].tolist()) == ([1], [1.0])
    assert (idle.draft_ids.tolist(), idle.hidden.shape) == ([], (0, 8))
    assert (last.draft_ids.tolist(), last.token_ids.tolist()) == ([1, 2], [73, 74])
    assert (last.hidden_ids.tolist(), last.hidden[:, 0].tolist()) == ([0], [2.0])
    whole, rest = (part.drafts for part in share_output(output, 2))
    assert (len(whole.draft_ids), len(rest.draft_ids), rest.hidden.shape) == (3, 0, (0, 8))
    assert merge_steps([steps[1], steps[1]], num_blocks=NUM_BLOCKS).drafting is not None
