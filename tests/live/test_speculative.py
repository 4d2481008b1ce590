"""Speculative decoding over real actors and HTTP: tokens of plain generation, acceptance as measured, nothing held."""

import dataclasses
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from model.config import ModelConfig
from model.reference import ReferenceModel, Sampling
from serving.config_file import load_config
from serving.spec_decode import parse_counters, stats_between
from tests.drafted import write_drafted_checkpoint
from tests.live.launches import PACKED, SMALL, complete, eventually, held, settings, tokens_of

pytestmark = pytest.mark.ray
ON = "speculative.num_speculative_tokens=1"
PROMPTS = [tuple(range(33, 33 + length)) for length in (3, 16, 40, 75)]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of the mini R1's shape of whose drafts some are right; nearly every token is a byte of text."""
    folder = tmp_path_factory.mktemp("mixed")
    shape = dataclasses.replace(load_config("laptop").shape, vocab_size=272)
    write_drafted_checkpoint(folder, shape, context_gain=0.05)
    return folder


@pytest.mark.parametrize(
    ("preset", "overrides"),
    [("laptop", SMALL), ("colocated", (*PACKED, "ray.ranks=batched"))],
    ids=["prefill and decode", "colocated, merged ranks"],
)
def test_tokens_are_those_of_one_process(launch, mixed, preset, overrides):
    server = launch(
        "serve", preset, "--port", "0", *settings(ON, f"model.checkpoint={mixed}", "clock.scale=0", *overrides)
    )
    url = server.url()
    model = ReferenceModel(ModelConfig.from_file(mixed / "config.json"), mixed)
    jobs = [(prompt, {}) for prompt in PROMPTS] + [(prompt, {"temperature": 1.0, "seed": 5}) for prompt in PROMPTS]
    with ThreadPoolExecutor(len(jobs)) as clients:
        for _ in range(2):  # cold, and with prefixes from the pool
            answers = list(clients.map(lambda job: complete(url, job[0], 24, **job[1]), jobs))
            for answer, (prompt, sampling) in zip(answers, jobs, strict=True):
                assert tokens_of(answer) == model.generate(prompt, 24, Sampling(**sampling)).token_ids
    whole = complete(url, PROMPTS[2], 24).json()["choices"][0]["text"]
    for start in range(4, 8):  # whether the string ends with the first token of a step or with the second
        stop = whole[start : start + 3]
        (choice,) = complete(url, PROMPTS[2], 24, stop=[stop]).json()["choices"]
        assert (choice["text"], choice["finish_reason"]) == (whole[: whole.index(stop)], "stop")
    stats = stats_between({}, parse_counters(httpx.get(f"{url}/metrics").text))
    assert stats is not None
    assert 0 < stats.num_accepted_tokens < stats.num_drafts
    bench = [sys.executable, "-m", "serving.cli", "bench", url, "--num-prompts", "6"]
    table = subprocess.run(bench, capture_output=True, text=True, check=True, timeout=120).stdout
    found = re.search(r"Acceptance length: +(\S+)", table)
    assert found, table
    assert 1 < float(found.group(1)) < 2
    eventually(lambda: held(url), lambda amounts: not any(amounts.values()))
    assert server.end() == 0
