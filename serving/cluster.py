"""The cluster as the control plane sees it: instances, router, pool and planes, wired together.

Owns: what a request may hold at once (a place in the router, blocks at two instances, a lease) and when each is given
back; the movements of blocks between instances and the pool.
Must not know: HTTP, Ray, whether time is virtual or shards make tensors: it is given a clock, shards and a transport.
"""

import asyncio
import functools
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from devices.clock import Clock
from devices.fabric import Endpoint, Fabric
from serving.config import Role, RunConfig
from serving.core.event_log import EventLog
from serving.core.ids import BlockIds, InstanceId, RequestId
from serving.core.request import Request
from serving.core.router import Placement, Router, source_prefill_rank
from serving.core.scheduled_batch import Load
from serving.engine import Engine, RunEnd, TokenSink
from serving.errors import EngineFailure
from serving.kv_pool import KvPool
from serving.transport import RankRef, Transport


class Hold:
    """What a request holds at one instance, shared by its life and by the movements of its blocks.

    The last `release` gives it back: blocks may not be reused while bytes are still on their way into or out of them.
    """

    def __init__(self, give_back: Callable[[], None]) -> None:
        self._give_back = give_back
        self._count = 1
        self.released = asyncio.Event()

    def share(self) -> None:
        """One more user."""
        assert self._count, "held by nobody any more"
        self._count += 1

    def release(self) -> None:
        """One user less."""
        assert self._count, "released too often"
        self._count -= 1
        if not self._count:
            self._give_back()
            self.released.set()


@dataclass(slots=True, kw_only=True, eq=False)
class Placed:
    """A request with a place: instances, and what it holds there."""

    request: Request
    placement: Placement
    prefill: Engine
    prefill_hold: Hold
    decode: Engine | None = None  # None: colocated
    decode_hold: Hold | None = None
    decode_blocks: BlockIds | None = None

    @property
    def is_disaggregated(self) -> bool:
        """Whether another instance decodes."""
        return self.decode is not None

    async def released(self) -> None:
        """Wait until nothing of it is held."""
        await self.prefill_hold.released.wait()
        if self.decode_hold is not None:
            await self.decode_hold.released.wait()


class Cluster:
    """Everything between the frontend and the devices."""

    def __init__(
        self,
        *,
        config: RunConfig,
        clock: Clock,
        log: EventLog,
        engines: Mapping[Role, list[Engine]],
        router: Router,
        pool: KvPool | None,
        fabric: Fabric,
        transport: Transport,
        dies: Mapping[InstanceId, list[Endpoint]],
        kv_bytes_per_token: int,
    ) -> None:
        self.config = config
        self.clock = clock
        self.log = log
        self.engines = engines
        self.router = router
        self.pool = pool
        self.fabric = fabric
        self.on_capacity: Callable[[], None] = lambda: None
        self._transport = transport
        self._dies = dies
        self._kv_bytes_per_token = kv_bytes_per_token
        self._engine_of = {engine.instance_id: engine for group in engines.values() for engine in group}
        self._loops: list[asyncio.Task[None]] = []
        self._moves: set[asyncio.Task[None]] = set()
        self.num_kv_transfers = 0

    @property
    def all_engines(self) -> list[Engine]:
        """Every instance."""
        return list(self._engine_of.values())

    @property
    def failure(self) -> EngineFailure | None:
        """Why the cluster cannot serve, if an instance is lost."""
        return next((engine.failure for engine in self.all_engines if engine.failure is not None), None)

    def start(self) -> None:
        """Start the step loops, in the running event loop."""
        loop = asyncio.get_running_loop()
        self._loops = [loop.create_task(e.run(), name=f"engine {e.instance_id}") for e in self.all_engines]

    async def stop(self) -> None:
        """End the step loops; requests must have ended before."""
        await self.wait_for_moves()
        for task in self._loops:
            task.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)
        self._loops.clear()

    async def wait_for_moves(self) -> None:
        """Wait until no block is on its way."""
        while self._moves:
            await asyncio.gather(*self._moves, return_exceptions=True)

    def held(self) -> dict[str, int]:
        """What is held now; all zero when the cluster is at rest."""
        schedulers = [engine.scheduler for engine in self.all_engines]
        return {
            "requests": sum(len(s.request_ids) for s in schedulers),
            "slots": sum(s.num_running for s in schedulers),
            "blocks": sum(s.num_used_blocks for s in schedulers),
            "runs": sum(engine.num_runs for engine in self.all_engines),
            "placements": self.router.num_placements,
            "moves": len(self._moves),
            "leases": self.pool.index.num_leases if self.pool else 0,
            "puts": self.pool.index.num_pending_puts if self.pool else 0,
        }

    def check_invariants(self) -> None:
        """Raise AssertionError if any part contradicts itself."""
        for engine in self.all_engines:
            engine.scheduler.check_invariants()
        self.router.check_invariants()
        self.fabric.check_invariants()
        if self.pool is not None:
            self.pool.index.check_invariants()
