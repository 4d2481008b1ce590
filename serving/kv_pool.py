"""The shared KV-cache pool as the control plane uses it: find a prefix, load it, store new blocks.

Owns: the order of index, fabric and bytes: a prefix is leased before it is read, a block is published after its bytes
are there, and evicted bytes are dropped before their room is used again.
Must not know: scheduling, HTTP, what a block contains.
Source: arXiv 2506.12708, section 4.4 (EMS: index apart from bytes, NPUs read and write host DRAM over UB); Mooncake
Store (two-phase put, leases).

Each block crosses the UB plane once per instance: the dies of an instance divide the blocks among them, and pass them
on inside the instance, which is not charged (it is the bulk all-gather of a prefill step, small beside the step itself).
"""

import asyncio
from collections.abc import Sequence

from devices.clock import Clock
from devices.fabric import Endpoint, Fabric
from serving.core.event_log import EventLog
from serving.core.ids import BlockHash, BlockIds, InstanceId, RequestId
from serving.core.pool_index import Lease, PoolIndex, Put
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
        self.index = index
        self._hosts = list(hosts)
        self._fabric = fabric
        self._transport = transport
        self._clock = clock
        self._log = log
        self._block_bytes = block_bytes
        self._block_size = block_size
        self.num_queried_tokens = 0
        self.num_hit_tokens = 0
