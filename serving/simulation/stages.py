"""What a placed request goes through in virtual time: the movements and hand-overs of serving/cluster.py, as callbacks.

Owns: prefill, reading from and writing to the pool, the hand-over of KV, decoding: what follows what, and when.
Must not know: how a place is found, when requests arrive, how ranks, prompts and the pool decide.

Every callback is one round of the plain plane's event loop, so that even what happens at the same instant comes in the
same order.
"""

from devices.fabric import Fabric
from serving.core.decode_ranks import DecodeRow
from serving.core.event_log import EventLog
from serving.core.prompt_batcher import Prompt
from serving.core.router import source_prefill_rank
from serving.pool_moves import PoolMoves, PoolRead, PoolWrite
from serving.simulation.admission import Admission, ignore
from serving.simulation.columns import NEVER
from serving.simulation.event_loop import Callback, EventLoop
from serving.simulation.life import Life
from serving.simulation.move_notes import MoveNotes


class Stages:
    """From a place to the last token."""

    def __init__(
        self,
        *,
        loop: EventLoop,
        log: EventLog | None,
        admission: Admission,
        pool: PoolMoves | None,
        fabric: Fabric,
        moves: MoveNotes,
        block_size: int,
        kv_bytes_per_token: int,
        hidden_state_bytes: int,
        on_finished: Callback,
    ) -> None:
        """`on_finished(life)` is called when a request has all its tokens."""
        self._loop = loop
        self._log = log
        self._admission = admission
        self._pool = pool
        self._fabric = fabric
        self._moves = moves
        self._block_size = block_size
        self._kv_bytes_per_token = kv_bytes_per_token
        self._hidden_state_bytes = hidden_state_bytes
        self._on_finished = on_finished

    def close(self) -> None:
        """The run is over: as Admission's."""
        self._on_finished = ignore

    def start_prefill(self, life: Life) -> None:
        """A request has a place: queue its prompt there."""
        assert life.prefill is not None
        if life.scheduled_ns == NEVER:
            life.scheduled_ns = self._loop.now_ns
        life.prompt = Prompt(life, life.num_tokens, life.key, life.block_hashes)
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
        self._loop.call_soon(self._admission.release_prefill, life)

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
        self._admission.prefill_done(life)
        if self._pool is not None and life.block_hashes:
            life.prefill_holds += 1
            self._loop.call_soon(self._start_store, life)
        if life.num_output_tokens >= life.max_tokens:
            self._on_finished(life)
            return
        life.prefill_holds += 1
        life.decode_holds += 1
        self._loop.call_soon(self._start_transfer, life)

    def _start_store(self, life: Life) -> None:
        assert self._pool is not None
        assert life.prefill is not None
        write = self._pool.start_store(life.request_id, life.block_hashes, dies=life.prefill.dies)
        if write is None:
            self._loop.call_soon(self._admission.release_prefill, life)
        else:
            self._moves.note(
                "pool_store", life, write.start_ns, write.end_ns, len(write.blocks) * self._pool.block_bytes
            )
            self._loop.call_at(write.end_ns, self._end_store, (life, write))

    def _end_store(self, what: tuple[Life, PoolWrite]) -> None:
        life, write = what
        assert self._pool is not None
        self._pool.finish_store(write)
        self._loop.call_soon(self._admission.release_prefill, life)

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
        self._admission.release_prefill(life)
        self._admission.release_decode(life)

    def _hear_of_transfer(self, life: Life) -> None:
        self._loop.call_soon(self._start_decode, life)

    def _start_decode(self, life: Life) -> None:
        assert life.decode is not None
        assert life.row is not None
        self._admission.leave_prefill(life)
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
        self._loop.call_soon(self._on_finished, life)

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
        self._loop.call_soon(self._admission.start_again, life)


def _life(prompt: Prompt) -> Life:
    assert isinstance(prompt.owner, Life)
    return prompt.owner


def _owner(row: DecodeRow) -> Life:
    assert isinstance(row.owner, Life)
    return row.owner
