"""What a well-formed request gets, in process."""

import json
from dataclasses import replace
from typing import Any

import httpx
import pytest

from model.chat import EOS
from serving.messages import TokenDelta

pytestmark = pytest.mark.asyncio
CHAT = {"messages": [{"role": "user", "content": "hi"}]}
USAGE_TIMES = {
    "simulated": {"queue_ms": 1.0, "ttft_ms": 10.0, "tpot_ms": 2.0, "e2el_ms": 20.0, "itl_ms": [1.5, 2.5]},
    "wall": {"queue_ms": 3.0, "ttft_ms": 30.0, "tpot_ms": 6.0, "e2el_ms": 60.0},
}


def events(response: httpx.Response) -> list[Any]:
    """The objects of a stream; checks its framing."""
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    *lines, last, empty = response.text.split("\n\n")
    assert (last, empty) == ("data: [DONE]", "")
    assert all(line.startswith("data: ") for line in lines)
    return [json.loads(line.removeprefix("data: ")) for line in lines]


async def test_a_completion(client, frontend):
    response = await client.post("/v1/completions", json={"prompt": "hi", "model": "mini-r1"})
    request = frontend.requests[0]
    body = response.json()
    assert body.pop("id").startswith("cmpl-")
    assert body == {
        "object": "text_completion",
        "created": 1_700_000_000,
        "model": "mini-r1",
        "choices": [{"index": 0, "text": "Hello", "logprobs": None, "finish_reason": "stop", "stop_reason": None}],
        "usage": {
            "prompt_tokens": 3,
            "completion_tokens": 6,  # the end-of-sequence token counts
            "total_tokens": 9,
            "prompt_tokens_details": {"cached_tokens": 16},
            **USAGE_TIMES,
        },
    }
    assert request.prompt_token_ids == (frontend.tokenizer.bos_token_id, *frontend.ids("hi"))
    assert request.sampling.max_tokens == 16
    assert frontend.outcomes[request.request_id] == "finished stop"


async def test_a_chat_completion_takes_all_the_room_there_is(client, frontend):
    response = await client.post("/v1/chat/completions", json=CHAT)
    body = response.json()
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "Hello"}
    request = frontend.requests[0]
    assert len(request.prompt_token_ids) + request.sampling.max_tokens == frontend.max_model_len


async def test_chat_contents_may_be_parts_and_developers_are_the_system(client, frontend):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    turns = [{"role": "developer", "content": parts}, {"role": "user", "content": "c"}]
    await client.post("/v1/chat/completions", json={"messages": turns})
    plain = [{"role": "system", "content": "a\nb"}, {"role": "user", "content": "c"}]
    await client.post("/v1/chat/completions", json={"messages": plain})
    first, second = frontend.requests
    assert first.prompt_token_ids == second.prompt_token_ids


@pytest.mark.parametrize(
    ("prompt", "num_choices"),
    [("a", 1), (["a", "b"], 2), ([5, 6, 7], 1), ([[5, 6], [7]], 2)],
)
async def test_every_form_of_prompt(client, frontend, prompt, num_choices):
    response = await client.post("/v1/completions", json={"prompt": prompt, "add_special_tokens": False})
    assert [choice["index"] for choice in response.json()["choices"]] == list(range(num_choices))
    if prompt == [5, 6, 7]:
        assert frontend.requests[0].prompt_token_ids == (5, 6, 7)


async def test_every_parameter_reaches_the_frontend(client, frontend, caplog):
    body = {
        "prompt": "hi",
        "max_tokens": 9,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "seed": -2,
        "stop": "x",
        "stop_token_ids": [3],
        "ignore_eos": True,
        "logprobs": None,
        "priority": -4,
        "cache_salt": "tenant",
        "kv_transfer_params": {"remote_host": "10.0.0.1"},
        "user": "someone",
        "unheard_of": [1],
    }
    assert (await client.post("/v1/completions", json=body)).status_code == 200
    request = frontend.requests[0]
    sampling = request.sampling
    assert (sampling.max_tokens, sampling.min_tokens, sampling.temperature) == (9, 2, 0.5)
    assert (sampling.top_p, sampling.top_k, sampling.seed) == (0.9, 7, 2**64 - 2)
    assert (sampling.stop, sampling.stop_token_ids, sampling.ignore_eos) == (("x",), (3,), True)
    assert (request.priority, request.cache_salt) == (-4, "tenant")
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "serving.openai_protocol"]
    assert warning == "unknown fields in the request were ignored: ['unheard_of']"


