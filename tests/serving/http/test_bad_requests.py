"""Every bad request gets its own status, the field, the value and the limit; nothing is held; never a 5xx."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.errors import Draining, QueueFull

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
HUGE = 10**30


def check_error(
    response: httpx.Response, status: int, *, param: str | None = None, parts: tuple[str, ...] = ()
) -> None:
    assert response.status_code == status, response.text
    (error,) = response.json().values()
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == status
    assert error["param"] == param
    for part in parts:
        assert part in error["message"]


BAD_COMPLETIONS: list[tuple[dict[str, Any], str | None, tuple[str, ...]]] = [
    ({}, "prompt", ("required",)),
    ({"prompt": ""}, "prompt", ("empty",)),
    ({"prompt": []}, "prompt", ("empty",)),
    ({"prompt": [[]]}, "prompt", ("empty",)),
    ({"prompt": ["a", ""]}, "prompt", ("empty",)),
    ({"prompt": None}, "prompt", ("None",)),
    ({"prompt": 5}, "prompt", ("5", "string")),
    ({"prompt": ["a", 5]}, "prompt", ("item 1",)),
    ({"prompt": ["a", [5]]}, "prompt", ("mix",)),
    ({"prompt": [True]}, "prompt", ()),
    ({"prompt": [300]}, "prompt", ("300", "below 300")),
    ({"prompt": [-1]}, "prompt", ("-1", "at least 0")),
    ({"prompt": [HUGE]}, "prompt", ("below 300",)),
    ({"prompt": "a" * 128}, "prompt", ("129 tokens", "max_model_len 128")),
    ({"prompt": "a" * 5000}, "prompt", ("5000 characters", "max_model_len 128")),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens", ("got 0", "at least 1")),
    ({"prompt": "a", "max_tokens": -3}, "max_tokens", ("got -3", "at least 1")),
    ({"prompt": "a", "max_tokens": 200}, "max_tokens", ("2 prompt tokens", "200", "max_model_len 128")),
    ({"prompt": "a", "max_tokens": HUGE}, "max_tokens", (str(HUGE), "at most")),
    ({"prompt": "a", "max_tokens": "5"}, "max_tokens", ("'5'", "integer")),
    ({"prompt": "a", "max_tokens": 5.5}, "max_tokens", ("5.5", "integer")),
    ({"prompt": "a", "max_tokens": True}, "max_tokens", ("True",)),
    ({"prompt": "a", "min_tokens": 9, "max_tokens": 8}, "min_tokens", ("got 9", "max_tokens 8")),
    ({"prompt": "a", "temperature": -0.1}, "temperature", ("-0.1", "at least 0")),
    ({"prompt": "a", "temperature": 2.1}, "temperature", ("2.1", "at most 2")),
    ({"prompt": "a", "temperature": "hot"}, "temperature", ("'hot'", "number")),
    ({"prompt": "a", "top_p": 0}, "top_p", ("above 0",)),
    ({"prompt": "a", "top_p": 1.5}, "top_p", ("1.5", "at most 1")),
    ({"prompt": "a", "top_k": -2}, "top_k", ("got -2",)),
    ({"prompt": "a", "top_k": 2**31}, "top_k", ("at most",)),
    ({"prompt": "a", "n": 0}, "n", ("got 0", "greater than or equal to 1")),
    ({"prompt": "a", "n": 129}, "n", ("129", "128")),
    ({"prompt": ["a", "b"], "n": 65}, "prompt", ("130 choices", "at most 128")),
    ({"prompt": "a", "seed": HUGE}, "seed", (str(HUGE), "less than or equal")),
    ({"prompt": "a", "seed": 1.5}, "seed", ("1.5",)),
    ({"prompt": "a", "stop": [""]}, "stop", ("1 to 512 characters",)),
    ({"prompt": "a", "stop": "x" * 513}, "stop", ("1 to 512 characters",)),
    ({"prompt": "a", "stop": ["x"] * 33}, "stop", ("at most 32",)),
    ({"prompt": "a", "stop": [1]}, "stop.0", ("got 1",)),
    ({"prompt": "a", "stop_token_ids": [300]}, "stop_token_ids", ("below 300",)),
    ({"prompt": "a", "stop_token_ids": [1] * 129}, "stop_token_ids", ("at most 128",)),
    ({"prompt": "a", "logprobs": 21}, "logprobs", ("21", "at most 20")),
    ({"prompt": "a", "logprobs": -1}, "logprobs", ("at least 0",)),
    ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options", ("stream is true",)),
    ({"prompt": "a", "stream": "yes"}, "stream", ("'yes'",)),
    ({"prompt": "a", "priority": 2**31}, "priority", ()),
    ({"prompt": "a", "cache_salt": ""}, "cache_salt", ("at least 1 character",)),
    ({"prompt": "a", "request_id": "a\nb"}, "request_id", ("pattern",)),
    ({"prompt": "a", "model": 5}, "model", ()),
    ({"prompt": "a", "echo": True}, "echo", ("True", "not supported")),
    ({"prompt": "a", "suffix": "x"}, "suffix", ("not supported",)),
    ({"prompt": "a", "best_of": 2}, "best_of", ("got 2", "not supported")),
    ({"prompt": "a", "presence_penalty": 0.5}, "presence_penalty", ("0.5",)),
    ({"prompt": "a", "frequency_penalty": -0.5}, "frequency_penalty", ("-0.5",)),
    ({"prompt": "a", "logit_bias": {"5": 1}}, "logit_bias", ("'5'",)),
    ({"prompt": "a", "prompt_logprobs": 1}, "prompt_logprobs", ("got 1",)),
    ({"prompt": "a", "response_format": {"type": "json_object"}}, "response_format", ("json_object",)),
]
BAD_CHATS: list[tuple[dict[str, Any], str, tuple[str, ...]]] = [
    ({}, "messages", ("required",)),
    ({"messages": []}, "messages", ("at least 1",)),
    ({"messages": "hi"}, "messages", ("'hi'",)),
    ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", ("got 5",)),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", ("'tool'", "'assistant'")),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages.0.content",
        ("part 0", "text"),
    ),
    ({**CHAT, "tools": [{"type": "function"}]}, "tools", ("function",)),
    ({**CHAT, "top_logprobs": 2}, "top_logprobs", ("logprobs",)),
    ({**CHAT, "logprobs": 5}, "logprobs", ("got 5",)),
    ({**CHAT, "logprobs": True, "top_logprobs": 21}, "logprobs", ("21", "at most 20")),
    ({**CHAT, "max_completion_tokens": 0}, "max_tokens", ("got 0",)),
    ({"messages": [{"role": "user", "content": "a" * 126}]}, "prompt", ("max_model_len 128",)),
    ({"messages": [{"role": "user", "content": "a" * 9999}]}, "messages", ("9999 characters",)),
    ({**CHAT, "chat_template": "{{x}}"}, "chat_template", ("not supported",)),
]


@pytest.mark.asyncio
@pytest.mark.parametrize(("body", "param", "parts"), BAD_COMPLETIONS, ids=lambda value: str(value)[:40])
async def test_bad_completions(client, frontend, body, param, parts):
    check_error(await client.post("/v1/completions", json=body), 400, param=param, parts=parts)
    assert not frontend.requests


@pytest.mark.asyncio
@pytest.mark.parametrize(("body", "param", "parts"), BAD_CHATS, ids=lambda value: str(value)[:40])
async def test_bad_chats(client, frontend, body, param, parts):
    check_error(await client.post("/v1/chat/completions", json=body), 400, param=param, parts=parts)
    assert not frontend.requests


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"nonsense",
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b'{"prompt": ' + b"[" * 500 + b"]" * 500 + b"}",
        b"null",
        b"[]",
        b'"text"',
    ],
    ids=lambda content: repr(content[:30]),
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
async def test_bodies_that_are_not_the_right_json(client, path, content):
    response = await client.post(path, content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "BadRequestError"
    assert len(response.content) < 600


@pytest.mark.asyncio
@pytest.mark.parametrize("number", ["NaN", "1e999", "-Infinity"])
async def test_numbers_must_be_finite(client, number):
    content = f'{{"prompt": "a", "temperature": {number}}}'
    response = await client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    check_error(response, 400, param="temperature", parts=("finite",))


@pytest.mark.asyncio
async def test_the_model_must_be_the_served_one(client):
    for path, body in (
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", CHAT),
        ("/tokenize", {"prompt": "a"}),
    ):
        response = await client.post(path, json={**body, "model": "gpt-4"})
        check_error(response, 404, param="model", parts=("'gpt-4'", "'mini-r1'"))


@pytest.mark.asyncio
async def test_unknown_routes_and_wrong_methods(client):
    check_error(await client.post("/v1/nothing", json={}), 404)
    response = await client.get("/v1/completions")
    check_error(response, 405)
    assert response.headers["allow"] == "POST"


@pytest.mark.asyncio
async def test_tokenize_wants_one_of_two_and_detokenize_known_ids(client):
    check_error(await client.post("/tokenize", json={}), 400, param="prompt", parts=("exactly one",))
    check_error(await client.post("/detokenize", json={"tokens": [300]}), 400, param="tokens", parts=("below 300",))


@pytest.mark.asyncio
async def test_other_media_types_are_refused(client):
    response = await client.post("/v1/completions", content="{}", headers={"content-type": "text/plain"})
    check_error(response, 415, parts=("'text/plain'", "application/json"))


@pytest.mark.asyncio
async def test_a_body_over_the_limit_is_refused_by_its_declared_length(client):
    check_error(await client.post("/v1/completions", content=b"x" * 10_000_000), 413, parts=("10000000", "8388608"))


@pytest.mark.asyncio
async def test_a_body_without_a_length_is_read_up_to_the_limit(connect_with):
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 1000
            yield b"x" * 1000

    async with connect_with(max_body_bytes=10_000) as http:
        check_error(await http.post("/v1/completions", content=endless()), 413, parts=("10000",))
    assert sent == 11_000


@pytest.mark.asyncio
async def test_the_key_guards_v1_only(connect_with):
    async with connect_with(api_keys=["one", "two"]) as http:
        for headers in (
            {},
            {"Authorization": "Bearer three"},
            {"Authorization": "Basic one"},
            {"Authorization": "one"},
        ):
            response = await http.get("/v1/models", headers=headers)
            check_error(response, 401, parts=("Bearer",))
            assert response.headers["www-authenticate"] == "Bearer"
        assert (await http.get("/v1/models", headers={"Authorization": "Bearer two"})).status_code == 200
        for path in ("/health", "/metrics", "/version"):
            assert (await http.get(path)).status_code == 200


@pytest.mark.asyncio
async def test_a_bad_request_id_is_refused(client):
    response = await client.get("/health", headers={"X-Request-Id": "a b"})
    check_error(response, 400, param="X-Request-Id", parts=("'a b'", "printable"))


@pytest.mark.asyncio
@pytest.mark.parametrize("streamed", [False, True])
async def test_a_full_queue_is_429_with_retry_after_and_admits_all_choices_or_none(client, frontend, streamed):
    frontend.rejection, frontend.num_admitted = QueueFull("queue: 256 requests wait, the limit", retry_after_s=2.4), 1
    response = await client.post("/v1/completions", json={"prompt": "a", "n": 2, "stream": streamed})
    check_error(response, 429, parts=("256",))
    assert response.headers["retry-after"] == "3"
    assert not frontend.held
    assert list(frontend.outcomes.values()) == ["aborted"]


@pytest.mark.asyncio
async def test_a_draining_server_is_503(client, frontend):
    frontend.rejection = Draining("the server is shutting down")
    check_error(await client.post("/v1/chat/completions", json=CHAT), 503, parts=("shutting down",))


NASTY = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["", "\0", "😀", "\u2028", "<｜User｜>", "a" * 300]),
    st.lists(st.one_of(st.integers(-5, 400), st.text(max_size=3), st.none()), max_size=4),
    st.dictionaries(
        st.sampled_from(["type", "text", "role", "content", "include_usage"]), st.text(max_size=3), max_size=3
    ),
    st.recursive(st.none(), lambda inner: st.lists(inner, max_size=2), max_leaves=8),
)
FIELDS = sorted(
    {name for body, _, _ in BAD_COMPLETIONS + BAD_CHATS for name in body}
    | {"top_logprobs", "kv_transfer_params", "return_token_ids", "ignore_eos", "include_stop_str_in_output", "x"}
)
BODIES = st.dictionaries(st.sampled_from(FIELDS), NASTY, max_size=4)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
@settings(max_examples=60, deadline=None)
@given(change=BODIES, raw=st.none() | st.binary(max_size=20))
def test_no_body_makes_the_server_fail(new_system, path, change, raw):
    frontend, client = new_system()
    base = {"prompt": "hi"} if path.endswith("/completions") and "chat" not in path else dict(CHAT)
    content = json.dumps({**base, **change}).encode() if raw is None else raw

    async def post() -> httpx.Response:
        async with client as http:
            return await http.post(path, content=content, headers={"content-type": "application/json"})

    response = asyncio.run(post())
    assert not frontend.held
    if response.status_code != 200:
        assert response.status_code in (400, 404)
        assert response.json()["error"]["code"] == response.status_code
