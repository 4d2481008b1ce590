"""Index of the shared KV pool: which host holds which block, who is reading, what goes next.

Owns: the map from block hashes to (host, handle), the two phases of a put, leases, and eviction by bytes.
Must not know: the bytes, transfers, who asks. Time is given.
Source: Mooncake Store (put start / commit / revoke, leases that pin what is read, index apart from bytes); EMS of arXiv
2506.12708 section 4.4 (consistent hashing over hosts, LRU). Hosts are chosen by rendezvous hashing: of all hosts the
one whose hash with the block is highest, so removing a host moves only what it held.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

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
    """Room for one block, which nobody can find before `put_commit`. What was `evicted` for it must be freed first."""

    block: PoolBlock
    evicted: tuple[PoolBlock, ...]


@dataclass(slots=True)
class _Entry:
    block: PoolBlock
    num_leases: int = 0


class PoolIndex:
    """Metadata of the pool. Blocks that are being read or written are never evicted.

    A block's own host makes room for it by evicting its least recently used blocks; only if that is not enough, since
    the rest is being read or written, the next host by hash takes it. An illegal call raises and changes nothing.
    """

    def __init__(self, *, hosts: Mapping[int, int], lease_ns: int) -> None:
        """`hosts` gives the capacity of each in bytes; a lease protects its blocks for `lease_ns`."""
        if lease_ns < 1 or any(capacity < 0 for capacity in hosts.values()):
            raise IllegalCall(f"lease_ns {lease_ns} must be positive, capacities {dict(hosts)} must not be negative")
        self._capacity = dict(hosts)
        self._used = dict.fromkeys(hosts, 0)
        self._lease_ns = lease_ns
        self._entries: dict[BlockHash, _Entry] = {}
        # Per host, committed and unleased blocks, least recently used first.
        self._idle: dict[int, OrderedDict[BlockHash, None]] = {host_id: OrderedDict() for host_id in hosts}
        self._writing: dict[BlockHash, PoolBlock] = {}
        self._leases: dict[int, Lease] = {}  # in order of their ends, since time does not go back
        self._host_ids, self._host_seeds = _seeds(hosts)
        self._next_handle = 0
        self._next_lease = 0
        self._latest_ns = 0
        self.num_hits = 0  # blocks that leases asked for and got
        self.num_misses = 0  # and did not get
        self.num_evicted = 0

    @property
    def num_blocks(self) -> int:
        """Blocks that can be found."""
        return len(self._entries)

    @property
    def num_leases(self) -> int:
        """Leases that are held."""
        return len(self._leases)

    @property
    def num_pending_puts(self) -> int:
        """Puts that are started and neither committed nor revoked."""
        return len(self._writing)

    @property
    def used_bytes(self) -> int:
        """Of all hosts, blocks being written among them."""
        return sum(self._used.values())

    @property
    def used_bytes_by_host(self) -> tuple[int, ...]:
        """The same per host, in the order of the hosts."""
        return tuple(self._used.values())

    @property
    def capacity_bytes(self) -> int:
        """Of all hosts."""
        return sum(self._capacity.values())

    def find_prefix(self, hashes: Sequence[BlockHash]) -> int:
        """Number of leading blocks that are in the pool; does not count as use."""
        for index, block_hash in enumerate(hashes):
            if block_hash not in self._entries:
                return index
        return len(hashes)

    def touch(self, hashes: Sequence[BlockHash]) -> None:
        """Make the prefix the most recently used, its end less so than its beginning, which must outlive it."""
        for block_hash in reversed(hashes[: self.find_prefix(hashes)]):
            entry = self._entries[block_hash]
            if not entry.num_leases:
                self._idle[entry.block.host_id].move_to_end(block_hash)

    def lease(self, hashes: Sequence[BlockHash], now_ns: int) -> Lease:
        """Pin the longest prefix of `hashes` that is in the pool, for reading; it may be empty."""
        if now_ns < self._latest_ns:
            raise IllegalCall(f"instant {now_ns} ns is before the last one, {self._latest_ns} ns")
        self._latest_ns = now_ns
        entries = [self._entries[block_hash] for block_hash in hashes[: self.find_prefix(hashes)]]
        self.num_hits += len(entries)
        self.num_misses += len(hashes) - len(entries)
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

    def release(self, lease_id: int) -> int:
        """Give a lease back; returns how many of its leading blocks are still there, that is, were good to read.

        Fewer than it had if a host was removed. Raises LeaseLost if the lease is not held: it expired, so what was
        read may be wrong.
        """
        lease = self._leases.pop(lease_id, None)
        if lease is None:
            raise LeaseLost(lease_id=lease_id)
        num_intact = len(lease.blocks)
        # Tail first, so that the end of a prefix is evicted before its beginning.
        for index in reversed(range(len(lease.blocks))):
            block = lease.blocks[index]
            entry = self._entries.get(block.block_hash)
            if entry is None or entry.block.handle != block.handle:
                num_intact = index
                continue
            entry.num_leases -= 1
            if not entry.num_leases:
                self._idle[block.host_id][block.block_hash] = None
        return num_intact

    def expire(self, now_ns: int) -> int:
        """Take back the leases that end at `now_ns` or before; returns their number."""
        late = []
        for lease in self._leases.values():
            if lease.expires_ns > now_ns:
                break
            late.append(lease.lease_id)
        for lease_id in late:
            self.release(lease_id)
        return len(late)

    def put_start(self, block_hash: BlockHash, num_bytes: int) -> PutStarted | None:
        """Reserve room for a block on a host, evicting old blocks there.

        None if the block is there, or being written, or no host has room that is neither leased nor being written.
        """
        if num_bytes < 1:
            raise IllegalCall(f"a block of {num_bytes} bytes")
        if block_hash in self._entries or block_hash in self._writing:
            return None
        for host_id in self._hosts_by_preference(block_hash):
            missing = self._used[host_id] + num_bytes - self._capacity[host_id]
            victims: list[BlockHash] = []
            for victim in self._idle[host_id]:
                if missing <= 0:
                    break
                victims.append(victim)
                missing -= self._entries[victim].block.num_bytes
            if missing > 0:
                continue
            evicted = tuple(self._evict(victim) for victim in victims)
            block = PoolBlock(block_hash=block_hash, host_id=host_id, handle=self._next_handle, num_bytes=num_bytes)
            self._next_handle += 1
            self._used[host_id] += num_bytes
            self._writing[block_hash] = block
            return PutStarted(block=block, evicted=evicted)
        return None

    def is_pending(self, block: PoolBlock) -> bool:
        """Whether the put of this block is in progress; not any more if its host was removed."""
        return self._writing.get(block.block_hash) == block

    def put_commit(self, block: PoolBlock) -> None:
        """The bytes are there: let the block be found. Raises IllegalCall if this put is not in progress.

        Of a prefix, commit the end first: what is committed later is evicted later.
        """
        self._end_put(block)
        self._entries[block.block_hash] = _Entry(block)
        self._idle[block.host_id][block.block_hash] = None

    def put_revoke(self, block: PoolBlock) -> None:
        """The bytes did not arrive: give the room back. Raises IllegalCall if this put is not in progress."""
        self._end_put(block)
        self._used[block.host_id] -= block.num_bytes

    def remove_host(self, host_id: int) -> int:
        """Forget a host and all that it held; returns the number of blocks. Puts on it are not in progress any more."""
        if host_id not in self._capacity:
            raise IllegalCall(f"host {host_id} is not in the pool")
        lost = [block_hash for block_hash, entry in self._entries.items() if entry.block.host_id == host_id]
        for block_hash in lost:
            del self._entries[block_hash]
        self._writing = {h: block for h, block in self._writing.items() if block.host_id != host_id}
        del self._capacity[host_id], self._used[host_id], self._idle[host_id]
        self._host_ids, self._host_seeds = _seeds(self._capacity)
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
            assert block_hash == entry.block.block_hash
            assert entry.num_leases == leased.get(entry.block.handle, 0)
            assert (block_hash in self._idle[entry.block.host_id]) == (entry.num_leases == 0)
            assert block_hash not in self._writing
        num_idle = sum(not entry.num_leases for entry in self._entries.values())
        assert sum(len(idle) for idle in self._idle.values()) == num_idle
        ends = [lease.expires_ns for lease in self._leases.values()]
        assert ends == sorted(ends)
        assert self._host_ids == list(self._capacity)

    def _end_put(self, block: PoolBlock) -> None:
        if self._writing.get(block.block_hash) != block:
            raise IllegalCall(f"put of handle {block.handle} is not in progress")
        del self._writing[block.block_hash]

    def _evict(self, block_hash: BlockHash) -> PoolBlock:
        block = self._entries.pop(block_hash).block
        del self._idle[block.host_id][block_hash]
        self._used[block.host_id] -= block.num_bytes
        self.num_evicted += 1
        return block

    def _hosts_by_preference(self, block_hash: BlockHash) -> Iterable[int]:
        """Hosts by rendezvous hash, the best first; the others are sorted only if somebody asks."""
        if not self._host_ids:
            return
        key = np.uint64(int.from_bytes(blake2b(block_hash, digest_size=8).digest(), "little"))
        weights = _mix(self._host_seeds ^ key)
        yield self._host_ids[int(np.argmax(weights))]
        for index in np.argsort(weights)[-2::-1].tolist():
            yield self._host_ids[index]


def _seeds(host_ids: Iterable[int]) -> tuple[list[int], NDArray[np.uint64]]:
    """Hosts, and a 64-bit number for each that depends on its id alone."""
    ids = list(host_ids)
    digests = [blake2b(str(host_id).encode(), digest_size=8).digest() for host_id in ids]
    return ids, np.array([int.from_bytes(digest, "little") for digest in digests], np.uint64)


def _mix(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Finalizer of splitmix64: every input bit changes about half of the output bits."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
