"""Tokens of the whole system against plain generation in one process: equal, however the work is spread.

Torch shards in this process; the reference is `model.reference`, which knows no scheduler, no ranks and no blocks.
"""

import asyncio
from functools import cache

import pytest

from model.config import ModelConfig
from model.reference import ReferenceModel, Sampling
from serving.local_devices import local_transport
from serving.simulator import run_in_virtual_time
from serving.workloads.load import load_workload
from tests.sampled_requests import SAMPLED

LENGTHS = ((5, 9), (33, 6), (17, 12), (40, 3), (1, 8), (21, 1))  # of prompt and output
GREEDY = tuple((f"r{i}", length, i, {"max_tokens": limit}) for i, (length, limit) in enumerate(LENGTHS))


@pytest.fixture(scope="module")
def reference(checkpoint):
    """A function: tokens and logprobs of plain generation."""
    model = ReferenceModel(ModelConfig.from_file(checkpoint / "config.json"), checkpoint)

    @cache
    def generate(prompt, *, max_tokens, ignore_eos=True, logprobs=None, **sampling):
        wanted = Sampling(num_logprobs=logprobs, stop_at_eos=not ignore_eos, **sampling)
        return model.generate(prompt, max_tokens, wanted)

    return generate


@pytest.fixture
def serve(run_system, make_config, checkpoint, prompt):
    """A function: serve requests (name, prompt length, prompt seed, sampling) on a run; the replies and the system.

    Requests arrive `gap_ns` after each other. With `shared` they all begin with that many equal tokens.
    """

    def run(name, *overrides, requests=GREEDY, gap_ns=100_000, shared=0):
        config = make_config(name, *overrides)

        async def program(system):
            readers = []
            for i, (request_id, length, seed, sampling) in enumerate(requests):
                await system.clock.sleep_until(i * gap_ns)
                tokens = prompt(shared, seed=99) + prompt(length, seed=seed)
                readers.append(asyncio.ensure_future(system.generate(request_id, tokens, **sampling)))
            return await asyncio.gather(*readers), system

        return run_system(config, program, transport=local_transport(config, checkpoint))

    return run


@pytest.fixture
def check(serve, reference, prompt):
    """A function: serve, and compare every request with the reference; returns the system."""

    def run(name, *overrides, requests=GREEDY, shared=0, **options):
        replies, system = serve(name, *overrides, requests=requests, shared=shared, **options)
        for reply, (_, length, seed, sampling) in zip(replies, requests, strict=True):
            expected = reference(prompt(shared, seed=99) + prompt(length, seed=seed), **sampling)
            assert reply.token_ids == expected.token_ids
        return system

    return run


def num_events(system, kind):
    return len(system.events(kind))


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("colocated", ()),
        ("disaggregated", ()),
        ("colocated", ("instances.colocated.npus=1",)),
        ("colocated", ("instances.colocated.npus=4",)),
        ("colocated", ("instances.colocated.npus=8",)),
        ("colocated", ("instances.colocated.npus=2", "instances.colocated.dies_per_npu=2")),
        ("disaggregated", ("instances.prefill.npus=1", "instances.decode.npus=1")),
        ("disaggregated", ("instances.prefill.npus=4", "instances.decode.npus=8")),
        ("disaggregated", ("instances.prefill.npus=8", "instances.decode.npus=1")),
        ("disaggregated", ("instances.prefill.dies_per_npu=2", "instances.decode.dies_per_npu=2")),
        ("colocated", ("instances.colocated.num_redundant_experts=6",)),
        ("disaggregated", ("instances.prefill.num_redundant_experts=2", "instances.decode.num_redundant_experts=16")),
        (
            "disaggregated",
            (
                "instances.prefill.shared_expert=dispatched",
                "instances.prefill.num_shared_expert_copies=2",
                "instances.decode.npus=4",
                "instances.decode.shared_expert=dispatched",
                "instances.decode.num_shared_expert_copies=2",
                "instances.decode.num_redundant_experts=2",
            ),
        ),
        ("disaggregated", ("cache.block_size=16",)),
        ("laptop", ()),
        ("laptop-2p2d", ()),
        ("colocated", ("timing.microbatch=false", "clock.scale=0")),
        ("colocated", ("ray.pack=node", "ray.ranks=batched")),
        ("laptop-2p2d", ("ray.pack=node", "ray.ranks=batched")),
        ("disaggregated", ("instances.decode.dies_per_npu=2", "ray.ranks=batched", "model.dispatch_dtype=float32")),
    ],
    ids=str,
)
def test_tokens_do_not_depend_on_how_the_model_is_spread(check, name, overrides):
    check(name, *overrides)


@pytest.mark.parametrize("name", ["disaggregated", "colocated"])
def test_tokens_are_the_same_when_prompts_are_computed_in_chunks(check, name):
    role = "prefill" if name == "disaggregated" else "colocated"
    system = check(name, f"instances.{role}.max_num_seqs=5", f"instances.{role}.max_num_batched_tokens=7")
    assert all(int(line.rpartition("=")[2]) <= 7 * 2 for line in system.events("step"))


@pytest.mark.parametrize("name", ["disaggregated", "colocated"])
def test_tokens_are_the_same_after_preemptions(check, name):
    role = "decode" if name == "disaggregated" else "colocated"
    requests = [(f"r{i}", 25 + i, i, {"max_tokens": 30}) for i in range(6)]
    system = check(
        name, f"instances.{role}.npus=1", f"instances.{role}.num_blocks=32", requests=requests, gap_ns=20_000
    )
    assert num_events(system, "preempt") >= 2


