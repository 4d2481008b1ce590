"""A chat endpoint that answers held-out problems as a script says, and answers made by hand."""

import asyncio
import json

import pytest
from aiohttp import web

from model.tasks.problem import Problem
from model.training.samples import reply_text
from serving.evaluation.client import Answer
from serving.evaluation.questions import Question


class ChatEndpoint:
    """An endpoint on a free port; `reply(question)` gives (text, finish_reason), an HTTP status, or waits."""

    def __init__(self, reply):
        self.reply, self.bodies = reply, []
        self.in_flight = self.max_in_flight = 0

    async def __aenter__(self):
        app = web.Application()
        app.router.add_get("/v1/models", self._list_models)
        app.router.add_post("/v1/chat/completions", self._complete)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1.0)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_):
        await self._runner.cleanup()

    async def _list_models(self, request):
        return web.json_response({"object": "list", "data": [{"id": "mini"}]})

    async def _complete(self, request):
        body = await request.json()
        self.bodies.append(body)
        self.in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight)
        try:
            reply = self.reply(body["messages"][0]["content"])
            reply = await reply if asyncio.iscoroutine(reply) else reply
        finally:
            self.in_flight -= 1
        if isinstance(reply, int):
            return web.json_response({"error": {"message": "out of order"}}, status=reply)
        text, finish_reason = reply
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        events = [{"choices": [{"index": 0, "delta": {"content": part}, "finish_reason": None}]} for part in text]
        events += [
            {"choices": [{"index": 0, "delta": {"content": ""}, "finish_reason": finish_reason}]},
            {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": len(text) + 1}},
        ]
        for event in events:
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response


@pytest.fixture
def chat_endpoint():
    """Makes an endpoint of a script; to be entered."""
    return ChatEndpoint


@pytest.fixture
def right():
    """Makes the script that gives the right reply to each of some questions."""

    def make(questions):
        replies = {q.problem.question: reply_text(q.problem) for q in questions}
        return lambda question: (replies[question], "stop")

    return make


@pytest.fixture
def problem():
    """Makes a problem whose answer is 7."""

    def make(question="What is 3 + 4?", **values):
        given = {"kind": "addition", "level": 1, "key": "3+4", "question": question, "trace": "3+4=7", "answer": "7"}
        return Problem(**given | values)

    return make


@pytest.fixture
def answer(problem):
    """Makes an answer to the problem, right unless `reply` says otherwise."""

    def make(reply="3+4=7\n</think>\n\n7", *, group="addition", finish_reason="stop", error=None, **values):
        question = Question(group=group, problem=problem(**values))
        return Answer(question=question, reply=reply, finish_reason=finish_reason, num_tokens=9, error=error)

    return make
