"""The pool's decisions without anybody who waits: literal ends, what an error leaves, and equal to the waiting pool."""

import asyncio
import heapq
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.clock import run_virtual
from devices.fabric import Fabric
from devices.faults import LinkDown
from serving.core.block_hash import hash_prompt
from serving.core.event_log import EventLog
from serving.core.pool_index import PoolIndex
from serving.kv_pool import KvPool
from serving.pool_moves import PoolMoves
from serving.transport import NullTransport, RankRef

BLOCK_BYTES = 9_000_000
PACE_NS = 9_000_000  # at a gigabyte per second
CHAINS = [hash_prompt(tokens, 1) for tokens in ([1, 2, 3, 4], [1, 2, 8], [7, 7, 7, 7, 7])]


class World:
    """A pool of two hosts and two dies, at an instant that the test sets."""

    def __init__(self, hardware, *, num_blocks=8, lease_ns=10**9):
        self.now_ns = 0
        self.fabric = Fabric(hardware)
        self.log = EventLog(keep=True)
        self.parts = {
            "index": PoolIndex(hosts=dict.fromkeys((0, 1), num_blocks * BLOCK_BYTES), lease_ns=lease_ns),
            "hosts": [self.fabric.host(0), self.fabric.host(9)],
            "fabric": self.fabric,
            "log": self.log,
            "block_bytes": BLOCK_BYTES,
            "block_size": 1,
            "read_bytes_per_s": 1e9,
        }
        self.dies = [self.fabric.die(0), self.fabric.die(0, 1)]
        self.pool = PoolMoves(now_ns=lambda: self.now_ns, **self.parts)

    def store(self, chain):
        write = self.pool.start_store("w", chain, dies=self.dies)
        self.now_ns = write.end_ns
        self.pool.finish_store(write)

    def held(self):
        self.pool.index.check_invariants()
        return self.pool.index.num_leases, self.pool.index.num_pending_puts


@pytest.fixture(scope="module")
def world(make_config):
    """A function that makes one."""
    hardware = make_config("disaggregated").hardware
    return lambda **sizes: World(hardware, **sizes)


def test_a_block_is_found_when_its_write_is_finished_and_read_at_the_pace_of_the_dies(world):
    w = world()
    write = w.pool.start_store("r0", CHAINS[0], dies=w.dies)
    assert (write.positions, write.num_evicted, w.pool.find_prefix_tokens(CHAINS[0])) == ((0, 1, 2, 3), 0, 0)
    assert write.end_ns > write.start_ns == 0
    assert w.pool.start_store("r1", CHAINS[1], dies=w.dies).positions == (2,)  # the others are being written
    w.now_ns = write.end_ns
    w.pool.finish_store(write)
    assert (w.pool.find_prefix_tokens(CHAINS[0]), w.pool.num_stored_blocks) == (4, 4)
    read = w.pool.start_load("r2", CHAINS[0], first=1, dies=w.dies)
    assert [block.block_hash for block in read.blocks] == list(CHAINS[0][1:])
    assert read.end_ns == write.end_ns + 2 * PACE_NS  # the first die takes two of the three
    other = w.pool.start_load("r3", CHAINS[0][:1], first=0, dies=w.dies)
    assert other.end_ns == write.end_ns + 3 * PACE_NS  # behind them
    w.now_ns = other.end_ns
    assert (w.pool.finish_load(read), w.pool.finish_load(other), w.pool.num_loaded_blocks) == (3, 1, 4)


def test_what_needs_no_move_is_over_at_once_and_logs_nothing(world):
    w = world()
    w.store(CHAINS[0])
    num_events = w.log.num_events
    assert w.pool.start_store("r", CHAINS[0], dies=w.dies) is None
    read = w.pool.start_load("r", CHAINS[0], first=4, dies=w.dies)
    assert (read.blocks, read.end_ns, w.pool.finish_load(read)) == ((), w.now_ns, 0)
    assert (w.log.num_events, w.held()) == (num_events, (0, 0))


def test_a_link_that_is_down_leaves_no_lease_and_no_put(world):
    w = world()
    w.store(CHAINS[0])
    for host in w.parts["hosts"]:
        w.fabric.fail_link("ub", host)
    with pytest.raises(LinkDown):
        w.pool.start_load("r", CHAINS[0], first=0, dies=w.dies)
    with pytest.raises(LinkDown):
        w.pool.start_store("r", CHAINS[2], dies=w.dies)
    assert (w.held(), w.pool.index.num_blocks) == ((0, 0), 4)


