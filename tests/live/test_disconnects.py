"""Clients that go away, at any moment: everything that their requests held is given back."""

import json
import random
import socket
import threading
import time

import httpx
import pytest

from tests.live.launches import PATIENCE_S, complete, eventually, held, metrics, tokens_of

pytestmark = pytest.mark.ray


def sent(url: str, body: dict[str, object], *, num_bytes: int | None = None) -> socket.socket:
    """A connection on which the request was sent, or its first `num_bytes`."""
    content = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(content)}\r\n\r\n"
    address = httpx.URL(url)
    connection = socket.create_connection((address.host, address.port), timeout=PATIENCE_S)
    connection.sendall((head.encode() + content)[:num_bytes])
    return connection


def num_aborted(url: str) -> float:
    """Requests that were ended because nobody wanted them any more."""
    return sum(v for name, v in metrics(url).items() if "request_success_total" in name and '"abort"' in name)


def test_a_client_that_goes_before_the_first_token_stops_the_prefill(url):
    before = num_aborted(url)
    for stream in (False, True):
        with sent(url, {"prompt": [9] * 900, "max_tokens": 100, "stream": stream}):
            eventually(lambda: sum(held(url).values()))
    eventually(lambda: num_aborted(url) - before, lambda number: number == 2)


def test_a_client_that_goes_in_the_middle_of_a_stream_stops_the_decoding(url):
    before = num_aborted(url)
    body = {"prompt": "on and on", "max_tokens": 900, "ignore_eos": True, "stream": True, "n": 2}
    with sent(url, body) as connection:
        received = b""
        while received.count(b"data: ") < 5:
            received += connection.recv(4096)
        assert held(url)['supernode:held{resource="slots"}'] > 0
    eventually(lambda: num_aborted(url) - before, lambda number: number == 2)


def test_64_clients_that_leave_at_random_leave_nothing(url, reference):
    """Some in the middle of sending, some without a farewell. A client that stays is served meanwhile."""

    def come_and_go(seed: int) -> None:
        chance = random.Random(seed)
        body = {
            "prompt": [20 + seed] * chance.randint(1, 400),
            "max_tokens": chance.randint(1, 200),
            "ignore_eos": True,
            "stream": bool(seed % 2),
            "n": chance.choice((1, 1, 2)),
        }
        time.sleep(chance.random())
        with sent(url, body, num_bytes=chance.randint(1, 300) if seed % 8 == 0 else None) as connection:
            time.sleep(chance.choice((0, 0.02, 0.2, 1)) * chance.random())
            if seed % 3 == 0:  # a reset, not an orderly end
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    clients = [threading.Thread(target=come_and_go, args=(seed,)) for seed in range(64)]
    for client in clients:
        client.start()
    answers = [complete(url, [30, 31, 32], 12) for _ in range(3)]
    for client in clients:
        client.join()
    eventually(lambda: held(url), lambda amounts: not any(amounts.values()))
    for answer in answers:
        assert answer.status_code == 429 or tokens_of(answer) == reference([30, 31, 32], 12)
    assert tokens_of(complete(url, [30, 31, 32], 12)) == reference([30, 31, 32], 12)