async def test_null_is_the_same_as_leaving_a_field_out(client, frontend):
    names = ["max_tokens", "temperature", "top_p", "top_k", "n", "seed", "stop", "stop_token_ids", "stream"]
    names += ["stream_options", "logprobs", "suffix", "model", "request_id"]
    response = await client.post("/v1/completions", json={"prompt": "hi", **dict.fromkeys(names)})
    assert response.status_code == 200
    await client.post("/v1/completions", json={"prompt": "hi"})
    first, second = frontend.requests
    assert first.sampling == second.sampling


async def test_neutral_values_of_unsupported_fields_are_accepted(client):
    neutral = {"best_of": 1, "presence_penalty": 0.0, "logit_bias": {}, "tools": [], "echo": False, "suffix": None}
    body = {"prompt": "hi", "response_format": {"type": "text"}, **neutral}
    response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200


async def test_n_choices_have_their_own_seeds_and_share_the_prompt_in_usage(client, frontend):
    response = await client.post("/v1/completions", json={"prompt": ["a", "b"], "n": 3, "seed": 10})
    body = response.json()
    assert [request.sampling.seed for request in frontend.requests] == [10, 11, 12, 10, 11, 12]
    assert len({request.request_id for request in frontend.requests}) == 6
    assert body["usage"]["prompt_tokens"] == 4
    assert body["usage"]["completion_tokens"] == 36
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 32


async def test_a_streamed_completion(client):
    response = await client.post("/v1/completions", json={"prompt": "hi", "stream": True})
    chunks = events(response)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "Hello"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 5 + ["stop"]
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert not any("usage" in chunk for chunk in chunks)


async def test_a_streamed_chat_opens_with_the_role_and_ends_with_the_usage(client):
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = events(await client.post("/v1/chat/completions", json={**CHAT, **options}))
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks[:-1]) == "Hello"
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 6
    assert chunks[-1]["usage"]["simulated"] == USAGE_TIMES["simulated"]
    assert chunks[-1]["usage"]["wall"] == USAGE_TIMES["wall"]


async def test_continuous_usage_counts_the_tokens_so_far(client):
    options = {"stream": True, "stream_options": {"continuous_usage_stats": True}}
    chunks = events(await client.post("/v1/completions", json={"prompt": "hi", **options}))
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 4, 5, 6]


async def test_n_streams_come_interleaved_and_whole(client, frontend):
    chunks = events(await client.post("/v1/completions", json={"prompt": "hi", "stream": True, "n": 3}))
    texts = ["", "", ""]
    for chunk in chunks:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == ["Hello"] * 3
    assert set(frontend.outcomes.values()) == {"finished stop"}


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_stop_string_finishes_the_request_in_the_frontend_too(client, frontend, streamed):
    frontend.say("one STOP two", tokens_per_delta=3)
    body = {"prompt": "hi", "stop": ["STOP", "never"], "stream": streamed}
    response = await client.post("/v1/completions", json=body)
    if streamed:
        chunks = events(response)
        choice = chunks[-1]["choices"][0]
        text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    else:
        choice = response.json()["choices"][0]
        text = choice["text"]
        assert response.json()["usage"]["completion_tokens"] == 8
    assert text == "one "
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "STOP")
    assert list(frontend.outcomes.values()) == ["finished stop 'STOP' after 8"]


