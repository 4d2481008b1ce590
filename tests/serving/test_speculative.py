"""Speculative decoding in the whole system: the tokens are those of plain generation, whatever the drafts are worth."""

import asyncio
from functools import cache

import pytest

from model.config import ModelConfig
from model.reference import ReferenceModel, Sampling
from serving.local_devices import local_transport
from tests.drafted import write_drafted_checkpoint
from tests.sampled_requests import SAMPLED

ON = "speculative.num_speculative_tokens=1"
GAINS = {"right": 0.0, "mixed": 0.15, "wrong": None}  # of the context; None: random weights
LENGTHS = ((5, 9), (33, 6), (17, 12), (40, 3), (1, 8), (21, 1), (8, 2))  # of prompt and output
GREEDY = tuple((f"r{i}", length, i, {"max_tokens": limit}) for i, (length, limit) in enumerate(LENGTHS))


@pytest.fixture(scope="module")
def drafted(tmp_path_factory, checkpoint):
    """A function: checkpoint whose drafts are right, mixed or wrong, and its plain generation."""

    @cache
    def load(kind):
        directory = checkpoint
        config = ModelConfig.from_file(checkpoint / "config.json")
        if GAINS[kind] is not None:
            directory = tmp_path_factory.mktemp(kind)
            write_drafted_checkpoint(directory, config, seed=3, context_gain=GAINS[kind])
        model = ReferenceModel(config, directory)

        @cache
        def generate(prompt, *, max_tokens, ignore_eos=True, logprobs=None, stop_token_ids=(), **sampling):
            wanted = Sampling(num_logprobs=logprobs, stop_at_eos=not ignore_eos, **sampling)
            return model.generate(prompt, max_tokens, wanted)

        return directory, generate

    return load


@pytest.fixture
def serve(run_system, make_config, drafted, prompt):
    """A function: serve requests (name, prompt length, prompt seed, sampling); the replies and the system."""

    def run(name, *overrides, kind="mixed", requests=GREEDY, gap_ns=100_000, shared=0):
        config = make_config(name, ON, *overrides)

        async def program(system):
            readers = []
            for i, (request_id, length, seed, sampling) in enumerate(requests):
                await system.clock.sleep_until(i * gap_ns)
                tokens = prompt(shared, seed=99) + prompt(length, seed=seed)
                readers.append(asyncio.ensure_future(system.generate(request_id, tokens, **sampling)))
            return await asyncio.gather(*readers), system

        return run_system(config, program, transport=local_transport(config, drafted(kind)[0]))

    return run


@pytest.fixture
def check(serve, drafted, prompt):
    """A function: serve, and compare every request with plain generation; returns the system."""

    def run(name, *overrides, kind="mixed", requests=GREEDY, shared=0, **options):
        replies, system = serve(name, *overrides, kind=kind, requests=requests, shared=shared, **options)
        for reply, (_, length, seed, sampling) in zip(replies, requests, strict=True):
            expected = drafted(kind)[1](prompt(shared, seed=99) + prompt(length, seed=seed), **sampling)
            assert reply.token_ids == expected.token_ids
        return system

    return run


def drafts_of(system):
    """Verified and accepted drafts of all instances."""
    engines = system.cluster.all_engines
    return sum(e.num_drafts for e in engines), sum(e.num_accepted for e in engines)


@pytest.mark.parametrize("kind", GAINS)
@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("colocated", ()),
        ("disaggregated", ()),
        ("colocated", ("instances.colocated.npus=1",)),
        ("colocated", ("instances.colocated.npus=4",)),
        ("disaggregated", ("instances.prefill.npus=1", "instances.decode.npus=1")),
        ("disaggregated", ("instances.prefill.npus=4", "instances.decode.npus=4")),
        ("disaggregated", ("cache.block_size=16",)),
        ("colocated", ("cache.block_size=1", "instances.colocated.num_blocks=160")),
        ("laptop", ()),
        ("colocated", ("ray.pack=node", "ray.ranks=batched")),
        ("laptop-2p2d", ("ray.pack=node", "ray.ranks=batched")),
        ("disaggregated", ("instances.decode.dies_per_npu=2", "ray.ranks=batched")),
    ],
    ids=str,
)
def test_greedy_tokens_are_those_without_drafts(check, kind, name, overrides):
    system = check(name, *overrides, kind=kind)
    num_drafts, num_accepted = drafts_of(system)
    assert num_drafts > 10
    rate = num_accepted / num_drafts
    assert {"right": rate == 1, "mixed": 0 < rate < 1, "wrong": rate < 0.2}[kind]


@pytest.mark.parametrize("kind", GAINS)
@pytest.mark.parametrize("name", ["colocated", "disaggregated"])
def test_sampled_tokens_are_those_without_drafts(check, kind, name):
    system = check(name, kind=kind, requests=SAMPLED)
    assert {reason for _, reason in system.outcomes} <= {"stop", "length"}


