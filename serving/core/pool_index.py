"""Index of the shared KV pool: which host holds which block, who is reading, what goes next.

Owns: the map from block hashes to (host, handle), the two phases of a put, leases, and eviction by bytes.
Must not know: the bytes, transfers, who asks. Time is given.
Source: Mooncake Store (put start / commit / revoke, leases that pin what is read, index apart from bytes); EMS of arXiv
2506.12708 section 4.4 (consistent hashing over hosts, LRU). Hosts are chosen by rendezvous hashing: of all hosts the
one whose hash with the block is highest, so removing a host moves only what it held.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from serving.core.errors import IllegalCall, LeaseLost
from serving.core.ids import BlockHash


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolBlock:
    """Where one block is."""

    block_hash: BlockHash
    host_id: int
    handle: int  # unique over the life of the index
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """A pinned prefix. It protects its blocks until `release`, or until it expires."""

    lease_id: int
    blocks: tuple[PoolBlock, ...]
    expires_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PutStarted:
    """Room for one block, which nobody can find before `put_commit`; `evicted` made the room and must be freed first."""

    block: PoolBlock
    evicted: tuple[PoolBlock, ...]


@dataclass(slots=True)
class _Entry:
    block: PoolBlock
    num_leases: int = 0


class PoolIndex:
    """Metadata of the pool. Blocks that are being read or written are never evicted."""

    def __init__(self, *, hosts: Mapping[int, int], lease_ns: int) -> None:
        """`hosts` gives the capacity of each in bytes."""
        self._capacity = dict(hosts)
        self._used = dict.fromkeys(hosts, 0)
        self._lease_ns = lease_ns
        self._entries: dict[BlockHash, _Entry] = {}
        # Per host, committed and unleased blocks, least recently used first.
        self._idle: dict[int, OrderedDict[BlockHash, None]] = {host_id: OrderedDict() for host_id in hosts}
        self._writing: dict[BlockHash, PoolBlock] = {}
        self._leases: dict[int, Lease] = {}
        self._next_handle = 0
        self._next_lease = 0
        self.num_evicted = 0

    @property
    def num_blocks(self) -> int:
        """Blocks that can be found."""
        return len(self._entries)

    @property
    def num_leases(self) -> int:
        return len(self._leases)

    @property
    def num_pending_puts(self) -> int:
        return len(self._writing)

    @property
    def used_bytes(self) -> int:
        """Of all hosts, blocks being written among them."""
        return sum(self._used.values())

    def find_prefix(self, hashes: Sequence[BlockHash]) -> int:
        """Number of leading blocks that are in the pool; does not count as use."""
        for index, block_hash in enumerate(hashes):
            if block_hash not in self._entries:
                return index
        return len(hashes)

    def lease(self, hashes: Sequence[BlockHash], now_ns: int) -> Lease:
        """Pin the longest prefix of `hashes` that is in the pool, for reading."""
        entries = [self._entries[block_hash] for block_hash in hashes[: self.find_prefix(hashes)]]
        lease = Lease(
            lease_id=self._next_lease,
            blocks=tuple(entry.block for entry in entries),
            expires_ns=now_ns + self._lease_ns,
        )
        self._next_lease += 1
        self._leases[lease.lease_id] = lease
        for entry in entries:
            entry.num_leases += 1
            self._idle[entry.block.host_id].pop(entry.block.block_hash, None)
        return lease

    def release(self, lease_id: int) -> None:
        """Give a lease back. Raises LeaseLost if it is not held: it expired, so what was read may be wrong."""
        lease = self._leases.pop(lease_id, None)
        if lease is None:
            raise LeaseLost(lease_id=lease_id)
        # Tail first, so that the end of a prefix is evicted before its beginning.
        for block in reversed(lease.blocks):
            entry = self._entries.get(block.block_hash)
            if entry is None or entry.block.handle != block.handle:
                continue  # its host was removed
            entry.num_leases -= 1
            if not entry.num_leases:
                self._idle[block.host_id][block.block_hash] = None

    def expire(self, now_ns: int) -> int:
        """Reclaim the leases that ended before `now_ns`; returns their number."""
        late = [lease_id for lease_id, lease in self._leases.items() if lease.expires_ns <= now_ns]
        for lease_id in late:
            self.release(lease_id)
        return len(late)

    def put_start(self, block_hash: BlockHash, num_bytes: int) -> PutStarted | None:
        """Reserve room for a block on its host, evicting old blocks there.

        None if the block is there, or being written, or no host has room that is neither leased nor being written.
        """
        if num_bytes < 1:
            raise IllegalCall(f"a block of {num_bytes} bytes")
        if block_hash in self._entries or block_hash in self._writing:
            return None
        for host_id in self._preferred_hosts(block_hash):
            idle = self._idle[host_id]
            missing = self._used[host_id] + num_bytes - self._capacity[host_id]
            victims: list[BlockHash] = []
            for victim in idle:
                if missing <= 0:
                    break
                victims.append(victim)
                missing -= self._entries[victim].block.num_bytes
            if missing > 0:
                continue
            evicted = tuple(self._remove(victim) for victim in victims)
            self.num_evicted += len(evicted)
            block = PoolBlock(block_hash=block_hash, host_id=host_id, handle=self._next_handle, num_bytes=num_bytes)
            self._next_handle += 1
            self._used[host_id] += num_bytes
            self._writing[block_hash] = block
            return PutStarted(block=block, evicted=evicted)
        return None

    def put_commit(self, block: PoolBlock) -> None:
        """The bytes are there: let the block be found. Raises IllegalCall if this put is not in progress."""
        self._end_put(block)
        self._entries[block.block_hash] = _Entry(block)
        self._idle[block.host_id][block.block_hash] = None

    def put_revoke(self, block: PoolBlock) -> None:
        """The bytes did not arrive: give the room back. Raises IllegalCall if this put is not in progress."""
        self._end_put(block)
        self._used[block.host_id] -= block.num_bytes

    def remove_host(self, host_id: int) -> int:
        """Forget a host and all that it held; puts and leases on it end as if they had not been. Returns the blocks."""
        if host_id not in self._capacity:
            raise IllegalCall(f"host {host_id} is not in the pool")
        lost = [h for h, entry in self._entries.items() if entry.block.host_id == host_id]
        for block_hash in lost:
            del self._entries[block_hash]
        for block_hash in [h for h, block in self._writing.items() if block.host_id == host_id]:
            del self._writing[block_hash]
        del self._capacity[host_id], self._used[host_id], self._idle[host_id]
        return len(lost)

    def check_invariants(self) -> None:
        """Raise AssertionError unless bytes, leases and LRU orders agree with the entries."""
        used = dict.fromkeys(self._capacity, 0)
        for block in [*(entry.block for entry in self._entries.values()), *self._writing.values()]:
            used[block.host_id] += block.num_bytes
        assert used == self._used
        assert all(used[host_id] <= self._capacity[host_id] for host_id in used)
        leased: dict[int, int] = {}
        for lease in self._leases.values():
            for block in lease.blocks:
                leased[block.handle] = leased.get(block.handle, 0) + 1
        for block_hash, entry in self._entries.items():
            assert entry.num_leases == leased.get(entry.block.handle, 0)
            assert (block_hash in self._idle[entry.block.host_id]) == (entry.num_leases == 0)
            assert block_hash not in self._writing
        assert sum(len(idle) for idle in self._idle.values()) == sum(not e.num_leases for e in self._entries.values())

    def _end_put(self, block: PoolBlock) -> None:
        if self._writing.get(block.block_hash) != block:
            raise IllegalCall(f"put of handle {block.handle} is not in progress")
        del self._writing[block.block_hash]

    def _remove(self, block_hash: BlockHash) -> PoolBlock:
        block = self._entries.pop(block_hash).block
        del self._idle[block.host_id][block_hash]
        self._used[block.host_id] -= block.num_bytes
        return block

    def _preferred_hosts(self, block_hash: BlockHash) -> list[int]:
        """Hosts by rendezvous hash; the next one takes the block where the first is full of pinned blocks."""

        def weight(host_id: int) -> bytes:
            return blake2b(block_hash + host_id.to_bytes(4, "little"), digest_size=8).digest()

        return sorted(self._capacity, key=weight, reverse=True)