@pytest.mark.parametrize("apart", [False, True])
async def test_a_stop_token_is_reported_and_not_shown(client, frontend, apart):
    (token_id,) = frontend.ids("!")
    end = TokenDelta(token_ids=(token_id,), finish_reason="stop", stop_reason=token_id)
    frontend.say("Hi!!" if apart else "Hi!", then=replace(end, token_ids=()) if apart else end)
    response = await client.post("/v1/completions", json={"prompt": "hi", "stop_token_ids": [token_id]})
    (choice,) = response.json()["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("Hi!", "stop", token_id)
    assert response.json()["usage"]["completion_tokens"] == 4


async def test_the_token_that_ended_it_shows_on_request(client, frontend):
    frontend.say("Hi", then=frontend.end_of_sequence())
    texts = []
    for extra in ({}, {"include_stop_str_in_output": True}):
        body = {"prompt": "hi", "skip_special_tokens": False, **extra}
        texts.append((await client.post("/v1/completions", json=body)).json()["choices"][0]["text"])
    assert texts == ["Hi", f"Hi{EOS}"]


async def test_completion_logprobs(client, frontend):
    frontend.say("é!")
    frontend.with_logprobs()
    body = (await client.post("/v1/completions", json={"prompt": "hi", "logprobs": 2})).json()
    logprobs = body["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["\N{REPLACEMENT CHARACTER}"] * 2 + ["!"]
    assert logprobs["token_logprobs"] == [-0.5] * 3
    assert logprobs["top_logprobs"][2] == {"!": -0.5, ":": -9999.0}
    assert logprobs["text_offset"] == [0, 1, 2]
    assert frontend.requests[0].sampling.logprobs == 2


async def test_chat_logprobs_carry_the_bytes_of_half_characters(client, frontend):
    frontend.say("é!")
    frontend.with_logprobs()
    options = {"logprobs": True, "top_logprobs": 1, "stream": True}
    chunks = events(await client.post("/v1/chat/completions", json={**CHAT, **options}))
    content = [entry for chunk in chunks[1:] for entry in chunk["choices"][0]["logprobs"]["content"]]
    assert [entry["bytes"] for entry in content] == [[0xC3], [0xA9], [0x21]]
    assert content[0]["top_logprobs"][1] == {"token": ":", "logprob": -9999.0, "bytes": [58]}


async def test_token_ids_on_request(client, frontend):
    ids = [*frontend.ids("Hello"), frontend.tokenizer.eos_token_id]
    body = {"prompt": [5, 6], "return_token_ids": True}
    choice = (await client.post("/v1/completions", json=body)).json()["choices"][0]
    assert (choice["token_ids"], choice["prompt_token_ids"]) == (ids, [5, 6])
    chunks = events(await client.post("/v1/completions", json={**body, "stream": True}))
    assert [token for chunk in chunks for token in chunk["choices"][0]["token_ids"]] == ids
    assert ["prompt_token_ids" in chunk["choices"][0] for chunk in chunks] == [True] + [False] * 5


async def test_the_request_id_is_the_client_s_or_a_new_one_and_never_ours_twice(client, frontend):
    for _ in range(2):
        response = await client.post("/v1/completions", json={"prompt": "hi"}, headers={"X-Request-Id": "mine"})
        assert response.headers["X-Request-Id"] == "mine"
        assert response.json()["id"] == "cmpl-mine"
    assert frontend.requests[0].request_id != frontend.requests[1].request_id
    response = await client.post("/v1/completions", json={"prompt": "hi", "request_id": "body", "stream": True})
    assert response.headers["X-Request-Id"] == "body"
    assert len((await client.get("/health")).headers["X-Request-Id"]) == 32


async def test_models(client):
    (card,) = (await client.get("/v1/models")).json()["data"]
    assert (card["id"], card["max_model_len"]) == ("mini-r1", 128)
    assert (await client.get("/v1/models/mini-r1")).json() == card
    assert (await client.get("/v1/models/other")).status_code == 404


async def test_tokenize_and_detokenize_are_inverse(client, frontend):
    body = (await client.post("/tokenize", json={"prompt": "é", "return_token_strs": True})).json()
    bos = frontend.tokenizer.bos_token_id
    assert body["tokens"] == [bos, *frontend.ids("é")]
    assert (body["count"], body["max_model_len"], len(body["token_strs"])) == (3, 128, 3)
    back = (await client.post("/detokenize", json={"tokens": body["tokens"][1:]})).json()
    assert back == {"prompt": "é"}
    chat = (await client.post("/tokenize", json=CHAT)).json()
    await client.post("/v1/chat/completions", json=CHAT)
    assert tuple(chat["tokens"]) == frontend.requests[-1].prompt_token_ids


async def test_health_and_version(client, frontend):
    assert (await client.get("/health")).status_code == 200
    assert (await client.post("/ping")).status_code == 200
    frontend.healthy = False
    assert (await client.get("/health")).status_code == 503
    assert (await client.get("/version")).json() == {"version": "1.2.3"}


async def test_metrics_are_served_in_the_text_format(client):
    await client.post("/v1/completions", json={"prompt": "", "n": 2})
    response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    assert 'supernode:requests_rejected_total{reason="invalid"} 1.0' in response.text
