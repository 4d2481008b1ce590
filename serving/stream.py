"""The deltas of one request on their way to whoever reads them.

Owns: the queue between the engine, which never waits, and one reader.
Must not know: HTTP, how the request is served.
"""

import asyncio
from collections.abc import Callable

from serving.messages import FinishReason, RequestTimes, TokenDelta, TokenLogprobs


class TokenStream:
    """Implements `messages.GenerationStream`. `end(stop_reason)` ends the request in the name of its reader:
    as finished if a stop string was found, as aborted if None."""

    def __init__(self, end: Callable[[str | None], RequestTimes]) -> None:
        self._end = end
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._last: TokenDelta | None = None
        self._is_read_out = False
        self._wake = asyncio.Event()

    def push(self, token_ids: tuple[int, ...], logprobs: tuple[TokenLogprobs, ...] | None) -> None:
        """New tokens; `logprobs` one per token, if they are wanted."""
        self._token_ids.extend(token_ids)
        if logprobs is not None:
            self._logprobs.extend(logprobs)
        self._wake.set()

    def close(self, reason: FinishReason, *, stop_reason: int | None, times: RequestTimes, error: str | None) -> None:
        """The request has ended; no token follows."""
        self._last = TokenDelta(token_ids=(), finish_reason=reason, stop_reason=stop_reason, times=times, error=error)
        self._wake.set()

    def __aiter__(self) -> "TokenStream":
        return self

    async def __anext__(self) -> TokenDelta:
        """All tokens since the last call, at least one, or the end."""
        if self._is_read_out:
            raise StopAsyncIteration
        while not self._token_ids and self._last is None:
            self._wake.clear()
            await self._wake.wait()
        token_ids, self._token_ids = tuple(self._token_ids), []
        logprobs, self._logprobs = tuple(self._logprobs) or None, []
        if self._last is None:
            return TokenDelta(token_ids=token_ids, logprobs=logprobs)
        self._is_read_out = True
        last = self._last
        return TokenDelta(
            token_ids=token_ids,
            logprobs=logprobs,
            finish_reason=last.finish_reason,
            stop_reason=last.stop_reason,
            times=last.times,
            error=last.error,
        )

    def finish(self, *, stop_reason: str, num_tokens: int) -> RequestTimes:
        """See GenerationStream.finish. `num_tokens` may be fewer than were generated: the reader lags behind."""
        self._is_read_out = True
        return self._end(stop_reason)

    async def aclose(self) -> None:
        """See GenerationStream.aclose."""
        self._is_read_out = True
        if self._last is None:
            self._end(None)
