"""A frontend that plays scripts, the app over it in process, and the same app behind a real socket."""

import asyncio
import logging
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import httpx
import pytest
import pytest_asyncio
import uvicorn
from fastapi import FastAPI

from model.tokenizer import Tokenizer
from serving.errors import RequestRejected
from serving.http_api import create_app
from serving.messages import GenerateRequest, Latencies, RequestTimes, TokenDelta, TokenLogprobs
from serving.metrics import Metrics

HANG = "hang"  # in a script: nothing comes until the stream is closed
TIMES = RequestTimes(
    simulated=Latencies(queue_ms=1.0, ttft_ms=10.0, tpot_ms=2.0, e2el_ms=20.0),
    wall=Latencies(queue_ms=3.0, ttft_ms=30.0, tpot_ms=6.0, e2el_ms=60.0),
    num_cached_tokens=16,
    simulated_itl_ms=(1.5, 2.5),
)
Step = TokenDelta | Exception | str


class FakeStream:
    """Plays one script and keeps the frontend's books."""

    def __init__(self, frontend: "FakeFrontend", request: GenerateRequest, steps: Sequence[Step]) -> None:
        self._frontend, self._request, self._steps = frontend, request, list(steps)
        frontend.held.add(request.request_id)
        frontend.idle.clear()

    def __aiter__(self) -> "FakeStream":
        return self

    async def __anext__(self) -> TokenDelta:
        await asyncio.sleep(0)
        step = self._steps.pop(0) if self._steps else None
        if step is None:
            raise StopAsyncIteration
        if isinstance(step, str):
            self._frontend.hanging.set()
            await asyncio.Event().wait()
        if isinstance(step, Exception):
            self._end("failed")
            raise step
        assert isinstance(step, TokenDelta)
        if step.finish_reason is not None:
            self._end(f"finished {step.finish_reason}")
        return step

    def finish(self, *, stop_reason: str, num_tokens: int) -> RequestTimes:
        self._end(f"finished stop {stop_reason!r} after {num_tokens}")
        return TIMES

    async def aclose(self) -> None:
        self._end("aborted")

    def _end(self, outcome: str) -> None:
        self._frontend.outcomes.setdefault(self._request.request_id, outcome)
        self._frontend.held.discard(self._request.request_id)
        if not self._frontend.held:
            self._frontend.idle.set()


@dataclass
class FakeFrontend:
    """Answers every request with `script`; `rejection`, if set, refuses those after the first `num_admitted`."""

    model_name: str = "mini-r1"
    max_model_len: int = 128
    vocab_size: int = 300
    tokenizer: Tokenizer = field(default_factory=lambda: Tokenizer.byte_level(300))
    script: list[Step] = field(default_factory=list)
    rejection: RequestRejected | None = None
    num_admitted: int = 0
    healthy: bool = True
    requests: list[GenerateRequest] = field(default_factory=list)
    outcomes: dict[str, str] = field(default_factory=dict)
    held: set[str] = field(default_factory=set)
    idle: threading.Event = field(default_factory=threading.Event)
    hanging: threading.Event = field(default_factory=threading.Event)

    def submit(self, request: GenerateRequest) -> FakeStream:
        request.check_fits(max_model_len=self.max_model_len, vocab_size=self.vocab_size)
        if self.rejection is not None and len(self.requests) >= self.num_admitted:
            raise self.rejection
        self.requests.append(request)
        return FakeStream(self, request, self.script)

    def health(self) -> bool:
        return self.healthy

    def ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text))

    def say(self, text: str, *, tokens_per_delta: int = 1, then: Step | None = None) -> None:
        """Script `text`, ended by `then`: by default by its last token, for length."""
        ids = self.ids(text)
        parts = [ids[at : at + tokens_per_delta] for at in range(0, len(ids), tokens_per_delta)]
        self.script = [TokenDelta(token_ids=part) for part in parts]
        if then is None:
            self.script[-1] = replace(self.script[-1], finish_reason="length", times=TIMES)  # type: ignore[type-var]
        else:
            self.script.append(then)

    def end_of_sequence(self) -> TokenDelta:
        return TokenDelta(token_ids=(self.tokenizer.eos_token_id,), finish_reason="stop", times=TIMES)

    def with_logprobs(self) -> None:
        """Give every scripted token a logprob, and token 65 as its only alternative."""
        for at, step in enumerate(self.script):
            assert isinstance(step, TokenDelta)
            entries = tuple(
                TokenLogprobs(logprob=-0.5, top=((token_id, -0.5), (65, float("-inf")))) for token_id in step.token_ids
            )
            self.script[at] = replace(step, logprobs=entries)


