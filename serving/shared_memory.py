"""Exchange between the ranks of several processes of one host, through windows in shared memory.

Owns: the layout of the windows, what is written to and read from them.
Must not know: torch (a tensor is read through its `numpy` method, and made by the caller's `from_array`), Ray, layers.
Source: the dispatch and combine operators of CloudMatrix-Infer (arXiv 2506.12708, section 4.2.1): buffers of a size
fixed beforehand, no exchange of sizes first, written directly by the sender, two of each.

Each pair (source, destination) of ranks in different processes has two segments, for even and for odd exchanges:

    header: number of the exchange, kind and dtype, width, rows | window_bytes for the rows

In exchange k a process writes the segments of parity k % 2 whose source is one of its ranks, comes to the barrier, and
then reads those whose destination is one of its ranks. Why two segments and one barrier are enough: a process writes a
segment again in exchange k + 2, so after barrier k + 1 opened, so after every process had come to barrier k + 1. A
process comes there only from its call of exchange k + 1; when it makes that call it has read the reply of exchange k,
and its caller is done with it. One segment would not do: a fast process would write exchange k + 1 while a slow one,
past the same barrier k, still reads exchange k. And two do not keep a reply any longer than that: once a process has
come to barrier k + 1, a faster one may write exchange k + 2 over the reply of exchange k. A borrowed reply therefore
holds until the next call of `exchange`, not until the second-next; that would take three segments.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np

from serving.exchange import (
    ALL_GATHER,
    Call,
    FromArray,
    GroupUnusable,
    RanksOutOfStep,
    WindowOverflow,
    as_it_is,
    check_partition,
    describe,
    read_call,
)
from serving.shared_barrier import BARRIER, EXCHANGE, SharedGroup
from serving.shared_mapping import remove_windows

__all__ = ["SharedMemoryExchange", "WindowGroupSpec", "remove_windows"]

_HEADER = struct.Struct("=QIIQ")  # number of the exchange, kind and dtype, width, rows
_LINE_BYTES = 64  # a header and its rows begin on cache lines of their own


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowGroupSpec:
    """A group of ranks, the same in each of its processes. Raises ValueError naming the field that is wrong.

    `path`: a directory that does not exist yet, in /dev/shm; process 0 makes it, and removes it when all have joined.
    `ranks_by_process[p]`: the ranks that process p drives. `window_bytes`: the most that one rank sends to another in
    one exchange. `timeout_s`: the longest wait for the others. After a failure, make a group of another path and epoch.
    """

    path: str
    world_size: int
    ranks_by_process: tuple[tuple[int, ...], ...]
    window_bytes: int
    timeout_s: float
    epoch: int

    def __post_init__(self) -> None:
        check_partition(self.ranks_by_process, self.world_size)
        if self.window_bytes < 1:
            raise ValueError(f"window_bytes: got {self.window_bytes}, must be at least 1")
        if not 0 < self.timeout_s < float("inf"):
            raise ValueError(f"timeout_s: got {self.timeout_s}, must be positive and finite")

    @property
    def name(self) -> str:
        return f"group {self.path.rstrip('/').rpartition('/')[2]}, epoch {self.epoch}"

    @property
    def segment_bytes(self) -> int:
        """Bytes of one segment, header and padding included."""
        return _LINE_BYTES + -(-self.window_bytes // _LINE_BYTES) * _LINE_BYTES

    def segment_pairs(self) -> list[tuple[int, int]]:
        """(source, destination) of every segment of one parity, in the order in which they lie."""
        process_of = {rank: p for p, ranks in enumerate(self.ranks_by_process) for rank in ranks}
        ranks = range(self.world_size)
        return [(s, d) for s in ranks for d in ranks if process_of[s] != process_of[d]]

    @property
    def total_bytes(self) -> int:
        """What the group takes of the host's shared memory, but for a page or two."""
        return 2 * len(self.segment_pairs()) * self.segment_bytes


