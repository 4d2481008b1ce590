"""How the control plane reaches devices: steps, and cache blocks that move between devices.

Owns: which worker holds which rank or host, and the fan-out of one order to the workers that it concerns.
Must not know: requests, simulated time, what a worker is made of (an object here, or a process behind a channel).
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from model.step import StepInput, StepOutput
from serving.core.ids import BlockIds, InstanceId

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankRef:
    """One rank of one instance."""

    instance_id: InstanceId
    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolObject:
    """One block's bytes in the pool: the host that holds them and its name for them."""

    host_id: int
    handle: int


class Transport(Protocol):
    """Orders to devices. Each returns at once; the awaitable ends when the bytes have moved.

    Orders to one device are carried out in the order in which they were given, steps apart from block movements.
    Raises EngineFailure, from the awaitable, when a device is lost.
    """

    def step(
        self, instance_id: InstanceId, inputs: Sequence[StepInput], *, charged_ns: int
    ) -> Awaitable[list[StepOutput]]:
        """Run one step on every rank of an instance; entry r of `inputs` and of the result is rank r's."""

    def kv_transfer(
        self, source: RankRef, source_blocks: BlockIds, target: RankRef, target_blocks: BlockIds
    ) -> Awaitable[None]:
        """Copy cache blocks from rank to rank."""

    def pool_load(
        self, target: RankRef | InstanceId, objects: Sequence[PoolObject], blocks: BlockIds
    ) -> Awaitable[None]:
        """Copy pool objects into cache blocks of one rank, or of every rank of an instance."""

    def pool_store(self, source: RankRef, blocks: BlockIds, objects: Sequence[PoolObject]) -> Awaitable[None]:
        """Copy cache blocks of one rank into pool objects."""

    def pool_free(self, objects: Sequence[PoolObject]) -> None:
        """Drop pool objects that the index has evicted."""


class NullTransport:
    """No devices: a run with timing shards moves no bytes."""

    def step(
        self, instance_id: InstanceId, inputs: Sequence[StepInput], *, charged_ns: int
    ) -> Awaitable[list[StepOutput]]:
        raise AssertionError("timing shards make no steps on devices")

    async def kv_transfer(
        self, source: RankRef, source_blocks: BlockIds, target: RankRef, target_blocks: BlockIds
    ) -> None:
        return None

    async def pool_load(self, target: RankRef | InstanceId, objects: Sequence[PoolObject], blocks: BlockIds) -> None:
        return None

    async def pool_store(self, source: RankRef, blocks: BlockIds, objects: Sequence[PoolObject]) -> None:
        return None

    def pool_free(self, objects: Sequence[PoolObject]) -> None:
        return None


# Carries out `method(*args)` on a worker: (worker_id, lane, method, args). Lanes are independent of each other.
Invoke = Callable[[str, str, str, tuple[Any, ...]], "asyncio.Future[Any]"]
OnInstanceLost = Callable[[InstanceId, str], None]  # and a message
OnHostLost = Callable[[int], None]


