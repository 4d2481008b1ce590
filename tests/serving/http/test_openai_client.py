"""The openai client against the real server: answers, streams, and errors as its own exceptions."""

from collections.abc import Iterator

import openai
import pytest

from serving.errors import Draining, EngineFailure, QueueFull
from serving.messages import TokenDelta

CHAT = [{"role": "user", "content": "hi"}]


@pytest.fixture
def api(server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0, timeout=20) as client:
        yield client


def test_completion(api):
    answer = api.completions.create(model="mini-r1", prompt="hi", max_tokens=8, seed=1, stop=["x"])
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("Hello", "stop")
    assert answer.usage.total_tokens == 9
    assert answer.usage.prompt_tokens_details.cached_tokens == 16
    assert answer.usage.model_extra["simulated"]["ttft_ms"] == 10.0
    assert answer.usage.model_extra["wall"]["tpot_ms"] == 6.0


def test_chat(api, server):
    answer = api.chat.completions.create(
        model="mini-r1", messages=CHAT, n=2, temperature=0.5, max_completion_tokens=8, extra_body={"top_k": 4}
    )
    assert [choice.message.content for choice in answer.choices] == ["Hello", "Hello"]
    assert {request.sampling.top_k for request in server.frontend.requests} == {4}


def test_streamed_completion(api):
    with api.completions.create(model="mini-r1", prompt="hi", stream=True) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) == "Hello"


def test_streamed_chat_with_usage(api):
    with api.chat.completions.create(
        model="mini-r1", messages=CHAT, stream=True, stream_options={"include_usage": True}
    ) as stream:
        *chunks, last = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == "Hello"
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert (last.choices, last.usage.completion_tokens) == ([], 6)


def test_logprobs(api, server):
    server.frontend.say("Hi")
    server.frontend.with_logprobs()
    answer = api.chat.completions.create(model="mini-r1", messages=CHAT, logprobs=True, top_logprobs=2)
    content = answer.choices[0].logprobs.content
    assert [entry.token for entry in content] == ["H", "i"]
    assert content[0].top_logprobs[1].logprob == -9999.0
    whole = api.completions.create(model="mini-r1", prompt="hi", logprobs=2)
    assert whole.choices[0].logprobs.tokens == ["H", "i"]


def test_models(api):
    assert [model.id for model in api.models.list()] == ["mini-r1"]
    assert api.models.retrieve("mini-r1").id == "mini-r1"


def test_bad_requests(api):
    with pytest.raises(openai.BadRequestError, match="max_tokens: got 0, must be at least 1") as caught:
        api.completions.create(model="mini-r1", prompt="hi", max_tokens=0)
    assert caught.value.param == "max_tokens"
    with pytest.raises(openai.NotFoundError, match="gpt-4"):
        api.chat.completions.create(model="gpt-4", messages=CHAT)
    with pytest.raises(openai.APIStatusError, match="exceed") as caught:
        api.completions.create(model="mini-r1", prompt="x" * 10_000_000)
    assert caught.value.status_code == 413


def test_a_wrong_key(api):
    with pytest.raises(openai.AuthenticationError, match="API key"):
        api.with_options(api_key="wrong").models.list()


def test_a_full_queue_and_a_draining_server(api, server):
    server.frontend.rejection = QueueFull("queue: full", retry_after_s=3)
    with pytest.raises(openai.RateLimitError, match="queue: full") as caught:
        api.completions.create(model="mini-r1", prompt="hi", stream=True)
    assert caught.value.response.headers["retry-after"] == "3"
    server.frontend.rejection = Draining("shutting down")
    with pytest.raises(openai.InternalServerError, match="shutting down"):
        api.completions.create(model="mini-r1", prompt="hi")


def test_engine_failures_before_and_after_the_first_token(api, server):
    server.frontend.script = [EngineFailure("link down")]
    with pytest.raises(openai.InternalServerError, match="link down"):
        api.completions.create(model="mini-r1", prompt="hi", stream=True)
    server.frontend.say("He", then=TokenDelta(token_ids=(), finish_reason="error", error="link down"))
    with api.completions.create(model="mini-r1", prompt="hi", stream=True) as stream:
        with pytest.raises(openai.APIError, match="link down"):
            list(stream)


def test_leaving_a_stream_early_frees_the_request(api, server):
    server.frontend.say("He", then="hang")
    with api.completions.create(model="mini-r1", prompt="hi", stream=True) as stream:
        next(iter(stream))
    assert server.frontend.idle.wait(timeout=20)
    assert list(server.frontend.outcomes.values()) == ["aborted"]
