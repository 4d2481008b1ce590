"""A request may be given up at any moment: at every event of a run, and some turns of the event loop after it."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

CROWDED = (
    "instances.{role}.num_blocks=32",
    "instances.{role}.max_num_seqs=3",
    "instances.{role}.npus=1",
    "kv_pool={{enabled: true, hosts: 1, dram_bytes_per_host: 1700000}}",  # six blocks
)
SETTINGS = {
    "disaggregated": ("disaggregated", "decode"),
    "colocated with a pool": ("colocated", "colocated"),
}
STEP_NS = {"prefill": 300_000, "decode": 100_000, "colocated": 200_000}
NUM_REQUESTS, NUM_TOKENS = 5, 30


class AfterEvent:
    """Calls `action` a number of turns of the event loop after the log's event number `index`."""

    def __init__(self, log: Any, index: int, turns: int, action: Callable[[], None]) -> None:
        self._log, self._append, self._index, self._turns, self._action = log, log.append, index, turns, action
        log.append = self

    def __call__(self, *args: Any, **details: Any) -> None:
        self._append(*args, **details)
        if self._log.num_events == self._index + 1:
            self._turn(self._turns)

    def _turn(self, turns: int) -> None:
        if turns:
            asyncio.get_running_loop().call_soon(self._turn, turns - 1)
        else:
            self._action()


@pytest.fixture
def crowded(make_config):
    """A function: the configuration of a setting, too small for what is asked of it."""

    def make(setting: str):
        name, role = SETTINGS[setting]
        return make_config(name, *(override.format(role=role) for override in CROWDED))

    return make


async def serve_all(system, prompts, *, victim=None, index=0, turns=0):
    """Serve every prompt, and give the victim up. The replies of all."""
    streams = {}
    closing = []

    def give_up() -> None:
        if victim in streams:
            closing.append(asyncio.ensure_future(streams[victim].aclose()))

    if victim is not None:
        AfterEvent(system.log, index, turns, give_up)
    readers = []
    for i, prompt in enumerate(prompts):
        await system.clock.sleep_until(i * 150_000)
        streams[i] = system.submit(f"r{i}", prompt, max_tokens=NUM_TOKENS)
        readers.append(asyncio.ensure_future(system.read(streams[i])))
    return await asyncio.gather(*readers)


@pytest.mark.parametrize(
    ("turns", "latency_s", "stride"),
    [(0, 0.0, 1), (1, 0.0, 1), (2, 0.0, 3), (4, 0.0, 3), (0, 0.0002, 11)],
    ids=["at once", "a turn later", "two turns later", "four turns later", "late devices"],
)
@pytest.mark.parametrize("setting", SETTINGS)
def test_whenever_a_request_is_given_up_the_others_get_their_tokens(
    run_system, crowded, fake_devices, prompt, setting, turns, latency_s, stride
):
    config = crowded(setting)
    prompts = [prompt(12, seed=1) + prompt(6 + i, seed=i) for i in range(NUM_REQUESTS)]
    expected = [fake_devices(config).generate(tokens, NUM_TOKENS) for tokens in prompts]
    systems = []

    def run(victim=None, index=0):
        async def program(system):
            systems.append(system)
            return await serve_all(system, prompts, victim=victim, index=index, turns=turns)

        devices = fake_devices(config, latency_s=latency_s)
        return run_system(config, program, transport=devices, step_ns=STEP_NS)

    assert [reply.token_ids for reply in run()] == expected
    assert {"preempt", "pool_store", "pool_load"} <= {event.kind for event in systems[0].log.events}
    indices = range(0, systems[0].log.num_events, stride)
    for index in indices:
        victim = index % NUM_REQUESTS
        replies = run(victim, index)
        outcomes = dict(systems[-1].outcomes)
        for i, (reply, tokens) in enumerate(zip(replies, expected, strict=True)):
            if i == victim:
                assert outcomes[f"r{i}"] in ("abort", "length")
                assert reply.token_ids == tokens[: len(reply.token_ids)]
            else:
                assert (outcomes[f"r{i}"], reply.finish_reason, reply.token_ids) == ("length", "length", tokens)
    assert sum(("abort" in dict(system.outcomes).values()) for system in systems) > len(indices) / 3


