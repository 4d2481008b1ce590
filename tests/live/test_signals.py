"""Ctrl-C, SIGTERM and kill -9, at every stage of a launch: an orderly end if there is one, and nothing left behind.

That nothing is left is checked by the fixture `launch`.
"""

import json
import signal
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.live.launches import (
    PACKED,
    PATIENCE_S,
    complete,
    eventually,
    held,
    metrics,
    noise,
    settings,
    tokens_of,
)

pytestmark = pytest.mark.ray
PROMPT = (50, 51, 52)

# Stages of a boot, by what shows that it has come so far.
STAGES = {
    "folders": lambda launch: list(launch.temporary.iterdir()),
    "gcs": lambda launch: launch.processes("gcs_server"),
    "raylet": lambda launch: launch.processes("raylet/raylet"),
    "worker": lambda launch: launch.processes("ray::NpuWorker"),
    "socket": lambda launch: list(launch.temporary.glob("supernode-*/*.sock")),
}


@pytest.mark.parametrize(
    ("stage", "group", "times"),
    [("folders", False, 1), ("gcs", True, 1), ("raylet", False, 2), ("worker", True, 2), ("socket", False, 1)],
)
def test_ctrl_c_during_the_boot(launch, stage, group, times):
    """To the process alone, and as a terminal sends it; once, and twice by an impatient user."""
    booting = launch("serve", "laptop", "--port", "0")
    booting.wait_for(STAGES[stage])
    for _ in range(times):
        booting.send(signal.SIGINT, group=group)
    assert booting.wait() == 130
    assert booting.stdout == ""
    assert noise(booting.stderr) == [], booting.stderr


def test_two_launches_share_a_machine_and_the_end_of_one_is_not_the_others(launch, reference):
    """One loses an NPU while nobody asks, and is killed; the other ends in order while clients wait for it."""
    one, other = (launch("serve", "laptop", "--port", "0", *settings(*PACKED)) for _ in range(2))
    for url in (one.url(), other.url()):
        assert tokens_of(complete(url, PROMPT, 8)) == reference(PROMPT, 8)
    one.workers("NpuWorker")[0].kill()
    eventually(lambda: httpx.get(f"{one.url()}/health").status_code, lambda status: status == 503)
    assert one.end(signal.SIGKILL) == -signal.SIGKILL
    eventually(one.leftovers, lambda left: not left)
    assert tokens_of(complete(other.url(), PROMPT, 8)) == reference(PROMPT, 8)

    url = other.url()

    def ask(stream: bool) -> httpx.Response:
        body = {"prompt": "on and on", "max_tokens": 900, "ignore_eos": True, "stream": stream}
        return httpx.post(f"{url}/v1/completions", json=body, timeout=PATIENCE_S)

    with ThreadPoolExecutor(2) as clients:
        asked = [clients.submit(ask, stream) for stream in (False, True)]
        eventually(lambda: held(url)['supernode:held{resource="slots"}'], lambda slots: slots >= 2)
        assert other.end(signal.SIGTERM) == 0
        answers = [answer.result() for answer in asked]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert all('"finish_reason":"abort"' in answer.text for answer in answers)
    assert noise(other.stderr) == []


@pytest.mark.parametrize("group", [False, True], ids=["process", "group"])
def test_an_interrupted_run_prints_what_was_finished(launch, tmp_path, group):
    result = tmp_path / "result.json"
    workload = ("workload.num_requests=400", "workload.output_len=8", "workload.input_len=80")
    run = launch("run", "laptop", "--json", str(result), *settings(*PACKED, *workload))
    url = run.url()
    finished = 'vllm:request_success_total{engine="decode-0",finished_reason="length"}'
    eventually(lambda: metrics(url).get(finished, 0), lambda number: number >= 3)
    assert run.end(group=group) == 130
    assert "Not sent (interrupted):" in run.stdout
    values = json.loads(result.read_text())
    assert values["interrupted"]
    assert values["completed"] >= 3
    assert set(values["held_at_rest"].values()) == {0}
