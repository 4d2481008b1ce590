"""Asking an endpoint the questions of an evaluation, and grading what it replies.

Owns: how a question is sent, how many are in flight, and what a reply is worth.
Must not know: HTTP (serving/bench_client.py), which questions are asked, tables.
Source: DeepSeek-R1's reply: the thinking, `</think>`, the answer. The opening tag is part of the prompt. Thinking is
read from the text; an endpoint that takes it out of the text would have every reply count as malformed.
"""

import asyncio
import json
import sys
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from model.chat import THINK_END
from serving.bench_client import BenchClient
from serving.bench_config import BenchConfig
from serving.bench_stream import StreamRecorder
from serving.client_process import Progress, is_interrupted
from serving.errors import ConfigError
from serving.evaluation.questions import Question
from serving.records import RequestRecord
from serving.workloads.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class AskSettings:
    """How questions are asked. `model` None asks the first that the endpoint lists."""

    base_url: str
    model: str | None = None
    api_key: str | None = None
    concurrency: int = 32
    temperature: float = 0.0
    max_tokens: int = 400
    seed: int = 0  # of sampling, where the temperature is not 0
    disable_tqdm: bool | None = None  # None: a bar only where stderr is a terminal

    def __post_init__(self) -> None:
        for option, value, least in (("--concurrency", self.concurrency, 1), ("--max-tokens", self.max_tokens, 1)):
            if value < least:
                raise ConfigError(f"{option}: {value} is below the limit {least}")
        if not 0 <= self.temperature <= 2:
            raise ConfigError(f"--temperature: {self.temperature} is not in [0, 2]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A question and what came back."""

    question: Question
    reply: str  # as generated: thinking, tag, answer
    finish_reason: str | None  # None: the request failed
    num_tokens: int
    error: str | None = None

    @property
    def text(self) -> str | None:
        """The visible answer behind the thinking; None if the thinking was never closed."""
        _, tag, answer = self.reply.partition(THINK_END)
        return answer.strip() if tag else None

    @property
    def is_correct(self) -> bool:
        """Whether the visible answer is right."""
        return self.text is not None and self.question.problem.is_correct(self.text)

    @property
    def is_well_formed(self) -> bool:
        """Whether the thinking was closed and the reply ended by itself."""
        return self.text is not None and self.finish_reason == "stop"


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The answers in the order of the questions; without those that an interrupt gave up."""

    model: str
    answers: tuple[Answer, ...]
    is_interrupted: bool
    num_not_asked: int


async def ask(settings: AskSettings, questions: Sequence[Question], *, stop: asyncio.Event) -> Asked:
    """Ask every question once. When `stop` is set, what is in flight is given up. Raises EndpointNotReady."""
    config = BenchConfig(
        base_url=settings.base_url,
        backend="openai-chat",
        model=settings.model,
        api_key=settings.api_key,
        ready_check_timeout_s=0.0,
    )
    answers: dict[int, Answer] = {}
    async with BenchClient(config, Workload(name="evaluation", requests=())) as client:
        await client.wait_until_ready()
        with Progress(total=len(questions), disable=settings.disable_tqdm, file=sys.stderr, unit="problem") as bar:
            interrupted = await is_interrupted(_ask_all(client, settings, questions, answers, bar), stop)
        return Asked(
            model=client.model,
            answers=tuple(answers[index] for index in sorted(answers)),
            is_interrupted=interrupted,
            num_not_asked=len(questions) - len(answers),
        )


async def _ask_all(
    client: BenchClient,
    settings: AskSettings,
    questions: Sequence[Question],
    answers: dict[int, Answer],
    bar: Progress,
) -> None:
    rest = iter(_interleaved(questions))
    async with asyncio.TaskGroup() as group:
        for _ in range(settings.concurrency):
            group.create_task(_work(client, settings, rest, answers, bar))


def _interleaved(questions: Sequence[Question]) -> list[tuple[int, Question]]:
    """Indices and questions, groups by turns: an interrupted evaluation has some answers of each."""
    num_before: Counter[str] = Counter()
    turns = []
    for index, question in enumerate(questions):
        turns.append((num_before[question.group], index, question))
        num_before[question.group] += 1
    return [(index, question) for _, index, question in sorted(turns, key=lambda turn: turn[:2])]


async def _work(
    client: BenchClient,
    settings: AskSettings,
    rest: Iterator[tuple[int, Question]],
    answers: dict[int, Answer],
    bar: Progress,
) -> None:
    """One of the clients that share the questions."""
    for index, question in rest:
        recorder = StreamRecorder(f"eval-{index}", num_prompt_tokens=0, chat=True, keep_text=True)
        record = await client.send(_body(client.model, settings, question), recorder)
        answers[index] = _answer(question, record)
        bar.update()


def _body(model: str, settings: AskSettings, question: Question) -> bytes:
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": question.problem.question}],
        "max_completion_tokens": settings.max_tokens,
        "temperature": settings.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if settings.temperature:
        body["seed"] = zlib.crc32(f"{settings.seed}/{question.group}/{question.problem.question}".encode())
    return json.dumps(body).encode()


def _answer(question: Question, record: RequestRecord) -> Answer:
    is_finished = record.outcome == "finished"
    return Answer(
        question=question,
        reply=record.text or "",
        finish_reason=record.reason if is_finished else None,
        num_tokens=record.num_output_tokens,
        error=None if is_finished else record.error or record.reason,
    )
