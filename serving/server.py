"""The HTTP server: one socket, one event loop that it shares with the control plane, an orderly end.

Owns: binding, the life of uvicorn.
Must not know: routes (serving/http_api.py), the cluster, signals (serving/interrupts.py).
"""

import asyncio
import contextlib
import errno
import socket
from collections.abc import Awaitable, Callable, Iterator

import uvicorn
from starlette.types import ASGIApp

from serving.errors import ConfigError

SHUTDOWN_TIMEOUT_S = 3


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ConfigError if the address cannot be had; done before anything slow is started."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"server.host: {host}: {error.strerror or error}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        field = "host" if error.errno == errno.EADDRNOTAVAIL else "port"
        raise ConfigError(f"server.{field}: {host}:{port}: {error.strerror or error}") from None
    return listener


class _Server(uvicorn.Server):
    """uvicorn without signal handlers of its own: the launch decides what a signal means."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(
    app: ASGIApp,
    listener: socket.socket,
    *,
    stop: asyncio.Event,
    on_ready: Callable[[], None],
    on_stop: Callable[[], Awaitable[None]],
) -> None:
    """Serve until `stop` is set, then await `on_stop`, which ends running requests."""
    server = _Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            lifespan="off",
            loop="none",
            ws="none",
            timeout_keep_alive=30,
            timeout_graceful_shutdown=SHUTDOWN_TIMEOUT_S,
        )
    )
    loop = asyncio.get_running_loop()
    serving = loop.create_task(server.serve(sockets=[listener]), name="http")
    while not server.started and not serving.done():
        await asyncio.sleep(0.005)
    if not serving.done():
        on_ready()
    stopped = loop.create_task(stop.wait())
    await asyncio.wait((serving, stopped), return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    await on_stop()
    server.should_exit = True
    await serving
