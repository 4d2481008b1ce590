"""One streamed completion, from bytes to a record.

Owns: the parser of server-sent events and the rules by which chunks become token times: which chunk carries a
token, what a malformed or failed stream is, and how the server's usage is read.
Must not know: HTTP clients, asyncio, the wall clock (instants come in as `now_ns`).
Source: SSE of the WHATWG HTML standard, section 9.2 (only `data` matters here); OpenAI's chunk objects; errors in
mid-stream as vLLM sends them, `data: {"error": ...}`; token counting as in `vllm bench serve`, except that a chunk
without text that only opens a chat message or only closes a stream is not taken for a token.
"""

import json
import math
from array import array
from typing import Any

from serving.errors import ServingError, shown
from serving.records import Outcome, RequestRecord, Timing

_FAILURE_REASONS = ("abort", "error")


class StreamError(ServingError):
    """The stream is not a completion. `reason` is a short fixed phrase, the message says what was received."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class SseParser:
    """Splits bytes, in whatever pieces they arrive, into the data of server-sent events."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The data of each event that `data` completes; comments and events without data are left out."""
        data = self._rest + data
        if b"\r" in data:
            # A final \r may be half of \r\n: leave it for the next call.
            keep = data[-1:] == b"\r"
            data = (data[:-1] if keep else data).replace(b"\r\n", b"\n").replace(b"\r", b"\n") + b"\r" * keep
        *events, self._rest = data.split(b"\n\n")
        parsed = []
        for event in events:
            if event[:6] == b"data: " and b"\n" not in event:  # nearly always
                parsed.append(event[6:])
            elif value := _event_data(event):
                parsed.append(value)
        return parsed

    def close(self) -> list[bytes]:
        """The data of an event that the end of the stream cut before its blank line."""
        rest, self._rest = self._rest, b""
        value = _event_data(rest.replace(b"\r", b"\n"))
        return [value] if value else []


