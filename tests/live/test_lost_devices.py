"""Devices that are lost while requests run: a host costs its part of the pool, an NPU its instance."""

import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.live.launches import PATIENCE_S, SMALL, complete, eventually, held, settings, tokens_of

pytestmark = pytest.mark.ray
PROMPT = tuple(range(30, 30 + 100))
COLLECTIVE_TIMEOUT_S = 60  # ray.exchange_timeout_s: what nobody may wait for


def cached_tokens(answer: httpx.Response) -> int:
    return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_a_lost_host_costs_time_and_a_lost_npu_its_instance(launch, reference):
    server = launch("serve", "laptop", "--port", "0", *settings(*SMALL))
    url = server.url()
    wanted = reference(PROMPT, 10)
    assert [cached_tokens(complete(url, PROMPT, 10)) for _ in range(2)] == [0, 96]

    # Six blocks over two hosts: the prefix is cut where the first lost block was, and computed again.
    host = server.workers("HostWorker")[0]
    host.kill()
    for _ in range(3):
        answer = complete(url, PROMPT, 10)
        assert tokens_of(answer) == wanted
    assert cached_tokens(answer) == 96  # stored again, where there is a host
    assert httpx.get(f"{url}/health").status_code == 200
    assert not any(held(url).values())

    def ask(stream: bool) -> httpx.Response:
        body = {"prompt": list(PROMPT), "max_tokens": 900, "ignore_eos": True, "stream": stream}
        return httpx.post(f"{url}/v1/completions", json=body, timeout=PATIENCE_S)

    with ThreadPoolExecutor(4) as clients:
        asked = [clients.submit(ask, stream) for stream in (False, True, False, True)]
        eventually(lambda: held(url)['supernode:held{resource="slots"}'], lambda slots: slots == 4)
        decode_npu = server.workers("NpuWorker")[-1]
        decode_npu.kill()
        started = time.monotonic()
        answers = [answer.result() for answer in asked]
    assert time.monotonic() - started < COLLECTIVE_TIMEOUT_S / 2
    for answer in answers:
        assert "decode-0" in answer.text  # in a step or, of a request that was just handed over, in its transfer
        assert '"InternalServerError"' in answer.text
    assert [answer.status_code for answer in answers[::2]] == [500, 500]  # streams may have begun, with 200
    eventually(lambda: httpx.get(f"{url}/health").status_code, lambda status: status == 503)
    assert complete(url, PROMPT, 10).status_code == 500
    assert not any(held(url).values())
    assert server.end() == 0
    assert "Traceback" not in server.stderr
