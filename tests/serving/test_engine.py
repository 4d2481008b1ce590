"""The step loop: what it never waits for, and what happens to everybody when a device is lost."""

import asyncio
from collections import Counter

import pytest

from serving.errors import EngineFailure

STEP_NS = {"prefill": 1_000_000, "decode": 50_000, "colocated": 200_000}
LOST = EngineFailure("step: npu 3 is lost: switched off")


def test_decode_steps_go_on_while_the_cache_of_another_request_arrives(run_system, make_config, fake_devices, prompt):
    config = make_config("disaggregated", "instances.decode.npus=1")
    devices = fake_devices(config, latency_s=0.0002)

    async def program(system):
        first = asyncio.ensure_future(system.generate("r0", prompt(8, seed=1), max_tokens=60))
        await system.clock.sleep_until(10_000)
        replies = await asyncio.gather(first, system.generate("r1", prompt(100, seed=2), max_tokens=3))
        assert replies[0].token_ids == devices.generate(prompt(8, seed=1), 60)
        assert replies[1].token_ids == devices.generate(prompt(100, seed=2), 3)
        return [(e.now_ns, e.kind, dict(e.details)) for e in system.log.events]

    events = run_system(config, program, transport=devices, step_ns=STEP_NS)
    start_ns = [now_ns for now_ns, kind, _ in events if kind == "kv_transfer"][1]
    steps = [(now_ns, d["rows"]) for now_ns, kind, d in events if kind == "step" and d["charged_ns"] == 50_000]
    before = [now_ns for now_ns, rows in steps if now_ns >= start_ns and rows == 1]
    together = [now_ns for now_ns, rows in steps if rows == 2]
    assert len(together) == 2
    assert before[:5] == [before[0] + i * 50_000 for i in range(5)]  # 100 tokens take 286 microseconds over RDMA
    assert start_ns + 286_000 < together[0] <= start_ns + 286_000 + 50_000


def test_a_step_is_charged_in_full_however_fast_its_devices_are(run_system, make_config, fake_devices, prompt):
    config = make_config("colocated")

    async def program(system):
        await asyncio.gather(*(system.generate(f"r{i}", prompt(5, seed=i), max_tokens=9) for i in range(3)))
        return system

    system = run_system(config, program, transport=fake_devices(config), step_ns=STEP_NS)
    engine = system.cluster.all_engines[0]
    assert (engine.num_steps, engine.busy_ns) == (9, 9 * 200_000)
    assert system.clock.now_ns() == 9 * 200_000
    assert (engine.cache_usage, engine.num_used_blocks) == (0.0, 0)


@pytest.mark.parametrize("error", [LOST, RuntimeError("index out of range")], ids=["device", "bug"])
@pytest.mark.parametrize("num_good_steps", [0, 2, 5])
@pytest.mark.parametrize(
    ("name", "role"), [("disaggregated", "decode"), ("disaggregated", "prefill"), ("colocated", "colocated")]
)
def test_a_lost_instance_fails_every_request_once_and_refuses_new_ones(
    run_system, make_config, fake_devices, prompt, name, role, num_good_steps, error
):
    """Running, transferring and queued requests alike; with the message of the loss, and nothing held afterwards."""
    config = make_config(name, f"instances.{role}.max_num_seqs=2", f"instances.{role}.npus=2")

    class Devices(fake_devices):
        def step(self, instance_id, inputs, *, charged_ns):
            if instance_id == f"{role}-0":
                self.faults["step"] = [error if self.num_calls[role] >= num_good_steps else None]
                self.num_calls[role] += 1
            else:
                self.faults["step"] = []
            return super().step(instance_id, inputs, charged_ns=charged_ns)

    async def program(system):
        running = []
        for i in range(12):
            await system.clock.sleep_until(i * 300_000)
            if system.cluster.failure is None:
                running.append(asyncio.ensure_future(system.generate(f"r{i}", prompt(4 + i, seed=i), max_tokens=40)))
                await asyncio.sleep(0)
        replies = await asyncio.gather(*running)
        assert not system.frontend.health()
        for i in range(2):  # again and again
            with pytest.raises(EngineFailure, match=f"instance {role}-0: "):
                system.submit(f"late{i}", prompt(5))
        return replies, system.outcomes

    replies, outcomes = run_system(config, program, transport=Devices(config), step_ns=STEP_NS)
    failed = [reply for reply in replies if reply.finish_reason == "error"]
    message = str(error) if error is LOST else "RuntimeError: index out of range"
    assert failed
    assert {reply.error for reply in failed} == {f"instance {role}-0: {message}"}
    assert all(reply.finish_reason == "length" for reply in replies if reply not in failed)
    assert Counter(reason for _, reason in outcomes)["error"] == len(failed) + 2


@pytest.mark.parametrize("turns", range(5))
def test_a_request_given_up_when_its_instance_is_lost_does_not_keep_the_others_from_hearing_of_it(
    run_system, make_config, fake_devices, prompt, turns
):
    config = make_config("colocated")

    async def program(system):
        streams = [system.submit(f"r{i}", prompt(5, seed=i)) for i in range(3)]
        readers = [asyncio.ensure_future(system.read(stream)) for stream in streams]
        await system.clock.sleep_until(STEP_NS["colocated"])
        for _ in range(turns):
            await asyncio.sleep(0)
        await streams[1].aclose()
        return [reply.finish_reason for reply in await asyncio.gather(*readers)]

    devices = fake_devices(config, faults={"step": [LOST]})
    reasons = run_system(config, program, transport=devices, step_ns=STEP_NS)
    assert (reasons[0], reasons[2]) == ("error", "error")
    assert reasons[1] in ("abort", "error")


