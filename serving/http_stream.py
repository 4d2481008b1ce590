"""Bodies in and token streams out, and what happens when the client goes away.

Owns: how much of a body is read, that a disconnect at any moment ends the work, what is sent before and after the
first token.
Must not know: routes, JSON of a choice (serving/openai_output.py), engines.
Source: the ASGI specification's `http.disconnect`; the order of vLLM's server-sent events.

A client that leaves is noticed by a task that waits for `http.disconnect` all the time that work goes on. Asking now
and then (`Request.is_disconnected`) would leave a request in the engine for as long as no token comes.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serving.choices import ChoiceSet
from serving.errors import BodyTooLarge, ServingError, UnsupportedMediaType
from serving.openai_output import DONE_EVENT, OutputFormat, error_event

T = TypeVar("T")


async def read_body(request: Request, *, max_body_bytes: int) -> bytes:
    """The request's body. Raises BodyTooLarge as soon as that is known: from its declared length, or on the way."""
    media_type = request.headers.get("content-type", "application/json").split(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        # Also keeps web pages out: a browser sends other types across origins without asking first.
        raise UnsupportedMediaType(f"Content-Type: got {media_type!r}, must be 'application/json'")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_body_bytes:
        raise BodyTooLarge(f"body: {declared} bytes exceed the limit of {max_body_bytes}")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > max_body_bytes:
            raise BodyTooLarge(f"body: more than the limit of {max_body_bytes} bytes")
    return bytes(body)


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Run `work` to its end, or cancel it and raise ClientDisconnect when the client goes first.

    The request's body must have been read. When this returns or raises, `work` has ended.
    """
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_disconnect(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events of a ChoiceSet.

    It submits the requests itself, so that nothing can come between admission and the block that frees. The status
    line waits for the first token: a rejection or a failure before it has its own status, and a client may retry.
    """

    media_type = "text/event-stream"

    def __init__(self, choice_set: ChoiceSet, output: OutputFormat) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._choice_set = choice_set
        self._output = output

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._choice_set:
            try:
                await until_disconnect(receive, self._send_events(send))
            except (ClientDisconnect, OSError):  # OSError: what servers of newer ASGI versions raise in send
                return

    async def _send_events(self, send: Send) -> None:
        choice_set, output = self._choice_set, self._output
        choices = choice_set.choices
        batch = await choice_set.next()
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        body = output.opening_events(choices)
        try:
            while batch:
                body += b"".join([output.event(delta, choices) for delta in batch])
                await send({"type": "http.response.body", "body": body, "more_body": True})
                body = b""
                batch = await choice_set.next()
            body = output.closing_events(choices)
        except ServingError as error:
            body = error_event(error) + DONE_EVENT
        except Exception:
            await _send_last(send, error_event(None) + DONE_EVENT)
            raise
        await _send_last(send, body)


async def _send_last(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": False})