@given(
    ends=st.lists(
        st.tuples(st.integers(0, NUM_REQUESTS - 1), st.integers(0, 9_000_000), st.sampled_from(["abort", "stop"])),
        max_size=6,
    ),
    gaps_ns=st.lists(st.integers(0, 400_000), min_size=NUM_REQUESTS, max_size=NUM_REQUESTS),
    lengths=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=NUM_REQUESTS, max_size=NUM_REQUESTS),
    setting=st.sampled_from(list(SETTINGS)),
)
@settings(max_examples=40, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_requests_that_end_at_any_instant_leave_nothing_behind(
    run_system, crowded, fake_devices, prompt, ends, gaps_ns, lengths, setting
):
    config = crowded(setting)
    prompts = [prompt(num_tokens) for num_tokens, _ in lengths]  # one is the beginning of another

    async def program(system):
        streams = {}

        async def end(number: int, when_ns: int, how: str) -> None:
            await system.clock.sleep_until(when_ns)
            if number not in streams:
                return
            if how == "stop":
                streams[number].finish(stop_reason="###", num_tokens=1)
            await streams[number].aclose()

        ending = [asyncio.ensure_future(end(*entry)) for entry in ends]
        readers = []
        for i, tokens in enumerate(prompts):
            await system.clock.sleep_until(system.clock.now_ns() + gaps_ns[i])
            streams[i] = system.submit(f"r{i}", tokens, max_tokens=lengths[i][1])
            readers.append(asyncio.ensure_future(system.read(streams[i])))
        replies = await asyncio.gather(*readers)
        await asyncio.gather(*ending)
        return replies, dict(system.outcomes)

    devices = fake_devices(config)
    replies, outcomes = run_system(config, program, transport=devices, step_ns=STEP_NS)
    ended_early = {number for number, _, _ in ends}
    for i, reply in enumerate(replies):
        expected = devices.generate(prompts[i], lengths[i][1])
        assert reply.token_ids == expected[: len(reply.token_ids)]
        if i not in ended_early:
            assert (outcomes[f"r{i}"], reply.token_ids) == ("length", expected)


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_request_given_up_before_its_task_has_begun_holds_nothing(run_system, crowded, fake_devices, prompt, setting):
    config = crowded(setting)

    async def program(system):
        streams = [system.submit(f"r{i}", prompt(10), max_tokens=4) for i in range(6)]  # more than there is room for
        for stream in streams:
            await stream.aclose()  # not one turn of the loop since
        assert system.outcomes == [(f"r{i}", "abort") for i in range(6)]
        assert [await system.read(stream) for stream in streams]
        return await system.generate("r6", prompt(10), max_tokens=4)

    devices = fake_devices(config)
    reply = run_system(config, program, transport=devices, step_ns=STEP_NS)
    assert reply.token_ids == devices.generate(prompt(10), 4)


@pytest.mark.parametrize("turns", range(6))
def test_a_caller_of_serve_that_is_canceled_gives_its_request_up(run_system, crowded, fake_devices, turns):
    from serving.core.request import Request
    from serving.messages import SamplingParams

    config = crowded("disaggregated")

    async def program(system):
        request = Request(
            request_id="r0",
            arrival_ns=0,
            num_prompt_tokens=4,
            max_tokens=3,
            prompt_token_ids=(20, 21, 22, 23),
            sampling=SamplingParams(max_tokens=3, seed=0),
        )
        serving = asyncio.ensure_future(system.frontend.serve(request, on_token=lambda *token: None))
        for _ in range(turns):
            await asyncio.sleep(0)
        serving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await serving
        return system.outcomes

    outcomes = run_system(config, program, transport=fake_devices(config), step_ns=STEP_NS)
    assert outcomes == ([("r0", "abort")] if turns else [])  # at once: `serve` had not begun


def test_a_name_is_free_again_only_when_its_last_request_holds_nothing(run_system, crowded, fake_devices, prompt):
    config = crowded("disaggregated")

    async def program(system):
        stream = system.submit("twin", prompt(10), max_tokens=8)
        with pytest.raises(ValueError, match="'twin' is in flight"):
            system.submit("twin", prompt(10))
        while not system.events("step"):
            await asyncio.sleep(0)
        await stream.aclose()  # in the middle of a prefill step, whose end frees its blocks
        for _ in range(10):
            await asyncio.sleep(0)
        with pytest.raises(ValueError, match="'twin' is in flight"):
            system.submit("twin", prompt(10))
        await system.clock.sleep_until(STEP_NS["prefill"] + 1)
        return await system.generate("twin", prompt(11))

    devices = fake_devices(config)
    reply = run_system(config, program, transport=devices, step_ns=STEP_NS)
    assert reply.token_ids == devices.generate(prompt(11), 8)