def test_moves_that_do_not_come_give_back_what_they_held(world):
    w = world()
    w.store(CHAINS[0])
    write = w.pool.start_store("r", CHAINS[2], dies=w.dies)
    read = w.pool.start_load("r", CHAINS[0], first=0, dies=w.dies)
    w.pool.revoke_store(write)
    assert w.pool.cancel_load(read)  # nothing that it was to read is gone
    assert (w.held(), w.pool.index.num_blocks, w.pool.num_loaded_blocks) == ((0, 0), 4, 0)


def test_a_host_that_is_lost_takes_its_part_of_a_write(world):
    w = world()
    write = w.pool.start_store("r", CHAINS[2], dies=w.dies)
    hosts = [block.host_id for block in write.blocks]
    w.pool.lose_host(hosts[0])
    w.pool.finish_store(write)
    assert w.pool.num_stored_blocks == sum(host_id != hosts[0] for host_id in hosts) < 5
    assert w.held() == (0, 0)


moves = st.lists(
    st.tuples(
        st.integers(0, 40_000_000),  # when, in ns
        st.sampled_from(["load", "load", "store", "store", "lose"]),
        st.integers(0, len(CHAINS) - 1),
        st.integers(0, 3),  # first block to read, or host to lose (of two)
    ),
    max_size=12,
)


def stepped(world, program):
    """Without asyncio: a heap of (instant, number), each end as a timer and then a hold, as the clock has them."""
    heap, numbers, results = [], itertools.count(), []

    def at(when_ns, call):
        heapq.heappush(heap, (when_ns, next(numbers), call))

    def finish(name, end):
        def hold():
            at(world.now_ns, lambda: results.append((name, end())))

        return hold

    def start(name, kind, chain, first):
        def begin():
            if kind == "lose":
                world.pool.lose_host(first % 2)
            elif kind == "load":
                read = world.pool.start_load(name, chain, first=first, dies=world.dies)
                if not read.blocks:
                    results.append((name, world.pool.finish_load(read)))
                else:
                    at(read.end_ns, finish(name, lambda: world.pool.finish_load(read)))
            elif (write := world.pool.start_store(name, chain, dies=world.dies)) is not None:
                at(write.end_ns, finish(name, lambda: world.pool.finish_store(write)))
            else:
                results.append((name, None))

        return begin

    for i, (when_ns, kind, chain, first) in enumerate(program):
        at(when_ns, start(f"r{i}", kind, CHAINS[chain], first))
    while heap:
        world.now_ns, _, call = heapq.heappop(heap)
        call()
    return results


def waited(world, program):
    """The same through the pool that waits."""

    async def main(clock):
        world.pool = KvPool(transport=NullTransport(), clock=clock, **world.parts)
        results = []

        async def move(i, when_ns, kind, chain, first):
            await clock.sleep_until(when_ns)
            if kind == "lose":
                world.pool.lose_host(first % 2)
                return
            blocks = np.arange(len(CHAINS[chain]), dtype=np.int32)
            if kind == "load":
                results.append(
                    (
                        f"r{i}",
                        await world.pool.load(
                            f"r{i}", CHAINS[chain], first=first, blocks=blocks[first:], target="p", dies=world.dies
                        ),
                    )
                )
            else:
                source = RankRef(instance_id="p", rank=0)
                await world.pool.store(f"r{i}", CHAINS[chain], blocks, source=source, dies=world.dies)
                results.append((f"r{i}", None))

        await asyncio.gather(*(move(i, *item) for i, item in enumerate(program)))
        return results

    return run_virtual(main)


@settings(max_examples=80, derandomize=True, deadline=None)
@given(program=moves, num_blocks=st.integers(1, 5), lease_ns=st.sampled_from([10_000_000, 10**9]))
def test_whoever_waits_the_decisions_are_the_same(world, program, num_blocks, lease_ns):
    first, second = (world(num_blocks=num_blocks, lease_ns=lease_ns) for _ in range(2))
    assert stepped(first, program) == waited(second, program)
    assert first.log.events == second.log.events
    assert first.held() == second.held() == (0, 0)
    assert first.pool.index.num_blocks == second.pool.index.num_blocks
    assert first.fabric.stats("ub") == second.fabric.stats("ub")