def test_whoever_waits_hears_of_a_loss_even_if_nobody_ran_any_more(run_system, make_config, fake_devices, prompt):
    """The only running request is given up during the step that fails; one more waits for its room."""
    config = make_config("colocated", "instances.colocated.npus=1", "instances.colocated.max_num_seqs=1")

    async def program(system):
        stream = system.submit("r0", prompt(5))
        waiting = asyncio.ensure_future(system.generate("r1", prompt(5)))
        await system.clock.sleep_until(100_000)
        await stream.aclose()
        return await waiting

    devices = fake_devices(config, faults={"step": [LOST]})
    reply = run_system(config, program, transport=devices, step_ns=STEP_NS)
    assert (reply.finish_reason, reply.error) == ("error", f"instance colocated-0: {LOST}")


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_an_instance_may_be_lost_while_it_has_nothing_to_do(run_system, make_config, fake_devices, prompt, role):
    config = make_config("disaggregated")

    async def program(system):
        await system.generate("r0", prompt(5))
        system.cluster.lose_instance(f"{role}-0", "npu-3's process is gone")
        reply = await system.generate("r1", prompt(5))  # before anybody has noticed
        assert not system.frontend.health()
        with pytest.raises(EngineFailure, match=f"instance {role}-0: npu-3's process is gone"):
            system.submit("r2", prompt(5))
        return reply

    reply = run_system(config, program, transport=fake_devices(config), step_ns=STEP_NS)
    assert (reply.finish_reason, reply.error) == ("error", f"instance {role}-0: npu-3's process is gone")


@pytest.mark.parametrize("when_ns", [10_000, 1_020_000, 1_200_000, 2_500_000])
def test_a_host_that_is_lost_costs_nobody_a_request(run_system, make_config, fake_devices, prompt, when_ns):
    config = make_config("disaggregated")
    devices = fake_devices(config)
    prompts = [prompt(20) + prompt(i, seed=i) for i in range(1, 6)]

    async def lose(system):
        await system.clock.sleep_until(when_ns)
        system.cluster.lose_host(0)
        for item in [item for item in devices.stored if item.host_id == 0]:
            del devices.stored[item]

    async def program(system):
        losing = asyncio.ensure_future(lose(system))
        readers = []
        for i, tokens in enumerate(prompts):
            await system.clock.sleep_until(i * 1_000_000)
            readers.append(asyncio.ensure_future(system.generate(f"r{i}", tokens, max_tokens=3)))
        replies = await asyncio.gather(*readers)
        await losing
        return replies

    replies = run_system(config, program, transport=devices, step_ns=STEP_NS)
    assert [reply.token_ids for reply in replies] == [devices.generate(tokens, 3) for tokens in prompts]


def test_a_failed_hand_over_fails_its_request_alone(run_system, make_config, fake_devices, prompt):
    config = make_config("disaggregated", "instances.decode.npus=1", "instances.decode.max_num_seqs=2")
    lost = EngineFailure("pull_blocks: the peer's process is gone")
    devices = fake_devices(config, faults={"kv_transfer": [None, lost]})

    async def program(system):
        return await asyncio.gather(*(system.generate(f"r{i}", prompt(5 + i), max_tokens=20) for i in range(5)))

    replies = run_system(config, program, transport=devices, step_ns=STEP_NS)
    assert [reply.error for reply in replies] == [None, str(lost), None, None, None]
    for i in (0, 2, 3, 4):  # the last ones waited in the queue when it happened
        assert replies[i].token_ids == devices.generate(prompt(5 + i), 20)


def test_stopping_lets_a_step_end(make_config, fake_devices, prompt, run_system):
    """Requests that are given up while they compute hold their blocks to the end of the step, and no longer."""
    config = make_config("colocated")

    async def program(system):
        for i in range(3):
            system.submit(f"r{i}", prompt(5, seed=i))
        await system.clock.sleep_until(100_000)
        await system.frontend.abort_all()
        assert system.cluster.held()["slots"] == 3
        await system.cluster.stop()
        assert not any(system.cluster.held().values())
        return system.clock.now_ns()

    assert run_system(config, program, transport=fake_devices(config), step_ns=STEP_NS) == 200_000


def test_equal_runs_are_charged_equally(run_system, make_config, prompt):
    """Timing shards and the shipped time model."""
    config = make_config("disaggregated")

    async def program(system):
        streams = [system.submit(f"r{i}", prompt(20, seed=i), max_tokens=4) for i in range(4)]
        for stream in streams:
            await system.read(stream)
        return system.log.digest(), system.cluster.all_engines

    digests = set()
    for _ in range(3):
        digest, engines = run_system(config, program)
        digests.add(digest)
        assert all(engine.num_steps and engine.busy_ns > 0 for engine in engines)
    assert len(digests) == 1
