"""What is written down of movements of KV blocks, and of the pool's fill.

Owns: the columns while they grow; a record of the fill that stays short however long the run.
Must not know: who moves what.
"""

import numpy as np

from serving.pool_moves import MOVE_KINDS, MoveKind, PoolMoves
from serving.simulation.columns import MoveColumns, PoolColumns
from serving.simulation.growing_columns import as_int16, as_int32, as_int64, int_column
from serving.simulation.life import Life

MOST_FILLS = 8192  # then every second one is dropped, and from then on half as many are kept


class MoveNotes:
    """Of one run. With `keep` every movement; the pool's fill always, at the beginning of movements."""

    def __init__(self, pool: PoolMoves | None, *, keep: bool) -> None:
        self._pool = pool
        self._keep = keep
        self._kind, self._request, self._instance = int_column(), int_column(), int_column()
        self._start_ns, self._end_ns, self._num_bytes = int_column(), int_column(), int_column()
        self._fill_ns: list[int] = []
        self._fill_bytes: list[int] = []
        self._every, self._num_seen = 1, 0

    def note(self, kind: MoveKind, life: Life, start_ns: int, end_ns: int, num_bytes: int) -> None:
        """A movement has begun."""
        if self._pool is not None:
            self._note_fill(start_ns, self._pool.index.used_bytes)
        if not self._keep:
            return
        instance = life.decode if kind == "kv_transfer" else life.prefill
        assert instance is not None
        self._kind.append(MOVE_KINDS.index(kind))
        self._request.append(life.index)
        self._instance.append(instance.index)
        self._start_ns.append(start_ns)
        self._end_ns.append(end_ns)
        self._num_bytes.append(num_bytes)

    def _note_fill(self, now_ns: int, used_bytes: int) -> None:
        self._num_seen += 1
        if self._fill_ns and self._fill_ns[-1] == now_ns:
            self._fill_bytes[-1] = used_bytes
        elif self._num_seen % self._every == 0:
            self._fill_ns.append(now_ns)
            self._fill_bytes.append(used_bytes)
            if len(self._fill_ns) > MOST_FILLS:
                del self._fill_ns[::2], self._fill_bytes[::2]
                self._every *= 2

    def move_columns(self) -> MoveColumns | None:
        """Of all movements, if they were kept."""
        if not self._keep:
            return None
        return MoveColumns(
            kind=as_int16(self._kind),
            request=as_int32(self._request),
            start_ns=as_int64(self._start_ns),
            end_ns=as_int64(self._end_ns),
            num_bytes=as_int64(self._num_bytes),
            instance=as_int16(self._instance),
        )

    def pool_columns(self) -> PoolColumns | None:
        """Of the pool, if there is one."""
        pool = self._pool
        if pool is None:
            return None
        return PoolColumns(
            capacity_bytes=pool.index.capacity_bytes,
            block_bytes=pool.block_bytes,
            num_hits=pool.index.num_hits,
            num_misses=pool.index.num_misses,
            num_evicted=pool.index.num_evicted,
            num_loaded_blocks=pool.num_loaded_blocks,
            num_stored_blocks=pool.num_stored_blocks,
            time_ns=np.array(self._fill_ns, np.int64),
            used_bytes=np.array(self._fill_bytes, np.int64),
            host_used_bytes=np.array(list(pool.index.host_used_bytes.values()), np.int64),
        )