class StreamRecorder:
    """Times the chunks of one streamed response, choice 0.

    `start_ns` is set by the sender right before it sends; every later instant is on the same clock.
    """

    def __init__(self, request_id: str, *, num_prompt_tokens: int, chat: bool, keep_text: bool) -> None:
        self.request_id = request_id
        self.start_ns: int | None = None
        self.scheduled_ns: int | None = None
        self.done = False
        self._num_prompt_tokens = num_prompt_tokens
        self._chat = chat
        self._text: list[str] | None = [] if keep_text else None
        self._first_ns: int | None = None
        self._last_ns = 0
        self._gaps_ns = array("q")
        self._finish_reason: str | None = None
        self._ends_without_text = False
        self._usage: dict[str, Any] = {}

    def on_event(self, data: bytes, now_ns: int) -> None:
        """Take the data of one event. Raises StreamError if it is an error, or not a chunk."""
        if data == b"[DONE]":
            self.done = True
            return
        try:
            chunk = json.loads(data)
            if error := chunk.get("error"):
                raise StreamError("error in stream", error_message(error))
            self._usage = chunk.get("usage") or self._usage
            if choices := chunk.get("choices"):
                self._on_choice(choices[0], now_ns)
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise StreamError("malformed chunk", f"malformed chunk {shown(data)}: {error!r}") from None

    def check_complete(self) -> None:
        """Raises StreamError unless the stream, which has ended, was a whole answer."""
        if self._finish_reason in _FAILURE_REASONS:
            raise StreamError(f"finish_reason {self._finish_reason}", "the server gave the request up")
        if self._first_ns is None:
            raise StreamError("no token", "the stream ended without a chunk that carries a token")
        if not self.done and self._finish_reason is None:
            raise StreamError("cut short", "the stream ended before a finish_reason or [DONE]")

    def finished(self) -> RequestRecord:
        """The record of a whole answer. Raises StreamError if its usage is not to be understood."""
        self.check_complete()
        try:
            return self.record("finished", self._finish_reason or "done")
        except (ValueError, TypeError, AttributeError) as error:
            raise StreamError("malformed usage", f"malformed usage {shown(self._usage)}: {error!r}") from None

    def ended(self, outcome: Outcome, reason: str, error: str | None) -> RequestRecord:
        """The record of anything else, with what had arrived until then."""
        self._usage = {}
        return self.record(outcome, reason, error=error)

    def record(self, outcome: Outcome, reason: str, *, error: str | None = None) -> RequestRecord:
        usage = self._usage
        num_output = _count(usage.get("completion_tokens"))
        gaps_ns, last_ns, num_chunks = self._gaps_ns, self._last_ns, len(self._gaps_ns) + (self._first_ns is not None)
        if self._ends_without_text and gaps_ns and num_chunks > (num_output or 0):
            gaps_ns, last_ns, num_chunks = gaps_ns[:-1], last_ns - gaps_ns[-1], num_chunks - 1
        wall = None
        if self._first_ns is not None:
            assert self.start_ns is not None
            wall = Timing(
                start_ns=self.start_ns,
                ttft_ns=self._first_ns - self.start_ns,
                e2el_ns=last_ns - self.start_ns,
                itl_ns=gaps_ns,
                queue_ns=None if self.scheduled_ns is None else max(self.start_ns - self.scheduled_ns, 0),
            )
        num_prompt = _count(usage.get("prompt_tokens"))
        return RequestRecord(
            request_id=self.request_id,
            outcome=outcome,
            reason=reason,
            num_prompt_tokens=self._num_prompt_tokens if num_prompt is None else num_prompt,
            num_output_tokens=num_chunks if num_output is None else num_output,
            num_cached_tokens=_count((usage.get("prompt_tokens_details") or {}).get("cached_tokens")),
            has_usage=num_output is not None,
            wall=wall,
            simulated=_simulated(usage.get("simulated")),
            error=error,
            text=None if self._text is None else "".join(self._text),
        )

    def _on_choice(self, choice: dict[str, Any], now_ns: int) -> None:
        finish_reason = choice.get("finish_reason")
        if self._chat:
            delta = choice["delta"]
            text = delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning")
            if not text and finish_reason is None and "role" in delta:
                return  # opens the message, before any token
        else:
            text = choice.get("text")
        if finish_reason is not None:
            self._finish_reason = str(finish_reason)
        self._ends_without_text = not text and finish_reason is not None
        if self._first_ns is None:
            self._first_ns = now_ns
        else:
            self._gaps_ns.append(now_ns - self._last_ns)
        self._last_ns = now_ns
        if text and self._text is not None:
            self._text.append(text)


def error_message(error: object) -> str:
    """The message in an error object of OpenAI's, vLLM's or Dynamo's form, or in anything else."""
    if isinstance(error, dict):
        for key in ("error", "message", "detail"):
            if error.get(key):
                return error_message(error[key])
    return error if isinstance(error, str) else json.dumps(error)


def _simulated(values: dict[str, Any] | None) -> Timing | None:
    """Our server's `usage.simulated`; `itl_ms` may be a list of gaps or one number."""
    if not values or values.get("ttft_ms") is None or values.get("e2el_ms") is None:
        return None
    itl = values.get("itl_ms")
    gaps = itl if isinstance(itl, list) else None if itl is None else [itl]
    return Timing(
        ttft_ns=_ns(values["ttft_ms"]),
        e2el_ns=_ns(values["e2el_ms"]),
        tpot_ns=None if values.get("tpot_ms") is None else _ns(values["tpot_ms"]),
        itl_ns=None if gaps is None else [_ns(gap) for gap in gaps],
        queue_ns=None if values.get("queue_ms") is None else _ns(values["queue_ms"]),
    )


def _ns(milliseconds: float) -> float:
    if not math.isfinite(milliseconds):
        raise ValueError(f"{milliseconds} ms")
    return milliseconds * 1e6


def _count(value: object) -> int | None:
    if value is None:
        return None
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is not a count")
    return value


def _event_data(event: bytes) -> bytes:
    lines = [line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:")]
    return b"\n".join(lines)
