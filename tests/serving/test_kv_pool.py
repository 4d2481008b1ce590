"""The shared pool: what it saves, and what happens when it is too small, too slow or broken."""

import asyncio

import numpy as np
import pytest

from devices.clock import run_virtual
from devices.fabric import Fabric
from serving.core.block_hash import hash_prompt
from serving.core.event_log import EventLog
from serving.core.pool_index import PoolIndex
from serving.errors import EngineFailure
from serving.kv_pool import KvPool
from serving.transport import RankRef

STEP_NS = {"prefill": 1_000_000, "decode": 50_000, "colocated": 200_000}
BLOCK_BYTES = 281_088  # of 4 tokens, as charged
LOST = EngineFailure("the host is lost")
PREFILL = RankRef(instance_id="prefill-0", rank=0)


def room_for(num_blocks, *, hosts=1):
    return f"kv_pool={{hosts: {hosts}, dram_bytes_per_host: {num_blocks * BLOCK_BYTES}}}"


@pytest.fixture
def run_pool(make_config, fake_devices):
    """A function: run `program(pool, store, load, devices)` on a pool of `num_blocks` blocks on one host.

    `store(tokens)` and `load(tokens, first)` move a prompt's full blocks from and to an instance's blocks 0, 1, ...
    """

    def run(program, *, num_blocks=8, lease_ns=10**9, faults=None):
        config = make_config("disaggregated")
        devices = fake_devices(config, faults=faults or {})
        fabric = Fabric(config.hardware)

        async def main(clock):
            pool = KvPool(
                index=PoolIndex(hosts={0: num_blocks * BLOCK_BYTES}, lease_ns=lease_ns),
                hosts=[fabric.host(0)],
                fabric=fabric,
                transport=devices,
                clock=clock,
                log=EventLog(),
                block_bytes=BLOCK_BYTES,
                block_size=4,
                read_bytes_per_s=config.hardware.rates.pool_read_bytes_per_s,
            )
            cache = devices._cache("prefill-0", 0)
            dies = [fabric.die(0), fabric.die(1)]

            async def store(tokens):
                hashes = hash_prompt(tokens, 4)
                cache[: len(hashes)] = [tokens[4 * i : 4 * i + 4] for i in range(len(hashes))]
                await pool.store("r", hashes, block_ids(len(hashes)), source=PREFILL, dies=dies)

            async def load(tokens, first=0):
                hashes = hash_prompt(tokens, 4)
                cache[:] = -1
                blocks = block_ids(len(hashes))[first:]
                count = await pool.load("r", hashes, first=first, blocks=blocks, target="prefill-0", dies=dies)
                loaded = list(tokens[4 * first : 4 * (first + count)])
                assert cache[blocks[:count]].reshape(-1).tolist() == loaded
                return count

            await program(pool, store, load, clock)
            pool.index.check_invariants()
            assert (pool.index.num_leases, pool.index.num_pending_puts) == (0, 0)
            assert len(devices.stored) == pool.index.num_blocks
            return pool

        return run_virtual(main)

    return run


def block_ids(count):
    return np.arange(count, dtype=np.int32)


def test_what_was_stored_is_found_and_loaded_from_any_block_on(run_pool, prompt):
    async def program(pool, store, load, clock):
        await store(prompt(13))
        assert pool.find_prefix_tokens(hash_prompt(prompt(20), 4)) == 12
        assert await load(prompt(12)) == 3
        assert await load(prompt(12), first=2) == 1
        assert await load(prompt(16), first=3) == 0
        assert await load(prompt(8, seed=1)) == 0
        assert (pool.num_stored_blocks, pool.num_loaded_blocks) == (3, 4)

    run_pool(program)


def test_reads_are_paced_die_by_die(run_pool, prompt):
    """Four blocks into two dies, twice at once: each die takes four, one after the other, at the pool's rate."""

    async def program(pool, store, load, clock):
        await store(prompt(16))
        start_ns = clock.now_ns()
        await asyncio.gather(load(prompt(16)), load(prompt(16)))
        assert clock.now_ns() - start_ns == 4 * round(BLOCK_BYTES * 1e9 / 4.2e9)

    run_pool(program)


def test_storing_again_writes_only_what_is_new(run_pool, prompt):
    async def program(pool, store, load, clock):
        await store(prompt(8))
        await asyncio.gather(store(prompt(16)), store(prompt(16)))  # two requests with the same prefix at once
        assert pool.num_stored_blocks == 4
        assert await load(prompt(16)) == 4

    run_pool(program)


