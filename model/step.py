"""What one engine step asks of one rank, and what the rank answers.

Owns: the layout of a step's arrays. Plain numpy, so that a step crosses a process border without torch.
Must not know: tensors, weights, requests' identity, scheduling.
Source: the flat batch of vLLM's model runner (query_start, seq_lens, block_tables).

    requests      r0        r1    r2
    token_ids   [ a b c d | e   | f g ]        T = 7 rows; r0 is a prefill chunk, r1 decodes
    query_start [ 0         4     5     7 ]    rows of request r are [query_start[r], query_start[r + 1])
    seq_lens    [ 10        33    2 ]          context after the step; rows' positions end at seq_lens[r] - 1
    sample_rows [ 4 6 ]                        S = 2 rows whose next token is wanted (r0 is not finished)
"""

# Shapes: T tokens of the step, R requests, S sampled rows, M blocks in the longest block table

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SamplingBatch:
    """How to choose the next token of each of S rows. All arrays have shape (S,)."""

    temperature: NDArray[np.float32]  # 0 = greedy, lowest id on ties
    top_p: NDArray[np.float32]  # in (0, 1]; 1 = off
    top_k: NDArray[np.int32]  # 0 = off
    seed: NDArray[np.uint64]
    position: NDArray[np.int64]  # position in the sequence that the new token will take
    suppress_eos: NDArray[np.bool_]  # min_tokens is not reached yet
    want_logprobs: NDArray[np.bool_]
    num_logprobs: NDArray[np.int32]  # most likely alternatives to report beside the chosen token

    def __post_init__(self) -> None:
        _set_dtypes(self, _SAMPLING_DTYPES)
        sizes = {f.name: getattr(self, f.name).shape for f in fields(self)}
        assert set(sizes.values()) == {(len(self.temperature),)}, f"sampling shapes differ: {sizes}"

    def __len__(self) -> int:
        return len(self.temperature)

    @classmethod
    def greedy(cls, position: NDArray[np.int64], *, suppress_eos: bool = False) -> "SamplingBatch":
        """Greedy sampling without logprobs for rows whose new tokens take the given positions."""
        size = len(position)
        return cls(
            temperature=np.zeros(size, np.float32),
            top_p=np.ones(size, np.float32),
            top_k=np.zeros(size, np.int32),
            seed=np.zeros(size, np.uint64),
            position=position,
            suppress_eos=np.full(size, suppress_eos),
            want_logprobs=np.zeros(size, np.bool_),
            num_logprobs=np.zeros(size, np.int32),
        )

    def take(self, rows: NDArray[np.intp]) -> "SamplingBatch":
        """The entries `rows`, in that order."""
        return SamplingBatch(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DraftingBatch:
    """What the MTP module has to do beside a step (see model/speculation.py). Arrays per request have shape (R,).

    A request's row is verified if it is a draft: then it is its last row, and it and the row before it are sampled.
    """

    num_drafts: NDArray[np.int32]  # (R,) 0 or 1 of the request's rows, the last, is a draft
    is_behind: NDArray[np.bool_]  # (R,) the module has not seen the first row's token: no draft was made after it
    makes_draft: NDArray[np.bool_]  # (R,) make the next draft: the newest token's slot is there
    eos_position: NDArray[np.int64]  # (R,) EOS is suppressed at positions below (min_tokens)
    carried_ids: NDArray[np.int32]  # (c,) requests, ascending, whose hidden state before the first row is known
    carried: NDArray[np.float32]  # (c, H)

    def __post_init__(self) -> None:
        _set_dtypes(self, _DRAFTING_DTYPES)
        shapes = {array.shape for array in (self.num_drafts, self.is_behind, self.makes_draft, self.eos_position)}
        assert len(shapes) == 1, f"drafting shapes differ: {shapes}"
        assert len(self.carried) == len(self.carried_ids), "one hidden state per carried request"

    @classmethod
    def idle(cls, hidden_size: int) -> "DraftingBatch":
        """Of a rank that has nothing to do."""
        none = np.zeros(0, np.int32)
        return cls(
            num_drafts=none,
            is_behind=none.astype(np.bool_),
            makes_draft=none.astype(np.bool_),
            eos_position=none.astype(np.int64),
            carried_ids=none,
            carried=np.zeros((0, hidden_size), np.float32),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepInput:
    """One step of one rank. An idle rank has T = R = S = 0 and still takes part in every collective."""

    token_ids: NDArray[np.int64]  # (T,)
    positions: NDArray[np.int64]  # (T,)
    query_start: NDArray[np.int32]  # (R + 1,)
    seq_lens: NDArray[np.int32]  # (R,) tokens in context after this step
    block_tables: NDArray[np.int32]  # (R, M); entries past a request's context are not read
    sample_rows: NDArray[np.int32]  # (S,) rows of T, ascending
    sampling: SamplingBatch
    drafting: DraftingBatch | None = None  # None: without the MTP module

    def __post_init__(self) -> None:
        _set_dtypes(self, _STEP_DTYPES)
        num_seqs, num_tokens = len(self.seq_lens), len(self.token_ids)
        assert self.positions.shape == self.token_ids.shape == (num_tokens,), "positions differ from token_ids"
        assert self.query_start.shape == (num_seqs + 1,), "query_start must have R + 1 entries"
        assert self.query_start[0] == 0, "query_start must begin at row 0"
        assert self.query_start[-1] == num_tokens, "query_start must end behind the last row"
        assert bool((np.diff(self.query_start) > 0).all()), "every request needs at least one row"
        assert self.block_tables.ndim == 2, "block_tables must be (R, M)"
        assert len(self.block_tables) == num_seqs, "block_tables must have R rows"
        assert self.sample_rows.shape == (len(self.sampling),), "one sampling entry per sample row"
        assert bool((np.diff(self.sample_rows) > 0).all()), "sample_rows must ascend"
        is_row = (self.sample_rows >= 0) & (self.sample_rows < num_tokens)
        assert bool(is_row.all()), "sample_rows must be rows of the step"
        assert self.drafting is None or len(self.drafting.num_drafts) == num_seqs, "drafting must have R entries"
        if num_seqs:
            last_positions = self.positions[self.query_start[1:] - 1]
            assert bool((last_positions == self.seq_lens - 1).all()), "a request's rows must end its context"

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_seqs(self) -> int:
        return len(self.seq_lens)

    @property
    def num_samples(self) -> int:
        return len(self.sample_rows)

    @classmethod
    def idle(cls, drafting: DraftingBatch | None = None) -> "StepInput":
        """The step of a rank that has nothing to do."""
        none = np.zeros(0, np.int64)
        return cls(
            token_ids=none,
            positions=none,
            query_start=np.zeros(1, np.int32),
            seq_lens=np.zeros(0, np.int32),
            block_tables=np.zeros((0, 0), np.int32),
            sample_rows=np.zeros(0, np.int32),
            sampling=SamplingBatch.greedy(none),
            drafting=drafting,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """Log-probabilities under the raw model distribution: before temperature, filters and EOS suppression."""

    logprob: float  # of the chosen token
    top: tuple[tuple[int, float], ...]  # (token id, logprob), most likely first, lowest id on ties


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DraftOutput:
    """What the MTP module gives: drafts, and where it made none the hidden state that it needs to go on."""

    draft_ids: NDArray[np.int32]  # (d,) requests of the step
    token_ids: NDArray[np.int64]  # (d,) guesses of the tokens after the newest ones
    hidden_ids: NDArray[np.int32]  # (h,) requests of the step
    hidden: NDArray[np.float32]  # (h, H) final-normed hidden states of their last accepted rows


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepOutput:
    """What one rank sampled. With sequence_tensor attention a rank answers only for the samples in its slice."""

    sample_ids: NDArray[np.int32]  # (s,) index into the S samples of the StepInput
    token_ids: NDArray[np.int64]  # (s,)
    logprobs: tuple[TokenLogprobs | None, ...]  # None where they were not wanted
    expert_counts: NDArray[np.int64]  # (num_moe_layers, n_routed_experts): choices of this rank's tokens
    drafts: DraftOutput | None = None  # None: without the MTP module


_SAMPLING_DTYPES: dict[str, type[np.generic]] = {
    "temperature": np.float32,
    "top_p": np.float32,
    "top_k": np.int32,
    "seed": np.uint64,
    "position": np.int64,
    "suppress_eos": np.bool_,
    "want_logprobs": np.bool_,
    "num_logprobs": np.int32,
}
_DRAFTING_DTYPES: dict[str, type[np.generic]] = {
    "num_drafts": np.int32,
    "is_behind": np.bool_,
    "makes_draft": np.bool_,
    "eos_position": np.int64,
    "carried_ids": np.int32,
    "carried": np.float32,
}
_STEP_DTYPES: dict[str, type[np.generic]] = {
    "token_ids": np.int64,
    "positions": np.int64,
    "query_start": np.int32,
    "seq_lens": np.int32,
    "block_tables": np.int32,
    "sample_rows": np.int32,
}


def _set_dtypes(batch: object, dtypes: dict[str, type[np.generic]]) -> None:
    """Bring the arrays of a frozen batch to their declared dtype while it is being made (no copy if it has it)."""
    for name, dtype in dtypes.items():
        object.__setattr__(batch, name, np.asarray(getattr(batch, name), dtype))
