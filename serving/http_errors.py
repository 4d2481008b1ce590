"""What the endpoint answers when it does not answer: errors in OpenAI's shape, and who is let in.

Owns: exception to status, headers and body; the API key; the request id of every request.
Must not know: the routes' work.
Source: vLLM's API server (the key guards /v1 only; X-Request-Id is echoed).
"""

import hashlib
import hmac
import re
from collections.abc import Callable, Sequence

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.errors import EngineFailure, InvalidRequest, RequestRejected, Unauthorized, shown
from serving.metrics import Metrics
from serving.openai_output import error_body, rejection
from serving.openai_protocol import MAX_ID_CHARS, REQUEST_ID_PATTERN

REQUEST_ID_HEADER = "x-request-id"
_STATUS_CLIENT_CLOSED_REQUEST = 499  # nginx's; nobody is there to read it


def add_error_handlers(app: FastAPI, metrics: Metrics) -> None:
    """Every error of every route leaves in one shape."""

    async def rejected(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestRejected)
        return rejection_response(error, metrics)

    async def http_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        body = error_body(str(error.detail), status=error.status_code)
        return JSONResponse(body, error.status_code, headers=dict(error.headers or {}))

    async def failed(_: Request, error: Exception) -> Response:
        # What an engine says was written for the client; anything else is a defect, and stays in the server's log.
        message = str(error) if isinstance(error, EngineFailure) else "internal error"
        return JSONResponse(error_body(message, status=500), 500)

    async def gone(_: Request, _error: Exception) -> Response:
        return Response(status_code=_STATUS_CLIENT_CLOSED_REQUEST)

    app.add_exception_handler(RequestRejected, rejected)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(EngineFailure, failed)
    app.add_exception_handler(ClientDisconnect, gone)
    app.add_exception_handler(Exception, failed)


def rejection_response(error: RequestRejected, metrics: Metrics) -> Response:
    """The answer to a rejected request, which is also counted."""
    metrics.observe_rejected(error.reason)
    body, headers = rejection(error)
    return JSONResponse(body, error.status, headers=headers)


class Guard:
    """ASGI middleware: checks the API key under /v1 and gives every request an id, which its response carries."""

    def __init__(self, app: ASGIApp, *, api_keys: Sequence[str], metrics: Metrics, new_id: Callable[[], str]) -> None:
        self._app = app
        # Digests have one length, so that comparing them tells nothing about the keys.
        self._key_digests = [_digest(key.encode()) for key in api_keys]
        self._metrics = metrics
        self._new_id = new_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        state = scope.setdefault("state", {})
        given = headers.get(REQUEST_ID_HEADER.encode(), b"").decode("latin-1")
        state["request_id"] = self._new_id()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message.get("headers", ()),
                    (REQUEST_ID_HEADER.encode(), state["request_id"].encode("latin-1")),
                ]
            await send(message)

        try:
            if given:
                state["request_id"] = _checked_id(given)
            self._check_key(scope["path"], headers)
        except RequestRejected as error:
            await rejection_response(error, self._metrics)(scope, receive, send_with_id)
        else:
            await self._app(scope, receive, send_with_id)

    def _check_key(self, path: str, headers: dict[bytes, bytes]) -> None:
        if not self._key_digests or not (path == "/v1" or path.startswith("/v1/")):
            return
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        digest = _digest(key.strip())
        matches = [hmac.compare_digest(digest, allowed) for allowed in self._key_digests]
        if scheme.lower() != b"bearer" or not any(matches):
            raise Unauthorized("Authorization: no API key or a wrong one; send 'Authorization: Bearer <key>'")


def _checked_id(request_id: str) -> str:
    if len(request_id) > MAX_ID_CHARS or re.fullmatch(REQUEST_ID_PATTERN, request_id) is None:
        raise InvalidRequest(
            f"X-Request-Id: got {shown(request_id)}, must have at most {MAX_ID_CHARS} printable ASCII characters",
            param="X-Request-Id",
        )
    return request_id


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
