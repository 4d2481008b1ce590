"""A tree barrier among processes of one host, and a way to give up together.

Owns: the group's FIFOs, joining, the barrier, the errors of those who wait in it.
Must not know: collectives, windows, tensors, Ray.
Source: fifo(7) and pipe(7): a write of at most PIPE_BUF bytes is atomic.

Process 0 is the root. The others each write one record, "process p has come to barrier k", to the root's FIFO; when
the root has read one from every process it writes "barrier k is open" to each of theirs. A record names its process and
its barrier, so none counts twice; counting one semaphore cannot promise that, since a fast process's next signal passes
for a slow one's first. Records also order memory: whoever has read one sees all that its writer had stored before,
because both took the pipe's lock. The words in the mapping only tell what to say when a record does not come.

Waiting blocks and does not spin. With 8 processes on 2 idle cores, a few rounds of sched_yield before blocking save 40
of 60 microseconds; beside other busy processes every round costs a slice of the scheduler, 4 milliseconds.
"""

import contextlib
import hashlib
import os
import select
import struct
import time
from collections.abc import Iterable
from pathlib import Path

from devices.faults import CollectiveTimeout
from serving.exchange import GroupUnusable, RanksLost, RanksOutOfStep, failure_of, failure_text, named
from serving.shared_mapping import FIFO_PREFIX, SharedMapping, make_directory, remove_windows

JOINING, BARRIER, EXCHANGE = 0, 1, 2
_OPERATIONS = ("joining", "barrier", "exchange")
_ARRIVED, _OPENED, _WAKE = 0, 1, 2
_RECORD = struct.Struct("=HHIQ")  # what happened, operation, process, number of the barrier
_WATCH_MS = 100  # how often a waiting process looks whether those it waits for are alive

Record = tuple[int, int, int, int]


