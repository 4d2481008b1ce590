"""Workloads: what is asked of the system, by whom it is not known.

Owns: `Workload` (requests in arrival order, with a digest of all that matters), and how the tokens of a prompt and
the names of its blocks follow from its content.
Must not know: HTTP, clocks, models, trace files (serving/workloads/traces.py), how requests are sent.

Equal pieces give equal tokens, hence equal block hashes, in every process and on every run.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from serving.core.splitmix64 import mix64
from serving.errors import ConfigError
from serving.workloads.arrivals import Arrivals, generator_for
from serving.workloads.block_names import block_names
from serving.workloads.requests import Ints, RequestTable, WorkloadRequest

# Safe for any vocabulary of at least 256 tokens whose special tokens are first or last.
DEFAULT_VOCABULARY = range(16, 256)

_WINDOW = 256  # requests whose blocks are named in one pass: enough to make a pass cheap, few enough to stay in cache


@dataclass(frozen=True, slots=True)
class _NamedBlocks:
    """Names of the blocks of some requests in a row."""

    requests: range
    block_size: int
    names: list[int]
    offsets: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Requests in arrival order, and what turns their content into tokens.

    `requests` may be given as any sequence; it is kept as columns. `vocabulary` is the range that token ids are drawn
    from; it should leave out special tokens.
    """

    name: str
    requests: Sequence[WorkloadRequest]
    seed: int = 0
    vocabulary: range = DEFAULT_VOCABULARY
    hash_block_size: int | None = None
    _named: list[_NamedBlocks] = field(init=False, repr=False, compare=False, default_factory=list)  # the last pass

    def __post_init__(self) -> None:
        if not self.vocabulary or self.vocabulary.step != 1 or self.vocabulary.start < 0:
            raise ConfigError(f"vocabulary: {self.vocabulary} is not a range of token ids with step 1")
        if not isinstance(self.requests, RequestTable):
            table = RequestTable.of(self.requests, hash_block_size=self.hash_block_size)
            object.__setattr__(self, "requests", table)

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def columns(self) -> RequestTable:
        """The requests as columns."""
        assert isinstance(self.requests, RequestTable)
        return self.requests

    @property
    def request_ids(self) -> Sequence[str]:
        """Shape (N,)."""
        return self.columns.request_ids

    @property
    def arrival_ns(self) -> Ints | None:
        """From the start of the workload, not decreasing, shape (N,); None: a closed loop."""
        return self.columns.arrival_ns

    @property
    def num_prompt_tokens(self) -> Ints:
        """Shape (N,)."""
        return self.columns.num_prompt_tokens

    @property
    def max_tokens(self) -> Ints:
        """Output tokens, shape (N,)."""
        return self.columns.max_tokens

    @property
    def priority(self) -> Ints:
        """Lower is sooner, shape (N,)."""
        return self.columns.priority

    @property
    def has_arrivals(self) -> bool:
        """Whether the requests say when they arrive; otherwise the sender decides."""
        return len(self) > 0 and self.arrival_ns is not None

    @property
    def digest(self) -> str:
        """Hexadecimal digest of all that decides what is sent and when; the name is not part of it."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(repr((self.seed, self.vocabulary, self.hash_block_size)).encode())
        digest.update(self.columns.digest())
        return digest.hexdigest()

    def block_hashes(self, index: int, block_size: int) -> list[int]:
        """Names of the full blocks of request `index`'s prompt, in order, each in [0, 2**63).

        Prompts of this workload with the same content up to a block's end have the same name for it, others another.
        Fastest where requests are asked for in order. Raises IndexError, and ConfigError if block_size is not positive.
        """
        named = self._named[0] if self._named else None
        if named is None or index not in named.requests or named.block_size != block_size:
            named = self._name_blocks(index, block_size)
        row = index - named.requests.start
        return named.names[named.offsets[row] : named.offsets[row + 1]]

    def prompt_token_ids(self, request: WorkloadRequest) -> NDArray[np.int64]:
        """Token ids of the request's prompt, shape (num_prompt_tokens,); the same on every call."""
        if request.prompt_token_ids is not None:
            return np.array(request.prompt_token_ids, dtype=np.int64)
        if request.hash_ids is not None:
            assert self.hash_block_size is not None
            streams = np.repeat(np.array(request.hash_ids, dtype=np.int64), self.hash_block_size)
            positions = np.tile(np.arange(self.hash_block_size), len(request.hash_ids))
            end = request.num_prompt_tokens
            return self._token_ids(streams[:end], positions[:end])
        assert request.pieces is not None
        streams = np.concatenate([np.full(p.num_tokens, p.stream) for p in request.pieces])
        positions = np.concatenate([np.arange(p.num_tokens) for p in request.pieces])
        return self._token_ids(streams, positions)

    def with_arrivals(self, arrivals: Arrivals | None, *, seed: int | None = None) -> "Workload":
        """The same requests arriving by `arrivals`; None makes it a closed loop."""
        if arrivals is None:
            return self.with_arrival_ns(None)
        rng = generator_for(self.seed if seed is None else seed, "arrivals")
        return self.with_arrival_ns(to_ns(arrivals.times_s(rng, len(self))))

    def with_arrival_ns(self, arrival_ns: Ints | None) -> "Workload":
        """The same requests at other instants, shape (N,), which must not decrease; None makes it a closed loop."""
        return dataclasses.replace(self, requests=dataclasses.replace(self.columns, arrival_ns=arrival_ns))

    def with_rate_factor(self, factor: float) -> "Workload":
        """The same requests arriving `factor` times as fast."""
        if not (np.isfinite(factor) and factor > 0):
            raise ConfigError(f"rate factor: {factor} must be finite and above the limit 0")
        return self.with_arrival_ns(to_ns(self._arrivals() / (1e9 * factor)))

    def limited(self, *, num_requests: int | None = None, duration_s: float | None = None) -> "Workload":
        """The first `num_requests` of the requests that arrive before `duration_s`."""
        count = len(self)
        if duration_s is not None:
            if not duration_s > 0:
                raise ConfigError(f"duration_s: {duration_s} must be above the limit 0")
            count = int(np.searchsorted(self._arrivals(), duration_s * 1e9))
        if num_requests is not None:
            if num_requests < 1:
                raise ConfigError(f"num_requests: {num_requests} is below the limit 1")
            count = min(count, num_requests)
        return dataclasses.replace(self, requests=self.columns.head(count))

    def _arrivals(self) -> Ints:
        if self.arrival_ns is None:
            raise ConfigError(f"workload {self.name}: a closed loop has no arrival times")
        return self.arrival_ns

    def _name_blocks(self, index: int, block_size: int) -> _NamedBlocks:
        if block_size < 1:
            raise ConfigError(f"block_size: {block_size} is below the limit 1")
        if not 0 <= index < len(self):
            raise IndexError(f"request {index} of {len(self)}")
        start = index - index % _WINDOW
        requests = range(start, min(start + _WINDOW, len(self)))
        names, offsets = block_names(self.columns, requests, block_size)
        named = _NamedBlocks(requests, block_size, names.tolist(), offsets.tolist())
        self._named[:] = [named]
        return named

    def _token_ids(self, streams: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.int64]:
        # Counter-based, so any piece of any stream is one vectorized pass and needs no state.
        key = generator_for(self.seed, "tokens").integers(2**64, size=1, dtype=np.uint64)
        mixed = mix64(mix64(streams.astype(np.uint64) ^ key) + positions.astype(np.uint64))
        drawn = mixed % np.uint64(len(self.vocabulary))
        return self.vocabulary.start + drawn.astype(np.int64)


def to_ns(times_s: NDArray[np.float64]) -> Ints:
    """Seconds as integer nanoseconds."""
    return np.rint(times_s * 1e9).astype(np.int64)
