"""The cluster as the control plane sees it: instances, router, pool and planes, wired together.

Owns: what a request may hold at once (a place in the router, blocks at two instances, a lease) and when each is given
back; the movements of blocks between instances and the pool.
Must not know: HTTP, Ray, whether time is virtual or shards make tensors: it is given a clock, shards and a transport.
"""

import asyncio
import functools
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from devices.clock import Clock
from devices.fabric import Endpoint, Fabric
from serving.config import Role, RunConfig
from serving.core.event_log import EventLog
from serving.core.ids import Counts, InstanceId, RequestId
from serving.core.request import Request
from serving.core.router import Placement, Room, Router, source_prefill_rank
from serving.core.scheduled_batch import Load
from serving.engine import Engine
from serving.engine_run import RunEnd, TokenSink
from serving.errors import EngineFailure
from serving.kv_pool import KvPool
from serving.placed import Hold, Placed
from serving.pool_moves import BlockMove
from serving.transport import RankRef, Transport

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class KvTransfer:
    """One hand-over of latent KV, for metrics."""

    instance_id: InstanceId  # that received it
    num_bytes: int  # as charged
    simulated_ns: int
    wall_ns: int


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
        hidden_state_bytes: int = 0,
    ) -> None:
        """`hidden_state_bytes`: of the hidden state that is handed over with a request's KV, for its first draft."""
        self.config = config
        self.clock = clock
        self.log = log
        self.engines = engines
        self.router = router
        self.pool = pool
        self.fabric = fabric
        self.on_capacity: Callable[[], None] = lambda: None
        self.on_kv_transfer: Callable[[KvTransfer], None] = lambda transfer: None  # that is over
        self.on_place: Callable[[Placement], None] = lambda placement: None
        self.on_move: Callable[[BlockMove], None] = lambda move: None
        self._transport = transport
        self._dies = dies
        self._kv_bytes_per_token = kv_bytes_per_token
        self._hidden_state_bytes = hidden_state_bytes
        self._engine_of = {engine.instance_id: engine for group in engines.values() for engine in group}
        self._loops: list[asyncio.Task[None]] = []
        self._moves: set[asyncio.Task[None]] = set()
        self.num_kv_transfers = 0
        if pool is not None:
            pool.on_move = lambda move: self.on_move(move)

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
        """End the step loops, each after the step that it is in; requests must have ended before."""
        await self.wait_for_moves()
        for engine in self.all_engines:
            engine.stop()
        await asyncio.gather(*self._loops)
        self._loops.clear()

    async def wait_for_moves(self) -> None:
        """Wait until no block is on its way."""
        while self._moves:
            await asyncio.gather(*self._moves, return_exceptions=True)

    def knows(self, request_id: RequestId) -> bool:
        """Whether a request of this name holds anything at an instance."""
        return any(engine.knows(request_id) for engine in self.all_engines)

    def held(self) -> dict[str, int]:
        """What is held now; all zero when the cluster is at rest."""
        schedulers = [engine.scheduler for engine in self.all_engines]
        return {
            "requests": sum(len(s.request_ids) for s in schedulers),
            "slots": sum(s.num_running for s in schedulers),
            "blocks": sum(engine.num_used_blocks for engine in self.all_engines),
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

    def lose_instance(self, instance_id: InstanceId, message: str) -> None:
        """A device of it is gone: its requests fail."""
        self._engine_of[instance_id].lose(message)

    def lose_host(self, host_id: int) -> None:
        """A host of the pool is gone: what it held is computed again when it is wanted."""
        if self.pool is not None:
            self.pool.lose_host(host_id)

    def place(self, request: Request, *, order: int) -> Placed | None:
        """Choose instances for a request and reserve its decode rank's KV space; None if there is no room now."""
        role: Role = "decode" if self.config.disaggregated else "colocated"
        num_tokens = request.num_tokens
        rooms = [engine.room for engine in self.engines[role]]
        # What was placed at this very instant may not have come to its instance yet; the router counts it already.
        unplaced_slots = self.config.instances[role].max_num_seqs - self.router.num_requests
        placement = self.router.reserve(
            request_id=request.request_id,
            num_tokens=num_tokens,
            # One more than is known: the first token's block is needed at once.
            num_blocks=num_tokens // self.config.cache.block_size + 1,
            room=Room(
                free_blocks=np.concatenate([room.free_blocks for room in rooms]),
                free_slots=np.minimum(np.concatenate([room.free_slots for room in rooms]), unplaced_slots),
            ),
            num_prefix_tokens=self._prefix_tokens(request),
        )
        if placement is None:
            return None
        self.log.append(
            self.clock.now_ns(),
            "place",
            request.request_id,
            prefill=placement.prefill,
            decode=placement.decode,
            rank=placement.rank,
        )
        self.on_place(placement)
        prefill, decode = self._engine_of[placement.prefill], self._engine_of[placement.decode]
        placed = Placed(
            request=request,
            placement=placement,
            prefill=prefill,
            prefill_hold=Hold(functools.partial(prefill.release, request.request_id)),
        )
        if self.config.disaggregated:
            try:
                placed.decode_blocks = decode.reserve(request, rank=placement.rank, order=order)
            except Exception:
                self.router.release(request.request_id)
                raise
            placed.decode = decode
            placed.decode_hold = Hold(functools.partial(decode.release, request.request_id))
        return placed

    def unplace(self, placed: Placed) -> None:
        """The request's life needs its place no longer; movements of its blocks may still hold parts of it."""
        self.router.release(placed.request.request_id)
        placed.leave_prefill()
        if placed.decode_hold is not None:
            placed.decode_hold.release()

    def _prefix_tokens(self, request: Request) -> Counts | None:
        if self.config.router.policy != "prefix_affinity":
            return None
        return np.array(
            [
                engine.scheduler.num_prefix_tokens(rank, request.block_hashes)
                for engine in self.engines["prefill" if self.config.disaggregated else "colocated"]
                for rank in range(engine.scheduler.num_ranks)
            ],
            np.int64,
        )

    async def prefill(self, request: Request, placed: Placed, *, order: int, sink: TokenSink) -> RunEnd:
        """Compute the prompt (and what was generated before a preemption), and the next token.

        On a colocated instance: everything to the request's end. Afterwards new full blocks are on their way to the
        pool.
        """
        engine = placed.prefill
        rank = 0 if placed.is_disaggregated else placed.placement.rank
        limit = request.num_tokens + 1 if placed.is_disaggregated else request.num_tokens_limit
        pool = self.pool
        end = await engine.add(
            request,
            rank=rank,
            sink=sink,
            limit=limit,
            order=order,
            find_external=None if pool is None else functools.partial(pool.find_prefix_tokens, request.block_hashes),
            load=None if pool is None else functools.partial(self._start_load, request, placed),
        )
        self.router.prefill_done(request.request_id)
        if pool is not None and request.block_hashes:
            self._move(self._store(request, placed), placed.prefill_hold)
        return end

    async def kv_transfer(self, request: Request, placed: Placed) -> None:
        """Send the latent KV of all computed tokens to the decode rank, over RDMA, from the mapped prefill rank.

        Then the prefill instance is left: slot and blocks there are free for another prompt, once the pool has its.
        """
        assert placed.decode is not None
        assert placed.decode_hold is not None
        assert placed.decode_blocks is not None
        move = self._move(self._transfer(request, placed), placed.prefill_hold, placed.decode_hold)
        await asyncio.shield(move)  # a life that is ended meanwhile leaves the movement to its end
        placed.leave_prefill()  # whoever waits there for blocks must not wait until this request is decoded

    async def decode(self, request: Request, placed: Placed, *, sink: TokenSink) -> RunEnd:
        """Generate from the transferred KV to the request's end, or until it is preempted."""
        assert placed.decode is not None
        return await placed.decode.resume(request, sink=sink)

    def _move(self, movement: Coroutine[Any, Any, None], *holds: Hold) -> "asyncio.Task[None]":
        """Run a movement of blocks as a task that shares `holds` until it is over."""
        for hold in holds:
            hold.share()
        task = asyncio.get_running_loop().create_task(movement, name="move")
        self._moves.add(task)

        def finished(task: "asyncio.Task[None]") -> None:
            self._moves.discard(task)
            for hold in holds:
                hold.release()
            error = None if task.cancelled() else task.exception()
            if error is not None:  # whoever awaits the movement hears it too, but nobody may
                logger.warning("a movement of blocks failed: %s: %s", type(error).__name__, error)

        task.add_done_callback(finished)
        return task

    def _start_load(self, request: Request, placed: Placed, load: Load) -> None:
        self._move(self._load(request, placed, load), placed.prefill_hold)

    async def _load(self, request: Request, placed: Placed, load: Load) -> None:
        assert self.pool is not None
        block_size = self.config.cache.block_size
        first = load.num_cached_tokens // block_size
        last = first + load.num_external_tokens // block_size
        instance_id = placed.prefill.instance_id
        target = instance_id if placed.is_disaggregated else RankRef(instance_id=instance_id, rank=load.rank)
        try:
            num_loaded = await self.pool.load(
                request.request_id,
                request.block_hashes[:last],
                first=first,
                blocks=load.block_ids,
                target=target,
                dies=self._pool_dies(placed),
            )
            if not request.is_over:
                placed.prefill.activate(
                    request,
                    num_cached_tokens=(first + num_loaded) * block_size,
                    num_pool_tokens=num_loaded * block_size,
                )
        except Exception as error:  # re-raised: without this the request would wait for its blocks for ever
            message = str(error) if isinstance(error, EngineFailure) else f"{type(error).__name__}: {error}"
            placed.prefill.fail_run(request.request_id, message)
            raise

    async def _store(self, request: Request, placed: Placed) -> None:
        assert self.pool is not None
        engine = placed.prefill
        hashes = request.block_hashes
        blocks = engine.scheduler.block_table(request.request_id)[: len(hashes)]
        rank = 0 if placed.is_disaggregated else placed.placement.rank
        source = RankRef(instance_id=engine.instance_id, rank=rank)
        await self.pool.store(request.request_id, hashes, blocks, source=source, dies=self._pool_dies(placed))

    def _pool_dies(self, placed: Placed) -> list[Endpoint]:
        """The dies that exchange a request's blocks with the pool: all of a prefill instance, or its rank's alone."""
        dies = self._dies[placed.prefill.instance_id]
        return dies if placed.is_disaggregated else [dies[placed.placement.rank]]

    async def _transfer(self, request: Request, placed: Placed) -> None:
        assert placed.decode is not None
        assert placed.decode_blocks is not None
        prefill, decode, rank = placed.prefill, placed.decode, placed.placement.rank
        source_rank = source_prefill_rank(
            prefill_tp_size=len(self._dies[prefill.instance_id]),
            decode_tp_size=1,
            decode_dp_size=len(self._dies[decode.instance_id]),
            decode_dp_rank=rank,
        )
        # All tokens but the one that was just sampled have their KV by now.
        num_tokens = request.num_tokens - 1
        num_blocks = -(-num_tokens // self.config.cache.block_size)
        start_ns = self.clock.now_ns()
        start_wall_ns = time.monotonic_ns()
        num_bytes = num_tokens * self._kv_bytes_per_token + self._hidden_state_bytes
        end_ns = self.fabric.reserve(
            "rdma",
            self._dies[prefill.instance_id][source_rank],
            self._dies[decode.instance_id][rank],
            num_bytes=num_bytes,
            now_ns=start_ns,
            op="read",
        )
        self.log.append(start_ns, "kv_transfer", request.request_id, source=source_rank, rank=rank, bytes=num_bytes)
        self.on_move(
            BlockMove(
                kind="kv_transfer",
                request_id=request.request_id,
                start_ns=start_ns,
                end_ns=end_ns,
                num_bytes=num_bytes,
            )
        )
        moving = asyncio.ensure_future(
            self._transport.kv_transfer(
                RankRef(instance_id=prefill.instance_id, rank=source_rank),
                prefill.scheduler.block_table(request.request_id)[:num_blocks],
                RankRef(instance_id=decode.instance_id, rank=rank),
                placed.decode_blocks[:num_blocks],
            )
        )
        await self.clock.sleep_until(end_ns)
        await self.clock.external(moving)
        self.num_kv_transfers += 1
        self.on_kv_transfer(
            KvTransfer(
                instance_id=decode.instance_id,
                num_bytes=num_bytes,
                simulated_ns=end_ns - start_ns,
                wall_ns=time.monotonic_ns() - start_wall_ns,
            )
        )
