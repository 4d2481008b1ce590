"""The shared KV-cache pool as the control plane decides on it: what is read, where blocks are stored, until when.

Owns: the two halves of a read and of a write. The first takes every decision and reservation at the present instant and
says when the bytes will be there; the second, called then, makes it so. Between them the caller waits however it likes.
Must not know: how anybody waits, what a block contains, the devices that move it.
Source: arXiv 2506.12708, section 4.4 (EMS: index apart from bytes, NPUs read and write host DRAM over UB); Mooncake
Store (two-phase put, leases).

Each block crosses the UB plane once per instance: the dies of an instance divide the blocks among them. Passing them on
inside the instance is not charged: it is part of the all-gather of a prefill step, and small beside the step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from devices.fabric import Endpoint, Fabric
from serving.core.errors import LeaseLost
from serving.core.event_log import EventLog
from serving.core.ids import BlockHash, RequestId
from serving.core.pool_block import Lease, PoolBlock
from serving.core.pool_index import PoolIndex

MoveKind = Literal["kv_transfer", "pool_load", "pool_store"]  # on planes rdma, ub, ub
MOVE_KINDS: tuple[MoveKind, ...] = get_args(MoveKind)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockMove:
    """A movement of KV blocks that has just begun, and when it will be over."""

    kind: MoveKind
    request_id: RequestId
    start_ns: int
    end_ns: int
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolRead:
    """A read in progress. It is over with `finish_load` at `end_ns` or later, or with `cancel_load`."""

    request_id: RequestId
    lease: Lease
    first: int  # the leading blocks of the lease that are not read: they are at the instance already
    blocks: tuple[PoolBlock, ...]  # that are read, in the prefix's order; none if nothing was found behind `first`
    start_ns: int
    end_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolWrite:
    """A write in progress. It is over with `finish_store` at `end_ns` or later, or with `revoke_store`."""

    request_id: RequestId
    hashes: Sequence[BlockHash]  # of the whole prefix
    blocks: tuple[PoolBlock, ...]  # that are written
    positions: tuple[int, ...]  # of `blocks` in `hashes`
    num_evicted: int  # blocks that made room
    start_ns: int
    end_ns: int


class PoolMoves:
    """The pool of one cluster."""

    def __init__(
        self,
        *,
        index: PoolIndex,
        hosts: Sequence[Endpoint],
        fabric: Fabric,
        now_ns: Callable[[], int],
        log: EventLog,
        block_bytes: int,
        block_size: int,
        read_bytes_per_s: float,
    ) -> None:
        """`hosts[i]` is the endpoint of host i of the index; `block_bytes` is a block as charged.

        `now_ns` gives the present instant. `read_bytes_per_s` is what the pool's software reaches into one die, below
        what the plane does.
        """
        self.index = index
        self.block_bytes = block_bytes
        self._hosts = list(hosts)
        self._fabric = fabric
        self._now_ns = now_ns
        self._log = log
        self._block_size = block_size
        self._pace_ns = round(block_bytes * 1e9 / read_bytes_per_s)  # of a block into one die
        self._reading_until_ns: dict[Endpoint, int] = {}  # by die
        self._lost_hosts: set[int] = set()
        self.num_loaded_blocks = 0
        self.num_stored_blocks = 0
        self.on_move: Callable[[BlockMove], None] | None = None

    def find_prefix_tokens(self, hashes: Sequence[BlockHash]) -> int:
        """Tokens of the longest prefix that the pool holds now."""
        self.index.expire(self._now_ns())
        return self.index.find_prefix(hashes) * self._block_size

    def lose_host(self, host_id: int) -> None:
        """Forget a host that is gone, and what it held; its part of what is read or written now will not arrive.

        Told twice, by two channels to it, it is still lost once.
        """
        if host_id in self._lost_hosts:
            return
        self._lost_hosts.add(host_id)
        num_blocks = self.index.remove_host(host_id)
        self._log.append(self._now_ns(), "host_lost", f"host-{host_id}", blocks=num_blocks)

    def start_load(
        self, request_id: RequestId, hashes: Sequence[BlockHash], *, first: int, dies: Sequence[Endpoint]
    ) -> PoolRead:
        """Lease what is there of `hashes` and read it from block `first` on into `dies`, in turn.

        Raises LinkDown, and then nothing is leased.
        """
        now_ns = end_ns = self._now_ns()
        lease = self.index.lease(hashes, now_ns)
        wanted = lease.blocks[first:]
        if wanted:
            try:
                end_ns = self._reserve_read(wanted, dies, now_ns)
            except BaseException:  # re-raised: nobody will read under this lease
                self._end_lease(request_id, lease)
                raise
            self._log.append(now_ns, "pool_load", request_id, blocks=len(wanted), until_ns=end_ns)
            self._tell("pool_load", request_id, len(wanted), now_ns, end_ns)
        return PoolRead(request_id=request_id, lease=lease, first=first, blocks=wanted, start_ns=now_ns, end_ns=end_ns)

    def finish_load(self, read: PoolRead) -> int:
        """The bytes are there: how many blocks are good, from the first that was read on.

        Fewer than were read when the lease expired during the read, or when a host is lost.
        """
        num_loaded = max(0, self._end_lease(read.request_id, read.lease) - read.first)
        self.num_loaded_blocks += num_loaded
        return num_loaded

    def cancel_load(self, read: PoolRead) -> bool:
        """The bytes will not come. Whether they should have, that is, whether all blocks are in the pool still."""
        return self._end_lease(read.request_id, read.lease) == len(read.lease.blocks)

    def start_store(
        self, request_id: RequestId, hashes: Sequence[BlockHash], *, dies: Sequence[Endpoint]
    ) -> PoolWrite | None:
        """Reserve room for the blocks that the pool does not have and write them from `dies`, in turn.

        None if there is nothing to write: then all is done. Blocks for which no host has room are left out. Raises
        LinkDown, and then nothing is reserved in the pool; what was evicted for it is gone.
        """
        now_ns = self._now_ns()
        self.index.expire(now_ns)
        self.index.touch(hashes)  # what is there must not make room for the blocks that continue it
        puts = self.index.put_start_all(hashes, self.block_bytes)
        if not puts.blocks:
            self.index.touch(hashes)
            return None
        if puts.evicted:
            self._drop(puts.evicted)
        try:
            end_ns = self._reserve_write(puts.blocks, dies, now_ns)
        except BaseException:  # re-raised: room must not stay reserved for bytes that will not come
            self._revoke(puts.blocks)
            raise
        num_evicted = len(puts.evicted)
        self._log.append(
            now_ns, "pool_store", request_id, blocks=len(puts.blocks), evicted=num_evicted, until_ns=end_ns
        )
        self._tell("pool_store", request_id, len(puts.blocks), now_ns, end_ns)
        return PoolWrite(
            request_id=request_id,
            hashes=hashes,
            blocks=puts.blocks,
            positions=puts.positions,
            num_evicted=num_evicted,
            start_ns=now_ns,
            end_ns=end_ns,
        )

    def finish_store(self, write: PoolWrite) -> None:
        """The bytes are there: the blocks can be found from now on, but for what a lost host took along."""
        self.num_stored_blocks += self.index.put_commit_all(write.blocks)
        self.index.touch(write.hashes)

    def revoke_store(self, write: PoolWrite) -> None:
        """The bytes will not come, or not all: give the room back."""
        self._revoke(write.blocks)

    def _reserve_read(self, blocks: Sequence[PoolBlock], dies: Sequence[Endpoint], now_ns: int) -> int:
        """Instant at which all blocks are there: each die takes its own one after the other."""
        sources = [self._hosts[block.host_id] for block in blocks]
        end_ns = self._fabric.reserve_all(
            "ub", sources, _in_turn(dies, len(blocks)), num_bytes=self.block_bytes, now_ns=now_ns, op="read"
        )
        each, rest = divmod(len(blocks), len(dies))
        for i, die in enumerate(dies[: len(blocks)]):
            paced_ns = max(now_ns, self._reading_until_ns.get(die, 0)) + (each + (i < rest)) * self._pace_ns
            self._reading_until_ns[die] = paced_ns
            end_ns = max(end_ns, paced_ns)
        return end_ns

    def _reserve_write(self, blocks: Sequence[PoolBlock], dies: Sequence[Endpoint], now_ns: int) -> int:
        targets = [self._hosts[block.host_id] for block in blocks]
        return self._fabric.reserve_all(
            "ub", _in_turn(dies, len(blocks)), targets, num_bytes=self.block_bytes, now_ns=now_ns, op="write"
        )

    def _tell(self, kind: MoveKind, request_id: RequestId, num_blocks: int, start_ns: int, end_ns: int) -> None:
        if self.on_move is None:  # the fast driver writes movements down by itself
            return
        num_bytes = num_blocks * self.block_bytes
        self.on_move(BlockMove(kind=kind, request_id=request_id, start_ns=start_ns, end_ns=end_ns, num_bytes=num_bytes))

    def _end_lease(self, request_id: RequestId, lease: Lease) -> int:
        """Give a lease back; how many of its leading blocks were good to read all the time."""
        try:
            return self.index.release(lease.lease_id)
        except LeaseLost:  # its blocks may have been evicted
            self._log.append(self._now_ns(), "lease_lost", request_id)
            return 0

    def _revoke(self, blocks: Sequence[PoolBlock]) -> None:
        pending = [block for block in blocks if self.index.is_pending(block)]
        for block in pending:
            self.index.put_revoke(block)
        self._drop(pending)  # some may have come

    def _drop(self, blocks: Sequence[PoolBlock]) -> None:
        """Whatever is stored of these blocks is not needed any more. Here there are no bytes."""


def _in_turn(dies: Sequence[Endpoint], count: int) -> list[Endpoint]:
    return (list(dies) * -(-count // len(dies)))[:count]
