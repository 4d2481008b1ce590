"""The frontend: who is admitted, in which order, and how a request ends."""

import asyncio

import pytest

from serving.core.request import Request
from serving.errors import Draining, PromptTooLong, QueueFull
from serving.messages import SamplingParams

STEP_NS = {"prefill": 1_000_000, "decode": 500_000, "colocated": 700_000}
ONE_AT_A_TIME = ("instances.decode.npus=1", "instances.decode.max_num_seqs=1")
EOS = 1


def request_of(request_id, prompt, *, max_tokens=2):
    return Request(
        request_id=request_id,
        arrival_ns=0,
        num_prompt_tokens=len(prompt),
        max_tokens=max_tokens,
        prompt_token_ids=prompt,
        sampling=SamplingParams(max_tokens=max_tokens, seed=0, ignore_eos=True),
    )


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_requests_are_served_in_the_order_of_the_policy(run_system, make_config, fake_devices, prompt, policy):
    config = make_config("disaggregated", *ONE_AT_A_TIME, f"scheduler.policy={policy}")

    async def program(system):
        priorities = {"r0": 0, "r1": 5, "r2": 1, "r3": 5, "r4": 0}
        replies = [system.generate(name, prompt(5), priority=p) for name, p in priorities.items()]
        await asyncio.gather(*replies)
        return [name for name, _ in system.outcomes]

    order = run_system(config, program, transport=fake_devices(config), step_ns=STEP_NS)
    assert order == {"fcfs": ["r0", "r1", "r2", "r3", "r4"], "priority": ["r0", "r4", "r2", "r1", "r3"]}[policy]


def test_nobody_passes_a_head_of_the_queue_that_does_not_fit(run_system, make_config, fake_devices, prompt):
    config = make_config("disaggregated", "instances.decode.npus=1", "instances.decode.num_blocks=32")

    async def program(system):
        running = asyncio.ensure_future(system.generate("running", prompt(60), max_tokens=20))
        await asyncio.sleep(0)
        waiting = [
            asyncio.ensure_future(system.generate(name, prompt(length), max_tokens=2))
            for name, length in (("large", 100), ("small", 5))
        ]
        await system.clock.sleep_until(2_000_000)
        assert system.frontend.num_waiting == 2  # although the small one would fit
        await asyncio.gather(running, *waiting)
        return [line.split()[2] for line in system.events("place")]

    names = run_system(config, program, transport=fake_devices(config), step_ns=STEP_NS)
    assert names == ["running", "large", "small"]


def test_a_more_urgent_request_that_fits_does_not_wait_for_a_large_one(run_system, make_config, fake_devices, prompt):
    overrides = ("instances.decode.npus=1", "instances.decode.num_blocks=32", "scheduler.policy=priority")
    config = make_config("disaggregated", *overrides)

    async def program(system):
        replies = [
            asyncio.ensure_future(system.generate(name, prompt(length), priority=priority))
            for name, length, priority in (("running", 60, 0), ("large", 100, 5), ("urgent", 5, 1))
        ]
        await asyncio.gather(*replies)
        return [line.split() for line in system.events("place")]

    placed = run_system(config, program, transport=fake_devices(config), step_ns=STEP_NS)
    assert [(line[2], int(line[0])) for line in placed][:2] == [("running", 0), ("urgent", 0)]


@pytest.mark.parametrize("name", ["disaggregated", "colocated"])
def test_a_full_queue_refuses_and_says_why(run_system, make_config, fake_devices, prompt, name):
    role = "decode" if name == "disaggregated" else "colocated"
    limits = (f"instances.{role}.npus=1", f"instances.{role}.max_num_seqs=2", "scheduler.max_queued_requests=3")
    config = make_config(name, *limits)

    async def program(system):
        streams = [system.submit(f"r{i}", prompt(5), max_tokens=2) for i in range(5)]  # at one instant
        assert system.frontend.num_waiting == 3
        held = system.cluster.held()
        with pytest.raises(QueueFull, match=r"3 requests wait already, scheduler.max_queued_requests is 3") as refusal:
            system.submit("r5", prompt(5))
        assert refusal.value.retry_after_s > 0
        request = request_of("r6", prompt(5))
        await system.frontend.serve(request, on_token=lambda *token: None)
        assert (request.outcome.state.value, str(request.outcome.reason)) == ("rejected", "queue_full")
        assert "max_queued_requests is 3" in request.outcome.message
        assert system.cluster.held() == held
        for stream in streams:
            assert (await system.read(stream)).finish_reason == "length"

    run_system(config, program, transport=fake_devices(config), step_ns=STEP_NS)


def test_without_a_queue_a_request_runs_now_or_never(run_system, make_config, fake_devices, prompt):
    config = make_config("disaggregated", *ONE_AT_A_TIME, "scheduler.max_queued_requests=0")

    async def program(system):
        stream = system.submit("r0", prompt(5))
        with pytest.raises(QueueFull):
            system.submit("r1", prompt(5))
        await system.read(stream)
        return (await system.generate("r2", prompt(5))).finish_reason

    assert run_system(config, program, transport=fake_devices(config), step_ns=STEP_NS) == "length"


def test_a_draining_frontend_finishes_what_it_has_and_takes_no_more(run_system, make_config, fake_devices, prompt):
    config = make_config("disaggregated", *ONE_AT_A_TIME)

    async def program(system):
        streams = [system.submit(f"r{i}", prompt(5), max_tokens=2) for i in range(2)]  # the second one waits
        assert system.frontend.health()
        system.frontend.drain()
        assert not system.frontend.health()
        with pytest.raises(Draining, match="shutting down"):
            system.submit("r2", prompt(5))
        request = request_of("r3", prompt(5))
        await system.frontend.serve(request, on_token=lambda *token: None)
        assert str(request.outcome.reason) == "draining"
        return [(await system.read(stream)).finish_reason for stream in streams]

    assert run_system(config, program, transport=fake_devices(config), step_ns=STEP_NS) == ["length", "length"]


