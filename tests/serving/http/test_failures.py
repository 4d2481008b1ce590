"""What a client hears when the engine, the app or the server fails; nothing stays held."""

import asyncio
import json

import pytest

from serving.errors import EngineFailure
from serving.messages import TokenDelta

pytestmark = pytest.mark.asyncio


def last_event(text: str) -> dict[str, object]:
    """The last object of a stream, which must have been ended properly."""
    *_, last, done, rest = text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return json.loads(last.removeprefix("data: "))


async def test_an_engine_failure_before_the_first_token_has_a_status(client, frontend):
    frontend.script = [EngineFailure("NPU decode-0/3 is lost")]
    for streamed in (False, True):
        response = await client.post("/v1/completions", json={"prompt": "hi", "stream": streamed})
        assert response.status_code == 500
        assert response.json()["error"]["type"] == "InternalServerError"
        assert response.json()["error"]["message"] == "NPU decode-0/3 is lost"


@pytest.mark.parametrize("num_choices", [1, 2])
async def test_an_engine_failure_after_the_first_token_is_an_event(client, frontend, num_choices):
    frontend.say("He", then=TokenDelta(token_ids=(), finish_reason="error", error="link down"))
    response = await client.post("/v1/completions", json={"prompt": "hi", "stream": True, "n": num_choices})
    assert response.status_code == 200
    error = last_event(response.text)["error"]
    assert error["code"] == 500
    assert "link down" in error["message"]


async def test_a_stream_that_just_ends_is_a_failure(client, frontend):
    frontend.script = [TokenDelta(token_ids=(65,))]
    response = await client.post("/v1/completions", json={"prompt": "hi"})
    assert response.status_code == 500


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_defect_is_reported_without_its_details_and_still_raised(client, connect_with, frontend, streamed):
    frontend.say("H", then=RuntimeError("secret detail"))
    body = {"prompt": "hi", "stream": streamed}
    with pytest.raises(RuntimeError, match="secret detail"):  # so that the server logs it
        await client.post("/v1/completions", json=body)
    async with connect_with(shows_defects=False) as http:
        response = await http.post("/v1/completions", json=body)
    error = last_event(response.text)["error"] if streamed else response.json()["error"]
    assert (error["message"], error["code"]) == ("internal error", 500)


@pytest.mark.parametrize("num_choices", [1, 2])
@pytest.mark.parametrize("streamed", [False, True])
async def test_a_server_that_cancels_its_tasks_frees_the_request(client, frontend, streamed, num_choices):
    frontend.say("H", then="hang")
    body = {"prompt": "hi", "stream": streamed, "n": num_choices}
    task = asyncio.create_task(client.post("/v1/completions", json=body))
    while not frontend.hanging.is_set():
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert list(frontend.outcomes.values()) == ["aborted"] * num_choices
    assert len(asyncio.all_tasks()) == 1