def test_the_end_of_an_old_prefix_goes_before_its_beginning(run_pool, prompt):
    async def program(pool, store, load, clock):
        await store(prompt(16, seed=1))
        await store(prompt(16, seed=2))
        await store(prompt(8, seed=3))  # takes two of the eight blocks
        found = [pool.find_prefix_tokens(hash_prompt(prompt(16, seed=seed), 4)) for seed in (1, 2, 3)]
        assert found == [8, 16, 8]
        await store(prompt(12, seed=1))  # its beginning was old, and is in use again
        await store(prompt(12, seed=4))
        found = [pool.find_prefix_tokens(hash_prompt(prompt(16, seed=seed), 4)) for seed in (1, 2, 3, 4)]
        assert found == [12, 0, 8, 12]

    run_pool(program, num_blocks=8)


def test_what_does_not_fit_is_left_out(run_pool, prompt):
    async def program(pool, store, load, clock):
        await store(prompt(40))
        assert pool.num_stored_blocks == 8
        assert await load(prompt(40)) == 8

    run_pool(program, num_blocks=8)


def test_a_store_that_fails_halfway_leaves_nothing_behind(run_pool, prompt):
    """The devices had written before they failed."""

    async def program(pool, store, load, clock):
        with pytest.raises(EngineFailure, match="the host is lost"):
            await store(prompt(16))
        assert (pool.index.num_blocks, pool.index.used_bytes, pool.num_stored_blocks) == (0, 0, 0)
        await store(prompt(16))
        assert await load(prompt(16)) == 4

    run_pool(program, faults={"pool_store": [LOST]})


def test_a_load_that_fails_gives_nothing_and_keeps_no_lease(run_pool, prompt):
    """Whoever asked computes the tokens instead: the pool is a cache, and no request depends on it."""

    async def program(pool, store, load, clock):
        await store(prompt(16))
        assert await load(prompt(16)) == 0
        assert await load(prompt(16)) == 4
        assert pool.num_loaded_blocks == 4

    run_pool(program, faults={"pool_load": [LOST]})


def test_a_lease_that_ends_during_the_read_makes_it_worthless(run_pool, prompt):
    """A read takes 3.6 microseconds here, and the lease is for one: its blocks go, and with them what was read."""

    async def program(pool, store, load, clock):
        await store(prompt(16, seed=1))

        async def evict():
            await clock.sleep_until(clock.now_ns() + 2_000)
            await store(prompt(16, seed=2))

        evicting = asyncio.ensure_future(evict())
        assert await load(prompt(16, seed=1)) == 0
        await evicting
        assert pool.num_loaded_blocks == 0
        assert pool.find_prefix_tokens(hash_prompt(prompt(16, seed=2), 4)) == 16

    run_pool(program, num_blocks=4, lease_ns=1_000)


def test_a_read_of_blocks_that_were_evicted_under_an_ended_lease_is_no_failure(run_pool, prompt):
    """The devices find nothing at the handle any more: the request computes the tokens, no device is at fault."""

    async def program(pool, store, load, clock):
        await store(prompt(16, seed=1))

        async def evict():
            await clock.sleep_until(clock.now_ns() + 2_000)
            await store(prompt(16, seed=2))

        evicting = asyncio.ensure_future(evict())
        assert await load(prompt(16, seed=1)) == 0
        await evicting

    gone = EngineFailure("read: BlockNotStored: host 0: handle 0 holds no bytes")
    run_pool(program, num_blocks=4, lease_ns=1_000, faults={"pool_load": [gone]})


def test_an_ended_lease_costs_nothing_while_nobody_needs_the_room(run_pool, prompt):
    async def program(pool, store, load, clock):
        await store(prompt(16))
        assert await load(prompt(16)) == 4

    run_pool(program, lease_ns=1)


@pytest.mark.parametrize("move", ["load", "store"])
def test_a_host_that_is_lost_takes_what_it_had_and_what_was_on_its_way(run_pool, prompt, move):
    async def program(pool, store, load, clock):
        await store(prompt(16))

        async def leave():
            await clock.sleep_until(clock.now_ns() + 2_000)
            pool.lose_host(0)
            pool.lose_host(0)  # whoever else has a channel to it

        leaving = asyncio.ensure_future(leave())
        if move == "load":
            assert await load(prompt(16)) == 0
        else:
            await store(prompt(16, seed=2))
        await leaving
        pool._transport.stored.clear()
        assert pool.find_prefix_tokens(hash_prompt(prompt(16), 4)) == 0
        await store(prompt(16))  # there is no host any more
        assert pool.num_stored_blocks == 4

    run_pool(program)


