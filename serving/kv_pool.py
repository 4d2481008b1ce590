"""The shared KV-cache pool with its bytes: waits until blocks have moved, on the clock and on the devices.

Owns: the order of index, planes and bytes: a prefix is leased before it is read, a block is published after its bytes
are there, and evicted bytes are dropped before their room is used again.
Must not know: scheduling, HTTP, what a block contains; decisions are serving/pool_moves.py's.
"""

import asyncio
import logging
from collections.abc import Sequence

import numpy as np

from devices.clock import Clock
from devices.fabric import Endpoint, Fabric
from serving.core.event_log import EventLog
from serving.core.ids import BlockHash, BlockIds, InstanceId, RequestId
from serving.core.pool_block import PoolBlock
from serving.core.pool_index import PoolIndex
from serving.errors import EngineFailure
from serving.pool_moves import PoolMoves
from serving.transport import PoolObject, RankRef, Transport

logger = logging.getLogger(__name__)


class KvPool(PoolMoves):
    """The pool of one cluster, and its devices."""

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
        """As `PoolMoves`; bytes are moved by `transport` and waited for on `clock`."""
        super().__init__(
            index=index,
            hosts=hosts,
            fabric=fabric,
            now_ns=lambda: clock.now_ns(),  # asked for when it runs: a plan is built without a clock
            log=log,
            block_bytes=block_bytes,
            block_size=block_size,
            read_bytes_per_s=read_bytes_per_s,
        )
        self._transport = transport
        self._clock = clock

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
        read = self.start_load(request_id, hashes, first=first, dies=dies)
        try:
            if read.blocks:
                objects = [_object(block) for block in read.blocks]
                reading = asyncio.ensure_future(self._transport.pool_load(target, objects, blocks[: len(objects)]))
                await self._clock.sleep_until(read.end_ns)
                await self._clock.external(reading)
        except EngineFailure as failure:
            if self.cancel_load(read):
                logger.warning("request %s computes what the pool did not give: %s", request_id, failure)
            return 0  # what it was to read is evicted, or its host is gone
        except BaseException:
            self.cancel_load(read)
            raise
        return self.finish_load(read)

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
        write = self.start_store(request_id, hashes, dies=dies)
        if write is None:
            return
        try:
            objects = [_object(block) for block in write.blocks]
            writing = asyncio.ensure_future(
                self._transport.pool_store(source, blocks[np.array(write.positions)], objects)
            )
            await self._clock.sleep_until(write.end_ns)
            await self._clock.external(writing)
        except BaseException:  # re-raised: room must not stay reserved for bytes that will not come
            self.revoke_store(write)
            raise
        self.finish_store(write)

    def _drop(self, blocks: Sequence[PoolBlock]) -> None:
        self._transport.pool_free([_object(block) for block in blocks])


def _object(block: PoolBlock) -> PoolObject:
    return PoolObject(host_id=block.host_id, handle=block.handle)
