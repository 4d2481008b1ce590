"""Answers of the OpenAI-compatible endpoint: response bodies, server-sent events, usage.

Owns: the JSON that a client reads for a choice, a usage record or an error, and that a chunk costs microseconds:
what does not change from token to token is made once per request.
Must not know: sockets, engines, where the deltas come from.
Source: OpenAI's API reference; vLLM's `usage`, `stop_reason`, `token_ids` and logprobs. `usage.simulated` and
`usage.wall` are ours: the request's latencies by the simulated clock and by the wall's, in milliseconds.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, Literal

from model.tokenizer import Tokenizer
from serving.choices import Choice, ChoiceDelta
from serving.errors import QueueFull, RequestRejected, ServingError
from serving.messages import Latencies

Json = dict[str, Any]

DONE_EVENT = b"data: [DONE]\n\n"
_LEAST_LOGPROB = -9999.0  # JSON has no infinity; vLLM's value

_dumps: Callable[[object], str] = json.JSONEncoder(separators=(",", ":")).encode
_OBJECTS = {
    "completion": ("text_completion", "text_completion"),
    "chat": ("chat.completion", "chat.completion.chunk"),
}  # whole, streamed
_ERROR_TYPES = {
    400: "BadRequestError",
    401: "UnauthorizedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    413: "PayloadTooLargeError",
    415: "UnsupportedMediaTypeError",
    429: "TooManyRequestsError",
    503: "ServiceUnavailableError",
}


def error_body(message: str, *, status: int, param: str | None = None) -> Json:
    """vLLM's error object, which OpenAI's clients read too."""
    default = "BadRequestError" if status < 500 else "InternalServerError"
    error = {
        "message": message,
        "type": _ERROR_TYPES.get(status, default),
        "param": param,
        "code": status,
    }
    return {"error": error}


def error_event(error: ServingError | None) -> bytes:
    """The event that tells of a failure after the status line; None: an unexpected one, not described."""
    body = error_body("internal error" if error is None else str(error), status=500)
    return b"data: " + _dumps(body).encode() + b"\n\n"


def rejection(error: RequestRejected) -> tuple[Json, dict[str, str]]:
    """Body and headers that answer a rejected request."""
    headers = {}
    if isinstance(error, QueueFull):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    elif error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return error_body(str(error), status=error.status, param=error.param), headers


class OutputFormat:
    """Writes one request's answer, in the shape of `kind`, as a whole or as events."""

    def __init__(
        self,
        kind: Literal["completion", "chat"],
        *,
        response_id: str,
        model_name: str,
        created_s: int,
        tokenizer: Tokenizer,
        num_choices_per_prompt: int,
        returns_token_ids: bool = False,
        include_usage: bool = False,
        continuous_usage: bool = False,
    ) -> None:
        self._is_chat = kind == "chat"
        self._tokenizer = tokenizer
        self._num_choices_per_prompt = num_choices_per_prompt
        self._returns_token_ids = returns_token_ids
        self._include_usage = include_usage
        self._continuous_usage = continuous_usage
        whole, streamed = _OBJECTS[kind]
        self._envelope: Json = {"id": response_id, "object": whole, "created": created_s, "model": model_name}
        event_envelope = _dumps(self._envelope | {"object": streamed})[:-1]
        self._event_head = f'data: {event_envelope},"choices":['
        self._text_open, self._text_close = ('"delta":{"content":', "}") if self._is_chat else ('"text":', "")
        # OpenAI wants a null usage in every chunk once usage was asked for.
        self._event_tail = ',"usage":null}\n\n' if include_usage else "}\n\n"

    def opening_events(self, choices: Sequence[Choice]) -> bytes:
        """What comes before the first text: in a chat, each choice's role."""
        if not self._is_chat:
            return b""
        extra = f',"prompt_token_ids":{_ids(choices[0])}' if self._returns_token_ids else ""
        role = '"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null'
        tail = f"]{extra}{self._event_tail}"
        return "".join(f'{self._event_head}{{"index":{choice.index},{role}}}{tail}' for choice in choices).encode()

    def event(self, delta: ChoiceDelta, choices: Sequence[Choice]) -> bytes:
        """One chunk. The JSON is put together by hand: this is the only code that runs for every token."""
        choice = delta.choice
        logprobs, end, extra = "null", '"finish_reason":null,"stop_reason":null', ""
        if delta.logprobs is not None:
            logprobs = _dumps(self._logprobs(delta))
        if choice.finish_reason is not None:
            end = f'"finish_reason":"{choice.finish_reason}","stop_reason":{_dumps(choice.stop_reason)}'
        if self._returns_token_ids:
            extra = f',"token_ids":{list(delta.token_ids)}'
            if not self._is_chat and choice.num_tokens == len(delta.token_ids):
                extra += f',"prompt_token_ids":{_ids(choice)}'
        tail = self._event_tail
        if self._continuous_usage:
            tail = f',"usage":{_dumps(self._counts(choices))}}}\n\n'
        return (
            f'{self._event_head}{{"index":{choice.index},{self._text_open}{_dumps(delta.text)}'
            f'{self._text_close},"logprobs":{logprobs},{end}{extra}}}]{tail}'
        ).encode()

    def closing_events(self, choices: Sequence[Choice]) -> bytes:
        """Usage, if it was asked for, and the end of the stream."""
        if not self._include_usage:
            return DONE_EVENT
        usage = _dumps(self.usage(choices))
        return f'{self._event_head}],"usage":{usage}}}\n\n'.encode() + DONE_EVENT

    def body(self, wholes: Sequence[ChoiceDelta]) -> Json:
        """The whole answer at once; `wholes` has one delta per choice."""
        choices = [whole.choice for whole in wholes]
        body = self._envelope | {
            "choices": [self._whole_choice(whole) for whole in wholes],
            "usage": self.usage(choices),
        }
        if self._is_chat and self._returns_token_ids:
            body["prompt_token_ids"] = list(choices[0].request.prompt_token_ids)
        return body

    def usage(self, choices: Sequence[Choice]) -> Json:
        """Token counts and latencies. A prompt counts once however many choices it has.

        Latencies of several choices are what the client saw of the whole: the first token of any, the end of
        the last, the mean time per output token.
        """
        times = [choice.times for choice in choices if choice.times is not None]
        prompts = choices[:: self._num_choices_per_prompt]
        num_cached = sum(choice.times.num_cached_tokens for choice in prompts if choice.times is not None)
        simulated = _merged([entry.simulated for entry in times])
        if simulated is not None and len(times) == 1:  # gaps of several choices would mix
            simulated["itl_ms"] = [round(gap_ms, 6) for gap_ms in times[0].simulated_itl_ms]
        return self._counts(choices) | {
            "prompt_tokens_details": {"cached_tokens": num_cached},
            "simulated": simulated,
            "wall": _merged([entry.wall for entry in times]),
        }

    def _counts(self, choices: Sequence[Choice]) -> Json:
        prompts = choices[:: self._num_choices_per_prompt]
        num_prompt = sum(len(choice.request.prompt_token_ids) for choice in prompts)
        num_output = sum(choice.num_tokens for choice in choices)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_output,
            "total_tokens": num_prompt + num_output,
        }

    def _whole_choice(self, whole: ChoiceDelta) -> Json:
        choice = whole.choice
        text: Json = {"text": whole.text}
        if self._is_chat:
            text = {"message": {"role": "assistant", "content": whole.text}}
        body = {
            "index": choice.index,
            **text,
            "logprobs": None if whole.logprobs is None else self._logprobs(whole),
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if self._returns_token_ids:
            body["token_ids"] = list(whole.token_ids)
            if not self._is_chat:
                body["prompt_token_ids"] = list(choice.request.prompt_token_ids)
        return body

    def _logprobs(self, delta: ChoiceDelta) -> Json:
        return self._chat_logprobs(delta) if self._is_chat else self._completion_logprobs(delta)

    def _completion_logprobs(self, delta: ChoiceDelta) -> Json:
        tokens, token_logprobs, top_logprobs, text_offset = [], [], [], []
        for token_id, entry in zip(delta.token_ids, delta.logprobs or (), strict=True):
            token, logprob = self._token(token_id), max(entry.logprob, _LEAST_LOGPROB)
            best: dict[str, float] = {}
            for top_id, top_logprob in entry.top:  # two tokens may look alike: the better one is kept
                best.setdefault(self._token(top_id), max(top_logprob, _LEAST_LOGPROB))
            best.setdefault(token, logprob)
            tokens.append(token)
            token_logprobs.append(logprob)
            top_logprobs.append(best)
            text_offset.append(delta.choice.num_shown_chars)
            delta.choice.num_shown_chars += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": token_logprobs,
            "top_logprobs": top_logprobs,
            "text_offset": text_offset,
        }

    def _chat_logprobs(self, delta: ChoiceDelta) -> Json:
        return {
            "content": [
                self._chat_logprob(token_id, entry.logprob)
                | {"top_logprobs": [self._chat_logprob(*top) for top in entry.top]}
                for token_id, entry in zip(delta.token_ids, delta.logprobs or (), strict=True)
            ]
        }

    def _chat_logprob(self, token_id: int, logprob: float) -> Json:
        token_bytes = list(self._tokenizer.token_bytes(token_id))
        return {"token": self._token(token_id), "logprob": max(logprob, _LEAST_LOGPROB), "bytes": token_bytes}

    def _token(self, token_id: int) -> str:
        return self._tokenizer.token_bytes(token_id).decode(errors="replace")


def _ids(choice: Choice) -> str:
    return _dumps(choice.request.prompt_token_ids)


def _merged(parts: Sequence[Latencies]) -> Json | None:
    if not parts:
        return None
    tpots = [part.tpot_ms for part in parts if part.tpot_ms is not None]
    merged = Latencies(
        queue_ms=min((part.queue_ms for part in parts if part.queue_ms is not None), default=None),
        ttft_ms=min((part.ttft_ms for part in parts if part.ttft_ms is not None), default=None),
        tpot_ms=sum(tpots) / len(tpots) if tpots else None,
        e2el_ms=max(part.e2el_ms for part in parts),
    )
    return {name: value if value is None else round(value, 6) for name, value in asdict(merged).items()}