class SharedMemoryExchange:
    """The exchange of one process of the group, for all ranks that it drives. A context manager.

    The constructor waits until every process has joined; they must therefore be made at the same time. Any error inside
    `exchange` or `barrier` breaks the group for everybody: the others raise at once, and so does every later call.

    `from_array` makes the tensors of a reply, for instance torch.from_numpy. Rows between local ranks are handed over
    as they are, so nobody may write into rows that it has sent or received. The other tensors of a reply are copies
    that hold for good or, with `borrow`, show the windows: then they hold until the next call of `exchange`, which is
    what model/collectives.py promises a shard.
    """

    def __init__(
        self,
        spec: WindowGroupSpec,
        process_index: int,
        *,
        from_array: FromArray = as_it_is,
        borrow: bool = False,
    ) -> None:
        if not 0 <= process_index < len(spec.ranks_by_process):
            raise ValueError(
                f"process_index: got {process_index}, the group has {len(spec.ranks_by_process)} processes"
            )
        self.spec = spec
        self.local_ranks = spec.ranks_by_process[process_index]
        self._from_array = from_array
        self._borrow = borrow
        self._number = 0
        self._group = SharedGroup(
            spec.path,
            name=spec.name,
            ranks_by_process=spec.ranks_by_process,
            process=process_index,
            num_bytes=spec.total_bytes,
            timeout_s=spec.timeout_s,
        )
        self._locate_segments()

    def __enter__(self) -> "SharedMemoryExchange":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None:
            self._group.give_up(error)
        self.close()

    @property
    def num_open_windows(self) -> int:
        """Windows that this process holds: two per local rank, none once closed."""
        return 2 * len(self.local_ranks) if self._group.is_open else 0

    def exchange(self, collectives: Sequence[Any]) -> list[list[Any]]:
        """Serve one AllToAll or AllGather of each local rank, in the order of `local_ranks`; one reply for each.

        Raises WindowOverflow, RanksOutOfStep or ValueError (what was asked cannot be exchanged), CollectiveTimeout or
        RanksLost (others did not come), GroupUnusable (closed, or given up elsewhere).
        """
        try:
            self._group.check_usable()
            call = read_call(collectives, num_local=len(self.local_ranks), world_size=self.spec.world_size)
            self._number += 1
            replies = self._replies_from_local_ranks(call, collectives)
            self._write(call)
            self._group.barrier(EXCHANGE)
            self._read(call, replies)
            return replies
        except BaseException as error:
            self._group.give_up(error)
            raise

    def barrier(self) -> None:
        """Wait until every process of the group has come here."""
        self._group.barrier(BARRIER)

    def abort(self, reason: str) -> None:
        """Break the group, from any thread: whoever waits in it raises. For a supervisor that knows of a lost peer."""
        self._group.give_up(GroupUnusable(reason))

    def close(self) -> None:
        """Leave the group and free what it holds. Borrowed replies keep the windows mapped until they die."""
        self._group.close()

    def _locate_segments(self) -> None:
        """Offsets of the segments to write and to read, by parity, kind of collective and local rank.

        An all-gather is written once, into the sender's first segment, and everybody reads it there.
        """
        pairs = self.spec.segment_pairs()
        size = self.spec.segment_bytes
        ranks = range(self.spec.world_size)
        self._outgoing: list[tuple[list[list[tuple[int, int]]], ...]] = []
        self._incoming: list[tuple[list[list[tuple[int, int]]], ...]] = []
        for parity in (0, 1):
            start = self._group.mapping.offset + parity * len(pairs) * size
            offsets = {pair: start + index * size for index, pair in enumerate(pairs)}
            first = {source: offsets[source, d] for source, d in reversed(pairs)}
            remote = [rank for rank in ranks if rank not in self.local_ranks]
            self._outgoing.append(
                (
                    [[(d, offsets[source, d]) for d in remote] for source in self.local_ranks],
                    [[(0, first[source])] if remote else [] for source in self.local_ranks],
                )
            )
            self._incoming.append(
                (
                    [[(source, offsets[source, d]) for source in remote] for d in self.local_ranks],
                    [[(source, first[source]) for source in remote]],
                )
            )

    def _write(self, call: Call) -> None:
        memory = self._group.mapping.memory
        number, code, width, dtype = self._number, call.code, call.width, call.dtype
        limit = self.spec.window_bytes
        for rank, blocks, segments in zip(
            self.local_ranks, call.rows, self._outgoing[number % 2][call.kind], strict=True
        ):
            for index, offset in segments:
                rows = blocks[index]
                if rows.nbytes > limit:
                    to = "every rank" if call.kind == ALL_GATHER else f"rank {index}"
                    raise WindowOverflow(
                        f"{self.spec.name}: rank {rank} sends {rows.nbytes} bytes to {to}, window_bytes is {limit}"
                    )
                num_rows = len(rows)
                _HEADER.pack_into(memory, offset, number, code, width, num_rows)
                if num_rows:
                    np.ndarray(rows.shape, dtype, memory, offset + _LINE_BYTES)[...] = rows

    def _read(self, call: Call, replies: list[list[Any]]) -> None:
        segments = self._incoming[self._number % 2][call.kind]
        if call.kind == ALL_GATHER:
            for source, offset in segments[0]:
                tensor = self._read_segment(call, source, offset)
                for reply in replies:
                    reply[source] = tensor
            return
        for reply, from_others in zip(replies, segments, strict=True):
            for source, offset in from_others:
                reply[source] = self._read_segment(call, source, offset)

    def _read_segment(self, call: Call, source: int, offset: int) -> Any:
        memory = self._group.mapping.memory
        number, code, width, num_rows = _HEADER.unpack_from(memory, offset)
        if number != self._number or code != call.code or width != call.width:
            raise RanksOutOfStep(
                f"{self.spec.name}: rank {source} sent {describe(code, width)} as exchange {number}, rank "
                f"{self.local_ranks[0]} expects {describe(call.code, call.width)} as exchange {self._number}"
            )
        rows = np.ndarray((num_rows, width), call.dtype, memory, offset + _LINE_BYTES)
        return self._from_array(rows if self._borrow else rows.copy())

    def _replies_from_local_ranks(self, call: Call, collectives: Sequence[Any]) -> list[list[Any]]:
        """Replies that hold only what local ranks send: their own tensors.

        But a borrowed reply that a shard sends on must be copied, and before the barrier: as soon as that opens, the
        window of the last exchange may be written again.
        """
        is_gather = call.kind == ALL_GATHER
        replies: list[list[Any]] = [[None] * self.spec.world_size for _ in self.local_ranks]
        window = np.frombuffer(self._group.mapping.memory, np.uint8) if self._borrow else None
        for source, collective, blocks in zip(self.local_ranks, collectives, call.rows, strict=True):
            for rank, reply in zip(self.local_ranks, replies, strict=True):
                tensor, rows = (collective.rows, blocks[0]) if is_gather else (collective.rows[rank], blocks[rank])
                if window is not None and rows.nbytes and np.may_share_memory(rows, window):
                    tensor = self._from_array(rows.copy())
                reply[source] = tensor
        return replies
