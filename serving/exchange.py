"""What the exchanges between processes have in common: which rank lives where, what a call carries, how it fails.

Owns: the partition of a group's ranks among processes, the reading of a collective as arrays, the errors of a group.
Must not know: shared memory, sockets, torch (tensors are read through their `numpy` method), Ray.
Source: the collectives of model/collectives.py, told apart by their `rows`: a list with one 2-D tensor per rank
(all-to-all), or one 2-D tensor (all-gather).

CollectiveError           (an EngineFailure)
  WindowOverflow            a rank sent more bytes than its window holds
  RanksOutOfStep            ranks disagree on what they exchange
  RanksLost                 a process of the group ended; .ranks
  GroupUnusable             closed, or given up after a failure here or at a peer
CollectiveTimeout, for ranks that did not come in time, is a device's error (devices/faults.py).
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from devices.faults import CollectiveTimeout
from serving.errors import EngineFailure

Array: TypeAlias = npt.NDArray[Any]
# Makes what a shard wants (a tensor) of a received array; torch.from_numpy, or `as_it_is` for shards of numpy arrays.
FromArray: TypeAlias = Callable[[Array], Any]

ALL_TO_ALL, ALL_GATHER = 0, 1
# The position in this tuple travels in headers, so that receivers see at once when a sender means another type.
_DTYPES = ("int8", "uint8", "bool", "int16", "int32", "int64", "float16", "float32", "float64")
_CODE_BY_DTYPE = {np.dtype(name): code for code, name in enumerate(_DTYPES)}


class CollectiveError(EngineFailure):
    """A collective failed. The group cannot be used again; a new epoch makes a new one."""


class WindowOverflow(CollectiveError):
    """A rank sent more bytes than its window holds. The message names the ranks, the bytes and the limit."""


class RanksOutOfStep(CollectiveError):
    """Ranks disagree on what they exchange: the kind of collective, its position, the dtype or the width."""


class RanksLost(CollectiveError):
    """A process of the group ended without closing it; `ranks` are those that it drove."""

    def __init__(self, message: str, ranks: tuple[int, ...]) -> None:  # positional: it survives pickling
        super().__init__(message, ranks)
        self.ranks = ranks

    def __str__(self) -> str:
        return str(self.args[0])


class GroupUnusable(CollectiveError):
    """The group is closed, or was given up after a failure here or at a peer, which the message repeats."""


class ProcessExchange(Protocol):
    """What serves the collectives of one process's ranks; serving/shared_memory.py and serving/gloo_exchange.py."""

    def exchange(self, collectives: Sequence[Any]) -> list[list[Any]]:
        """Serve one collective of each local rank, in rank order; a reply for each: one tensor per source rank."""

    def barrier(self) -> None:
        """Wait until every process of the group has come here."""

    def abort(self, reason: str) -> None:
        """Break the group for everybody; from any thread."""

    def close(self) -> None:
        """Leave the group and free what it holds. Closing twice is harmless."""


@dataclass(frozen=True, slots=True)
class Call:
    """The collectives of the local ranks, read as arrays. All have one kind, dtype and width."""

    kind: int
    dtype: np.dtype[Any]
    width: int
    rows: list[list[Array]]  # rows[i][d]: from local rank i to rank d; all-gather: rows[i] has one entry

    @property
    def code(self) -> int:
        """Kind and dtype in one number for a header."""
        return self.kind * len(_DTYPES) + _CODE_BY_DTYPE[self.dtype]


def as_it_is(array: Array) -> Array:
    return array


def read_call(collectives: Sequence[Any], *, num_local: int, world_size: int) -> Call:
    """Read the collectives of the local ranks, one per rank in rank order, without copying.

    Raises ValueError if their number, kinds, shapes or dtypes do not fit together or cannot be carried.
    """
    if len(collectives) != num_local:
        raise ValueError(f"{len(collectives)} collectives for {num_local} local ranks")
    kind = ALL_TO_ALL if isinstance(collectives[0].rows, list | tuple) else ALL_GATHER
    rows = []
    dtype, width = None, 0
    for collective in collectives:
        tensors = collective.rows
        if isinstance(tensors, list | tuple) is not (kind == ALL_TO_ALL):
            raise ValueError("local ranks ask for different kinds of collective")
        if kind == ALL_GATHER:
            tensors = (tensors,)
        elif len(tensors) != world_size:
            raise ValueError(f"all-to-all of {len(tensors)} row blocks among {world_size} ranks")
        arrays = [tensor if isinstance(tensor, np.ndarray) else tensor.numpy() for tensor in tensors]
        for array in arrays:
            if array.ndim != 2:
                raise ValueError(f"rows must be 2-D, got shape {array.shape}")
            if dtype is None:
                dtype, width = array.dtype, array.shape[1]
            elif array.dtype != dtype or array.shape[1] != width:
                raise ValueError(
                    f"rows of dtype {array.dtype} and width {array.shape[1]} beside {dtype} and width {width}"
                )
        rows.append(arrays)
    assert dtype is not None
    if dtype not in _CODE_BY_DTYPE:
        raise ValueError(f"rows of dtype {dtype}; an exchange carries {', '.join(_DTYPES)}")
    return Call(kind, dtype, width, rows)


def describe(code: int, width: int) -> str:
    """A header's code and width in words."""
    if not 0 <= code < 2 * len(_DTYPES):
        return "no collective"
    kind, dtype = divmod(code, len(_DTYPES))
    return f"{'all-gather' if kind == ALL_GATHER else 'all-to-all'} of {_DTYPES[dtype]}, width {width}"


def check_partition(ranks_by_process: tuple[tuple[int, ...], ...], world_size: int) -> None:
    """Raise ValueError unless every rank belongs to exactly one process and every process drives a rank."""
    ranks = [rank for ranks in ranks_by_process for rank in ranks]
    if sorted(ranks) != list(range(world_size)) or not all(ranks_by_process):
        raise ValueError(f"ranks_by_process: {ranks_by_process} does not divide ranks 0 to {world_size - 1}")


def named(ranks: Iterable[int]) -> str:
    """'rank 3' or 'ranks 0, 3'."""
    ordered = sorted(ranks)
    return f"rank{'' if len(ordered) == 1 else 's'} {', '.join(map(str, ordered))}"


def failure_text(error: BaseException, ranks: Iterable[int]) -> bytes:
    """What other processes should learn of an error in the process that drives `ranks`; at most 900 bytes."""
    told: list[object]
    if isinstance(error, CollectiveTimeout):
        told = ["timeout", error.collective, error.missing_ranks, error.waited_s]
    elif isinstance(error, RanksLost):
        told = ["lost", *error.args]
    else:
        told = ["failed", f"{named(ranks)}: {str(error) or type(error).__name__}"]
    text = json.dumps(told)
    return (text if len(text) <= 900 else json.dumps(["failed", str(told[1])[:400]])).encode()


def failure_of(text: bytes) -> CollectiveError | CollectiveTimeout:
    """The error that a process raises when it learns `text` from another."""
    try:
        kind, message, *rest = json.loads(text)
    except ValueError:  # read while it was being written
        return GroupUnusable("another process failed")
    if kind == "timeout":
        return CollectiveTimeout(message, tuple(rest[0]), rest[1])
    if kind == "lost":
        return RanksLost(message, tuple(rest[0]))
    return GroupUnusable(message)