@pytest.mark.parametrize("name", ["disaggregated", "colocated"])
def test_tokens_are_the_same_with_a_prefix_from_the_pool(check, name):
    system = check(name, "kv_pool.enabled=true", shared=27, gap_ns=500_000_000)
    assert system.cluster.pool.num_loaded_blocks == 6 * (len(LENGTHS) - 1)  # of 4 tokens; the last 3 are no full block
    assert system.cluster.pool.num_stored_blocks > 6


def test_tokens_are_the_same_with_a_pool_that_is_too_small(check):
    system = check("disaggregated", "kv_pool={hosts: 2, dram_bytes_per_host: 1500000}", shared=16, gap_ns=50_000_000)
    assert system.cluster.pool.num_loaded_blocks > 0
    assert system.cluster.pool.index.num_evicted > 0


def test_tokens_are_the_same_with_preemptions_chunks_and_a_pool_at_once(check):
    requests = [(f"r{i}", 20 + i, i, {"max_tokens": 25}) for i in range(5)]
    system = check(
        "disaggregated",
        "instances.decode.npus=1",
        "instances.decode.num_blocks=32",
        "instances.prefill.max_num_seqs=5",
        "instances.prefill.max_num_batched_tokens=13",
        requests=requests,
        shared=9,
        gap_ns=30_000_000,
    )
    assert num_events(system, "preempt") >= 1
    assert system.cluster.pool.num_loaded_blocks > 0


def test_tokens_are_the_same_with_prefixes_in_the_instances_own_blocks(check):
    options = ("instances.colocated.prefix_caching=true", "instances.colocated.npus=1")
    system = check("colocated", *options, shared=27, gap_ns=500_000_000)
    cached = [line for line in system.events("admit") if "cached=24" in line]
    assert len(cached) == len(LENGTHS) - 1


@pytest.mark.parametrize("policy", ["least_loaded", "round_robin", "power_of_two", "prefix_affinity"])
def test_tokens_do_not_depend_on_the_router(check, policy):
    system = check("laptop-2p2d", f"router.policy={policy}", "instances.prefill.prefix_caching=true")
    assert len({line.split("prefill=")[1].split()[0] for line in system.events("place")}) == 2


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("colocated", ()),
        ("disaggregated", ("instances.decode.npus=4",)),
        ("disaggregated", ("instances.decode.npus=1", "instances.decode.num_blocks=32")),
    ],
    ids=str,
)
def test_sampled_tokens_depend_on_the_seed_and_on_nothing_else(check, name, overrides):
    system = check(name, *overrides, requests=SAMPLED)
    assert {reason for _, reason in system.outcomes} <= {"stop", "length"}


def test_a_request_gets_the_same_tokens_alone_and_in_any_company(serve):
    one = SAMPLED[:1]
    alone, _ = serve("disaggregated", requests=one)
    crowded, _ = serve("disaggregated", requests=(*SAMPLED[1:], *one), gap_ns=0)
    assert crowded[-1].token_ids == alone[0].token_ids
    assert alone[0].token_ids != crowded[1].token_ids  # another seed


def test_a_request_without_a_seed_gets_one_from_the_configuration(serve):
    requests = [("r0", 12, 0, {"temperature": 1.0}), ("r1", 12, 0, {"temperature": 1.0})]
    first, _ = serve("colocated", requests=requests)
    again, _ = serve("colocated", requests=requests)
    other, _ = serve("colocated", "seed=1", requests=requests)
    assert [reply.token_ids for reply in first] == [reply.token_ids for reply in again]
    assert first[0].token_ids != first[1].token_ids
    assert [reply.token_ids for reply in first] != [reply.token_ids for reply in other]


def test_logprobs_are_those_of_the_reference(serve, reference, prompt):
    requests = [(f"r{i}", 9 + i, i, {"max_tokens": 5, "logprobs": i}) for i in range(3)]
    replies, _ = serve("disaggregated", requests=requests)
    for reply, (_, length, seed, sampling) in zip(replies, requests, strict=True):
        expected = reference(prompt(length, seed=seed), **sampling)
        assert len(reply.logprobs) == 5
        for entry, wanted in zip(reply.logprobs, expected.logprobs, strict=True):
            assert entry.logprob == pytest.approx(wanted.logprob, abs=1e-4)
            assert [token for token, _ in entry.top] == [token for token, _ in wanted.top]
            assert len(entry.top) == sampling["logprobs"]


@pytest.mark.parametrize("name", ["disaggregated", "colocated"])
def test_dispatch_in_int8_runs_and_stays_close(serve, reference, prompt, name):
    """Rounding may change a token, after which the text is another one: most first tokens are the same."""
    replies, _ = serve(name, "model.dispatch_dtype=int8")
    expected = [
        reference(prompt(length, seed=i), max_tokens=limit).token_ids for i, (length, limit) in enumerate(LENGTHS)
    ]
    assert [len(reply.token_ids) for reply in replies] == [len(tokens) for tokens in expected]
    assert sum(reply.token_ids[0] == tokens[0] for reply, tokens in zip(replies, expected, strict=True)) >= 4


def test_a_replay_of_a_workload_gives_the_reference_tokens(make_config, checkpoint, reference):
    config = make_config("laptop", "workload={num_requests: 6, input_len: 24, output_len: 5, prefix_len: 16}")
    workload = load_workload(config)
    result = run_in_virtual_time(config, workload, open_transport=lambda: local_transport(config, checkpoint))
    assert not any(result.bench.held_at_rest.values())
    for item in workload.requests:
        prompt = tuple(workload.prompt_token_ids(item).tolist())
        assert result.token_ids[item.request_id] == reference(prompt, max_tokens=item.max_tokens).token_ids
