"""`supernode eval` against a scripted endpoint, from its arguments to its exit code."""

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from model.training.samples import reply_text
from serving.evaluation.questions import draw_questions

ROOT = Path(__file__).parents[3]
QUESTIONS = draw_questions(num_problems=4, kinds=["addition", "clock"])
ARGUMENTS = ("--kinds", "addition,clock", "--num-problems", "4")


async def supernode(*arguments, until=None):
    """Run `supernode eval` in a process of its own; exit code, standard output and error. `until`: then Ctrl-C."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "serving.cli", "eval", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
    )
    if until is not None:
        await until.wait()
        process.send_signal(signal.SIGINT)
    out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


@pytest.mark.asyncio
async def test_a_running_endpoint_is_evaluated_and_compared(chat_endpoint, right, tmp_path):
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    script = right(QUESTIONS)
    wrong = QUESTIONS[0].problem.question
    async with chat_endpoint(script) as endpoint:
        url = ("--base-url", f"{endpoint.url}/v1")
        code, out, err = await supernode(*url, *ARGUMENTS, "--json", str(first))
        assert (code, err) == (0, "")
        assert "model:                mini" in out
        assert "overall                        8      100.00" in out
        endpoint.reply = lambda question: ("</think>no", "stop") if question == wrong else script(question)
        code, out, err = await supernode(*url, *ARGUMENTS, "--compare", str(first), "--json", str(second))
    assert (code, err) == (0, "")
    assert "addition                       4     100.00   75.00      -25.00     1     0   1.0000" in out
    assert "Overall difference -12.50 points: not significant (p = 1)." in out
    values = json.loads(second.read_text())
    assert values["settings"] == {
        "seed": 0,
        "levels": "1,2,3",
        "num_problems": 4,
        "temperature": 0.0,
        "max_tokens": 400,
    }
    assert values["comparison"]["overall"]["only_earlier"] == 1
    assert [p["correct"] for p in values["problems"]] == [False] + [True] * (len(QUESTIONS) - 1)


@pytest.mark.asyncio
async def test_control_c_prints_what_was_answered_and_exits_with_130(chat_endpoint, tmp_path):
    replies = {q.problem.question: reply_text(q.problem) for q in QUESTIONS}
    waiting, result = asyncio.Event(), tmp_path / "out.json"

    async def reply(question):
        if question != QUESTIONS[0].problem.question:
            waiting.set()
            await asyncio.Event().wait()
        return replies[question], "stop"

    async with chat_endpoint(reply) as endpoint:
        arguments = ("--base-url", endpoint.url, *ARGUMENTS, "--concurrency", "1", "--json", str(result))
        code, out, err = await supernode(*arguments, until=waiting)
    assert (code, err) == (130, "")
    assert f"INTERRUPTED: {len(QUESTIONS) - 1} problems were not answered; what follows is partial." in out
    assert "overall                        1      100.00" in out
    assert json.loads(result.read_text())["interrupted"]


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ("needs a configuration", "--base-url")),
        (("laptop", "--kinds", "addition,poetry"), ("--kinds: 'poetry'", "story")),
        (("laptop", "--levels", "1,x"), ("--levels: 'x'", "1, 2, 3")),
        (("laptop", "--num-problems", "0"), ("--num-problems: 0", "1")),
        (("--base-url", "http://127.0.0.1:9", *ARGUMENTS), ("http://127.0.0.1:9: not ready", "Cannot connect")),
        (("--base-url", "http://127.0.0.1:9", "--set", "seed=1"), ("--set 'seed=1'",)),
        (("nope", *ARGUMENTS), ("nope: no such preset",)),
    ],
)
async def test_a_mistake_is_one_line_with_what_and_why(arguments, words):
    code, out, err = await supernode(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert all(word in err for word in words)
