"""Speculative decoding on one rank: the main model verifies a draft, the MTP module makes the next one.

Owns: one step of both: which rows the module runs, with which hidden states, and what has to be carried on.
Must not know: processes, other ranks' state, schedulers, who keeps the drafts between steps.
Source: DeepSeek-V3 (arXiv 2412.19437) section 2.2; verification by sampling with the same key is ours, and exact:
a token depends on its logits, seed and position, so a draft is right or wrong whatever the temperature.

A request that knows the tokens up to position n, with a draft d for n + 1, and the module done up to n:

    main model   rows   n        n + 1         samples t(n+1) after row n, t(n+2) after row n + 1
                 token  t(n)     d
    accepted (d = t(n+1)):  module rows n + 1, n + 2 with hidden states of n, n + 1; draft for n + 3
    rejected:               module row  n + 1        with hidden state  of n;        draft for n + 2

The main model's slot n + 1 of a rejected draft is overwritten in the next step, before anybody reads it. A request
that is "behind" has no draft, and its first row is the module's first row too: the hidden state before it comes from
the step before, where it was returned for want of a slot for the newest token; or from another instance, with the
cache; or it is unknown, behind a prefix found in a cache, and taken as zeros, which costs acceptance alone.
"""

# Shapes: T rows of the main model's step, U rows of the module's, t rows of this rank, R requests, H hidden_size

import dataclasses
from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.collectives import AllGather, Collective, Reply
from model.config import ModelConfig
from model.layout import RankLayout
from model.mtp import MtpModule
from model.sampling import sample
from model.step import DraftingBatch, DraftOutput, SamplingBatch, StepInput, StepOutput
from model.transformer import Transformer

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ModuleRows:
    """What the MTP module runs after a data-parallel step."""

    step: StepInput  # U rows of the requests that have any; samples where a draft is made
    previous_rows: Ints  # (U,) row of T whose hidden state each takes; -1: a carried one, or zeros
    owners: Ints  # (U,) request of each row
    draft_ids: Ints  # (d,) requests that get a draft
    hidden_ids: Ints  # (h,) requests that get none
    hidden_rows: Ints  # (h,) their last accepted rows of T


class SpeculativeTransformer:
    """Transformer and MTP module of one rank, stepped as one."""

    def __init__(self, config: ModelConfig, layout: RankLayout, transformer: Transformer, module: MtpModule) -> None:
        self._eos_token_id = config.eos_token_id
        self._hidden_size = config.hidden_size
        self._layout = layout
        self._transformer = transformer
        self._module = module

    def forward(self, step: StepInput) -> Generator[Collective, Reply, StepOutput]:
        """As Transformer.forward, with two samples for a request whose draft is verified; then the module's rows.

        sequence_tensor ranks prefill: they cache the module's latents of their rows, and make no drafts.
        """
        hidden, experts = yield from self._transformer.hidden_states(step)
        output = self._transformer.sampled(step, hidden, experts)
        if self._layout.attention == "sequence_tensor":
            drafts = yield from self._prefill(step, hidden)
        else:
            drafts = yield from self._draft(step, hidden, output)
        return dataclasses.replace(output, drafts=drafts)

    def _draft(self, step: StepInput, hidden: Tensor, output: StepOutput) -> Generator[Collective, Reply, DraftOutput]:
        rows = module_rows(step, output.token_ids)
        previous = hidden.new_zeros(len(rows.owners), self._hidden_size)
        is_known = rows.previous_rows >= 0
        previous[torch.from_numpy(is_known)] = hidden[torch.from_numpy(rows.previous_rows[is_known])]
        _fill_carried(previous, _drafting(step), np.flatnonzero(~is_known), rows.owners[~is_known])
        states = yield from self._module.forward(rows.step, previous)
        logits = self._module.logits(states[torch.from_numpy(rows.step.sample_rows).long()])
        token_ids, _ = sample(logits.numpy(), rows.step.sampling, eos_token_id=self._eos_token_id)
        return DraftOutput(
            draft_ids=rows.draft_ids.astype(np.int32),
            token_ids=token_ids,
            hidden_ids=rows.hidden_ids.astype(np.int32),
            hidden=hidden[torch.from_numpy(rows.hidden_rows)].numpy(),
        )

    def _prefill(self, step: StepInput, hidden: Tensor) -> Generator[Collective, Reply, DraftOutput]:
        """The module's rows are the main model's; a slice's first row needs the last row of the slice before."""
        drafting = _drafting(step)
        assert not drafting.num_drafts.any(), "a prefill instance verifies no drafts"
        assert not drafting.makes_draft.any(), "a prefill instance makes no drafts"
        own = self._layout.own_rows(step.num_tokens)
        last_rows = yield AllGather(hidden[-1:].contiguous())
        before = [rows for rows in last_rows[: self._layout.rank] if len(rows)]
        first = before[-1] if before else hidden.new_zeros(1, self._hidden_size)
        previous = torch.cat([first, hidden])[: len(hidden)]
        starts = step.query_start[:-1].astype(np.int64)
        mine = np.flatnonzero((starts >= own.start) & (starts < own.stop))
        previous[torch.from_numpy(starts[mine] - own.start)] = 0
        _fill_carried(previous, drafting, starts[mine] - own.start, mine)
        yield from self._module.forward(step, previous)
        ends = step.query_start[1:].astype(np.int64) - 1
        mine = np.flatnonzero((ends >= own.start) & (ends < own.stop))
        return DraftOutput(
            draft_ids=np.zeros(0, np.int32),
            token_ids=np.zeros(0, np.int64),
            hidden_ids=mine.astype(np.int32),
            hidden=hidden[torch.from_numpy(ends[mine] - own.start)].numpy(),
        )


