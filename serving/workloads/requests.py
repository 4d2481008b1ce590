"""Requests of a workload: one as a value, and a million as columns.

Owns: what a request is and may hold; the columns, their checks, and a view that makes request objects when asked.
Must not know: where requests come from, what tokens their content stands for (workloads/workload.py).

A prompt is described by its content, not by its tokens, so that a million long prompts fit in memory. Content is a
sequence of pieces (stream, number of tokens): the first n tokens of a stream. Hash ids are pieces of one size.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from serving.errors import ConfigError

Ints = NDArray[np.int64]

NO_SEED = int(np.iinfo(np.int64).min)  # in a column: sampling is left to the server
TOKENS, PIECES, HASH_IDS = range(3)  # what describes a prompt


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
            raise _error(self.request_id, "num_prompt_tokens", f"{self.num_prompt_tokens} is below the limit 1")
        if self.max_tokens < 1:
            raise _error(self.request_id, "max_tokens", f"{self.max_tokens} is below the limit 1")
        if self.arrival_ns is not None and self.arrival_ns < 0:
            raise _error(self.request_id, "arrival_ns", f"{self.arrival_ns} is below the limit 0")
        if (self.prompt_token_ids is None) + (self.pieces is None) + (self.hash_ids is None) != 2:
            raise _error(self.request_id, "prompt", "needs exactly one of prompt_token_ids, pieces, hash_ids")
        if self.prompt_token_ids is not None and len(self.prompt_token_ids) != self.num_prompt_tokens:
            raise _error(self.request_id, "num_prompt_tokens", f"{self.num_prompt_tokens} is not len(prompt_token_ids)")
        if self.pieces is not None and sum(p.num_tokens for p in self.pieces) != self.num_prompt_tokens:
            raise _error(self.request_id, "num_prompt_tokens", f"{self.num_prompt_tokens} is not the sum of its pieces")


@dataclass(frozen=True, slots=True)
class NumberedIds(Sequence[str]):
    """Request ids `prefix-number`, made when asked for."""

    prefix: str
    numbers: range

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> "NumberedIds": ...
    def __getitem__(self, index: int | slice) -> "str | NumberedIds":
        if isinstance(index, slice):
            return NumberedIds(self.prefix, self.numbers[index])
        return f"{self.prefix}-{self.numbers[index]}"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RequestTable(Sequence[WorkloadRequest]):
    """Requests in arrival order, one column per field; as a sequence it makes `WorkloadRequest`s and keeps none.

    Request i's content is elements [offsets[i], offsets[i + 1]): of `streams` and `stream_tokens` for pieces and for
    hash ids, whose elements have the workload's `hash_block_size` tokens, the last what is left; a token id is a
    stream of one token. `seeds` is NO_SEED where there is none.
    """

    request_ids: Sequence[str]
    arrival_ns: Ints | None  # (N,); None: a closed loop
    num_prompt_tokens: Ints  # (N,)
    max_tokens: Ints  # (N,)
    priority: Ints  # (N,)
    seeds: Ints  # (N,)
    kinds: NDArray[np.uint8]  # (N,) TOKENS, PIECES or HASH_IDS
    offsets: Ints  # (N + 1,) from 0
    streams: Ints  # (E,)
    stream_tokens: Ints  # (E,)

    def __post_init__(self) -> None:
        columns = (self.num_prompt_tokens, self.max_tokens, self.priority, self.seeds, self.kinds, self.offsets[1:])
        assert all(len(column) == len(self) for column in columns)
        assert self.offsets[0] == 0
        assert self.offsets[-1] == len(self.streams) == len(self.stream_tokens)
        if not isinstance(self.request_ids, NumberedIds) and len(set(self.request_ids)) != len(self):
            raise ConfigError("request ids are not unique")
        self._check("num_prompt_tokens", self.num_prompt_tokens, 1)
        self._check("max_tokens", self.max_tokens, 1)
        if self.arrival_ns is not None:
            self._check("arrival_ns", self.arrival_ns, 0)
            if (index := _first(np.diff(self.arrival_ns) < 0)) is not None:
                problem = f"{self.arrival_ns[index + 1]} is below {self.arrival_ns[index]} of the request before it"
                raise self._error(index + 1, "arrival_ns", f"{problem}; requests are not in arrival order")
        if (element := _first(self.stream_tokens < 1)) is not None:
            index = int(np.searchsorted(self.offsets, element, side="right")) - 1
            raise self._error(index, "pieces", f"{self.stream_tokens[element]} tokens are below the limit 1")
        ends = np.concatenate([[0], np.cumsum(self.stream_tokens)])[self.offsets]
        if (index := _first(np.diff(ends) != self.num_prompt_tokens)) is not None:
            raise self._error(
                index, "num_prompt_tokens", f"{self.num_prompt_tokens[index]} is not the sum of its pieces"
            )

    @classmethod
    def of(cls, requests: Sequence[WorkloadRequest], *, hash_block_size: int | None) -> "RequestTable":
        """Columns of request objects. Raises ConfigError where they contradict each other or `hash_block_size`."""
        contents = [_content(request, hash_block_size) for request in requests]
        timeless = [request.request_id for request in requests if request.arrival_ns is None]
        if timeless and len(timeless) != len(requests):
            raise _error(timeless[0], "arrival_ns", "None; arrival_ns is set for some requests and not for others")
        return cls(
            request_ids=tuple(request.request_id for request in requests),
            arrival_ns=None if timeless else _ints([request.arrival_ns for request in requests]),
            num_prompt_tokens=_ints([request.num_prompt_tokens for request in requests]),
            max_tokens=_ints([request.max_tokens for request in requests]),
            priority=_ints([request.priority for request in requests]),
            seeds=_ints([NO_SEED if request.seed is None else request.seed for request in requests]),
            kinds=np.array([kind for kind, _, _ in contents], dtype=np.uint8),
            offsets=offsets_of(_ints([len(streams) for _, streams, _ in contents])),
            streams=_ints([stream for _, streams, _ in contents for stream in streams]),
            stream_tokens=_ints([count for _, _, counts in contents for count in counts]),
        )

    @classmethod
    def of_pieces(
        cls,
        name: str,
        *,
        num_prompt_tokens: Ints,
        max_tokens: Ints,
        arrival_ns: Ints | None,
        seeds: Ints | None = None,
        offsets: Ints | None = None,
        streams: Ints | None = None,
        stream_tokens: Ints | None = None,
        kind: int = PIECES,
    ) -> "RequestTable":
        """Requests `name-0`, `name-1`, ... with columns for the rest; without `streams` every prompt is of its own."""
        count = len(num_prompt_tokens)
        return cls(
            request_ids=NumberedIds(name, range(count)),
            arrival_ns=arrival_ns,
            num_prompt_tokens=num_prompt_tokens,
            max_tokens=max_tokens,
            priority=np.zeros(count, np.int64),
            seeds=np.full(count, NO_SEED, np.int64) if seeds is None else seeds,
            kinds=np.full(count, kind, np.uint8),
            offsets=np.arange(count + 1) if offsets is None else offsets,
            streams=np.arange(count) if streams is None else streams,
            stream_tokens=num_prompt_tokens if stream_tokens is None else stream_tokens,
        )

    def __len__(self) -> int:
        return len(self.request_ids)

    @overload
    def __getitem__(self, index: int) -> WorkloadRequest: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[WorkloadRequest]: ...
    def __getitem__(self, index: int | slice) -> WorkloadRequest | Sequence[WorkloadRequest]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(f"request {index} of {len(self)}")
        index %= len(self)
        start, stop = int(self.offsets[index]), int(self.offsets[index + 1])
        kind, streams = self.kinds[index], self.streams[start:stop].tolist()
        pieces = map(Piece, streams, self.stream_tokens[start:stop].tolist())
        return WorkloadRequest(
            request_id=self.request_ids[index],
            num_prompt_tokens=int(self.num_prompt_tokens[index]),
            max_tokens=int(self.max_tokens[index]),
            arrival_ns=None if self.arrival_ns is None else int(self.arrival_ns[index]),
            prompt_token_ids=tuple(streams) if kind == TOKENS else None,
            pieces=tuple(pieces) if kind == PIECES else None,
            hash_ids=tuple(streams) if kind == HASH_IDS else None,
            priority=int(self.priority[index]),
            seed=None if self.seeds[index] == NO_SEED else int(self.seeds[index]),
        )

    def __iter__(self) -> Iterator[WorkloadRequest]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RequestTable) and self.digest() == other.digest()

    def head(self, count: int) -> "RequestTable":
        """The first `count` requests; the columns are views."""
        count = min(count, len(self))
        num_elements = int(self.offsets[count])
        return RequestTable(
            request_ids=self.request_ids[:count],
            arrival_ns=None if self.arrival_ns is None else self.arrival_ns[:count],
            num_prompt_tokens=self.num_prompt_tokens[:count],
            max_tokens=self.max_tokens[:count],
            priority=self.priority[:count],
            seeds=self.seeds[:count],
            kinds=self.kinds[:count],
            offsets=self.offsets[: count + 1],
            streams=self.streams[:num_elements],
            stream_tokens=self.stream_tokens[:num_elements],
        )

    def digest(self) -> bytes:
        """A hash of every column."""
        digest = hashlib.blake2b(digest_size=16)
        ids = self.request_ids if isinstance(self.request_ids, NumberedIds) else tuple(self.request_ids)
        digest.update(repr((ids, self.arrival_ns is None)).encode())
        columns: list[NDArray[Any]] = [] if self.arrival_ns is None else [self.arrival_ns]
        columns += [self.num_prompt_tokens, self.max_tokens, self.priority, self.seeds, self.kinds]
        columns += [self.offsets, self.streams, self.stream_tokens]
        for column in columns:
            digest.update(np.ascontiguousarray(column, dtype=column.dtype.newbyteorder("<")).data)
        return digest.digest()

    def _check(self, field: str, values: Ints, least: int) -> None:
        if (index := _first(values < least)) is not None:
            raise self._error(index, field, f"{values[index]} is below the limit {least}")

    def _error(self, index: int, field: str, problem: str) -> ConfigError:
        return _error(self.request_ids[index], field, problem)


def offsets_of(counts: Ints) -> Ints:
    """Where each of `counts` elements starts, and where the last ends; shape (len(counts) + 1,)."""
    offsets = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets


def _content(request: WorkloadRequest, hash_block_size: int | None) -> tuple[int, Sequence[int], Sequence[int]]:
    """What describes the prompt, its streams and how many tokens each gives."""
    if request.prompt_token_ids is not None:
        return TOKENS, request.prompt_token_ids, [1] * request.num_prompt_tokens
    if request.pieces is not None:
        return PIECES, [p.stream for p in request.pieces], [p.num_tokens for p in request.pieces]
    assert request.hash_ids is not None
    if hash_block_size is None or hash_block_size < 1:
        raise ConfigError(f"hash_block_size: {hash_block_size} is below the limit 1")
    num_ids, num_tokens = len(request.hash_ids), request.num_prompt_tokens
    if num_ids != -(-num_tokens // hash_block_size):
        raise ConfigError(
            f"request {request.request_id}: {num_ids} hash_ids do not fit {num_tokens} prompt tokens "
            f"in blocks of {hash_block_size}"
        )
    return (
        HASH_IDS,
        request.hash_ids,
        [*[hash_block_size] * (num_ids - 1), num_tokens - hash_block_size * (num_ids - 1)],
    )


def _ints(values: Sequence[int | None]) -> Ints:
    return np.array(values, dtype=np.int64)


def _first(is_wrong: NDArray[np.bool_]) -> int | None:
    """Index of the first True, if there is one."""
    return int(is_wrong.argmax()) if is_wrong.any() else None


def _error(request_id: str, field: str, problem: str) -> ConfigError:
    return ConfigError(f"request {request_id}: {field}: {problem}")
