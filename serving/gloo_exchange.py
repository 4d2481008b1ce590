"""Exchange between the ranks of processes on several hosts, over a raw gloo group.

Owns: the layout of the messages.
Must not know: layers, Ray, why a group broke (serving/gloo_group.py).
Source: the same calls as serving/shared_memory.py, for processes that share no memory.

Unlike a window, a message needs its size known beforehand: an exchange is an all-gather of headers,

    number of the exchange, kind and dtype, width, rows for each (local rank, destination)

and an all-to-all of bytes between processes: to each, for each of its ranks, the rows of each of ours. An all-gather
sends the rows of each of ours once to each process.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import torch

from serving.exchange import (
    ALL_GATHER,
    Call,
    FromArray,
    GroupUnusable,
    RanksOutOfStep,
    check_partition,
    describe,
    named,
    read_call,
)
from serving.gloo_group import GlooGroup, start_store

__all__ = ["GlooExchange", "GlooGroupSpec", "start_store"]

_HEADER_WORDS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class GlooGroupSpec:
    """A group of ranks, the same in each of its processes. Raises ValueError naming the field that is wrong.

    The store at `store_host`:`store_port` (see `start_store`) must outlive the group; groups that share it differ in
    `name` or `epoch`. `ranks_by_process[p]`: the ranks that process p drives. `timeout_s`: the longest wait.
    """

    store_host: str
    store_port: int
    world_size: int
    ranks_by_process: tuple[tuple[int, ...], ...]
    timeout_s: float
    epoch: int
    name: str = "ranks"

    def __post_init__(self) -> None:
        check_partition(self.ranks_by_process, self.world_size)
        if not 0 < self.timeout_s < float("inf"):
            raise ValueError(f"timeout_s: got {self.timeout_s}, must be positive and finite")


class GlooExchange:
    """The exchange of one process of the group, for all ranks that it drives. A context manager.

    The constructor waits until every process has joined. Any error breaks the group for everybody. Rows between local
    ranks are handed over as they are; the other tensors of a reply hold for good.
    """

    def __init__(self, spec: GlooGroupSpec, process_index: int, *, from_array: FromArray = torch.from_numpy) -> None:
        if not 0 <= process_index < len(spec.ranks_by_process):
            raise ValueError(f"process_index: got {process_index}, of {len(spec.ranks_by_process)} processes")
        self.spec = spec
        self.local_ranks = spec.ranks_by_process[process_index]
        self._process = process_index
        self._from_array = from_array
        self._number = 0
        self._header_size = _HEADER_WORDS + spec.world_size * max(len(ranks) for ranks in spec.ranks_by_process)
        self._group = GlooGroup(
            spec.store_host,
            spec.store_port,
            name=f"group {spec.name}, epoch {spec.epoch}",
            ranks_by_process=spec.ranks_by_process,
            process=process_index,
            timeout_s=spec.timeout_s,
        )

    def __enter__(self) -> "GlooExchange":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None:
            self._group.give_up(error)
        self.close()

    @property
    def num_open_windows(self) -> int:
        """A gloo group has none."""
        return 0

    def exchange(self, collectives: Sequence[Any]) -> list[list[Any]]:
        """Serve one AllToAll or AllGather of each local rank, in the order of `local_ranks`; one reply for each.

        Raises RanksOutOfStep or ValueError (what was asked cannot be exchanged), CollectiveTimeout or RanksLost (others
        did not come), GroupUnusable (closed, or given up elsewhere).
        """
        try:
            self._group.check_usable()
            call = read_call(collectives, num_local=len(self.local_ranks), world_size=self.spec.world_size)
            self._number += 1
            headers = self._exchange_headers(call)
            received = self._exchange_rows(call, headers)
            return self._replies(call, collectives, received)
        except BaseException as error:
            self._group.give_up(error)
            raise

    def barrier(self) -> None:
        """Wait until every process of the group has come here."""
        try:
            self._group.check_usable()
            self._number += 1
            self._exchange_headers(None)
        except BaseException as error:
            self._group.give_up(error)
            raise

    def abort(self, reason: str) -> None:
        """Break the group, from any thread. Who is blocked in gloo learns it only when a connection ends its wait."""
        self._group.abort(GroupUnusable(reason))

    def close(self) -> None:
        """Leave the group and close its connections. Closing twice is harmless."""
        self._group.close()

    def _exchange_headers(self, call: Call | None) -> list[list[int]]:
        """Everybody's header, a barrier's if `call` is None; raise RanksOutOfStep if one differs from ours."""
        mine = np.zeros(self._header_size, np.int64)
        mine[:_HEADER_WORDS] = (self._number, -1, 0) if call is None else (self._number, call.code, call.width)
        for i, blocks in enumerate([] if call is None else call.rows):
            start = _HEADER_WORDS + i * self.spec.world_size
            mine[start : start + len(blocks)] = [len(rows) for rows in blocks]
        everybody = torch.empty(len(self.spec.ranks_by_process) * len(mine), dtype=torch.int64)
        ours = torch.from_numpy(mine)
        self._group.run(lambda gloo: gloo._allgather_base(everybody, ours), f"exchange {self._number}")
        headers: list[list[int]] = everybody.view(-1, len(mine)).tolist()
        for process, (number, code, width, *_) in enumerate(headers):
            if [number, code, width] != headers[self._process][:_HEADER_WORDS]:
                expected = "no collective" if call is None else describe(call.code, call.width)
                raise RanksOutOfStep(
                    f"{self._group.name}: {named(self.spec.ranks_by_process[process])} came with "
                    f"{describe(code, width)} to exchange {number}, {named(self.local_ranks)} with {expected} to "
                    f"exchange {self._number}"
                )
        return headers

    def _exchange_rows(self, call: Call, headers: list[list[int]]) -> dict[tuple[int, int], Any]:
        """Rows from other processes as tensors, by (source, destination); of an all-gather by (source, 0)."""
        row_bytes = call.width * call.dtype.itemsize
        leaving, sent_bytes, received_bytes = [np.empty((0, call.width), call.dtype)], [], []
        arriving: list[tuple[tuple[int, int], int]] = []
        for process, ranks in enumerate(self.spec.ranks_by_process):
            if process == self._process:
                sent_bytes.append(0)
                received_bytes.append(0)
                continue
            theirs, ours = ((0,), (0,)) if call.kind == ALL_GATHER else (ranks, self.local_ranks)
            blocks = [local[d] for d in theirs for local in call.rows]
            leaving += blocks
            sent_bytes.append(sum(rows.nbytes for rows in blocks))
            counts = headers[process][_HEADER_WORDS:]
            expected = [
                ((source, d), counts[i * self.spec.world_size + d]) for d in ours for i, source in enumerate(ranks)
            ]
            arriving += expected
            received_bytes.append(row_bytes * sum(count for _, count in expected))
        outgoing = torch.from_numpy(np.concatenate(leaving).reshape(-1).view(np.uint8))
        incoming = torch.empty(sum(received_bytes), dtype=torch.uint8)
        self._group.run(
            lambda gloo: gloo.alltoall_base(incoming, outgoing, received_bytes, sent_bytes), f"exchange {self._number}"
        )
        received: dict[tuple[int, int], Any] = {}
        num_rows, start = sum(count for _, count in arriving), 0
        rows = incoming.numpy().view(call.dtype).reshape(num_rows, call.width)
        for pair, count in arriving:
            received[pair] = self._from_array(rows[start : start + count])
            start += count
        return received

    def _replies(self, call: Call, collectives: Sequence[Any], received: dict[tuple[int, int], Any]) -> list[list[Any]]:
        is_gather = call.kind == ALL_GATHER
        replies = []
        for rank in self.local_ranks:
            reply = []
            for source in range(self.spec.world_size):
                if source in self.local_ranks:
                    rows = collectives[self.local_ranks.index(source)].rows
                    reply.append(rows if is_gather else rows[rank])
                else:
                    reply.append(received[source, 0 if is_gather else rank])
            replies.append(reply)
        return replies