def module_rows(step: StepInput, token_ids: Ints) -> ModuleRows:
    """The module's rows after a data-parallel step whose samples are `token_ids` (S,).

    Rows of a request, by position:  [ known tokens of the step | newest token | and one more, if accepted )
    The module begins at the first of them if the request is behind, otherwise at the second.
    """
    drafting = _drafting(step)
    starts, ends = step.query_start[:-1].astype(np.int64), step.query_start[1:].astype(np.int64)
    num_drafts = drafting.num_drafts.astype(np.int64)
    num_known = ends - starts - num_drafts
    newest, after_newest, accepted = _new_tokens(step, token_ids)
    num_accepted_rows = num_known + accepted  # of the main model; their successors are known tokens
    first = np.where(drafting.is_behind, 0, 1)
    stop = num_accepted_rows + drafting.makes_draft
    counts = np.maximum(stop - first, 0)
    owners = np.repeat(np.arange(step.num_seqs), counts)
    bounds = np.concatenate([[0], np.cumsum(counts)])
    row = np.arange(bounds[-1]) - bounds[:-1][owners] + first[owners]  # counted from the request's first row
    inputs = np.concatenate([step.token_ids, [0]])  # one more, so that every index below is one
    known = inputs[np.minimum(starts[owners] + row, step.num_tokens)]
    past = row - num_known[owners]
    tokens = np.where(past < 0, known, np.where(past == 0, newest[owners], after_newest[owners]))
    positions = step.positions[starts]
    used = np.flatnonzero(counts)
    makes = np.flatnonzero(drafting.makes_draft)
    draft_positions = (positions + stop)[makes]
    without = np.flatnonzero(~drafting.makes_draft)
    return ModuleRows(
        step=StepInput(
            token_ids=tokens,
            positions=positions[owners] + row,
            query_start=np.concatenate([[0], np.cumsum(counts[used])]),
            seq_lens=(positions + stop)[used],
            block_tables=step.block_tables[used],
            sample_rows=bounds[1:][makes] - 1,
            sampling=_draft_sampling(step, makes, draft_positions),
        ),
        previous_rows=np.where(row > 0, starts[owners] + row - 1, -1),
        owners=owners,
        draft_ids=makes,
        hidden_ids=without,
        hidden_rows=(starts + num_accepted_rows - 1)[without],
    )


def _new_tokens(step: StepInput, token_ids: Ints) -> tuple[Ints, Ints, Ints]:
    """Per request (R,): the token after its known ones, the one after its draft, and whether the draft is accepted."""
    num_drafts = _drafting(step).num_drafts
    index, samples = _first_samples(step)
    newest, after_newest, accepted = (np.zeros(step.num_seqs, np.int64) for _ in range(3))
    newest[samples] = token_ids[index[samples]]
    drafted = np.flatnonzero(num_drafts)
    drafts = step.token_ids[step.query_start[1:][drafted] - 1]
    after_newest[drafted] = token_ids[index[drafted] + 1]
    accepted[drafted] = newest[drafted] == drafts
    return newest, after_newest, accepted


def _first_samples(step: StepInput) -> tuple[Ints, NDArray[np.bool_]]:
    """Per request (R,): index of its first sample, and whether it has one."""
    last_known = step.query_start[1:] - 1 - _drafting(step).num_drafts
    index = np.searchsorted(step.sample_rows, last_known)
    has_sample = np.isin(last_known, step.sample_rows)
    return index, has_sample


def _draft_sampling(step: StepInput, requests: Ints, positions: Ints) -> SamplingBatch:
    """A draft is chosen as the verifier will choose, by the same key: it differs only where the logits do."""
    index, has_sample = _first_samples(step)
    assert has_sample[requests].all(), "a draft is made after a sampled token"
    return dataclasses.replace(
        step.sampling.take(index[requests]),
        position=positions,
        suppress_eos=positions < _drafting(step).eos_position[requests],
        want_logprobs=np.zeros(len(requests), np.bool_),
    )


def _fill_carried(previous: Tensor, drafting: DraftingBatch, rows: Ints, owners: Ints) -> None:
    """Put the carried hidden state of each owner that has one into its row."""
    index = np.searchsorted(drafting.carried_ids, owners)
    for row, owner, i in zip(rows.tolist(), owners.tolist(), index.tolist(), strict=True):
        if i < len(drafting.carried_ids) and drafting.carried_ids[i] == owner:
            previous[row] = torch.from_numpy(np.array(drafting.carried[i]))


def _drafting(step: StepInput) -> DraftingBatch:
    assert step.drafting is not None, "a speculative rank is told what to draft"
    return step.drafting
