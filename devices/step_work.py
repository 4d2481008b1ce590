"""What one engine step has to do on each rank, and what it costs.

Owns: the two values that pass between an engine and the time model.
Must not know: operators, seconds, requests.
"""

from collections.abc import ItemsView, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

FIELDS = ("num_tokens", "num_context_tokens", "num_kv_tokens", "num_seqs", "num_samples")  # of StepWork


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
        columns = (self.num_tokens, self.num_context_tokens, self.num_kv_tokens, self.num_seqs, self.num_samples)
        signs = np.zeros(shape, dtype=np.int64)
        for name, values in zip(FIELDS, columns, strict=True):
            if values.shape != shape or values.dtype != np.int64 or not shape[0]:
                raise ValueError(f"StepWork.{name}: needs int64 of shape {shape}, got {values.dtype} {values.shape}")
            signs = signs | values
        if signs.min() < 0:  # one look for all of them
            name, least = next((n, v.min()) for n, v in zip(FIELDS, columns, strict=True) if v.min() < 0)
            raise ValueError(f"StepWork.{name}: {least} is negative")

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


class Breakdown(Mapping[str, int]):
    """Operators to integer nanoseconds that add up to the step, rounded when first read: most steps are never asked.

    The longest operator takes what rounding the others down leaves.
    """

    __slots__ = ("_parts_ns", "_total_ns", "seconds")

    def __init__(self, seconds: Mapping[str, float], total_ns: int) -> None:
        """`seconds` add up to `total_ns` but for rounding; an operator without any has no entry."""
        self.seconds, self._total_ns = seconds, total_ns
        self._parts_ns: dict[str, int] | None = None

    def _rounded(self) -> dict[str, int]:
        if self._parts_ns is None:
            parts_ns = {name: int(seconds * 1e9) for name, seconds in self.seconds.items() if seconds > 0}
            if parts_ns:
                parts_ns[max(parts_ns, key=parts_ns.__getitem__)] += self._total_ns - sum(parts_ns.values())
            self._parts_ns = parts_ns
        return self._parts_ns

    def __getitem__(self, name: str) -> int:
        return self._rounded()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rounded())

    def __len__(self) -> int:
        return len(self._rounded())

    def items(self) -> ItemsView[str, int]:
        """As of any mapping, at the speed of a dictionary."""
        return self._rounded().items()

    def __repr__(self) -> str:
        return repr(self._rounded())


@dataclass(slots=True, kw_only=True)  # not frozen: there is one for every step, and checked assignment doubles its cost
class StepTime:
    """Time of one step. `breakdown` holds the exposed time of each operator and adds up to `ns` exactly.

    Work that is hidden behind other work has no entry, or a small one.
    """

    ns: int
    breakdown: Mapping[str, int]

    @classmethod
    def of_seconds(cls, parts: Mapping[str, float]) -> "StepTime":
        """Operators to seconds: the total is rounded once."""
        ns = round(sum(parts.values()) * 1e9)
        return cls(ns=ns, breakdown=Breakdown(parts, ns))


class BreakdownSum:
    """The breakdowns of many steps, added up; rounded once, when they are all there."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._total_ns = 0

    def add(self, time: StepTime) -> None:
        """One more step."""
        self._total_ns += time.ns
        breakdown, sums = time.breakdown, self._seconds
        if isinstance(breakdown, Breakdown):
            for name, seconds in breakdown.seconds.items():
                sums[name] = sums.get(name, 0.0) + seconds
        else:
            for name, part_ns in breakdown.items():
                sums[name] = sums.get(name, 0.0) + part_ns * 1e-9

    @property
    def total(self) -> Mapping[str, int]:
        """Operators to integer nanoseconds that add up to those of all steps."""
        return dict(Breakdown(self._seconds, self._total_ns))


def _split(total: int, num_parts: int) -> IntArray:
    parts = np.full(num_parts, total // num_parts, dtype=np.int64)
    parts[: total % num_parts] += 1
    return parts
