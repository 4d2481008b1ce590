"""A client that goes away, at any moment and over a real socket, leaves nothing behind."""

import json
import socket
import struct

import pytest

from serving.errors import EngineFailure

HANG = "hang"


def post(connection: socket.socket, body: dict[str, object], *, length: int | None = None) -> None:
    content = json.dumps(body).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\n"
        f"Content-Type: application/json\r\nContent-Length: {length or len(content)}\r\n\r\n"
    )
    connection.sendall(head.encode() + content)


def read_until(connection: socket.socket, text: bytes) -> bytes:
    received = b""
    while text not in received:
        part = connection.recv(65536)
        assert part, f"closed after {received!r}"
        received += part
    return received


def reset(connection: socket.socket) -> None:
    """Close with a reset, as a killed client does."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@pytest.mark.parametrize("leave", [socket.socket.close, reset], ids=["close", "reset"])
@pytest.mark.parametrize("num_choices", [1, 3])
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_leaving_before_the_first_token(server, streamed, num_choices, leave):
    server.frontend.script = [HANG]
    connection = server.connect()
    post(connection, {"prompt": "hi", "stream": streamed, "n": num_choices})
    assert server.frontend.hanging.wait(timeout=20)
    leave(connection)
    assert server.frontend.idle.wait(timeout=20)
    assert list(server.frontend.outcomes.values()) == ["aborted"] * num_choices


@pytest.mark.parametrize("leave", [socket.socket.close, reset], ids=["close", "reset"])
@pytest.mark.parametrize("num_choices", [1, 3])
def test_leaving_in_the_middle_of_a_stream(server, num_choices, leave):
    server.frontend.say("He", then=HANG)
    connection = server.connect()
    post(connection, {"prompt": "hi", "stream": True, "n": num_choices})
    read_until(connection, b'"text":"e"')
    leave(connection)
    assert server.frontend.idle.wait(timeout=20)
    assert list(server.frontend.outcomes.values()) == ["aborted"] * num_choices


def test_leaving_while_the_body_is_sent(server):
    connection = server.connect()
    post(connection, {"prompt": "hi"}, length=1000)
    connection.close()
    again = server.connect()
    post(again, {"prompt": "hi"})
    assert b'"text":"Hello"' in read_until(again, b"}}")
    again.close()
    assert len(server.frontend.requests) == 1


def test_leaving_while_the_server_cannot_send(server):
    """The reader never reads: the writer waits for the socket, and is freed when the reader goes."""
    server.frontend.say("x" * 5000, tokens_per_delta=5000, then=HANG)
    server.frontend.script = server.frontend.script[:1] * 2000 + [HANG]
    connection = server.connect()
    post(connection, {"prompt": "hi", "stream": True})
    read_until(connection, b"xxx")
    reset(connection)
    assert server.frontend.idle.wait(timeout=20)
    assert list(server.frontend.outcomes.values()) == ["aborted"]


def test_a_connection_serves_on_after_errors(server):
    connection = server.connect()
    for _ in range(2):
        post(connection, {"prompt": ""})
        assert b" 400 " in read_until(connection, b'"code":400}}').split(b"\r\n")[0]
    server.frontend.script = [EngineFailure("link down")]
    post(connection, {"prompt": "hi"})
    assert b" 500 " in read_until(connection, b'"code":500}}').split(b"\r\n")[0]
    server.frontend.say("Hello", then=server.frontend.end_of_sequence())
    post(connection, {"prompt": "hi"})
    assert b"Hello" in read_until(connection, b"}}")
    connection.close()


def test_a_large_body_is_refused_before_it_is_sent(server):
    connection = server.connect()
    post(connection, {"prompt": "hi"}, length=10_000_000)
    assert b" 413 " in read_until(connection, b'"code":413}}').split(b"\r\n")[0]
    connection.close()
    assert not server.frontend.requests


def test_a_large_body_is_refused_when_it_is_sent_too(server):
    connection = server.connect()
    post(connection, {"prompt": "x" * 10_000_000})
    assert b" 413 " in read_until(connection, b'"code":413}}').split(b"\r\n")[0]
    connection.close()
    assert not server.frontend.requests
