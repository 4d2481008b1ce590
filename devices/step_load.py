"""What decides how long a step takes: a few sums and maxima of its work, and the ranks that may be the slowest.

Owns: the reduction of a step's work to that.
Must not know: operators, seconds, requests.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from devices.step_work import IntArray, StepWork

FEW_RANKS = 16  # up to which a loop over ranks costs less than arrays


@dataclass(
    slots=True, kw_only=True
)  # not frozen: there is one for every step, and checking assignments doubles its cost
class StepLoad:
    """What decides a step. `context` and `kv` have an entry for each rank that may be the slowest.

    A rank may be left out if another has at least as much of both. Where all dies share attention's heads
    (StepTimeModel.is_split), every rank has the mean over ranks, and that is the only entry.
    """

    num_ranks: int
    max_tokens: int  # of one rank; `total_` over all ranks; query tokens
    total_tokens: int
    max_samples: int
    total_samples: int
    max_seqs: int
    context: Sequence[float]  # sum over a rank's query tokens of the tokens that each attends to
    kv: Sequence[float]  # sum over a rank's requests of their context length after the step

    @classmethod
    def of(cls, work: StepWork, *, is_split: bool) -> "StepLoad":
        """The load of `work`."""
        num_ranks = work.num_ranks
        context: Sequence[float]
        kv: Sequence[float]
        if is_split:
            context = [int(np.add.reduce(work.num_context_tokens)) / num_ranks]
            kv = [int(np.add.reduce(work.num_kv_tokens)) / num_ranks]
        else:
            context, kv = slowest_ranks(work.num_context_tokens, work.num_kv_tokens)
        counts = np.array((work.num_tokens, work.num_samples, work.num_seqs))  # together: two calls in place of five
        max_tokens, max_samples, max_seqs = np.maximum.reduce(counts, axis=1).tolist()
        total_tokens, total_samples, _ = np.add.reduce(counts, axis=1).tolist()
        return cls(
            num_ranks=num_ranks,
            max_tokens=max_tokens,
            total_tokens=total_tokens,
            max_samples=max_samples,
            total_samples=total_samples,
            max_seqs=max_seqs,
            context=context,
            kv=kv,
        )

    @classmethod
    def of_sequence(
        cls,
        num_ranks: int,
        *,
        num_tokens: int,
        num_context_tokens: int,
        num_kv_tokens: int,
        num_seqs: int,
        num_samples: int,
        is_split: bool,
    ) -> "StepLoad":
        """The load of `StepWork.split_sequence` of the same arguments, without making it."""
        context, kv = num_context_tokens / num_ranks, num_kv_tokens / num_ranks
        return cls(
            num_ranks=num_ranks,
            max_tokens=-(-num_tokens // num_ranks),
            total_tokens=num_tokens,
            max_samples=-(-num_samples // num_ranks),
            total_samples=num_samples,
            max_seqs=-(-num_seqs // num_ranks),
            context=[context if is_split else -(-num_context_tokens // num_ranks)],
            kv=[kv if is_split else -(-num_kv_tokens // num_ranks)],
        )

    @property
    def mean_tokens(self) -> float:
        """Query tokens of a rank, the mean of all ranks."""
        return self.total_tokens / self.num_ranks


def slowest_ranks(context: IntArray, kv: IntArray) -> tuple[list[int], list[int]]:
    """Context and KV, shape (R,) each, of the ranks that no other exceeds in one and equals or exceeds in the other.

    In order of falling context; of equal ranks one.
    """
    if len(context) > FEW_RANKS:
        # A rank with much of both leaves few above it in either; whichever it is, the result is the same.
        top = int((context * kv).argmax())
        top_context, top_kv = context[top], kv[top]
        above = ((context > top_context) | (kv > top_kv)).nonzero()[0]
        pairs = [(int(top_context), int(top_kv))]
        if above.size:
            pairs += zip(context[above].tolist(), kv[above].tolist(), strict=True)
    else:
        pairs = list(zip(context.tolist(), kv.tolist(), strict=True))
    if len(pairs) == 1:
        return [pairs[0][0]], [pairs[0][1]]
    pairs.sort(reverse=True)
    contexts, kvs, most_kv = [], [], -1
    for rank_context, rank_kv in pairs:
        if rank_kv > most_kv:
            contexts.append(rank_context)
            kvs.append(rank_kv)
            most_kv = rank_kv
    return contexts, kvs
