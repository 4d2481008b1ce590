"""The choices of one HTTP request: opened together, read together, freed together.

Owns: admission of all or none, the order in which several choices are read, how a stop string ends one.
Must not know: HTTP, JSON, the prompt's text.

Who releases: `ChoiceSet` alone holds the streams. Leaving its block, for whatever reason, closes them all.
A stop string is seen here first, so this is also where the frontend is told that the choice has finished.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from model.step import TokenLogprobs
from model.tokenizer import Tokenizer
from serving.detokenize import TextStream
from serving.errors import EngineFailure
from serving.messages import (
    FinishReason,
    Frontend,
    GenerateRequest,
    GenerationStream,
    RequestTimes,
    TokenDelta,
)


class Choice:
    """One generation: its stream, its text and, once it has ended, why."""

    def __init__(self, index: int, request: GenerateRequest, *, stream: GenerationStream, tokenizer: Tokenizer) -> None:
        self.index = index
        self.request = request
        self.num_tokens = 0
        self.num_shown_chars = 0  # of token strings, for text_offset
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.times: RequestTimes | None = None
        self._stream = stream
        sampling = request.sampling
        # The end-of-sequence token is hidden anyway, unless special tokens are to be shown.
        eos_ids = () if sampling.skip_special_tokens else (tokenizer.eos_token_id,)
        self._text = TextStream(
            tokenizer.stream(skip_special_tokens=sampling.skip_special_tokens),
            sampling,
            end_ids=frozenset((*sampling.stop_token_ids, *eos_ids)),
        )

    async def next(self) -> "ChoiceDelta":
        """The next delta. Raises EngineFailure if the request is lost."""
        assert self.finish_reason is None, f"request {self.request.request_id}: read after its end"
        try:
            delta = await self._stream.__anext__()
        except StopAsyncIteration:
            raise EngineFailure(f"request {self.request.request_id}: its stream ended without a reason") from None
        return self._take(delta)

    def _take(self, delta: TokenDelta) -> "ChoiceDelta":
        if delta.finish_reason == "error":
            raise EngineFailure(f"request {self.request.request_id}: {delta.error or 'failed in the engine'}")
        token_ids, logprobs = delta.token_ids, None
        if self.request.sampling.logprobs is not None:
            logprobs = delta.logprobs or ()
            assert len(logprobs) == len(token_ids), (
                f"request {self.request.request_id}: {len(logprobs)} logprobs for {len(token_ids)} tokens"
            )
        piece = self._text.push(token_ids)
        text, stop = piece.text, piece.stop
        if stop is not None:
            token_ids = token_ids[: piece.num_tokens]
            logprobs = None if logprobs is None else logprobs[: piece.num_tokens]
        elif delta.finish_reason is not None:
            ended_by_token = delta.finish_reason == "stop" and not self.request.sampling.include_stop_str_in_output
            rest = self._text.finish(ended_by_token=ended_by_token)
            text, stop = text + rest.text, rest.stop
        self.num_tokens += len(token_ids)
        if stop is not None:
            self.finish_reason, self.stop_reason = "stop", stop
            self.times = delta.times or self._stream.finish(stop_reason=stop, num_tokens=self.num_tokens)
        elif delta.finish_reason is not None:
            self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason
            self.times = delta.times
        return ChoiceDelta(choice=self, text=text, token_ids=token_ids, logprobs=logprobs)


@dataclass(slots=True, kw_only=True)
class ChoiceDelta:
    """What one choice has to show next; after the choice's end, why is in `choice.finish_reason`."""

    choice: Choice
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None


class ChoiceSet:
    """An asynchronous context manager: entering submits all requests or none, leaving frees all they hold."""

    def __init__(self, frontend: Frontend, requests: Sequence[GenerateRequest]) -> None:
        self.choices: list[Choice] = []
        self._frontend = frontend
        self._requests = requests
        self._streams: list[GenerationStream] = []
        self._pumps: list[asyncio.Task[None]] = []
        self._queue: asyncio.Queue[ChoiceDelta | None] = asyncio.Queue()
        self._num_open = len(requests)

    async def __aenter__(self) -> Self:
        """Raises RequestRejected if one of them is refused; then none is held."""
        frontend = self._frontend
        try:
            for index, request in enumerate(self._requests):
                self._streams.append(stream := frontend.submit(request))
                self.choices.append(Choice(index, request, stream=stream, tokenizer=frontend.tokenizer))
        except BaseException:
            await self.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        for pump in self._pumps:
            pump.cancel()
        try:
            # First the readers: a stream need not bear being closed while it is read.
            await asyncio.gather(*self._pumps, return_exceptions=True)
        finally:
            for stream in self._streams:
                await stream.aclose()

    async def next(self) -> list[ChoiceDelta]:
        """What is ready, at least one delta; empty once every choice has ended."""
        if len(self.choices) == 1:  # no task and no queue between the engine and the socket
            choice = self.choices[0]
            return [await choice.next()] if choice.finish_reason is None else []
        if not self._pumps:
            self._pumps = [asyncio.create_task(self._pump(choice)) for choice in self.choices]
        batch: list[ChoiceDelta] = []
        while self._num_open and not batch:
            ready = [await self._queue.get()]
            while not self._queue.empty():
                ready.append(self._queue.get_nowait())
            batch = [delta for delta in ready if delta is not None]
            if len(batch) < len(ready):
                self._num_open -= len(ready) - len(batch)
                for pump in self._pumps:
                    if pump.done():
                        pump.result()  # raises what ended it
        return batch

    async def collect(self) -> list[ChoiceDelta]:
        """Read to the end: one delta per choice, in order, that holds all of it."""
        parts: list[list[ChoiceDelta]] = [[] for _ in self.choices]
        while batch := await self.next():
            for delta in batch:
                parts[delta.choice.index].append(delta)
        return [_joined(choice, parts[choice.index]) for choice in self.choices]

    async def _pump(self, choice: Choice) -> None:
        try:
            while choice.finish_reason is None:
                self._queue.put_nowait(await choice.next())
        finally:
            self._queue.put_nowait(None)


def _joined(choice: Choice, parts: Sequence[ChoiceDelta]) -> ChoiceDelta:
    logprobs = None
    if choice.request.sampling.logprobs is not None:
        logprobs = tuple(entry for part in parts for entry in part.logprobs or ())
    return ChoiceDelta(
        choice=choice,
        text="".join(part.text for part in parts),
        token_ids=tuple(token_id for part in parts for token_id in part.token_ids),
        logprobs=logprobs,
    )
