"""The lives of requests in virtual time: the sequence of serving/frontend.py and serving/cluster.py, as callbacks.

Owns: when a request is admitted, where it goes next, and that everything it holds is given back.
Must not know: asyncio, tensors, real time; how ranks, prompts and the pool decide.

The live control plane makes one coroutine per request; a million of them would take hours. Here a request is an object
that callbacks pass on. Decisions are made by the same router, pool and planes, and by schedulers that follow the same
rules with counts in place of blocks; every callback is one round of the plain plane's event loop, so that even what
happens at the same instant comes in the same order. Both ways note the same events (tests/serving/simulation).
"""

import heapq
from collections.abc import Callable
from typing import cast

import numpy as np

from devices.fabric import Fabric
from serving.config import RunConfig
from serving.core.acceptance import first_draw
from serving.core.decode_ranks import DecodeRow
from serving.core.event_log import EventLog
from serving.core.ids import BlockHash, Counts, RequestId
from serving.core.prompt_batcher import Prompt
from serving.core.request import OutcomeReason
from serving.core.router import Room, Router, source_prefill_rank
from serving.pool_moves import PoolMoves, PoolRead, PoolWrite
from serving.simulation.columns import NEVER
from serving.simulation.decode_instance import DecodeInstance
from serving.simulation.event_loop import EventLoop
from serving.simulation.life import Life, LifeNotes
from serving.simulation.move_notes import MoveNotes
from serving.simulation.prefill_instance import PrefillInstance
from serving.workloads.workload import Workload

PROGRESS_REQUESTS = 1024  # are over between two words of progress


