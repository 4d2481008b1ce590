"""`serve --shards timing`: the machine's latencies without tensors or Ray, and a server that is easily overrun."""

import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.live.launches import PATIENCE_S, Launch, complete, eventually, held, metrics, settings

KEY = {"Authorization": "Bearer sesame"}


@pytest.fixture(scope="module")
def mock():
    """A server with room for 8 requests and a queue of 4, ten times as fast as the machine."""
    overrides = (
        *("instances.decode.npus=2", "instances.decode.max_num_seqs=4", "scheduler.max_queued_requests=4"),
        "model.checkpoint=random",  # its tokenizer makes a token of every byte
    )
    launch = Launch(
        *("serve", "laptop", "--shards", "timing", "--port", "0", "--api-key", "sesame"),
        *settings(*overrides, "clock.scale=0.1"),
    )
    try:
        yield launch
        assert launch.end(signal.SIGTERM) == 0
        assert launch.stderr == "shutting down ...\n"
        assert launch.leftovers() == []
    finally:
        launch.close()


def test_answers_have_the_length_and_the_latency_that_were_asked_for(mock):
    body = {"prompt": "hello", "max_tokens": 20, "ignore_eos": True, "stream": False, "logprobs": 1}
    started = time.monotonic()
    answer = httpx.post(f"{mock.url()}/v1/completions", json=body, headers=KEY, timeout=PATIENCE_S)
    usage = answer.json()["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (6, 20)
    assert len(answer.json()["choices"][0]["text"]) == 20
    assert usage["simulated"]["e2el_ms"] > 20 * 15
    assert (time.monotonic() - started) * 1e3 >= usage["simulated"]["e2el_ms"] * 0.1  # clock.scale


def test_overload_is_refused_with_a_time_to_come_again(mock):
    url = mock.url()

    def ask(_: int) -> httpx.Response:
        return httpx.post(
            f"{url}/v1/completions",
            json={"prompt": "x" * 100, "max_tokens": 100, "ignore_eos": True},
            headers=KEY,
            timeout=PATIENCE_S,
        )

    with ThreadPoolExecutor(60) as clients:
        answers = list(clients.map(ask, range(60)))
    assert set(Counter(answer.status_code for answer in answers)) == {200, 429}
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert int(refused.headers["Retry-After"]) >= 1
    assert "scheduler.max_queued_requests is 4" in refused.json()["error"]["message"]
    assert ask(0).status_code == 200
    num_refused = sum(answer.status_code == 429 for answer in answers)
    assert metrics(url)['supernode:requests_rejected_total{reason="queue_full"}'] == num_refused
    eventually(lambda: held(url), lambda amounts: not any(amounts.values()))


def test_without_the_key_nobody_comes_in(mock):
    assert complete(mock.url(), "hi", 1).status_code == 401
    assert httpx.get(f"{mock.url()}/health").status_code == 200


def test_an_interrupted_bench_prints_what_was_finished(mock):
    command = [sys.executable, "-m", "serving.cli", "bench", mock.url(), "--api-key", "sesame", "--disable-tqdm"]
    bench = subprocess.Popen(
        [*command, "--num-prompts", "5000", "--request-rate", "20"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    finished = 'vllm:request_success_total{engine="decode-0",finished_reason="length"}'
    before = metrics(mock.url()).get(finished, 0)
    eventually(lambda: metrics(mock.url()).get(finished, 0), lambda number: number >= before + 3)
    bench.send_signal(signal.SIGINT)
    stdout, stderr = bench.communicate(timeout=PATIENCE_S)
    assert bench.returncode == 130
    assert "Not sent (interrupted):" in stdout
    assert stderr == ""


def test_the_full_machine_answers_without_weights():
    """256 NPUs, of which one copy of the weights would be 2,684 GB."""
    launch = Launch("serve", "cloudmatrix384", "--shards", "timing", "--port", "0", *settings("clock.scale=0"))
    try:
        body = {"prompt": "x" * 2000, "max_tokens": 8, "ignore_eos": True}
        usage = httpx.post(f"{launch.url()}/v1/completions", json=body, timeout=PATIENCE_S).json()["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (2001, 8)
        assert 40 < usage["simulated"]["ttft_ms"] < 80
        assert launch.end(signal.SIGTERM) == 0
        assert launch.leftovers() == []
    finally:
        launch.close()


@pytest.mark.parametrize("verb", ["serve", "run", "replay"])
def test_weights_that_no_machine_here_holds_are_refused_before_anything_starts(verb):
    launch = Launch(verb, "cloudmatrix384")
    try:
        assert launch.wait() == 2
        assert launch.stderr.startswith("error: model.checkpoint: random weights of 671 G parameters, 2,684 GB in fl")
        assert launch.stderr.count("\n") == 1
        assert launch.leftovers() == []
    finally:
        launch.close()
