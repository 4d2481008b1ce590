"""Asking: what is sent, what a reply is worth, what happens to requests that fail or are given up."""

import asyncio

import pytest

from model.training.samples import reply_text
from serving.bench_client import EndpointNotReady
from serving.errors import ConfigError
from serving.evaluation.client import AskSettings, ask
from serving.evaluation.questions import draw_questions
from serving.evaluation.run import evaluate_endpoint

QUESTIONS = draw_questions(num_problems=3, kinds=["addition", "story"])


def settings(endpoint, **options):
    return AskSettings(base_url=endpoint.url, **options)


@pytest.mark.parametrize(
    ("reply", "finish_reason", "correct", "well_formed"),
    [
        ("3+4=7\n</think>\n\n7", "stop", True, True),
        ("3+4=7\n</think>\n\n 07. ", "stop", True, True),
        ("3+4=7\n</think>\n\n8", "stop", False, True),
        ("3+4=7\n</think>\n\n7", "length", True, False),
        ("3+4=7\n7", "stop", False, False),
        ("7", "length", False, False),
        ("</think>7</think>7", "stop", False, True),
        ("", None, False, False),
    ],
)
def test_the_answer_behind_the_thinking_is_graded(answer, reply, finish_reason, correct, well_formed):
    graded = answer(reply, finish_reason=finish_reason)
    assert (graded.is_correct, graded.is_well_formed) == (correct, well_formed)


@pytest.mark.asyncio
async def test_every_question_is_asked_once_and_the_right_replies_are_right(chat_endpoint, right):
    async with chat_endpoint(right(QUESTIONS)) as endpoint:
        asked = await ask(settings(endpoint, concurrency=2), QUESTIONS, stop=asyncio.Event())
    assert (asked.model, asked.is_interrupted, asked.num_not_asked) == ("mini", False, 0)
    assert [a.question for a in asked.answers] == list(QUESTIONS)
    assert all(a.is_correct and a.is_well_formed for a in asked.answers)
    assert [a.num_tokens for a in asked.answers] == [len(reply_text(q.problem)) + 1 for q in QUESTIONS]


@pytest.mark.asyncio
async def test_as_many_questions_as_allowed_are_in_flight(chat_endpoint, right):
    script, pair = right(QUESTIONS), asyncio.Barrier(2)

    async def reply(question):
        await pair.wait()  # for a second one
        return script(question)

    async with chat_endpoint(reply) as endpoint:
        asked = await ask(settings(endpoint, concurrency=2), QUESTIONS[:4], stop=asyncio.Event())
    assert (len(asked.answers), endpoint.max_in_flight) == (4, 2)


@pytest.mark.asyncio
async def test_a_question_goes_out_as_a_chat_of_one_turn(chat_endpoint, right):
    async with chat_endpoint(right(QUESTIONS)) as endpoint:
        await ask(settings(endpoint, concurrency=1, max_tokens=77), QUESTIONS[:1], stop=asyncio.Event())
        await ask(settings(endpoint, concurrency=1, temperature=0.5, seed=3), QUESTIONS[:1], stop=asyncio.Event())
    greedy, sampled = endpoint.bodies
    assert greedy == {
        "model": "mini",
        "messages": [{"role": "user", "content": QUESTIONS[0].problem.question}],
        "max_completion_tokens": 77,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert sampled["temperature"] == 0.5
    assert sampled["seed"] >= 0


@pytest.mark.asyncio
async def test_a_request_that_fails_is_a_wrong_answer_that_says_why(chat_endpoint, right):
    script = right(QUESTIONS)
    broken = QUESTIONS[1].problem.question
    async with chat_endpoint(lambda question: 500 if question == broken else script(question)) as endpoint:
        asked = await ask(settings(endpoint), QUESTIONS, stop=asyncio.Event())
    failed = [a for a in asked.answers if a.error is not None]
    assert [a.question for a in failed] == [QUESTIONS[1]]
    assert (failed[0].is_correct, failed[0].finish_reason) == (False, None)
    assert "HTTP 500: out of order" in failed[0].error


@pytest.mark.asyncio
async def test_stopping_keeps_the_answers_that_came(chat_endpoint, right):
    script, stop = right(QUESTIONS), asyncio.Event()

    async def reply(question):
        if question == QUESTIONS[1].problem.question:  # the second of its group, when each has had one
            stop.set()
            await asyncio.Event().wait()
        return script(question)

    async with chat_endpoint(reply) as endpoint:
        asked = await ask(settings(endpoint, concurrency=1), QUESTIONS, stop=stop)
    assert [a.question for a in asked.answers] == [QUESTIONS[0], QUESTIONS[3], QUESTIONS[6]]
    assert (asked.is_interrupted, asked.num_not_asked) == (True, len(QUESTIONS) - 3)


def test_an_endpoint_that_is_not_there_is_a_mistake_of_the_caller():
    with pytest.raises(ConfigError, match=r"--base-url: http://127.0.0.1:9: not ready") as refusal:
        evaluate_endpoint(AskSettings(base_url="http://127.0.0.1:9"), QUESTIONS)
    assert not isinstance(refusal.value, EndpointNotReady)


@pytest.mark.parametrize("options", [{"concurrency": 0}, {"max_tokens": 0}, {"temperature": -1}, {"temperature": 3}])
def test_settings_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match="--"):
        AskSettings(base_url="http://test", **options)
