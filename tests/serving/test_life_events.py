"""The life of a request as literal event logs: who did what, to the nanosecond."""

import asyncio

import pytest

STEP_NS = {"prefill": 1_000_000, "decode": 500_000, "colocated": 700_000}
ONE_AT_A_TIME = ("instances.decode.npus=1", "instances.decode.max_num_seqs=1")


def test_the_events_of_one_disaggregated_request(run_system, make_config, fake_devices, prompt):
    config = make_config("disaggregated")
    devices = fake_devices(config)

    async def program(system):
        assert (await system.generate("r0", prompt(10), max_tokens=3)).token_ids == devices.generate(prompt(10), 3)
        return system.events()

    assert run_system(config, program, transport=devices, step_ns=STEP_NS) == [
        "       0 arrive r0 limit=3 prompt=10",
        "       0 place r0 decode=decode-0 prefill=prefill-0 rank=0",
        "       0 admit r0 cached=0 instance=prefill-0 rank=0",
        "       0 step prefill-0 charged_ns=1000000 rows=1 tokens=10",
        " 1000000 done r0 instance=prefill-0 stopped=0",
        # 2 full blocks of 4 tokens to the pool over UB, the latent KV of 10 tokens over RDMA: 70,272 bytes per token
        " 1000000 pool_store r0 blocks=2 evicted=0 until_ns=1004522",
        " 1000000 kv_transfer r0 bytes=702720 rank=0 source=0",
        " 1033089 step decode-0 charged_ns=500000 rows=1 tokens=1",
        " 1533089 step decode-0 charged_ns=500000 rows=1 tokens=1",
        " 2033089 done r0 instance=decode-0 stopped=0",
        " 2033089 outcome r0 reason=length tokens=3",
    ]


def test_the_events_of_a_request_whose_prefix_is_in_the_pool(run_system, make_config, fake_devices, prompt):
    config = make_config("disaggregated")
    devices = fake_devices(config)

    async def program(system):
        await system.generate("r0", prompt(13), max_tokens=1)
        await system.clock.sleep_until(10_000_000)
        num_events = system.log.num_events
        reply = await system.generate("r1", (*prompt(10), 33, 34), max_tokens=2)
        assert reply.token_ids == devices.generate((*prompt(10), 33, 34), 2)
        return system.events()[num_events:]

    assert run_system(config, program, transport=devices, step_ns=STEP_NS) == [
        "10000000 arrive r1 limit=2 prompt=12",
        "10000000 place r1 decode=decode-0 prefill=prefill-0 rank=0",
        "10000000 admit r1 cached=0 instance=prefill-0 rank=0",
        "10000000 pool_load r1 blocks=2 until_ns=10066926",
        "10066926 step prefill-0 charged_ns=1000000 rows=1 tokens=4",
        "11066926 done r1 instance=prefill-0 stopped=0",
        "11066926 pool_store r1 blocks=1 evicted=0 until_ns=11070576",
        "11066926 kv_transfer r1 bytes=843264 rank=0 source=0",
        "11105637 step decode-0 charged_ns=500000 rows=1 tokens=1",
        "11605637 done r1 instance=decode-0 stopped=0",
        "11605637 outcome r1 reason=length tokens=2",
    ]


def test_the_events_of_a_colocated_request(run_system, make_config, fake_devices, prompt):
    config = make_config("colocated", "instances.colocated.max_num_batched_tokens=8")
    devices = fake_devices(config)

    async def program(system):
        assert (await system.generate("r0", prompt(10), max_tokens=2)).token_ids == devices.generate(prompt(10), 2)
        return system.events()

    assert run_system(config, program, transport=devices, step_ns=STEP_NS) == [
        "       0 arrive r0 limit=2 prompt=10",
        "       0 place r0 decode=colocated-0 prefill=colocated-0 rank=0",
        "       0 admit r0 cached=0 instance=colocated-0 rank=0",
        "       0 step colocated-0 charged_ns=700000 rows=1 tokens=8",
        "  700000 step colocated-0 charged_ns=700000 rows=1 tokens=2",
        " 1400000 step colocated-0 charged_ns=700000 rows=1 tokens=1",
        " 2100000 done r0 instance=colocated-0 stopped=0",
        " 2100000 outcome r0 reason=length tokens=2",
    ]


def test_the_events_of_a_decode_preemption(run_system, make_config, fake_devices, prompt):
    """Two requests outgrow a decode rank of 32 blocks; the later one goes back to prefill with what it has."""
    config = make_config("disaggregated", "instances.decode.npus=1", "instances.decode.num_blocks=32")
    devices = fake_devices(config)

    async def program(system):
        replies = await asyncio.gather(
            system.generate("r0", prompt(59, seed=1), max_tokens=9),
            system.generate("r1", prompt(58, seed=2), max_tokens=12),
        )
        for reply, (length, seed, limit) in zip(replies, ((59, 1, 9), (58, 2, 12)), strict=True):
            assert reply.token_ids == devices.generate(prompt(length, seed=seed), limit)
        return [line.split(maxsplit=1)[1] for line in system.events("place", "admit", "preempt", "done")]

    assert run_system(config, program, transport=devices, step_ns=STEP_NS) == [
        "place r0 decode=decode-0 prefill=prefill-0 rank=0",
        "place r1 decode=decode-0 prefill=prefill-0 rank=0",
        "admit r0 cached=0 instance=prefill-0 rank=0",
        "admit r1 cached=0 instance=prefill-0 rank=0",
        "done r0 instance=prefill-0 stopped=0",
        "done r1 instance=prefill-0 stopped=0",
        "preempt r1 instance=decode-0 rank=0",
        "done r0 instance=decode-0 stopped=0",
        "place r1 decode=decode-0 prefill=prefill-0 rank=0",
        "admit r1 cached=0 instance=prefill-0 rank=0",
        "done r1 instance=prefill-0 stopped=0",
        "done r1 instance=decode-0 stopped=0",
    ]


def test_times_are_those_of_the_events(run_system, make_config, fake_devices, prompt):
    config = make_config("disaggregated", *ONE_AT_A_TIME)

    async def program(system):
        streams = [system.submit(f"r{i}", prompt(10, seed=i), max_tokens=3) for i in range(2)]
        return [[delta async for delta in stream][-1].times.simulated for stream in streams]

    first, second = run_system(config, program, transport=fake_devices(config), step_ns=STEP_NS)
    assert (first.queue_ms, first.ttft_ms, first.e2el_ms) == (0.0, 1.0, 2.033089)
    assert first.tpot_ms == pytest.approx((2.033089 - 1.0) / 2)
    assert (second.queue_ms, second.ttft_ms) == (2.033089, 3.033089)
