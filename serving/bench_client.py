"""HTTP side of the load generator: one endpoint, one request at a time.

Owns: the client session, readiness, what a request's body holds, and turning whatever happens to a request into
exactly one record.
Must not know: arrival times, concurrency, the figures of a run.
Source: request fields of OpenAI and vLLM. aiohttp because a streamed chunk costs it half the processor time that
httpx needs (34 against 78 us, event loop and JSON included, 32 streams on one core).
"""

import asyncio
import json
import logging
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import aiohttp

from serving.bench_config import BenchConfig
from serving.bench_stream import SseParser, StreamError, StreamRecorder, error_message
from serving.errors import ServingError, shown
from serving.records import Outcome, RequestRecord
from serving.spec_decode import Counters, parse_counters
from serving.workloads.requests import WorkloadRequest
from serving.workloads.synthetic import words_from_token_ids
from serving.workloads.workload import Workload

CONNECT_TIMEOUT_S = 30.0
READY_POLL_S = 0.25
READY_ANSWER_TIMEOUT_S = 10.0
METRICS_TIMEOUT_S = 5.0
# Below the 5 s after which uvicorn closes an idle connection, so that a request never meets a closing one.
KEEPALIVE_S = 4.0
MAX_ERROR_BODY_BYTES = 4096

RenderText = Callable[[Sequence[int]], str]

log = logging.getLogger(__name__)


class EndpointNotReady(ServingError):
    """The endpoint cannot be measured: not reachable in time, no access, or not OpenAI-compatible."""