class Driver:
    """One run of a disaggregated configuration."""

    def __init__(
        self,
        *,
        config: RunConfig,
        workload: Workload,
        loop: EventLoop,
        log: EventLog | None,
        router: Router,
        pool: PoolMoves | None,
        fabric: Fabric,
        prefills: list[PrefillInstance],
        decodes: list[DecodeInstance],
        room: Room,
        notes: LifeNotes,
        moves: MoveNotes,
        kv_bytes_per_token: int,
        hidden_state_bytes: int,
        on_progress: Callable[[int], None],
    ) -> None:
        """`room`: of all decode ranks, instance after instance, kept up to date by their instances."""
        self._config = config
        self._workload = workload
        self._loop = loop
        self._log = log
        self._router = router
        self._pool = pool
        self._fabric = fabric
        self._prefills = prefills
        self._decodes = decodes
        self._room = room
        self._notes = notes
        self._moves = moves
        self._kv_bytes_per_token = kv_bytes_per_token
        self._hidden_state_bytes = hidden_state_bytes
        self._on_progress = on_progress
        self._num_over = 0
        self._block_size = config.cache.block_size
        self._max_num_seqs = config.instances["decode"].max_num_seqs
        self._max_queued = config.scheduler.max_queued_requests
        self._has_priorities = config.scheduler.policy == "priority"
        self._needs_hashes = pool is not None or config.instances["prefill"].prefix_caching
        self.end_ns = 0  # the last outcome
        self._queue: list[tuple[tuple[int, int], Life]] = []
        self._lives: dict[int, Life] = {}
        self._num_sent = 0
        self._is_closed_loop = config.workload.max_concurrency is not None
        # Views that give plain integers: reading single numbers out of arrays costs three times as much.
        columns = workload.columns
        self._arrival_ns = None if columns.arrival_ns is None else columns.arrival_ns.data
        self._num_prompt_tokens = columns.num_prompt_tokens.data
        self._max_tokens = columns.max_tokens.data
        self._priority = columns.priority.data
        self._seeds = columns.seeds.data  # NO_SEED is negative, and drawn as 0
        self._prefill_of = {prefill.instance_id: prefill for prefill in prefills}
        self._decode_of = {decode.instance_id: decode for decode in decodes}

    @property
    def num_lives(self) -> int:
        """Requests without an outcome, or that still hold something."""
        return len(self._lives)

    @property
    def num_queued(self) -> int:
        """Requests without a place."""
        return len(self._queue)

    def start(self) -> None:
        """Send the first requests."""
        if self._is_closed_loop or self._arrival_ns is None:
            count = len(self._workload)
            if self._config.workload.max_concurrency is not None:
                count = min(count, self._config.workload.max_concurrency)
            self._num_sent = count
            for index in range(count):
                self._loop.call_soon(self._arrive, index)
        elif len(self._workload):
            self._loop.call_at(self._arrival_ns[0], self._arrive_on_time, 0, gives_way=False)

    def abort_all(self) -> None:
        """The run is interrupted: whoever has no outcome is aborted."""
        for life in list(self._lives.values()):
            self._close(life, OutcomeReason.ABORT)

    # --- arrival and admission ---

    def _arrive_on_time(self, index: int) -> None:
        arrivals = self._arrival_ns
        assert arrivals is not None
        self._num_sent = index + 1
        if index + 1 < len(arrivals):
            self._loop.call_at(arrivals[index + 1], self._arrive_on_time, index + 1, gives_way=False)
        self._arrive(index)

    def _arrive(self, index: int) -> None:
        workload, loop = self._workload, self._loop
        self._notes.num_arrived += 1
        request_id = RequestId(workload.request_ids[index])
        life = Life(
            index=index,
            request_id=request_id,
            order=self._notes.num_arrived,
            priority=self._priority[index] if self._has_priorities else 0,
            num_prompt_tokens=self._num_prompt_tokens[index],
            max_tokens=self._max_tokens[index],
            arrival_ns=loop.now_ns,
            draw=first_draw(request_id, max(0, self._seeds[index])) if self._config.is_speculative else 0,
        )
        if self._needs_hashes:
            life.block_hashes = cast(list[BlockHash], workload.block_hashes(index, self._block_size))
        self._lives[index] = life
        if self._log is not None:
            self._log.append(loop.now_ns, "arrive", request_id, prompt=life.num_prompt_tokens, limit=life.max_tokens)
        if life.num_tokens_limit > self._config.model.max_model_len:
            self._reject(life, OutcomeReason.PROMPT_TOO_LONG)
            return
        self._enqueue(life)
        self._admit_waiting()
        life.is_fresh = False
        if life.prefill is not None:
            loop.call_soon(self._start_prefill, life)
        elif len(self._queue) > self._max_queued:
            self._queue = [entry for entry in self._queue if entry[1] is not life]
            heapq.heapify(self._queue)
            self._reject(life, OutcomeReason.QUEUE_FULL)

    def _enqueue(self, life: Life) -> None:
        heapq.heappush(self._queue, ((life.priority, life.order), life))

    def _admit_waiting(self) -> None:
        """Place waiting requests in order, as far as there is room; nobody passes the first."""
        queue = self._queue
        while queue:
            life = queue[0][1]
            if not self._place(life):
                return
            heapq.heappop(queue)
            if not life.is_fresh:
                self._loop.call_soon(self._start_prefill, life)

    def _place(self, life: Life) -> bool:
        """Choose instances and reserve the decode rank's KV space; False if there is no room now."""
        for decode in self._decodes:
            decode.catch_up()
        num_tokens, router = life.num_tokens, self._router
        placement = router.reserve(
            request_id=life.request_id,
            num_tokens=num_tokens,
            num_blocks=num_tokens // self._block_size + 1,
            # A request that is leaving may be gone for the router and still hold its slot.
            room=Room(
                free_blocks=self._room.free_blocks,
                free_slots=np.minimum(self._room.free_slots, self._max_num_seqs - router.num_requests),
            ),
            num_prefix_tokens=self._prefix_tokens(life),
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
        life.prefill = self._prefill_of[placement.prefill]
        life.decode = self._decode_of[placement.decode]
        life.row = life.decode.reserve(
            life,
            rank=placement.rank,
            num_tokens=num_tokens,
            total_limit=life.num_tokens_limit,
            key=(life.priority, life.order),
            draw=life.draw,
        )
        life.prefill_holds = life.decode_holds = 1
        life.needs_prefill = True
        return True

    def _prefix_tokens(self, life: Life) -> Counts | None:
        if self._config.router.policy != "prefix_affinity":
            return None
        return np.array([p.batcher.num_prefix_tokens(life.block_hashes) for p in self._prefills], np.int64)

    # --- prefill ---

    def _start_prefill(self, life: Life) -> None:
        assert life.prefill is not None
        if life.scheduled_ns == NEVER:
            life.scheduled_ns = self._loop.now_ns
        life.prompt = Prompt(life, life.num_tokens, (life.priority, life.order), life.block_hashes)
        life.prefill.add(life.prompt)

    def find_external(self, prompt: Prompt) -> int:
        """Tokens of a prompt's prefix that the pool holds."""
        assert self._pool is not None
        life = _life(prompt)
        return self._pool.find_prefix_tokens(life.block_hashes)

    def on_admit(self, prompt: Prompt, num_cached: int, num_external: int) -> None:
        """A prefill instance has admitted a prompt; what is external is to be loaded first."""
        life = _life(prompt)
        assert life.prefill is not None
        if self._log is not None:
            self._log.append(
                self._loop.now_ns,
                "admit",
                life.request_id,
                instance=life.prefill.instance_id,
                rank=0,
                cached=num_cached,
            )
        if num_external:
            life.prefill_holds += 1
            self._loop.call_soon(self._start_load, (life, num_cached, num_external))
        else:
            self._begin_prefill(life, num_cached, 0)

    def _begin_prefill(self, life: Life, num_cached: int, num_pool: int) -> None:
        if life.prefill_start_ns == NEVER:
            life.prefill_start_ns = self._loop.now_ns
            life.num_cached_tokens, life.num_pool_tokens = num_cached, num_pool

    def _start_load(self, what: tuple[Life, int, int]) -> None:
        life, num_cached, num_external = what
        assert self._pool is not None
        assert life.prefill is not None
        first = num_cached // self._block_size
        last = first + num_external // self._block_size
        read = self._pool.start_load(life.request_id, life.block_hashes[:last], first=first, dies=life.prefill.dies)
        if read.blocks:
            num_bytes = len(read.blocks) * self._pool.block_bytes
            self._moves.note("pool_load", life, read.start_ns, read.end_ns, num_bytes)
            self._loop.call_at(read.end_ns, self._end_load, (life, read))
        else:
            self._end_load((life, read))

    def _end_load(self, what: tuple[Life, PoolRead]) -> None:
        life, read = what
        assert self._pool is not None
        assert life.prefill is not None
        assert life.prompt is not None
        num_loaded = self._pool.finish_load(read)
        num_cached = (read.first + num_loaded) * self._block_size
        self._begin_prefill(life, num_cached, num_loaded * self._block_size)
        life.prefill.activate(life.prompt, num_cached)
        self._loop.call_soon(self._release_prefill, life)

    def on_computed(self, prompt: Prompt) -> None:
        """A prompt is computed, and a token came out."""
        life, now_ns = _life(prompt), self._loop.now_ns
        assert life.prefill is not None
        if life.first_token_ns == NEVER:
            life.first_token_ns = now_ns
        else:
            life.prefill.notes.first_gaps_ns.append(now_ns - life.last_token_ns)
        life.last_token_ns = now_ns
        life.num_output_tokens += 1
        if self._log is not None:
            self._log.append(now_ns, "done", life.request_id, instance=life.prefill.instance_id, stopped=0)
        self._loop.call_soon(self._after_prefill, life)

    def _after_prefill(self, life: Life) -> None:
        self._router.prefill_done(life.request_id)
        if self._pool is not None and life.block_hashes:
            life.prefill_holds += 1
            self._loop.call_soon(self._start_store, life)
        if life.num_output_tokens >= life.max_tokens:
            self._finish(life)
            return
        life.prefill_holds += 1
        life.decode_holds += 1
        self._loop.call_soon(self._start_transfer, life)

    def _start_store(self, life: Life) -> None:
        assert self._pool is not None
        assert life.prefill is not None
        write = self._pool.start_store(life.request_id, life.block_hashes, dies=life.prefill.dies)
        if write is None:
            self._loop.call_soon(self._release_prefill, life)
        else:
            self._moves.note(
                "pool_store", life, write.start_ns, write.end_ns, len(write.blocks) * self._pool.block_bytes
            )
            self._loop.call_at(write.end_ns, self._end_store, (life, write))

    def _end_store(self, what: tuple[Life, PoolWrite]) -> None:
        life, write = what
        assert self._pool is not None
        self._pool.finish_store(write)
        self._loop.call_soon(self._release_prefill, life)

    # --- hand-over and decode ---

    def _start_transfer(self, life: Life) -> None:
        assert life.prefill is not None
        assert life.decode is not None
        assert life.row is not None
        rank, dies, now_ns = life.row.rank, life.prefill.dies, self._loop.now_ns
        targets = life.decode.dies
        source = source_prefill_rank(
            prefill_tp_size=len(dies), decode_tp_size=1, decode_dp_size=len(targets), decode_dp_rank=rank
        )
        num_bytes = (life.num_tokens - 1) * self._kv_bytes_per_token + self._hidden_state_bytes
        end_ns = self._fabric.reserve(
            "rdma", dies[source], targets[rank], num_bytes=num_bytes, now_ns=now_ns, op="read"
        )
        if self._log is not None:
            self._log.append(now_ns, "kv_transfer", life.request_id, source=source, rank=rank, bytes=num_bytes)
        self._moves.note("kv_transfer", life, now_ns, end_ns, num_bytes)
        self._loop.call_at(end_ns, self._end_transfer, life)

    def _end_transfer(self, life: Life) -> None:
        self._loop.call_soon(self._release_after_transfer, life)
        self._loop.call_soon(self._hear_of_transfer, life)

    def _release_after_transfer(self, life: Life) -> None:
        self._release_prefill(life)
        self._release_decode(life)

    def _hear_of_transfer(self, life: Life) -> None:
        self._loop.call_soon(self._start_decode, life)

    def _start_decode(self, life: Life) -> None:
        assert life.decode is not None
        assert life.row is not None
        self._leave_prefill(life)
        life.decode_start_ns = self._loop.now_ns
        life.decode.resume(life.row, life.num_tokens)

    def last_token_ns(self, row: DecodeRow) -> int:
        """When a request had its last token before it joined a decode instance."""
        return _owner(row).last_token_ns

    def on_ended(self, row: DecodeRow) -> None:
        """A decode instance has made a request's last token."""
        life = _owner(row)
        assert life.decode is not None
        life.num_output_tokens = life.max_tokens
        life.last_token_ns = self._loop.now_ns
        if self._log is not None:
            self._log.append(self._loop.now_ns, "done", life.request_id, instance=life.decode.instance_id, stopped=0)
        self._loop.call_soon(self._finish, life)

    def on_preempted(self, row: DecodeRow, last_ns: int) -> None:
        """A decode instance has taken a request's blocks."""
        life = _owner(row)
        assert life.decode is not None
        life.num_output_tokens = row.num_tokens - life.num_prompt_tokens
        life.last_token_ns = max(last_ns, life.last_token_ns)
        life.num_preemptions += 1
        if self._log is not None:
            self._log.append(
                self._loop.now_ns,
                "preempt",
                life.request_id,
                instance=life.decode.instance_id,
                rank=row.rank,
            )
        self._loop.call_soon(self._start_again, life)

    def _start_again(self, life: Life) -> None:
        self._router.release(life.request_id)
        self._leave_prefill(life)
        life.decode_holds -= 1
        assert not life.decode_holds
        if life.prefill_holds:
            life.waits_for_release = True
        else:
            self._admit_again(life)

    def _admit_again(self, life: Life) -> None:
        life.prefill = None
        self._enqueue(life)
        life.is_fresh = True
        self._admit_waiting()
        life.is_fresh = False
        if life.prefill is not None:
            self._start_prefill(life)

    # --- the end ---

    def _finish(self, life: Life) -> None:
        self._router.release(life.request_id)
        self._leave_prefill(life)
        self._release_decode(life)
        self._close(life, OutcomeReason.LENGTH)
        if self._is_closed_loop:
            self._after_rounds(3)

    def _reject(self, life: Life, reason: OutcomeReason) -> None:
        self._close(life, reason)
        if self._is_closed_loop:
            self._after_rounds(1)

    def _after_rounds(self, num_rounds: int) -> None:
        """Send the next request, after so many rounds of the event loop in which the client hears of the end."""
        if num_rounds:
            self._loop.call_soon(self._after_rounds, num_rounds - 1)
        elif self._num_sent < len(self._workload):
            self._num_sent += 1
            self._loop.call_soon(self._arrive, self._num_sent - 1)

    def _close(self, life: Life, reason: OutcomeReason) -> None:
        if self._log is not None:
            self._log.append(
                self._loop.now_ns, "outcome", life.request_id, reason=str(reason), tokens=life.num_output_tokens
            )
        self._notes.write(life, reason)
        self.end_ns = self._loop.now_ns
        self._num_over += 1
        if not self._num_over % PROGRESS_REQUESTS:
            self._on_progress(self._num_over)
        del self._lives[life.index]

    def _leave_prefill(self, life: Life) -> None:
        """The request itself needs its blocks at the prefill instance no longer; movements may."""
        if life.needs_prefill:
            life.needs_prefill = False
            self._release_prefill(life)

    def _release_prefill(self, life: Life) -> None:
        life.prefill_holds -= 1
        if not life.prefill_holds:
            assert life.prefill is not None
            assert life.prompt is not None
            life.prefill.release(life.prompt)
            self._admit_waiting()
            if life.waits_for_release:
                life.waits_for_release = False
                self._loop.call_soon(self._admit_again, life)

    def _release_decode(self, life: Life) -> None:
        life.decode_holds -= 1
        if not life.decode_holds:
            assert life.decode is not None
            assert life.row is not None
            life.decode.release(life.row)
            self._admit_waiting()


def _life(prompt: Prompt) -> Life:
    assert isinstance(prompt.owner, Life)
    return prompt.owner


def _owner(row: DecodeRow) -> Life:
    assert isinstance(row.owner, Life)
    return row.owner