@pytest.mark.parametrize("name", ["disaggregated", "colocated"])
@pytest.mark.parametrize(("num_blocks", "hosts"), [(3, 1), (5, 2), (1000, 2)])
@pytest.mark.parametrize("latency_s", [0.0, 0.0002])
def test_tokens_are_right_however_small_the_pool_is(
    run_system, make_config, fake_devices, prompt, name, num_blocks, hosts, latency_s
):
    config = make_config(name, "kv_pool.enabled=true", room_for(num_blocks, hosts=hosts))
    prompts = [prompt(12, seed=i % 3) + prompt(4 + i, seed=9 + i) for i in range(12)]
    devices = fake_devices(config, latency_s=latency_s)

    async def program(system):
        readers = []
        for i, tokens in enumerate(prompts):
            await system.clock.sleep_until(i * 700_000)
            readers.append(asyncio.ensure_future(system.generate(f"r{i}", tokens, max_tokens=5)))
        replies = await asyncio.gather(*readers)
        assert [reply.token_ids for reply in replies] == [devices.generate(tokens, 5) for tokens in prompts]
        return system.cluster.pool

    pool = run_system(config, program, transport=devices, step_ns=STEP_NS)
    assert pool.num_stored_blocks > 0
    assert pool.index.num_evicted > 0 or num_blocks == 1000
    if num_blocks == 1000:
        assert pool.num_loaded_blocks >= 15


@pytest.mark.parametrize("latency_s", [0.0, 0.0005])
def test_a_request_whose_lease_ends_too_soon_computes_its_prefix(
    run_system, make_config, fake_devices, prompt, latency_s
):
    """r2's blocks take the place of r0's while r1, at the other prefill instance, reads them."""
    config = make_config(
        "disaggregated", "instances.prefill.count=2", "instances.prefill.npus=1", room_for(3), "kv_pool.lease_s=1.0e-6"
    )
    devices = fake_devices(config, latency_s=latency_s)
    shared, other = prompt(13, seed=1), prompt(13, seed=2)

    async def program(system):
        await system.generate("r0", shared, max_tokens=1)
        await system.clock.sleep_until(10_000_000)
        second = asyncio.ensure_future(system.generate("r2", other, max_tokens=2))
        await system.clock.sleep_until(10_998_000)
        reply = await system.generate("r1", shared, max_tokens=5)
        await second
        return reply, system.events("lease_lost", "pool_load")

    reply, events = run_system(config, program, transport=devices, step_ns=STEP_NS)
    assert reply.token_ids == devices.generate(shared, 5)
    assert [line.split()[1:3] for line in events] == [["pool_load", "r1"], ["lease_lost", "r1"]]


@pytest.mark.parametrize("method", ["pool_load", "pool_store"])
@pytest.mark.parametrize("error", [LOST, RuntimeError("flipped bit")], ids=["device", "bug"])
def test_a_broken_pool_fails_nobody_but_for_a_bug(run_system, make_config, fake_devices, prompt, method, error):
    config = make_config("disaggregated", "instances.decode.npus=1", "instances.decode.max_num_seqs=2")
    devices = fake_devices(config, faults={method: [error]})

    async def program(system):
        first = await system.generate("r0", prompt(13), max_tokens=3)
        await system.clock.sleep_until(10_000_000)
        rest = [system.generate(f"r{i}", prompt(13) + prompt(i, seed=i), max_tokens=3) for i in range(1, 5)]
        return [first, *await asyncio.gather(*rest)]

    replies = run_system(config, program, transport=devices, step_ns=STEP_NS)
    failed = [reply for reply in replies if reply.finish_reason == "error"]
    if method == "pool_store" or error is LOST:
        assert not failed
    else:
        assert [reply.error for reply in failed] == ["RuntimeError: flipped bit"]
    for i, reply in enumerate(replies):
        if reply not in failed:
            assert reply.token_ids == devices.generate(prompt(13) + prompt(i, seed=i) if i else prompt(13), 3)