def test_a_request_beyond_the_context_is_refused_before_anything_is_held(run_system, make_config, fake_devices, prompt):
    config = make_config("disaggregated")

    async def program(system):
        for length, max_tokens in ((128, 1), (120, 9)):
            with pytest.raises(PromptTooLong, match="max_model_len 128"):
                system.submit("r0", prompt(length), max_tokens=max_tokens)
        request = request_of("r1", prompt(120), max_tokens=9)
        await system.frontend.serve(request, on_token=lambda *token: None)
        assert str(request.outcome.reason) == "prompt_too_long"
        assert (await system.generate("r2", prompt(120), max_tokens=8)).finish_reason == "length"

    run_system(config, program, transport=fake_devices(config), step_ns=STEP_NS)


@pytest.mark.parametrize("name", ["disaggregated", "colocated"])
@pytest.mark.parametrize(
    ("sampling", "num_tokens", "finish_reason", "stop_reason"),
    [
        ({"ignore_eos": False}, 3, "stop", None),
        ({"ignore_eos": True}, 8, "length", None),
        ({"ignore_eos": False, "min_tokens": 3}, 8, "length", None),  # its third token may not be EOS
        ({"ignore_eos": False, "min_tokens": 2}, 3, "stop", None),
        ({"stop_token_ids": (100,)}, 1, "stop", 100),
        ({"stop_token_ids": (103, 101)}, 2, "stop", 101),
        ({"stop_token_ids": (103, 101), "min_tokens": 3}, 4, "stop", 103),
        ({"stop_token_ids": (EOS,)}, 3, "stop", EOS),
        ({"max_tokens": 1}, 1, "length", None),
    ],
)
def test_what_ends_a_request(
    run_system, make_config, fake_devices, prompt, name, sampling, num_tokens, finish_reason, stop_reason
):
    """The model says 100, 101, EOS, 103, 104, ... after any prompt of five tokens."""
    config = make_config(name)

    def next_token(context):
        number = len(context) - 5
        return EOS if number == 2 else 100 + number

    async def program(system):
        return await system.generate("r0", prompt(5), **sampling)

    devices = fake_devices(config, next_token)
    reply = run_system(config, program, transport=devices, step_ns=STEP_NS)
    assert (len(reply.token_ids), reply.finish_reason, reply.stop_reason) == (num_tokens, finish_reason, stop_reason)


@pytest.mark.parametrize("num_read", [1, 2, 5])
def test_a_stop_string_finishes_the_request_where_the_reader_is(
    run_system, make_config, fake_devices, prompt, num_read
):
    config = make_config("disaggregated")

    async def program(system):
        stream = system.submit("r0", prompt(5), max_tokens=50)
        count = 0
        while count < num_read:
            count += len((await anext(stream)).token_ids)
        times = stream.finish(stop_reason="###", num_tokens=num_read)
        assert times.simulated.ttft_ms == pytest.approx(1.0)
        assert [delta async for delta in stream] == []
        await stream.aclose()
        return system.outcomes

    outcomes = run_system(config, program, transport=fake_devices(config), step_ns=STEP_NS)
    assert outcomes == [("r0", "stop")]


def test_a_stop_string_may_be_found_while_the_request_waits_to_be_prefilled_again(
    run_system, make_config, fake_devices, prompt
):
    config = make_config("disaggregated", "instances.decode.npus=1", "instances.decode.num_blocks=32")

    async def program(system):
        first = asyncio.ensure_future(system.generate("r0", prompt(59, seed=1), max_tokens=12))
        await asyncio.sleep(0)
        stream = system.submit("r1", prompt(59, seed=2), max_tokens=12)
        while not system.events("preempt"):
            await system.clock.sleep_until(system.clock.now_ns() + 1000)
        assert system.frontend.num_waiting == 1
        stream.finish(stop_reason="###", num_tokens=1)
        await first
        return system.outcomes

    outcomes = run_system(config, program, transport=fake_devices(config), step_ns=STEP_NS)
    assert outcomes == [("r1", "stop"), ("r0", "length")]


@pytest.mark.parametrize("name", ["disaggregated", "colocated"])
def test_every_token_comes_with_its_logprob_if_they_are_wanted(run_system, make_config, fake_devices, prompt, name):
    config = make_config(name)

    async def program(system):
        wanted, unwanted = await asyncio.gather(
            system.generate("r0", prompt(5), logprobs=0), system.generate("r1", prompt(7))
        )
        assert [-entry.logprob for entry in wanted.logprobs] == wanted.token_ids
        assert len(wanted.token_ids) == 8
        assert unwanted.logprobs == []

    run_system(config, program, transport=fake_devices(config), step_ns=STEP_NS)


def test_a_bug_in_one_life_fails_that_request_alone(run_system, make_config, fake_devices, prompt, caplog):
    """Whatever a life runs into, its client hears it and what it held is free."""
    config = make_config("disaggregated")
    devices = fake_devices(config, faults={"kv_transfer": [RuntimeError("flipped bit")]})

    async def program(system):
        return await asyncio.gather(system.generate("r0", prompt(5)), system.generate("r1", prompt(9)))

    lost, good = run_system(config, program, transport=devices, step_ns=STEP_NS)
    assert (lost.finish_reason, lost.error) == ("error", "RuntimeError: flipped bit")
    assert good.token_ids == devices.generate(prompt(9), 8)
    assert "request r0" in caplog.text
