"""Messages between an event loop and threads: their order, errors by name, and every way in which a peer ends."""

import asyncio
import os
import socket
import threading
import time
from multiprocessing import AuthenticationError

import numpy as np
import pytest
import pytest_asyncio

from serving import channel
from serving.channel import AsyncChannel, ChannelServer
from serving.errors import EngineFailure

KEY = b"secret"


class Methods:
    """What the server offers."""

    def __init__(self):
        self.calls = []
        self.gate = threading.Event()

    def echo(self, *args):
        self.calls.append(args)
        return args[0] if len(args) == 1 else args

    def wait(self):
        assert self.gate.wait(timeout=20)

    def fail(self):
        raise ValueError("3 blocks of 2")

    def unspeakable(self):
        return threading.Lock()

    def table(self):
        return {name: getattr(self, name) for name in ("echo", "wait", "fail", "unspeakable")}


@pytest.fixture
def methods():
    return Methods()


@pytest.fixture(params=["unix", "tcp"])
def server(request, tmp_path, methods):
    address = str(tmp_path / "server.sock") if request.param == "unix" else ("127.0.0.1", 0)
    server = ChannelServer(address, KEY, methods.table())
    yield server
    methods.gate.set()
    server.close()


@pytest.fixture
def losses():
    return []


@pytest_asyncio.fixture
async def client(server, losses):
    client = AsyncChannel(server.address, KEY, name="npu-3", on_lost=losses.append)
    yield client
    client.close()


@pytest.mark.asyncio
async def test_replies_come_in_the_order_of_the_calls(client, methods):
    futures = [client.call("echo", i) for i in range(100)]
    assert client.num_pending == 100
    order = []
    for i, future in enumerate(futures):
        future.add_done_callback(lambda _, i=i: order.append(i))
    assert await asyncio.gather(*futures) == list(range(100))
    assert order == list(range(100))
    assert methods.calls == [(i,) for i in range(100)]
    assert client.num_pending == 0


@pytest.mark.asyncio
async def test_a_call_leaves_at_once_whether_or_not_anybody_awaits_it(client, methods):
    client.call("echo", "unheard").cancel()
    assert await client.call("echo", 1, 2) == (1, 2)
    assert methods.calls == [("unheard",), (1, 2)]


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("fail", "fail: ValueError: 3 blocks of 2"),
        ("nothing", "nothing: KeyError: 'nothing'"),
        ("unspeakable", "unspeakable: TypeError: cannot pickle '_thread.lock' object"),
    ],
)
async def test_a_remote_error_has_its_name_and_the_channel_goes_on(client, method, message):
    before, failing, after = client.call("echo", 1), client.call(method), client.call("echo", 2)
    with pytest.raises(EngineFailure) as failure:
        await failing
    assert str(failure.value) == message
    assert (await before, await after) == (1, 2)


@pytest.mark.asyncio
async def test_a_message_that_cannot_be_sent_does_not_shift_the_replies(client):
    with pytest.raises(TypeError, match="cannot pickle"):
        client.call("echo", threading.Lock())
    assert client.num_pending == 0
    assert await client.call("echo", 7) == 7


@pytest.mark.asyncio
async def test_big_messages_arrive_whole_both_ways(client):
    blocks = np.random.default_rng(0).standard_normal((6, 64, 16, 80)).astype(np.float32)  # 2 MB
    for _ in range(3):
        assert np.array_equal(await client.call("echo", blocks), blocks)


@pytest.mark.asyncio
async def test_closing_ends_what_is_pending_and_refuses_more(client, losses):
    pending = [client.call("wait"), client.call("echo", 1)]
    client.close()
    client.close()
    for method, future in zip(("wait", "echo"), pending, strict=True):
        with pytest.raises(EngineFailure, match=f"{method}: the channel was closed before the reply"):
            await future
    with pytest.raises(EngineFailure, match="echo: the channel to npu-3 is closed"):
        await client.call("echo", 1)
    assert losses == []


@pytest.mark.asyncio
async def test_a_peer_that_leaves_fails_what_is_pending(client, server, losses):
    pending = [client.call("wait"), client.call("echo", 1)]
    await asyncio.sleep(0.01)
    server.close()
    for method, future in zip(("wait", "echo"), pending, strict=True):
        with pytest.raises(EngineFailure, match=f"{method}: npu-3's process is gone"):
            await asyncio.wait_for(future, 10)
    with pytest.raises(EngineFailure, match="echo: the channel to npu-3 is closed"):
        await client.call("echo", 1)
    assert len(losses) == 1
    assert losses[0].startswith("npu-3's process is gone (")


@pytest.mark.asyncio
async def test_a_peer_that_leaves_is_missed_even_if_nobody_asks_it_for_anything(client, server, losses):
    assert await client.call("echo", 1) == 1
    server.close()
    while not losses:
        await asyncio.sleep(0.01)
    assert client.num_pending == 0


@pytest.mark.asyncio
async def test_a_wrong_key_is_refused_and_others_are_served(server, client):
    with pytest.raises(AuthenticationError):
        AsyncChannel(server.address, b"guess")
    assert await client.call("echo", 1) == 1


@pytest.mark.asyncio
async def test_a_stranger_who_says_nothing_keeps_nobody_waiting(server):
    family = socket.AF_UNIX if isinstance(server.address, str) else socket.AF_INET
    with socket.socket(family) as stranger:
        stranger.connect(server.address)
        client = AsyncChannel(server.address, KEY)
        assert await client.call("echo", 1) == 1
        client.close()


def test_a_blocking_client_gets_replies_and_errors(server):
    connection = channel.connect(server.address, KEY)
    assert channel.call(connection, "echo", 5) == 5
    with pytest.raises(EngineFailure, match="fail: ValueError: 3 blocks of 2"):
        channel.call(connection, "fail")
    assert channel.call(connection, "echo", 6) == 6
    connection.close()


def test_a_blocking_client_hears_that_its_peer_has_left(server):
    connection = channel.connect(server.address, KEY)
    assert channel.call(connection, "echo", 5) == 5
    server.close()
    with pytest.raises(EngineFailure, match="echo: the peer's process is gone"):
        channel.call(connection, "echo", 6)
    assert connection.closed


def test_a_closed_server_is_gone(server, tmp_path):
    address = server.address
    server.close()
    server.close()
    with pytest.raises(OSError):  # noqa: PT011 - no file, or nobody at the port
        channel.connect(address, KEY)
    assert list(tmp_path.iterdir()) == []


def test_an_address_in_use_is_an_error_and_leaves_no_socket_open(server, methods):
    with pytest.raises(OSError, match="in use"):
        ChannelServer(server.address, KEY, methods.table())


def test_clients_that_have_left_cost_nothing(server):
    def num_open():
        return len(os.listdir("/proc/self/fd"))

    before = num_open()
    for _ in range(20):
        connection = channel.connect(server.address, KEY)
        channel.call(connection, "echo", 1)
        connection.close()
    deadline = time.monotonic() + 10
    while num_open() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert num_open() == before
