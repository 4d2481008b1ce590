"""The shared KV-cache pool as the control plane uses it: find a prefix, load it, store new blocks.

Owns: the order of index, planes and bytes: a prefix is leased before it is read, a block is published after its bytes
are there, and evicted bytes are dropped before their room is used again.
Must not know: scheduling, HTTP, what a block contains.
Source: arXiv 2506.12708, section 4.4 (EMS: index apart from bytes, NPUs read and write host DRAM over UB); Mooncake
Store (two-phase put, leases).

Each block crosses the UB plane once per instance: the dies of an instance divide the blocks among them. Passing them on
inside the instance is not charged: it is part of the all-gather of a prefill step, and small beside the step.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from devices.clock import Clock
from devices.fabric import Endpoint, Fabric
from serving.core.errors import LeaseLost
from serving.core.event_log import EventLog
from serving.core.ids import BlockHash, BlockIds, InstanceId, RequestId
from serving.core.pool_index import Lease, PoolBlock, PoolIndex
from serving.errors import EngineFailure
from serving.transport import PoolObject, RankRef, Transport

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockMove:
    """A movement of KV blocks that has just begun, and when it will be over."""

    kind: Literal["kv_transfer", "pool_load", "pool_store"]
    request_id: RequestId
    start_ns: int
    end_ns: int
    num_bytes: int


class KvPool:
    """The pool of one cluster."""

    def __init__(
        self,
        *,
        index: PoolIndex,
        hosts: Sequence[Endpoint],
        fabric: Fabric,
        transport: Transport,
        clock: Clock,
        log: EventLog,
        block_bytes: int,
        block_size: int,
        read_bytes_per_s: float,
    ) -> None:
        """`hosts[i]` is the endpoint of host i of the index; `block_bytes` is a block as charged.

        `read_bytes_per_s` is what the pool's software reaches into one die, below what the plane does.
        """
        self.index = index
        self._hosts = list(hosts)
        self._fabric = fabric
        self._transport = transport
        self._clock = clock
        self._log = log
        self._block_bytes = block_bytes
        self._block_size = block_size
        self._read_bytes_per_s = read_bytes_per_s
        self._reading_until_ns: dict[Endpoint, int] = {}  # by die
        self._lost_hosts: set[int] = set()
        self.num_loaded_blocks = 0
        self.num_stored_blocks = 0
        self.on_move: Callable[[BlockMove], None] = lambda move: None

    def find_prefix_tokens(self, hashes: Sequence[BlockHash]) -> int:
        """Tokens of the longest prefix that the pool holds now."""
        self.index.expire(self._clock.now_ns())
        return self.index.find_prefix(hashes) * self._block_size

    def lose_host(self, host_id: int) -> None:
        """Forget a host that is gone, and what it held; its part of what is read or written now will not arrive.

        Told twice, by two channels to it, it is still lost once.
        """
        if host_id in self._lost_hosts:
            return
        self._lost_hosts.add(host_id)
        num_blocks = self.index.remove_host(host_id)
        self._log.append(self._clock.now_ns(), "host_lost", f"host-{host_id}", blocks=num_blocks)

    async def load(
        self,
        request_id: RequestId,
        hashes: Sequence[BlockHash],
        *,
        first: int,
        blocks: BlockIds,
        target: RankRef | InstanceId,
        dies: Sequence[Endpoint],
    ) -> int:
        """Read blocks `hashes[first:]` into `blocks` of `target`; returns how many arrived, from the first on.

        Fewer arrive when blocks were evicted since they were found, when the lease expired during the read, or when a
        host is lost.
        """
        lease = self.index.lease(hashes, self._clock.now_ns())
        wanted = lease.blocks[first:]
        try:
            if wanted:
                await self._read(request_id, wanted, blocks[: len(wanted)], target=target, dies=dies)
        except EngineFailure as failure:
            if self._end_lease(request_id, lease) == len(lease.blocks):
                logger.warning("request %s computes what the pool did not give: %s", request_id, failure)
            return 0  # what it was to read is evicted, or its host is gone
        except BaseException:
            self._end_lease(request_id, lease)
            raise
        num_loaded = max(0, self._end_lease(request_id, lease) - first)
        self.num_loaded_blocks += num_loaded
        return num_loaded

    async def _read(
        self,
        request_id: RequestId,
        wanted: Sequence[PoolBlock],
        blocks: BlockIds,
        *,
        target: RankRef | InstanceId,
        dies: Sequence[Endpoint],
    ) -> None:
        start_ns = end_ns = self._clock.now_ns()
        for i, block in enumerate(wanted):
            source, die = self._hosts[block.host_id], dies[i % len(dies)]
            finish_ns = self._fabric.reserve("ub", source, die, num_bytes=block.num_bytes, now_ns=start_ns, op="read")
            paced_ns = max(start_ns, self._reading_until_ns.get(die, 0))
            paced_ns += round(block.num_bytes * 1e9 / self._read_bytes_per_s)
            self._reading_until_ns[die] = paced_ns
            end_ns = max(end_ns, finish_ns, paced_ns)
        self._log.append(start_ns, "pool_load", request_id, blocks=len(wanted), until_ns=end_ns)
        self.on_move(_move("pool_load", request_id, wanted, start_ns=start_ns, end_ns=end_ns))
        reading = asyncio.ensure_future(self._transport.pool_load(target, [_object(block) for block in wanted], blocks))
        await self._clock.sleep_until(end_ns)
        await self._clock.external(reading)

    def _end_lease(self, request_id: RequestId, lease: Lease) -> int:
        """Give a lease back; how many of its leading blocks were good to read all the time."""
        try:
            return self.index.release(lease.lease_id)
        except LeaseLost:  # its blocks may have been evicted
            self._log.append(self._clock.now_ns(), "lease_lost", request_id)
            return 0

    async def store(
        self,
        request_id: RequestId,
        hashes: Sequence[BlockHash],
        blocks: BlockIds,
        *,
        source: RankRef,
        dies: Sequence[Endpoint],
    ) -> None:
        """Write the blocks that the pool does not have; `hashes[i]` names what `blocks[i]` of `source` holds.

        Blocks for which no host has room are left out. Raises EngineFailure when a device is lost.
        """
        self.index.expire(self._clock.now_ns())
        self.index.touch(hashes)  # what is there must not make room for the blocks that continue it
        started: list[PoolBlock] = []
        evicted: list[PoolBlock] = []
        positions: list[int] = []
        for i, block_hash in enumerate(hashes):
            put = self.index.put_start(block_hash, self._block_bytes)
            if put is not None:
                started.append(put.block)
                evicted += put.evicted
                positions.append(i)
        if evicted:
            self._transport.pool_free([_object(block) for block in evicted])
        if started:
            try:
                await self._write(
                    request_id, blocks[np.array(positions)], started, num_evicted=len(evicted), source=source, dies=dies
                )
            except BaseException:  # re-raised: room must not stay reserved for bytes that will not come
                pending = [block for block in started if self.index.is_pending(block)]
                for block in pending:
                    self.index.put_revoke(block)
                self._transport.pool_free([_object(block) for block in pending])  # some may have come
                raise
            stored = [block for block in started if self.index.is_pending(block)]  # not what a lost host took along
            for block in reversed(stored):  # the end of a prefix is to be evicted before its beginning
                self.index.put_commit(block)
            self.num_stored_blocks += len(stored)
        self.index.touch(hashes)

    async def _write(
        self,
        request_id: RequestId,
        blocks: BlockIds,
        started: Sequence[PoolBlock],
        *,
        num_evicted: int,
        source: RankRef,
        dies: Sequence[Endpoint],
    ) -> None:
        start_ns = end_ns = self._clock.now_ns()
        for i, block in enumerate(started):
            die, host = dies[i % len(dies)], self._hosts[block.host_id]
            finish_ns = self._fabric.reserve("ub", die, host, num_bytes=block.num_bytes, now_ns=start_ns, op="write")
            end_ns = max(end_ns, finish_ns)
        self._log.append(start_ns, "pool_store", request_id, blocks=len(started), evicted=num_evicted, until_ns=end_ns)
        self.on_move(_move("pool_store", request_id, started, start_ns=start_ns, end_ns=end_ns))
        writing = asyncio.ensure_future(
            self._transport.pool_store(source, blocks, [_object(block) for block in started])
        )
        await self._clock.sleep_until(end_ns)
        await self._clock.external(writing)


def _move(
    kind: Literal["pool_load", "pool_store"],
    request_id: RequestId,
    blocks: Sequence[PoolBlock],
    *,
    start_ns: int,
    end_ns: int,
) -> BlockMove:
    num_bytes = sum(block.num_bytes for block in blocks)
    return BlockMove(kind=kind, request_id=request_id, start_ns=start_ns, end_ns=end_ns, num_bytes=num_bytes)


def _object(block: PoolBlock) -> PoolObject:
    return PoolObject(host_id=block.host_id, handle=block.handle)
