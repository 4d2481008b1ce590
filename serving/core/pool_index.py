"""Index of the shared KV pool: which host holds which block, who is reading, what goes next.

Owns: the map from block hashes to (host, handle), the two phases of a put, leases, and eviction by bytes.
Must not know: the bytes, transfers, who asks. Time is given.
Source: Mooncake Store (put start / commit / revoke, leases that pin what is read, index apart from bytes); EMS of arXiv
2506.12708 section 4.4 (consistent hashing over hosts, LRU). Hosts are chosen by rendezvous hashing, so removing a host
moves only what it held.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

from serving.core.errors import IllegalCall, LeaseLost
from serving.core.ids import BlockHash
from serving.core.pool_block import Lease, PoolBlock, PutsStarted, PutStarted
from serving.core.pool_host import PoolHost
from serving.core.rendezvous import Rendezvous


class _Pin:
    """A block that leases hold."""

    __slots__ = ("block", "num_leases")

    def __init__(self, block: PoolBlock) -> None:
        self.block = block
        self.num_leases = 1


class PoolIndex:
    """Metadata of the pool. Blocks that are being read or written are never evicted.

    A block's own host makes room for it by evicting its least recently used blocks; only if that is not enough, since
    the rest is being read or written, the next host by hash takes it. An illegal call raises and changes nothing.
    """

    def __init__(self, *, hosts: Mapping[int, int], lease_ns: int) -> None:
        """`hosts` gives the capacity of each in bytes; a lease protects its blocks for `lease_ns`."""
        if lease_ns < 1 or any(capacity < 0 for capacity in hosts.values()):
            raise IllegalCall(f"lease_ns {lease_ns} must be positive, capacities {dict(hosts)} must not be negative")
        self._lease_ns = lease_ns
        self._hosts = {host_id: PoolHost(host_id, capacity) for host_id, capacity in hosts.items()}
        self._rendezvous = Rendezvous(self._hosts)
        self._home: dict[BlockHash, PoolHost] = {}  # of every block that can be found
        self._pins: dict[BlockHash, _Pin] = {}  # of those that are leased; the others are idle at their hosts
        self._writing: dict[BlockHash, PoolBlock] = {}
        self._leases: dict[int, Lease] = {}  # in order of their ends, since time does not go back
        self._next_handle = 0
        self._next_lease = 0
        self._latest_ns = 0
        self._used_bytes = 0
        self.num_hits = 0  # blocks that leases asked for and got
        self.num_misses = 0  # and did not get
        self.num_evicted = 0

    @property
    def num_blocks(self) -> int:
        """Blocks that can be found."""
        return len(self._home)

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
        return self._used_bytes

    @property
    def host_used_bytes(self) -> dict[int, int]:
        """Of each host that is left."""
        return {host_id: host.used_bytes for host_id, host in self._hosts.items()}

    @property
    def capacity_bytes(self) -> int:
        """Of all hosts."""
        return sum(host.capacity_bytes for host in self._hosts.values())

    def find_prefix(self, hashes: Sequence[BlockHash]) -> int:
        """Number of leading blocks that are in the pool; does not count as use."""
        home = self._home
        for index, block_hash in enumerate(hashes):
            if block_hash not in home:
                return index
        return len(hashes)

    def touch(self, hashes: Sequence[BlockHash]) -> None:
        """Make the prefix the most recently used, its end less so than its beginning, which must outlive it."""
        home, pins = self._home, self._pins
        for block_hash in reversed(hashes[: self.find_prefix(hashes)]):
            if block_hash not in pins:
                home[block_hash].idle.move_to_end(block_hash)

    def lease(self, hashes: Sequence[BlockHash], now_ns: int) -> Lease:
        """Pin the longest prefix of `hashes` that is in the pool, for reading; it may be empty."""
        if now_ns < self._latest_ns:
            raise IllegalCall(f"instant {now_ns} ns is before the last one, {self._latest_ns} ns")
        self._latest_ns = now_ns
        blocks: list[PoolBlock] = []
        for block_hash in hashes:
            pin = self._pins.get(block_hash)
            if pin is not None:
                pin.num_leases += 1
            else:
                host = self._home.get(block_hash)
                if host is None:
                    break
                pin = self._pins[block_hash] = _Pin(host.take(block_hash))
            blocks.append(pin.block)
        self.num_hits += len(blocks)
        self.num_misses += len(hashes) - len(blocks)
        lease = Lease(lease_id=self._next_lease, blocks=tuple(blocks), expires_ns=now_ns + self._lease_ns)
        self._next_lease += 1
        self._leases[lease.lease_id] = lease
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
            pin = self._pins.get(block.block_hash)
            if pin is None or pin.block is not block:  # its host was removed; somebody may have stored it again
                num_intact = index
                continue
            pin.num_leases -= 1
            if not pin.num_leases:
                del self._pins[block.block_hash]
                self._hosts[block.host_id].keep(block)
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
        started = self.put_start_all((block_hash,), num_bytes)
        return PutStarted(block=started.blocks[0], evicted=started.evicted) if started.blocks else None

    def put_start_all(self, hashes: Sequence[BlockHash], num_bytes: int) -> PutsStarted:
        """`put_start` of one block of `num_bytes` each after the other; those for which it is None are left out."""
        if num_bytes < 1:
            raise IllegalCall(f"a block of {num_bytes} bytes")
        blocks: list[PoolBlock] = []
        positions: list[int] = []
        evicted: list[PoolBlock] = []
        home, writing = self._home, self._writing
        new = [block_hash for block_hash in hashes if block_hash not in home and block_hash not in writing]
        preferred = dict(zip(new, self._rendezvous.first_choices(new), strict=True)) if self._hosts else {}
        for position, block_hash in enumerate(hashes):
            if block_hash in home or block_hash in writing:
                continue
            host_id = preferred.get(block_hash)  # None: it was there until a block before it took its place
            host = None if host_id is None else self._hosts[host_id]
            if host is None or not self._make_room(host, num_bytes, evicted):
                choices = (self._hosts[host_id] for host_id in self._rendezvous.choices(block_hash))
                host = next((other for other in choices if self._make_room(other, num_bytes, evicted)), None)
                if host is None:
                    continue
            block = PoolBlock(block_hash, host.host_id, self._next_handle, num_bytes)
            self._next_handle += 1
            host.used_bytes += num_bytes
            self._used_bytes += num_bytes
            writing[block_hash] = block
            blocks.append(block)
            positions.append(position)
        return PutsStarted(blocks=tuple(blocks), positions=tuple(positions), evicted=tuple(evicted))

    def is_pending(self, block: PoolBlock) -> bool:
        """Whether the put of this block is in progress; not any more if its host was removed."""
        return self._writing.get(block.block_hash) == block

    def put_commit(self, block: PoolBlock) -> None:
        """The bytes are there: let the block be found. Raises IllegalCall if this put is not in progress."""
        if not self.put_commit_all((block,)):
            raise IllegalCall(f"put of handle {block.handle} is not in progress")

    def put_commit_all(self, blocks: Sequence[PoolBlock]) -> int:
        """Commit blocks of a prefix, in its order, but for those whose put is not in progress; returns their number.

        The last is committed first: what is committed later is evicted later.
        """
        num_committed = 0
        for block in reversed(blocks):
            block_hash = block.block_hash
            if self._writing.get(block_hash) == block:
                del self._writing[block_hash]
                self._home[block_hash] = host = self._hosts[block.host_id]
                host.keep(block)
                num_committed += 1
        return num_committed

    def put_revoke(self, block: PoolBlock) -> None:
        """The bytes did not arrive: give the room back. Raises IllegalCall if this put is not in progress."""
        if not self.is_pending(block):
            raise IllegalCall(f"put of handle {block.handle} is not in progress")
        del self._writing[block.block_hash]
        self._hosts[block.host_id].used_bytes -= block.num_bytes
        self._used_bytes -= block.num_bytes

    def remove_host(self, host_id: int) -> int:
        """Forget a host and all that it held; returns the number of blocks. Puts on it are not in progress any more."""
        host = self._hosts.pop(host_id, None)
        if host is None:
            raise IllegalCall(f"host {host_id} is not in the pool")
        lost = [block_hash for block_hash, at in self._home.items() if at is host]
        for block_hash in lost:
            del self._home[block_hash]
            self._pins.pop(block_hash, None)
        self._writing = {h: block for h, block in self._writing.items() if block.host_id != host_id}
        self._used_bytes -= host.used_bytes
        self._rendezvous = Rendezvous(self._hosts)
        return len(lost)

    def check_invariants(self) -> None:
        """Raise AssertionError unless bytes, leases and LRU orders agree with the entries."""
        blocks = [block for host in self._hosts.values() for block in host.oldest_first()]
        blocks += [pin.block for pin in self._pins.values()]
        assert {block.block_hash: self._hosts[block.host_id] for block in blocks} == self._home
        assert len(blocks) == len(self._home)
        assert not self._home.keys() & self._writing.keys()
        used = dict.fromkeys(self._hosts, 0)
        for block in [*blocks, *self._writing.values()]:
            assert 0 <= block.handle < self._next_handle
            used[block.host_id] += block.num_bytes
        assert used == self.host_used_bytes
        assert sum(used.values()) == self._used_bytes
        assert all(host.used_bytes <= host.capacity_bytes for host in self._hosts.values())
        leased = Counter(block.handle for lease in self._leases.values() for block in lease.blocks)
        pinned = {pin.block.handle: pin.num_leases for pin in self._pins.values()}
        assert pinned == {block.handle: leased[block.handle] for block in blocks if block.handle in leased}
        ends = [lease.expires_ns for lease in self._leases.values()]
        assert ends == sorted(ends)
        assert self._rendezvous.host_ids == list(self._hosts)

    def _make_room(self, host: PoolHost, num_bytes: int, evicted: list[PoolBlock]) -> bool:
        """Evict what a block of `num_bytes` needs, adding it to `evicted`. False if that is not enough: all stays."""
        missing = host.used_bytes + num_bytes - host.capacity_bytes
        if missing <= 0:
            return True
        victims: list[PoolBlock] = []
        for block in host.oldest_first():
            victims.append(block)
            missing -= block.num_bytes
            if missing <= 0:
                break
        else:
            return False
        for block in victims:
            del self._home[block.block_hash], host.idle[block.block_hash]
            host.used_bytes -= block.num_bytes
            self._used_bytes -= block.num_bytes
        self.num_evicted += len(victims)
        evicted += victims
        return True
