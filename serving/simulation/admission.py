"""Who gets a place in virtual time, and when it is given back: the queue of serving/frontend.py, the places of
serving/cluster.py.

Owns: the admission queue, the choice and reservation of a place, and the counting of who still needs it.
Must not know: what a request does at its place, when it arrives, how it ends.
"""

import heapq

import numpy as np

from serving.config import RunConfig
from serving.core.event_log import EventLog
from serving.core.ids import Counts, InstanceId
from serving.core.router import Room, Router
from serving.simulation.decode_instance import DecodeInstance
from serving.simulation.event_loop import Callback, EventLoop
from serving.simulation.life import Life
from serving.simulation.prefill_instance import PrefillInstance


class Admission:
    """Places requests in order, as far as there is room; nobody passes the first."""

    def __init__(
        self,
        *,
        config: RunConfig,
        loop: EventLoop,
        log: EventLog | None,
        router: Router,
        room: Room,
        prefills: list[PrefillInstance],
        decodes: list[DecodeInstance],
        on_placed: Callback,
    ) -> None:
        """`on_placed(life)` is called for a request that had to wait. The instances may be put into their lists later.

        `room` is that of all decode ranks, instance after instance; blocks are kept up to date by the instances. Its
        slots are those that neither the router nor the rank counts as taken: the one lets go of a request before the
        other, at one instant.
        """
        self._loop = loop
        self._log = log
        self._router = router
        self._room = room
        self._prefills = prefills
        self._decodes = decodes
        self._on_placed = on_placed
        self._block_size = config.cache.block_size
        self._has_affinity = config.router.policy == "prefix_affinity"
        self._queue: list[tuple[tuple[int, int], Life]] = []
        self._prefill_of: dict[InstanceId, PrefillInstance] = {}
        self._decode_of: dict[InstanceId, DecodeInstance] = {}

    def close(self) -> None:
        """The run is over: no cycle is left that would keep all of it until a garbage collection."""
        self._on_placed = ignore
        self._prefills.clear()
        self._decodes.clear()
        self._prefill_of, self._decode_of = {}, {}

    @property
    def num_queued(self) -> int:
        """Requests without a place."""
        return len(self._queue)

    def try_admit(self, life: Life) -> bool:
        """Queue a request; whether it has a place at once, then `on_placed` is not called."""
        heapq.heappush(self._queue, (life.key, life))
        life.is_fresh = True
        self._admit_waiting()
        life.is_fresh = False
        return life.prefill is not None

    def withdraw(self, life: Life) -> None:
        """Take a request out of the queue."""
        self._queue = [entry for entry in self._queue if entry[1] is not life]
        heapq.heapify(self._queue)

    def prefill_done(self, life: Life) -> None:
        """Its prompt is computed: it loads its prefill instance no longer."""
        self._router.prefill_done(life.request_id)

    def leave_router(self, life: Life) -> None:
        """A request needs its place no longer; its blocks may be needed still."""
        self._router.release(life.request_id)
        assert life.row is not None
        if not life.row.holds_slot:
            self._free_slot(life)

    def leave_prefill(self, life: Life) -> None:
        """The request itself needs its blocks at the prefill instance no longer; movements may. Once is enough."""
        if life.needs_prefill:
            life.needs_prefill = False
            self.release_prefill(life)

    def release_prefill(self, life: Life) -> None:
        """One user less of its blocks there; the last one gives them back."""
        life.prefill_holds -= 1
        if not life.prefill_holds:
            assert life.prefill is not None
            assert life.prompt is not None
            life.prefill.release(life.prompt)
            life.prompt = None  # it knows its owner: a cycle would keep both until a garbage collection
            self._admit_waiting()
            if life.waits_for_release:
                life.waits_for_release = False
                self._loop.call_soon(self.admit_again, life)

    def release_decode(self, life: Life) -> None:
        """One user less of its blocks at the decode rank; the last one gives them back."""
        life.decode_holds -= 1
        if not life.decode_holds:
            assert life.decode is not None
            assert life.row is not None
            if life.row.holds_slot:
                self._free_slot(life)
            life.decode.release(life.row)
            self._admit_waiting()

    def start_again(self, life: Life) -> None:
        """A request was preempted: it needs a new place, once the old one is given back."""
        self.leave_router(life)
        self.leave_prefill(life)
        life.decode_holds -= 1  # the rank has taken its blocks
        assert not life.decode_holds
        if life.prefill_holds:
            life.waits_for_release = True
        else:
            self.admit_again(life)

    def admit_again(self, life: Life) -> None:
        """Queue a preempted request."""
        life.prefill = None
        if self.try_admit(life):
            self._on_placed(life)

    def _admit_waiting(self) -> None:
        queue = self._queue
        while queue:
            life = queue[0][1]
            if not self._place(life):
                return
            heapq.heappop(queue)
            if not life.is_fresh:
                self._loop.call_soon(self._on_placed, life)

    def _place(self, life: Life) -> bool:
        """Choose instances and reserve the decode rank's KV space; False if there is no room now."""
        for decode in self._decodes:
            decode.catch_up()
        num_tokens = life.num_tokens
        placement = self._router.reserve(
            request_id=life.request_id,
            num_tokens=num_tokens,
            num_blocks=num_tokens // self._block_size + 1,
            room=self._room,
            num_prefix_tokens=self._prefix_tokens(life) if self._has_affinity else None,
        )
        if placement is None:
            return False
        if self._log is not None:
            self._log.append(
                self._loop.now_ns,
                "place",
                life.request_id,
                prefill=placement.prefill,
                decode=placement.decode,
                rank=placement.rank,
            )
        if not self._prefill_of:
            self._prefill_of = {prefill.instance_id: prefill for prefill in self._prefills}
            self._decode_of = {decode.instance_id: decode for decode in self._decodes}
        life.prefill = self._prefill_of[placement.prefill]
        life.decode = decode = self._decode_of[placement.decode]
        life.row = decode.reserve(
            life,
            rank=placement.rank,
            num_tokens=num_tokens,
            total_limit=life.num_tokens_limit,
            key=life.key,
            draw=life.draw,
        )
        self._room.free_slots[decode.first_rank + placement.rank] -= 1
        life.prefill_holds = life.decode_holds = 1
        life.needs_prefill = True
        return True

    def _free_slot(self, life: Life) -> None:
        assert life.decode is not None
        assert life.row is not None
        self._room.free_slots[life.decode.first_rank + life.row.rank] += 1

    def _prefix_tokens(self, life: Life) -> Counts:
        return np.array([p.batcher.num_prefix_tokens(life.block_hashes) for p in self._prefills], np.int64)


def ignore(life: Life) -> None:
    """What is called in place of a callback when a run is over."""
