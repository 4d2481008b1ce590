"""Workloads: what is asked of the system, by whom it is not known.

Owns: `WorkloadRequest` and `Workload` (requests in arrival order, with a digest of all that matters), the
synthetic workload, and how the tokens of a prompt follow from its content.
Must not know: HTTP, clocks, models, trace files (serving/workloads/traces.py), how requests are sent.
Source: `vllm bench serve` random and prefix_repetition data sets for the synthetic parameters; Mooncake's
traces for content given as hash ids.

A prompt is described by its content, not by its tokens, so that a million long prompts fit in memory. Content
is a sequence of pieces (stream, number of tokens): the first n tokens of a stream. Equal pieces give equal
tokens, hence equal block hashes, in every process and on every run.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from serving.errors import ConfigError
from serving.workloads.arrivals import Arrivals, generator_for

# Safe for any vocabulary of at least 256 tokens whose special tokens are first or last.
DEFAULT_VOCABULARY = range(16, 256)


class Piece(NamedTuple):
    """The first `num_tokens` tokens of an endless stream of tokens."""

    stream: int
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadRequest:
    """One request. Its prompt is exactly one of `prompt_token_ids`, `pieces`, `hash_ids`.

    `arrival_ns` counts from the start of the workload; None where completions drive arrivals (closed loop).
    `hash_ids[i]` names the prompt's i-th block of `Workload.hash_block_size` tokens and all that precedes it.
    A lower `priority` runs earlier. `seed` None leaves sampling to the server.
    """

    request_id: str
    num_prompt_tokens: int
    max_tokens: int
    arrival_ns: int | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    pieces: tuple[Piece, ...] | None = None
    hash_ids: tuple[int, ...] | None = None
    priority: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.num_prompt_tokens < 1:
            raise self._error("num_prompt_tokens", self.num_prompt_tokens, "is below the limit 1")
        if self.max_tokens < 1:
            raise self._error("max_tokens", self.max_tokens, "is below the limit 1")
        if self.arrival_ns is not None and self.arrival_ns < 0:
            raise self._error("arrival_ns", self.arrival_ns, "is below the limit 0")
        if (self.prompt_token_ids is None) + (self.pieces is None) + (self.hash_ids is None) != 2:
            raise self._error("prompt", None, "needs exactly one of prompt_token_ids, pieces, hash_ids")
        if self.prompt_token_ids is not None and len(self.prompt_token_ids) != self.num_prompt_tokens:
            raise self._error("num_prompt_tokens", self.num_prompt_tokens, "is not len(prompt_token_ids)")
        if self.pieces is not None and sum(p.num_tokens for p in self.pieces) != self.num_prompt_tokens:
            raise self._error("num_prompt_tokens", self.num_prompt_tokens, "is not the sum of its pieces")

    def _error(self, field: str, value: object, problem: str) -> ConfigError:
        return ConfigError(f"request {self.request_id}: {field}: {value} {problem}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Requests in arrival order, and what turns their content into tokens.

    `vocabulary` is the range that token ids are drawn from; it should leave out special tokens.
    """

    name: str
    requests: tuple[WorkloadRequest, ...]
    seed: int = 0
    vocabulary: range = DEFAULT_VOCABULARY
    hash_block_size: int | None = None

    def __post_init__(self) -> None:
        if not self.vocabulary or self.vocabulary.step != 1 or self.vocabulary.start < 0:
            raise ConfigError(f"vocabulary: {self.vocabulary} is not a range of token ids with step 1")
        if len({request.request_id for request in self.requests}) != len(self.requests):
            raise ConfigError(f"workload {self.name}: request ids are not unique")
        arrivals = [r.arrival_ns for r in self.requests if r.arrival_ns is not None]
        if arrivals and len(arrivals) != len(self.requests):
            raise ConfigError(f"workload {self.name}: arrival_ns is set for some requests and not for others")
        if any(later < earlier for earlier, later in itertools.pairwise(arrivals)):
            raise ConfigError(f"workload {self.name}: requests are not in arrival order")
        for request in self.requests:
            if request.hash_ids is not None:
                self._check_hash_ids(request.request_id, request.num_prompt_tokens, len(request.hash_ids))

    def _check_hash_ids(self, request_id: str, num_prompt_tokens: int, num_hash_ids: int) -> None:
        if self.hash_block_size is None or self.hash_block_size < 1:
            raise ConfigError(f"hash_block_size: {self.hash_block_size} is below the limit 1")
        if num_hash_ids != -(-num_prompt_tokens // self.hash_block_size):
            raise ConfigError(
                f"request {request_id}: {num_hash_ids} hash_ids do not fit {num_prompt_tokens} prompt tokens "
                f"in blocks of {self.hash_block_size}"
            )

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def has_arrivals(self) -> bool:
        """Whether the requests say when they arrive; otherwise the sender decides."""
        return bool(self.requests) and self.requests[0].arrival_ns is not None

    @property
    def digest(self) -> str:
        """Hexadecimal digest of all that decides what is sent and when; the name is not part of it."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(repr((self.seed, self.vocabulary, self.hash_block_size)).encode())
        for r in self.requests:
            content = (r.prompt_token_ids, r.pieces, r.hash_ids)
            identity = (r.request_id, r.num_prompt_tokens, r.max_tokens, r.arrival_ns, r.priority, r.seed)
            digest.update(repr((identity, content)).encode())
        return digest.hexdigest()

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
            return self._with_arrival_ns([None] * len(self))
        rng = generator_for(self.seed if seed is None else seed, "arrivals")
        return self._with_arrival_ns(to_ns(arrivals.times_s(rng, len(self))))

    def with_rate_factor(self, factor: float) -> "Workload":
        """The same requests arriving `factor` times as fast."""
        if not (np.isfinite(factor) and factor > 0):
            raise ConfigError(f"rate factor: {factor} must be finite and above the limit 0")
        times = [self._arrival_ns(request) for request in self.requests]
        return self._with_arrival_ns(to_ns(np.array(times, dtype=np.float64) / (1e9 * factor)))

    def limited(self, *, num_requests: int | None = None, duration_s: float | None = None) -> "Workload":
        """The first `num_requests` of the requests that arrive before `duration_s`."""
        requests = self.requests
        if duration_s is not None:
            if not duration_s > 0:
                raise ConfigError(f"duration_s: {duration_s} must be above the limit 0")
            requests = tuple(r for r in requests if self._arrival_ns(r) < duration_s * 1e9)
        if num_requests is not None:
            if num_requests < 1:
                raise ConfigError(f"num_requests: {num_requests} is below the limit 1")
            requests = requests[:num_requests]
        return dataclasses.replace(self, requests=requests)

    def _arrival_ns(self, request: WorkloadRequest) -> int:
        if request.arrival_ns is None:
            raise ConfigError(f"workload {self.name}: a closed loop has no arrival times")
        return request.arrival_ns

    def _with_arrival_ns(self, arrival_ns: Sequence[int | None]) -> "Workload":
        pairs = zip(self.requests, arrival_ns, strict=True)
        requests = tuple(dataclasses.replace(request, arrival_ns=when) for request, when in pairs)
        return dataclasses.replace(self, requests=requests)

    def _token_ids(self, streams: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.int64]:
        # Counter-based, so any piece of any stream is one vectorized pass and needs no state.
        key = generator_for(self.seed, "tokens").integers(2**64, size=1, dtype=np.uint64)
        mixed = _mix64(_mix64(streams.astype(np.uint64) ^ key) + positions.astype(np.uint64))
        drawn = mixed % np.uint64(len(self.vocabulary))
        return self.vocabulary.start + drawn.astype(np.int64)


def synthetic_workload(
    *,
    num_requests: int,
    input_len: int,
    output_len: int,
    range_ratio: float = 0.0,
    num_prefixes: int = 0,
    prefix_len: int = 0,
    seed: int = 0,
    arrivals: Arrivals | None = None,
    vocabulary: range = DEFAULT_VOCABULARY,
    name: str = "synthetic",
) -> Workload:
    """Random prompts, each after one of `num_prefixes` shared prefixes of `prefix_len` tokens.

    `input_len` counts the whole prompt, the prefix included. Lengths are uniform in [len * (1 - range_ratio),
    len * (1 + range_ratio)], and a prompt has at least one token of its own. Every prefix is used equally
    often (give or take one), in random order. With `arrivals` None the workload is a closed loop.
    """
    for field, value, least in (
        ("num_requests", num_requests, 1),
        ("input_len", input_len, 1),
        ("output_len", output_len, 1),
        ("num_prefixes", num_prefixes, 0),
        ("prefix_len", prefix_len, 0),
    ):
        if value < least:
            raise ConfigError(f"{field}: {value} is below the limit {least}")
    if not 0.0 <= range_ratio < 1.0:
        raise ConfigError(f"range_ratio: {range_ratio} is not in [0, 1)")
    shared_len = prefix_len if num_prefixes else 0
    if shared_len >= input_len:
        raise ConfigError(f"prefix_len: {prefix_len} must be below input_len {input_len}")
    input_lens = _lengths(generator_for(seed, "input_len"), num_requests, input_len, range_ratio)
    output_lens = _lengths(generator_for(seed, "output_len"), num_requests, output_len, range_ratio)
    seeds = generator_for(seed, "sampling").integers(2**31, size=num_requests)
    prefixes = np.arange(num_requests) % max(num_prefixes, 1)
    generator_for(seed, "prefixes").shuffle(prefixes)
    requests = []
    for i in range(num_requests):
        num_own = max(int(input_lens[i]) - shared_len, 1)
        # Even streams are prefixes and odd ones are requests' own, so neither shifts the other.
        shared = (Piece(2 * int(prefixes[i]), shared_len),) if shared_len else ()
        requests.append(
            WorkloadRequest(
                request_id=f"{name}-{i}",
                num_prompt_tokens=shared_len + num_own,
                max_tokens=int(output_lens[i]),
                pieces=(*shared, Piece(2 * i + 1, num_own)),
                seed=int(seeds[i]),
            )
        )
    workload = Workload(name=name, requests=tuple(requests), seed=seed, vocabulary=vocabulary)
    return workload if arrivals is None else workload.with_arrivals(arrivals)


# Short words that common vocabularies hold as one token when a space precedes them.
_WORDS = tuple(
    word
    for line in (
        "the of and to in is that it for was on are as with his they at be this from have or by one had not",
        "but what all were when we there can an your which their said if do will each about how up out them",
        "then she many some so these would other into has more her two like him see time could no make than",
    )
    for word in line.split()
)


def words_from_token_ids(token_ids: Sequence[int] | NDArray[np.int64]) -> str:
    """A text with one common word per token id, for endpoints that take only text; equal ids, equal words.

    Its length in the endpoint's own tokens is about right, and exact only in what the endpoint reports.
    """
    return " ".join(_WORDS[int(token_id) % len(_WORDS)] for token_id in token_ids)


def to_ns(times_s: NDArray[np.float64]) -> list[int]:
    """Seconds as integer nanoseconds."""
    return [int(when) for when in np.rint(times_s * 1e9).astype(np.int64)]


def _lengths(rng: np.random.Generator, count: int, mean: int, range_ratio: float) -> NDArray[np.int64]:
    low = max(int(np.ceil(mean * (1 - range_ratio))), 1)
    high = max(int(mean * (1 + range_ratio)), low)
    return rng.integers(low, high + 1, size=count)


def _mix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of splitmix64 (Steele, Lea and Flood 2014), element by element, modulo 2**64."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