class SharedGroup:
    """One process's membership. The constructor returns when all have joined and no file of the group is left.

    From `mapping.offset` on, `num_bytes` of `mapping.memory` are the caller's, zero at first. One thread at a time may
    use a group; `give_up` may come from any. What waits raises CollectiveTimeout, RanksLost, RanksOutOfStep or
    GroupUnusable.
    """

    def __init__(
        self,
        path: str,
        *,
        name: str,
        ranks_by_process: tuple[tuple[int, ...], ...],
        process: int,
        num_bytes: int,
        timeout_s: float,
    ) -> None:
        self.name = name
        self._path = Path(path)
        self._ranks_by_process = ranks_by_process
        self._process = process
        self._others = [p for p in range(len(ranks_by_process)) if p != process]
        self._timeout_s = timeout_s
        self._number = -1  # of the last barrier this process came to; joining is number 0
        self._look = False  # look at the mapping's words as soon as no record is left to read
        self._fifos: list[int] = []
        self._poller = select.poll()
        self._mapping: SharedMapping | None = None
        identity = hashlib.blake2b(f"{name} {ranks_by_process} {num_bytes}".encode(), digest_size=16).digest()
        if process == 0:
            make_directory(self._path)
        try:
            try:
                self._enter(num_bytes, identity)
            except FileNotFoundError as error:
                raise GroupUnusable(f"{name}: {error.filename} was removed before all had joined") from None
            self.barrier(JOINING)
        except BaseException:
            self._drop()
            if process == 0:
                remove_windows(self._path)
            raise

    @property
    def mapping(self) -> SharedMapping:
        if self._mapping is None:
            raise GroupUnusable(f"{self.name} is closed")
        return self._mapping

    @property
    def is_open(self) -> bool:
        return self._mapping is not None

    def check_usable(self) -> None:
        """Raise GroupUnusable if this process has closed the group or any process has given it up."""
        failure = self.mapping.failure()
        if failure is not None:
            raise GroupUnusable(f"{self.name} was given up: {failure_of(failure)}")

    def barrier(self, operation: int) -> None:
        """Wait until every process has come to the same barrier for the same operation."""
        try:
            self.check_usable()
            self._number += 1
            self.mapping.arrive(self._number)
            if self._process == 0:
                self._collect(operation)
                if operation == JOINING:
                    remove_windows(self._path)  # all have opened what they need: from here no kill leaves a file
                self._tell(self._others, _OPENED, operation)
            else:
                self._tell([0], _ARRIVED, operation)
                self._await_opening(operation)
        except BaseException as error:
            self.give_up(error)
            raise

    def give_up(self, error: BaseException) -> None:
        """Break the group: whoever waits, or calls later, raises with this error's text. Harmless if it is broken."""
        mapping = self._mapping
        if mapping is None or mapping.failure() is not None:
            return
        mapping.give_up(failure_text(error, self._ranks_by_process[self._process]))
        self._wake()

    def close(self) -> None:
        """Leave. Peers that wait for this process, or come again, raise GroupUnusable. Closing twice is harmless."""
        if self._mapping is not None:
            self._mapping.leave()
            self._wake()
        self._drop()

    def _enter(self, num_bytes: int, identity: bytes) -> None:
        fifos = [self._path / f"{FIFO_PREFIX}{process}" for process in range(len(self._ranks_by_process))]
        size = {"num_processes": len(fifos), "num_bytes": num_bytes}
        if self._process == 0:
            for fifo in fifos:
                os.mkfifo(fifo, 0o600)
            self._mapping = SharedMapping.create(self._path, identity=identity, **size)
        else:
            try:
                self._mapping = SharedMapping.open(
                    self._path, process=self._process, identity=identity, timeout_s=self._timeout_s, **size
                )
            except TimeoutError:
                raise CollectiveTimeout(f"{self.name}: joining", self._ranks_by_process[0], self._timeout_s) from None
        for fifo in fifos:
            # Opened for both directions, a FIFO neither blocks at opening nor breaks when its other end goes.
            self._fifos.append(os.open(fifo, os.O_RDWR | os.O_NONBLOCK))
        self._poller.register(self._fifos[self._process], select.POLLIN)
        if self._process == 0:
            self._mapping.publish(self._path)

    def _drop(self) -> None:
        mapping, self._mapping = self._mapping, None
        if mapping is not None:
            mapping.close()
        while self._fifos:
            os.close(self._fifos.pop())

    def _tell(self, processes: Iterable[int], what: int, operation: int) -> None:
        record = _RECORD.pack(what, operation, self._process, self._number)
        for process in processes:
            os.write(self._fifos[process], record)

    def _wake(self) -> None:
        for fifo in self._fifos:
            with contextlib.suppress(BlockingIOError):  # full: its reader has enough to wake up for
                os.write(fifo, _RECORD.pack(_WAKE, 0, self._process, 0))

    def _collect(self, operation: int) -> None:
        missing = set(self._others)
        deadline = time.monotonic() + self._timeout_s
        while missing:
            for _, theirs, process, number in self._records(missing, operation, deadline):
                if theirs != operation or number != self._number:
                    who, root = named(self._ranks_by_process[process]), named(self._ranks_by_process[0])
                    raise RanksOutOfStep(
                        f"{self.name}: {who} came to {_OPERATIONS[theirs]} {number}, "
                        f"{root} to {_OPERATIONS[operation]} {self._number}"
                    )
                missing.discard(process)

    def _await_opening(self, operation: int) -> None:
        records = self._records((0,), operation, time.monotonic() + self._timeout_s)
        assert records == [(_OPENED, operation, 0, self._number)], records

    def _records(self, awaited: Iterable[int], operation: int, deadline: float) -> list[Record]:
        """Read the records that are there, waiting for the first; raise once none can come from `awaited`."""
        while True:
            if self._look and not self._poller.poll(0):
                self._look = False
                self._raise_if_hopeless(awaited)
            remaining_ms = (deadline - time.monotonic()) * 1000
            if self._poller.poll(max(0.0, min(_WATCH_MS, remaining_ms))):
                read = list(_RECORD.iter_unpack(os.read(self._fifos[self._process], 256 * _RECORD.size)))
                records = [record for record in read if record[0] != _WAKE]
                self._look |= len(records) < len(read)
                if records:
                    return records
            elif remaining_ms > 0:
                self._look = True
            else:
                self._raise_if_hopeless(awaited)
                late = [p for p in self._others if not self.mapping.has_arrived(p, self._number)]
                where = f"{self.name}: {_OPERATIONS[operation]} {self._number}"
                raise CollectiveTimeout(where, self._ranks_of(late or [0]), self._timeout_s)

    def _raise_if_hopeless(self, awaited: Iterable[int]) -> None:
        """Raise if the group was given up, or one that we wait for has closed it or ended.

        What it wrote before may have come since our last look, so its state counts only if still nothing is there.
        """
        failure = self.mapping.failure()
        if failure is not None:
            raise failure_of(failure)
        gone = [p for p in awaited if self.mapping.has_left(p)]
        dead = [p for p in awaited if p not in gone and self.mapping.is_dead(p)]
        if self._poller.poll(0):
            return
        if dead:
            ranks = self._ranks_of(dead)
            raise RanksLost(f"{self.name}: the process of {named(ranks)} ended; the group cannot be used again", ranks)
        if gone:
            raise GroupUnusable(f"{self.name}: {named(self._ranks_of(gone))} closed the group")

    def _ranks_of(self, processes: Iterable[int]) -> tuple[int, ...]:
        return tuple(sorted(rank for process in processes for rank in self._ranks_by_process[process]))
