"""What one engine step has to do on each rank, and what it costs.

Owns: the two values that pass between an engine and the time model.
Must not know: operators, seconds, requests.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepWork:
    """Work of one step, one entry per rank of the instance; an idle rank has zeros.

    Decode and colocated instances are data-parallel: an entry counts the requests of that rank. A prefill instance
    splits one packed batch: an entry counts that rank's slice of the sequence (see `split_sequence`).
    """

    num_tokens: IntArray  # (R,) query tokens
    num_context_tokens: IntArray  # (R,) sum over query tokens of the tokens that each attends to, itself included
    num_kv_tokens: IntArray  # (R,) sum over requests of their context length after this step
    num_seqs: IntArray  # (R,) requests
    num_samples: IntArray  # (R,) rows whose next token is wanted

    def __post_init__(self) -> None:
        shape = (self.num_tokens.size,)
        for field in fields(self):
            values = getattr(self, field.name)
            if values.shape != shape or values.dtype != np.int64 or not shape[0]:
                raise ValueError(
                    f"StepWork.{field.name}: needs int64 of shape {shape}, got {values.dtype} {values.shape}"
                )
            if values.min() < 0:
                raise ValueError(f"StepWork.{field.name}: {values.min()} is negative")

    @property
    def num_ranks(self) -> int:
        return self.num_tokens.size

    @classmethod
    def of_ranks(
        cls,
        *,
        num_tokens: Sequence[int],
        num_context_tokens: Sequence[int],
        num_kv_tokens: Sequence[int],
        num_seqs: Sequence[int],
        num_samples: Sequence[int],
    ) -> "StepWork":
        """One number per rank."""
        return cls(
            num_tokens=np.array(num_tokens, dtype=np.int64),
            num_context_tokens=np.array(num_context_tokens, dtype=np.int64),
            num_kv_tokens=np.array(num_kv_tokens, dtype=np.int64),
            num_seqs=np.array(num_seqs, dtype=np.int64),
            num_samples=np.array(num_samples, dtype=np.int64),
        )

    @classmethod
    def uniform(
        cls,
        num_ranks: int,
        *,
        num_tokens: int,
        num_context_tokens: int,
        num_kv_tokens: int,
        num_seqs: int,
        num_samples: int,
    ) -> "StepWork":
        """The same work on every rank."""
        return cls(
            num_tokens=np.full(num_ranks, num_tokens, dtype=np.int64),
            num_context_tokens=np.full(num_ranks, num_context_tokens, dtype=np.int64),
            num_kv_tokens=np.full(num_ranks, num_kv_tokens, dtype=np.int64),
            num_seqs=np.full(num_ranks, num_seqs, dtype=np.int64),
            num_samples=np.full(num_ranks, num_samples, dtype=np.int64),
        )

    @classmethod
    def split_sequence(
        cls,
        num_ranks: int,
        *,
        num_tokens: int,
        num_context_tokens: int,
        num_kv_tokens: int,
        num_seqs: int,
        num_samples: int,
    ) -> "StepWork":
        """One packed batch, given by its totals, cut into `num_ranks` slices that differ by one at most."""
        return cls(
            num_tokens=_split(num_tokens, num_ranks),
            num_context_tokens=_split(num_context_tokens, num_ranks),
            num_kv_tokens=_split(num_kv_tokens, num_ranks),
            num_seqs=_split(num_seqs, num_ranks),
            num_samples=_split(num_samples, num_ranks),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Time of one step. `breakdown` holds the exposed time of each operator and adds up to `ns` exactly.

    Work that is hidden behind other work has no entry, or a small one.
    """

    ns: int
    breakdown: Mapping[str, int]


def _split(total: int, num_parts: int) -> IntArray:
    parts = np.full(num_parts, total // num_parts, dtype=np.int64)
    parts[: total % num_parts] += 1
    return parts