@pytest.mark.parametrize("kind", ["right", "mixed"])
@pytest.mark.parametrize("name", ["disaggregated", "colocated"])
def test_tokens_are_the_same_when_prompts_are_computed_in_chunks(check, name, kind):
    role = "prefill" if name == "disaggregated" else "colocated"
    chunks = (f"instances.{role}.max_num_seqs=5", f"instances.{role}.max_num_batched_tokens=11")
    system = check(name, *chunks, kind=kind)
    assert drafts_of(system)[1] > 5


@pytest.mark.parametrize("kind", ["right", "mixed", "wrong"])
@pytest.mark.parametrize("name", ["disaggregated", "colocated"])
def test_tokens_are_the_same_after_preemptions(check, name, kind):
    role = "decode" if name == "disaggregated" else "colocated"
    requests = [(f"r{i}", 25 + i, i, {"max_tokens": 30}) for i in range(6)]
    small = (f"instances.{role}.npus=1", f"instances.{role}.num_blocks=32")
    system = check(name, *small, kind=kind, requests=requests, gap_ns=20_000)
    assert len(system.events("preempt")) >= 2


@pytest.mark.parametrize("kind", ["right", "mixed"])
@pytest.mark.parametrize("name", ["disaggregated", "colocated"])
def test_tokens_are_the_same_with_a_prefix_from_the_pool(check, name, kind):
    system = check(name, "kv_pool.enabled=true", kind=kind, shared=27, gap_ns=500_000_000)
    assert system.cluster.pool.num_loaded_blocks == 6 * (len(LENGTHS) - 1)
    assert drafts_of(system)[1] > 5


def test_tokens_are_the_same_with_prefixes_in_the_instances_own_blocks(check):
    options = ("instances.colocated.prefix_caching=true", "instances.colocated.npus=1")
    system = check("colocated", *options, shared=27, gap_ns=500_000_000)
    assert sum("cached=24" in line for line in system.events("admit")) == len(LENGTHS) - 1


@pytest.mark.parametrize("kind", GAINS)
def test_every_small_limit_is_kept(check, kind):
    """One to four tokens, where the last draft may have no room, from prompts that end on either side of a block."""
    requests = [
        (f"r{length}-{limit}", length, length, {"max_tokens": limit}) for length in (3, 4, 5) for limit in (1, 2, 3, 4)
    ]
    for name in ("colocated", "disaggregated"):
        system = check(name, kind=kind, requests=requests)
        assert all(reason == "length" for _, reason in system.outcomes)


def test_a_request_may_fill_the_whole_context(check):
    requests = [("r0", 100, 0, {"max_tokens": 28}), ("r1", 126, 1, {"max_tokens": 2})]
    for name in ("colocated", "disaggregated"):
        check(name, "instances={%s}" % _roles(name, num_blocks=32), kind="right", requests=requests)  # noqa: UP031


def _roles(name, num_blocks):
    instance = f"{{npus: 1, dies_per_npu: 1, num_blocks: {num_blocks}, max_num_batched_tokens: 64, max_num_seqs: 8}}"
    return ", ".join(f"{role}: {instance}" for role in (name,) if role == "colocated") or ", ".join(
        f"{role}: {instance}" for role in ("prefill", "decode")
    )


@pytest.mark.parametrize("name", ["colocated", "disaggregated"])
def test_a_stop_token_cuts_the_draft_behind_it(serve, drafted, prompt, name):
    """Every position of the text in turn, so that the token is now the first of a step, now the second."""
    text = prompt(9, seed=1)
    expected = drafted("right")[1](text, max_tokens=12).token_ids
    stops = [i for i in range(12) if expected[i] not in expected[:i]]
    assert len(stops) >= 4
    requests = [(f"r{i}", 9, 1, {"max_tokens": 12, "stop_token_ids": (expected[i],)}) for i in stops]
    replies, _ = serve(name, kind="right", requests=requests)
    for reply, i in zip(replies, stops, strict=True):
        assert reply.token_ids == expected[: i + 1]
        assert (reply.finish_reason, reply.stop_reason) == ("stop", expected[i]), "at the limit, too"


def test_logprobs_are_those_without_drafts(serve, drafted, prompt):
    requests = [(f"r{i}", 9 + i, i, {"max_tokens": 6, "logprobs": i}) for i in range(3)]
    for kind in GAINS:
        replies, _ = serve("disaggregated", kind=kind, requests=requests)
        for reply, (_, length, seed, sampling) in zip(replies, requests, strict=True):
            expected = drafted(kind)[1](prompt(length, seed=seed), **sampling)
            assert len(reply.logprobs) == 6
            for entry, wanted in zip(reply.logprobs, expected.logprobs, strict=True):
                assert entry.logprob == pytest.approx(wanted.logprob, abs=1e-4)
                assert [token for token, _ in entry.top] == [token for token, _ in wanted.top]