class WorkerTransport:
    """Transport over workers (serving/worker.py).

    `ranks` gives per instance its workers in rank order and the ranks of each; `hosts` the worker of each host.
    `address_of` is the name by which one worker can reach another.
    """

    def __init__(
        self,
        *,
        invoke: Invoke,
        ranks: Mapping[InstanceId, Sequence[tuple[str, Sequence[int]]]],
        hosts: Sequence[str],
        address_of: Mapping[str, Any],
    ) -> None:
        self._invoke = invoke
        self._ranks = {instance_id: [(w, tuple(r)) for w, r in workers] for instance_id, workers in ranks.items()}
        self._worker_of = {
            (instance_id, rank): worker
            for instance_id, workers in self._ranks.items()
            for worker, local in workers
            for rank in local
        }
        self._hosts = list(hosts)
        self._address_of = dict(address_of)
        self._frees: set[asyncio.Future[Any]] = set()
        self._lost: set[str] = set()
        self._on_instance_lost: OnInstanceLost = lambda instance_id, message: None
        self._on_host_lost: OnHostLost = lambda host_id: None

    def watch(self, on_instance_lost: OnInstanceLost, on_host_lost: OnHostLost) -> None:
        """Call these, once, when a device of an instance or a host is gone, whether or not it has an order to carry
        out."""
        self._on_instance_lost, self._on_host_lost = on_instance_lost, on_host_lost

    def lose(self, worker_id: str, message: str) -> None:
        """Whoever carries the orders has found out that a worker is gone. Saying so twice is harmless."""
        if worker_id in self._lost:
            return
        self._lost.add(worker_id)
        logger.warning("%s", message)
        if worker_id in self._hosts:
            self._on_host_lost(self._hosts.index(worker_id))
        for instance_id, workers in self._ranks.items():
            if any(worker == worker_id for worker, _ in workers):
                self._on_instance_lost(instance_id, message)

    def step(
        self, instance_id: InstanceId, inputs: Sequence[StepInput], *, charged_ns: int
    ) -> Awaitable[list[StepOutput]]:
        futures = [
            self._invoke(worker, "step", "step", ([inputs[rank] for rank in local], charged_ns))
            for worker, local in self._ranks[instance_id]
        ]
        return self._join_steps(futures)

    async def _join_steps(self, futures: Sequence["asyncio.Future[Any]"]) -> list[StepOutput]:
        # The first error ends the wait: the other ranks of a lost one would only run into their timeout.
        return [output for outputs in await asyncio.gather(*futures) for output in outputs]

    def kv_transfer(
        self, source: RankRef, source_blocks: BlockIds, target: RankRef, target_blocks: BlockIds
    ) -> Awaitable[None]:
        address = self._address_of[self._worker_of[source.instance_id, source.rank]]
        order = (target.rank, target_blocks, address, source.rank, source_blocks)
        return self._invoke(self._worker_of[target.instance_id, target.rank], "data", "pull_blocks", order)

    def pool_load(
        self, target: RankRef | InstanceId, objects: Sequence[PoolObject], blocks: BlockIds
    ) -> Awaitable[None]:
        parts = self._by_host(objects)
        workers: Sequence[tuple[str, Sequence[int]]]
        if isinstance(target, RankRef):
            workers = [(self._worker_of[target.instance_id, target.rank], (target.rank,))]
        else:
            workers = self._ranks[target]
        futures = [self._invoke(worker, "data", "load_blocks", (local, blocks, parts)) for worker, local in workers]
        return self._drain(futures)

    async def pool_store(self, source: RankRef, blocks: BlockIds, objects: Sequence[PoolObject]) -> None:
        worker = self._worker_of[source.instance_id, source.rank]
        if self._frees:  # the room may be that of evicted blocks
            await asyncio.gather(*self._frees, return_exceptions=True)
        await self._invoke(worker, "data", "store_blocks", (source.rank, blocks, self._by_host(objects)))

    def pool_free(self, objects: Sequence[PoolObject]) -> None:
        for host_id, (handles, _) in self._handles_by_host(objects).items():
            future = self._invoke(self._hosts[host_id], "data", "free", (handles,))
            self._frees.add(future)
            future.add_done_callback(self._on_freed)

    def _on_freed(self, future: "asyncio.Future[Any]") -> None:
        self._frees.discard(future)
        if not future.cancelled() and future.exception() is not None:
            logger.warning("pool_free: %s", future.exception())  # a host that is lost has freed its memory

    async def _drain(self, futures: Sequence["asyncio.Future[Any]"]) -> None:
        await asyncio.gather(*futures)

    def _by_host(self, objects: Sequence[PoolObject]) -> list[tuple[Any, list[int], list[int]]]:
        """Per host: its address, its handles, and the positions of those in `objects`."""
        by_host = self._handles_by_host(objects)
        return [(self._address_of[self._hosts[host_id]], *by_host[host_id]) for host_id in sorted(by_host)]

    def _handles_by_host(self, objects: Sequence[PoolObject]) -> dict[int, tuple[list[int], list[int]]]:
        by_host: dict[int, tuple[list[int], list[int]]] = {}
        for position, item in enumerate(objects):
            handles, positions = by_host.setdefault(item.host_id, ([], []))
            handles.append(item.handle)
            positions.append(position)
        return by_host