class BenchClient:
    """An open session with the endpoint of `config`; use it as an asynchronous context manager."""

    def __init__(self, config: BenchConfig, workload: Workload, *, render_text: RenderText | None = None) -> None:
        self._config = config
        self._workload = workload
        self._render_text = render_text or words_from_token_ids
        self._model = config.model
        self._url = config.url

    async def __aenter__(self) -> "BenchClient":
        headers = {"Content-Type": "application/json", **self._config.headers}
        if self._config.api_key is not None:
            headers["Authorization"] = f"Bearer {self._config.api_key}"
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
            headers=headers,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    @property
    def model(self) -> str:
        """The model that is asked; known from `wait_until_ready` on."""
        return self._model or ""

    async def wait_until_ready(self) -> None:
        """Poll /v1/models until it answers; takes its first model unless one was chosen.

        Raises EndpointNotReady with the last problem after `ready_check_timeout_s`, or at once if waiting is of
        no use. With a timeout of 0 and a chosen model nothing is asked.
        """
        timeout_s = self._config.ready_check_timeout_s
        if timeout_s == 0 and self._model is not None:
            return
        deadline = time.monotonic() + timeout_s
        told = False
        while (problem := await self._try_models()) is not None:
            if time.monotonic() >= deadline:
                raise EndpointNotReady(f"{self._config.root_url}: not ready after {timeout_s:g} s: {problem}")
            if not told:
                log.warning("waiting up to %g s for %s: %s", timeout_s, self._config.root_url, problem)
                told = True
            await asyncio.sleep(READY_POLL_S)

    async def _try_models(self) -> str | None:
        """None if ready, else what is in the way."""
        url = f"{self._config.root_url}/v1/models"
        timeout = aiohttp.ClientTimeout(total=READY_ANSWER_TIMEOUT_S)
        try:
            async with self._session.get(url, timeout=timeout) as response:
                status, body = response.status, await response.read()
        except (aiohttp.ClientError, OSError) as error:  # TimeoutError is an OSError
            return f"{type(error).__name__} {error}".strip()
        if status == 429 or status >= 500:
            return f"HTTP {status}"
        if status in (401, 403):
            raise EndpointNotReady(f"{url}: HTTP {status}: {_error_text(body)}; is the API key right?")
        if self._model is not None:
            return None
        try:
            self._model = str(json.loads(body)["data"][0]["id"])
        except (ValueError, LookupError, TypeError):
            raise EndpointNotReady(
                f"{url}: HTTP {status}, lists no model: {_error_text(body)}; give the model's name"
            ) from None
        return None

    async def spec_decode_counters(self) -> Counters:
        """What the endpoint has drafted so far; empty if it does not say."""
        timeout = aiohttp.ClientTimeout(total=METRICS_TIMEOUT_S)
        try:
            async with self._session.get(f"{self._config.root_url}/metrics", timeout=timeout) as response:
                text = await response.text(errors="replace") if response.status == 200 else ""
        except (aiohttp.ClientError, OSError, ValueError):
            return {}
        return parse_counters(text)

    def encode(self, request: WorkloadRequest) -> bytes:
        """The JSON body of `request`."""
        config = self._config
        token_ids: list[int] = self._workload.prompt_token_ids(request).tolist()
        body: dict[str, Any] = {"model": self.model}
        if config.backend == "openai-chat":
            body["messages"] = [{"role": "user", "content": self._render_text(token_ids)}]
            body["max_completion_tokens"] = request.max_tokens
        else:
            body["prompt"] = token_ids if config.sends_tokens else self._render_text(token_ids)
            body["max_tokens"] = request.max_tokens
        body["stream"] = True
        body["stream_options"] = {"include_usage": True}
        for name in ("temperature", "top_p", "top_k", "min_p"):
            if (value := getattr(config, name)) is not None:
                body[name] = value
        if request.seed is not None:
            body["seed"] = request.seed
        if config.ignore_eos:
            body["ignore_eos"] = True
        if request.priority:
            body["priority"] = request.priority
        return json.dumps({**body, **config.extra_body}).encode()

    def recorder(self, request: WorkloadRequest) -> StreamRecorder:
        """An empty recorder for `request`."""
        return StreamRecorder(
            self._config.request_id_prefix + request.request_id,
            num_prompt_tokens=request.num_prompt_tokens,
            chat=self._config.backend == "openai-chat",
            keep_text=self._config.save_detailed,
        )

    async def send(
        self, body: bytes, recorder: StreamRecorder, *, cancel_after_s: float | None = None
    ) -> RequestRecord:
        """Post `body` and read the stream to its end. Never raises but for cancellation.

        After `cancel_after_s` the connection is closed, as by a user who walks away.
        """
        timeout_s = self._config.request_timeout_s
        is_cancelled = cancel_after_s is not None and cancel_after_s <= timeout_s
        timer = asyncio.timeout(cancel_after_s if is_cancelled else timeout_s)
        try:
            async with timer:
                return await self._exchange(body, recorder)
        except TimeoutError as error:
            if not timer.expired():
                return recorder.ended("failed", "connection", f"{type(error).__name__} {error}".strip())
            if is_cancelled:
                return recorder.ended("aborted", "cancelled by client", None)
            return recorder.ended("failed", "timeout", f"no end within request_timeout_s {timeout_s:g}")
        except StreamError as error:
            return recorder.ended("failed", error.reason, str(error))
        except (aiohttp.ClientError, OSError) as error:
            return recorder.ended("failed", "connection", f"{type(error).__name__} {error}".strip())
        except Exception as error:  # the task boundary: a crash is this request's outcome, not the run's
            log.exception("request %s", recorder.request_id)
            return recorder.ended("failed", type(error).__name__, repr(error))

    async def _exchange(self, body: bytes, recorder: StreamRecorder) -> RequestRecord:
        headers = {"X-Request-Id": recorder.request_id}
        recorder.start_ns = time.perf_counter_ns()
        async with self._session.post(self._url, data=body, headers=headers) as response:
            if response.status != 200:
                text = _error_text(await response.content.read(MAX_ERROR_BODY_BYTES))
                outcome: Outcome = "rejected" if 400 <= response.status < 500 else "failed"
                return recorder.ended(outcome, f"HTTP {response.status}", f"HTTP {response.status}: {text}")
            parser = SseParser()
            async for data in response.content.iter_any():
                now_ns = time.perf_counter_ns()  # before parsing: what arrived together has one time
                for event in parser.feed(data):
                    recorder.on_event(event, now_ns)
            for event in parser.close():
                recorder.on_event(event, time.perf_counter_ns())
            return recorder.finished()


def _error_text(body: bytes) -> str:
    text = body.decode(errors="replace").strip()
    try:
        return error_message(json.loads(text))
    except ValueError:
        return shown(text) if text else "no body"
