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
from collections.abc import Sequence

import numpy as np

from devices.clock import Clock
from devices.fabric import Endpoint, Fabric
from serving.core.errors import LeaseLost
from serving.core.event_log import EventLog
from serving.core.ids import BlockHash, BlockIds, InstanceId, RequestId
from serving.core.pool_index import PoolBlock, PoolIndex
from serving.errors import EngineFailure
from serving.transport import PoolObject, RankRef, Transport


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
    ) -> None:
        """`hosts[i]` is the endpoint of host i of the index; `block_bytes` is a block as charged."""
        self.index = index
        self._hosts = list(hosts)
        self._fabric = fabric
        self._transport = transport
        self._clock = clock
        self._log = log
        self._block_bytes = block_bytes
        self._block_size = block_size
        self.num_loaded_blocks = 0
        self.num_stored_blocks = 0

    def find_prefix_tokens(self, hashes: Sequence[BlockHash]) -> int:
        """Tokens of the longest prefix that the pool holds now."""
        self.index.expire(self._clock.now_ns())
        return self.index.find_prefix(hashes) * self._block_size

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

        Fewer arrive when blocks were evicted since they were found, or when the lease expired during the read. Raises
        EngineFailure when a device is lost.
        """
        start_ns = self._clock.now_ns()
        lease = self.index.lease(hashes, start_ns)
        wanted = lease.blocks[first:]
        try:
            if not wanted:
                return 0
            end_ns = start_ns
            for i, block in enumerate(wanted):
                end_ns = max(
                    end_ns,
                    self._fabric.reserve(
                        "ub",
                        self._hosts[block.host_id],
                        dies[i % len(dies)],
                        num_bytes=block.num_bytes,
                        now_ns=start_ns,
                        op="read",
                    ),
                )
            self._log.append(start_ns, "pool_load", request_id, blocks=len(wanted), until_ns=end_ns)
            reading = asyncio.ensure_future(
                self._transport.pool_load(target, [_object(block) for block in wanted], blocks[: len(wanted)])
            )
            await self._clock.sleep_until(end_ns)
            await self._clock.external(reading)
        finally:
            try:
                wanted = wanted[: max(0, self.index.release(lease.lease_id) - first)]
            except LeaseLost:  # what was read may have been overwritten
                self._log.append(self._clock.now_ns(), "lease_lost", request_id)
                wanted = ()
        self.num_loaded_blocks += len(wanted)
        return len(wanted)

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
        start_ns = self._clock.now_ns()
        self.index.expire(start_ns)
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
        if not started:
            return
        end_ns = start_ns
        for i, block in enumerate(started):
            end_ns = max(
                end_ns,
                self._fabric.reserve(
                    "ub",
                    dies[i % len(dies)],
                    self._hosts[block.host_id],
                    num_bytes=block.num_bytes,
                    now_ns=start_ns,
                    op="write",
                ),
            )
        self._log.append(start_ns, "pool_store", request_id, blocks=len(started), evicted=len(evicted), until_ns=end_ns)
        writing = asyncio.ensure_future(
            self._transport.pool_store(source, blocks[np.array(positions)], [_object(block) for block in started])
        )
        try:
            await self._clock.sleep_until(end_ns)
            await self._clock.external(writing)
        except BaseException:  # re-raised: room must not stay reserved for bytes that will not come
            for block in started:
                self.index.put_revoke(block)
            raise
        for block in reversed(started):  # the end of a prefix is to be evicted before its beginning
            self.index.put_commit(block)
        self.index.touch(hashes)
        self.num_stored_blocks += len(started)


def _object(block: PoolBlock) -> PoolObject:
    return PoolObject(host_id=block.host_id, handle=block.handle)
