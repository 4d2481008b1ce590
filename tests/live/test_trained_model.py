"""The shipped model, served by `laptop`: it reasons, its drafts change nothing, and transformers computes the same."""

from concurrent.futures import ThreadPoolExecutor
from random import Random

import httpx
import pytest
import torch

from model.chat import THINK_END, Message
from model.tasks.generator import KINDS, generate
from model.tasks.problem import Problem
from model.tokenizer import Tokenizer
from serving.config_file import load_config
from serving.spec_decode import parse_counters, stats_between
from tests.live.launches import PATIENCE_S, Launch, settings

pytestmark = pytest.mark.ray
NUM_PROBLEMS = 100
# Runs of the whole model at once, with as many ranks as the preset has.
FAST = settings("clock.scale=0", "scheduler.max_queued_requests=200")


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    rng = Random(100)
    kinds = list(KINDS)
    return [generate(rng, "test", kinds=[kinds[i % len(kinds)]]) for i in range(NUM_PROBLEMS)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(f"{load_config('laptop').model.checkpoint}/tokenizer.json")


def ask(url: str, problem: Problem) -> dict[str, object]:
    body = {
        "model": "mini-r1",
        "messages": [{"role": "user", "content": problem.question}],
        "temperature": 0,
        "max_completion_tokens": 300,
        "return_token_ids": True,
    }
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=PATIENCE_S)
    assert answer.status_code == 200, answer.text
    choice: dict[str, object] = answer.json()["choices"][0]
    return choice


def ask_all(url: str, problems: list[Problem]) -> list[dict[str, object]]:
    with ThreadPoolExecutor(32) as clients:
        return list(clients.map(lambda problem: ask(url, problem), problems))


@pytest.fixture(scope="module")
def replies(problems) -> dict[str, list[dict[str, object]]]:
    """All replies, without and with drafts, each from a launch of its own; and the drafts' counters."""
    found = {}
    for name, more in (("plain", ()), ("drafted", settings("speculative.num_speculative_tokens=1"))):
        launch = Launch("serve", "laptop", "--port", "0", *FAST, *more)
        try:
            url = launch.url()
            found[name] = ask_all(url, problems)
            found[f"{name} metrics"] = httpx.get(f"{url}/metrics").text
            assert launch.end() == 0, launch.stderr
        finally:
            launch.close()
    return found


def test_transformers_gives_the_served_tokens(replies, problems, tokenizer):
    """The served token is the likeliest at every position of transformers' logits: its greedy choice, all the way."""
    transformers = pytest.importorskip("transformers")
    checkpoint = load_config("laptop").model.checkpoint
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    for problem, reply in zip(problems, replies["plain"], strict=True):
        prompt = tokenizer.encode_chat([Message(role="user", content=problem.question)])
        served = reply["token_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *served]]), use_cache=False).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == served, problem.question
    prompt = tokenizer.encode_chat([Message(role="user", content=problems[0].question)])
    generated = model.generate(torch.tensor([prompt]), max_new_tokens=300, do_sample=False)
    assert generated[0, len(prompt) :].tolist() == replies["plain"][0]["token_ids"]


def test_drafts_change_no_token(replies):
    assert [r["token_ids"] for r in replies["drafted"]] == [r["token_ids"] for r in replies["plain"]]


def test_most_drafts_are_accepted(replies):
    stats = stats_between({}, parse_counters(replies["drafted metrics"]))
    assert stats is not None
    assert stats.num_accepted_tokens > 0.8 * stats.num_drafts > 0


def test_it_reasons(replies, problems):
    """Most replies are well formed and right; the figures by kind are those of `supernode eval`."""
    texts = [reply["message"]["content"] for reply in replies["plain"]]
    well_formed = [THINK_END in text for text in texts]
    right = [problem.is_correct(text.rsplit(THINK_END, 1)[-1]) for problem, text in zip(problems, texts, strict=True)]
    assert sum(well_formed) >= 0.95 * NUM_PROBLEMS
    assert sum(right) >= 0.75 * NUM_PROBLEMS