@dataclass
class RunningServer:
    """The app behind a socket of 127.0.0.1; `frontend` is what it talks to."""

    port: int
    frontend: FakeFrontend

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)


def make_app(frontend: FakeFrontend, **options: object) -> FastAPI:
    metrics = Metrics(model_name=frontend.model_name, max_model_len=frontend.max_model_len)
    return create_app(frontend, metrics=metrics, version="1.2.3", now_s=lambda: 1_700_000_000.0, **options)  # type: ignore[arg-type]


@pytest.fixture
def frontend() -> Iterator[FakeFrontend]:
    """A fresh frontend, which holds nothing when the test is over."""
    fake = FakeFrontend()
    fake.say("Hello", then=fake.end_of_sequence())
    yield fake
    assert not fake.held, f"still held: {fake.held}"
    assert fake.outcomes.keys() == {request.request_id for request in fake.requests}


@pytest_asyncio.fixture
async def client(frontend: FakeFrontend) -> AsyncIterator[httpx.AsyncClient]:
    async with connect(make_app(frontend)) as http:
        yield http


def connect(app: FastAPI, *, shows_defects: bool = True) -> httpx.AsyncClient:
    """An in-process client. `shows_defects`: what the app lets escape is raised here, as a server would log it."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=shows_defects)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


@pytest.fixture
def connect_with(frontend: FakeFrontend) -> Callable[..., httpx.AsyncClient]:
    """A function: in-process client of an app with other options."""

    def make(*, shows_defects: bool = True, **options: object) -> httpx.AsyncClient:
        return connect(make_app(frontend, **options), shows_defects=shows_defects)

    return make


@pytest.fixture(scope="session")
def new_system() -> Callable[[], tuple[FakeFrontend, httpx.AsyncClient]]:
    """A function: a fresh frontend and an in-process client of its app, for tests that run many."""

    def make() -> tuple[FakeFrontend, httpx.AsyncClient]:
        fake = FakeFrontend()
        fake.say("Hello", then=fake.end_of_sequence())
        fake.with_logprobs()
        return fake, connect(make_app(fake))

    return make


@pytest.fixture(scope="module")
def shared_server() -> Iterator[RunningServer]:
    """One real server for a module's tests, in a thread of its own."""
    fake = FakeFrontend()
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    app = make_app(fake, api_keys=["secret"])
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", ws="none", http="h11")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield RunningServer(port=listener.getsockname()[1], frontend=fake)
    server.should_exit = True
    thread.join(timeout=20)
    assert not thread.is_alive(), "the server did not stop"


@pytest.fixture
def server(shared_server: RunningServer, caplog: pytest.LogCaptureFixture) -> Iterator[RunningServer]:
    """The real server with a clean frontend, which holds nothing and logged no error when the test is over."""
    fake, fresh = shared_server.frontend, FakeFrontend()
    for name in ("script", "rejection", "num_admitted", "requests", "outcomes", "idle", "hanging"):
        setattr(fake, name, getattr(fresh, name))
    fake.say("Hello", then=fake.end_of_sequence())
    yield shared_server
    if fake.requests:
        assert fake.idle.wait(timeout=20), f"still held: {fake.held}"
    assert not fake.held
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
