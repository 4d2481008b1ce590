"""The laptop preset over real Ray actors and HTTP: tokens of the reference, and nothing left behind."""

import json
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from model.checkpoint import write_random_checkpoint
from model.reference import Sampling, generate
from serving.config_file import load_config

pytestmark = pytest.mark.ray
PROMPT = tuple(range(40, 75))


class Server:
    """`supernode serve` as a user starts it."""

    def __init__(self, checkpoint: Path, *settings: str) -> None:
        command = [sys.executable, "-m", "serving.cli", "serve", "laptop", "--port", "0"]
        for setting in ("clock.scale=0", f"model.checkpoint={checkpoint}", *settings):
            command += ["--set", setting]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        found = re.search(r"http://[\d.]+:\d+", self.process.stdout.readline())
        assert found, "the server ended before it was ready"
        self.url = found.group()

    def complete(self, **body: object) -> dict[str, object]:
        """One completion that returns token ids."""
        fields = {"model": "mini-r1", "prompt": list(PROMPT), "return_token_ids": True, **body}
        request = urllib.request.Request(
            f"{self.url}/v1/completions", json.dumps(fields).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            answer: dict[str, object] = json.load(reply)
        return answer

    def stop(self) -> int:
        """Ctrl-C, and the exit code."""
        self.process.send_signal(signal.SIGINT)
        self.process.communicate(timeout=60)
        return self.process.returncode


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_random_checkpoint(folder, load_config("laptop").shape, seed=3)
    return folder


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[Server]:
    """A running laptop; at the end it leaves no process, folder or window."""
    server = Server(checkpoint)
    marks = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    assert marks, "the server has no process for its devices"
    yield server
    assert server.stop() == 0
    assert [pid for pid in marks if Path(f"/proc/{pid}").exists()] == []


def reference(checkpoint: Path, num_tokens: int, **sampling: object) -> list[int]:
    return list(generate(load_config("laptop").shape, checkpoint, PROMPT, num_tokens, Sampling(**sampling)).token_ids)


def test_greedy_tokens_are_those_of_plain_generation(server: Server, checkpoint: Path):
    answer = server.complete(max_tokens=24, temperature=0, ignore_eos=True)
    assert answer["choices"][0]["token_ids"] == reference(checkpoint, 24)


def test_sampled_tokens_are_those_of_plain_generation(server: Server, checkpoint: Path):
    answer = server.complete(max_tokens=24, temperature=0.9, top_p=0.95, seed=11, ignore_eos=True)
    assert answer["choices"][0]["token_ids"] == reference(checkpoint, 24, temperature=0.9, top_p=0.95, seed=11)


def test_a_second_request_gets_its_prefix_from_the_pool(server: Server):
    first, second = (server.complete(max_tokens=4, temperature=0, ignore_eos=True) for _ in range(2))
    assert second["choices"][0]["token_ids"] == first["choices"][0]["token_ids"]
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == 32
    assert second["usage"]["simulated"]["ttft_ms"] > 0


def test_metrics_are_back_at_rest(server: Server):
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=60) as reply:
        text = reply.read().decode()
    running = re.findall(r"^vllm:num_requests_running\{.*\} (\S+)$", text, re.MULTILINE)
    assert running
    assert {float(value) for value in running} == {0.0}
    assert re.search(r'^supernode:plane_bytes_total\{plane="rdma"\} [1-9]', text, re.MULTILINE)
