"""A scripted OpenAI-compatible endpoint for the load generator to measure."""

import asyncio
import json

import pytest
from aiohttp import web

from serving.bench import run_bench
from serving.bench_config import BenchConfig
from serving.workloads.synthetic import synthetic_workload


class Exchange:
    """One request and the answer to it, as a script writes it."""

    def __init__(self, request, body):
        self.request, self.body = request, body
        self.id = request.headers["X-Request-Id"]
        self.response = None

    async def start(self):
        self.response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await self.response.prepare(self.request)

    async def raw(self, data):
        if self.response is None:
            await self.start()
        await self.response.write(data)

    async def event(self, value):
        await self.raw(b"data: " + json.dumps(value).encode() + b"\n\n")

    async def token(self, text="a", finish_reason=None):
        choice = {"index": 0, "finish_reason": finish_reason}
        if "messages" in self.body:
            choice["delta"] = {"content": text}
        else:
            choice["text"] = text
        await self.event({"choices": [choice], "usage": None})

    async def answer(self, num_tokens=None, **usage):
        """A whole answer of `num_tokens` (as many as were asked for), its usage, and the end."""
        limit = self.body.get("max_tokens") or self.body.get("max_completion_tokens")
        num_tokens = num_tokens or limit
        for i in range(num_tokens):
            await self.token(finish_reason="length" if i == num_tokens - 1 else None)
        await self.event({"choices": [], "usage": {"completion_tokens": num_tokens, **usage}})
        await self.raw(b"data: [DONE]\n\n")

    def error(self, status, message):
        return web.json_response({"error": {"message": message, "code": status}}, status=status)

    def drop(self):
        self.request.transport.abort()


class Endpoint:
    """An OpenAI-compatible endpoint on a free port whose completions are given by `script`."""

    def __init__(self, script, *, models=("mini",), not_ready=0, metrics=None):
        self.script, self.models, self.not_ready = script, models, not_ready
        self.metrics = metrics  # a function that gives the exposition
        self.bodies, self.headers, self.order = {}, {}, []
        self.in_flight = self.max_in_flight = self.num_disconnects = 0

    async def __aenter__(self):
        app = web.Application()
        app.router.add_get("/v1/models", self._list_models)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_post("/v1/chat/completions", self._complete)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_):
        await self._runner.cleanup()

    def config(self, **options):
        return BenchConfig(**({"base_url": self.url, "ready_check_timeout_s": 20.0} | options))

    async def idle(self):
        """Wait until every request has ended here too: a client that gave one up must have said so."""
        async with asyncio.timeout(20):
            while self.in_flight:
                await asyncio.sleep(0.005)

    async def _list_models(self, request):
        if self.not_ready:
            self.not_ready -= 1
            return web.Response(status=503)
        if isinstance(self.models, int):
            return web.json_response({"error": {"message": "no"}}, status=self.models)
        return web.json_response({"object": "list", "data": [{"id": name} for name in self.models]})

    async def _metrics(self, request):
        return web.Response(status=404) if self.metrics is None else web.Response(text=self.metrics())

    async def _complete(self, request):
        exchange = Exchange(request, await request.json())
        self.bodies[exchange.id], self.headers[exchange.id] = exchange.body, request.headers
        self.order.append(exchange.id)
        self.in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight)
        try:
            answer = await self.script(exchange)
        except (asyncio.CancelledError, ConnectionError):
            self.num_disconnects += 1
            raise
        finally:
            self.in_flight -= 1
        return answer or exchange.response


async def answer_whole(exchange):
    await exchange.answer()


def make_tokens(num_requests=4, output_len=3, **options):
    return synthetic_workload(num_requests=num_requests, input_len=8, output_len=output_len, name="w", **options)


async def run_against(script, workload=None, **options):
    async with Endpoint(script) as endpoint:
        result = await run_bench(endpoint.config(**options), workload or make_tokens())
        await endpoint.idle()
    return result, endpoint


@pytest.fixture
def serve():
    """Makes an endpoint of a script; to be entered."""
    return Endpoint


@pytest.fixture
def measure():
    """(result, endpoint) of a run against a script; checks that nothing is left in flight there."""
    return run_against


@pytest.fixture
def answer():
    """The script that answers every request as asked."""
    return answer_whole


@pytest.fixture
def tokens():
    """Makes a small closed-loop workload of token prompts, w-0, w-1, ..."""
    return make_tokens
