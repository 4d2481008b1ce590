"""Pool index against a model: what is there, who reads it, and who goes first."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serving.core.block_hash import hash_prompt
from serving.core.errors import IllegalCall, LeaseLost
from serving.core.pool_index import PoolIndex

CHAINS = [hash_prompt(tokens, 1) for tokens in ([1, 2, 3, 4], [1, 2, 8], [7, 7, 7, 7, 7])]
HASHES = sorted({block_hash for chain in CHAINS for block_hash in chain})
HOSTS = {0: 5, 1: 3, 2: 6}
LEASE_NS = 10


class PoolIndexMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.index = PoolIndex(hosts=HOSTS, lease_ns=LEASE_NS)
        self.hosts = dict(HOSTS)
        self.now_ns = 0
        self.there = {}  # hash -> block
        self.writing = {}  # hash -> block
        self.leases = {}  # lease id -> lease
        self.ended = []  # ids of leases that are over
        self.last_use = {}  # handle -> when it was last used
        self.num_uses = 0

    def use(self, blocks):
        """Note that these blocks became idle in this order."""
        for block in blocks:
            self.num_uses += 1
            self.last_use[block.handle] = self.num_uses

    def leased(self):
        return {block.handle for lease in self.leases.values() for block in lease.blocks}

    def used(self, host_id):
        blocks = [*self.there.values(), *self.writing.values()]
        return sum(block.num_bytes for block in blocks if block.host_id == host_id)

    def idle(self, host_id):
        leased = self.leased()
        blocks = [b for b in self.there.values() if b.host_id == host_id and b.handle not in leased]
        return sorted(blocks, key=lambda block: self.last_use[block.handle])

    def prefix(self, chain):
        found = []
        for block_hash in chain:
            if block_hash not in self.there:
                break
            found.append(self.there[block_hash])
        return found

    @rule(block_hash=st.sampled_from(HASHES), num_bytes=st.integers(1, 3))
    def put_start(self, block_hash, num_bytes):
        started = self.index.put_start(block_hash, num_bytes)
        if block_hash in self.there or block_hash in self.writing:
            assert started is None
            return
        room = {
            host_id: capacity - self.used(host_id) + sum(block.num_bytes for block in self.idle(host_id))
            for host_id, capacity in self.hosts.items()
        }
        if started is None:
            assert all(free < num_bytes for free in room.values())
            return
        host_id = started.block.host_id
        assert room[host_id] >= num_bytes
        assert list(started.evicted) == self.idle(host_id)[: len(started.evicted)]
        if started.evicted:  # no more than needed
            freed = sum(block.num_bytes for block in started.evicted[:-1])
            assert self.hosts[host_id] - self.used(host_id) + freed < num_bytes
        for block in started.evicted:
            del self.there[block.block_hash]
        assert started.block.handle not in self.last_use
        self.last_use[started.block.handle] = 0
        self.writing[block_hash] = started.block

    @precondition(lambda self: self.writing)
    @rule(data=st.data(), arrived=st.sampled_from([True, True, False]))
    def end_put(self, data, arrived):
        block = self.writing.pop(data.draw(st.sampled_from(sorted(self.writing))))
        if arrived:
            self.index.put_commit(block)
            self.there[block.block_hash] = block
            self.use([block])
        else:
            self.index.put_revoke(block)
        with pytest.raises(IllegalCall):
            self.index.put_commit(block)

    @rule(chain=st.sampled_from(CHAINS))
    def lease(self, chain):
        lease = self.index.lease(chain, self.now_ns)
        assert list(lease.blocks) == self.prefix(chain)
        self.leases[lease.lease_id] = lease

    def end_lease(self, lease_id):
        lease = self.leases.pop(lease_id)
        self.ended.append(lease_id)
        still_leased = self.leased()
        freed = [b for b in lease.blocks if self.there.get(b.block_hash) == b and b.handle not in still_leased]
        self.use(reversed(freed))
        intact = [self.there.get(block.block_hash) == block for block in lease.blocks]
        return [*intact, False].index(False)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data):
        lease_id = data.draw(st.sampled_from(sorted(self.leases)))
        assert self.index.release(lease_id) == self.end_lease(lease_id)

    @precondition(lambda self: self.ended)
    @rule(data=st.data())
    def a_lease_that_is_over_is_not_released_again(self, data):
        with pytest.raises(LeaseLost):
            self.index.release(data.draw(st.sampled_from(self.ended)))

    @rule(chain=st.sampled_from(CHAINS))
    def touch(self, chain):
        self.index.touch(chain)
        leased = self.leased()
        self.use(block for block in reversed(self.prefix(chain)) if block.handle not in leased)

    @rule(elapsed_ns=st.integers(0, LEASE_NS))
    def time_passes(self, elapsed_ns):
        self.now_ns += elapsed_ns
        late = [lease.lease_id for lease in self.leases.values() if lease.expires_ns <= self.now_ns]
        for lease_id in late:
            self.end_lease(lease_id)
        assert self.index.expire(self.now_ns) == len(late)

    @precondition(lambda self: self.hosts and self.num_uses > 5)
    @rule(data=st.data())
    def remove_host(self, data):
        host_id = data.draw(st.sampled_from(sorted(self.hosts)))
        lost = [block_hash for block_hash, block in self.there.items() if block.host_id == host_id]
        assert self.index.remove_host(host_id) == len(lost)
        for block_hash in lost:
            del self.there[block_hash]
        self.writing = {h: block for h, block in self.writing.items() if block.host_id != host_id}
        del self.hosts[host_id]

    @invariant()
    def agrees_with_the_model(self):
        self.index.check_invariants()
        for chain in CHAINS:
            assert self.index.find_prefix(chain) == len(self.prefix(chain))
        assert self.index.num_blocks == len(self.there)
        assert self.index.num_pending_puts == len(self.writing)
        assert self.index.num_leases == len(self.leases)
        assert self.index.used_bytes == sum(self.used(host_id) for host_id in self.hosts)


TestPoolIndex = PoolIndexMachine.TestCase
TestPoolIndex.settings = settings(
    derandomize=True, database=None, deadline=None, max_examples=200, stateful_step_count=40
)
