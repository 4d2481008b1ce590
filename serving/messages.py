"""Values that pass between the HTTP layer and the frontend, and the interface between the two.

Owns: what a request asks for, what comes back, when a value is out of range, and who releases what.
Must not know: HTTP, pydantic, engines, clocks (every instant and duration is given).
Source: field names and ranges of vLLM's SamplingParams; TPOT as `vllm bench serve` defines it.
"""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from model.step import TokenLogprobs as TokenLogprobs  # part of this interface
from serving.errors import InvalidRequest, PromptTooLong

if TYPE_CHECKING:  # a rank's process reads these messages and has no use for the tokenizer library
    from model.tokenizer import Tokenizer

FinishReason = Literal["stop", "length", "abort", "error"]

MAX_TEMPERATURE = 2.0  # OpenAI's limit
MAX_LOGPROBS = 20  # vLLM's default --max-logprobs
MAX_STOP_STRINGS = 32
MAX_STOP_CHARS = 512
MAX_STOP_TOKEN_IDS = 128
MAX_INT32 = 2**31 - 1
MAX_SEED = 2**64 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one choice is generated. A value out of range raises InvalidRequest and names the field.

    `temperature` 0 is greedy. `top_k` 0 is off. `seed` None lets the frontend draw one. `logprobs` None wants
    none, 0 those of the chosen tokens, k also those of the k best. `stop` ends before the string in the text.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        _check_range("max_tokens", self.max_tokens, 1, MAX_INT32)
        _check_range("min_tokens", self.min_tokens, 0, MAX_INT32)
        if self.min_tokens > self.max_tokens:
            raise InvalidRequest.of("min_tokens", self.min_tokens, f"exceeds max_tokens {self.max_tokens}")
        _check_range("temperature", self.temperature, 0.0, MAX_TEMPERATURE)
        if not 0.0 < self.top_p <= 1.0:
            raise InvalidRequest.of("top_p", self.top_p, "must be above 0 and at most 1")
        _check_range("top_k", self.top_k, 0, MAX_INT32)
        if self.seed is not None:
            _check_range("seed", self.seed, 0, MAX_SEED)
        if self.logprobs is not None:
            _check_range("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequest.of("stop", self.stop, f"must hold at most {MAX_STOP_STRINGS} strings")
        for text in self.stop:
            if not 0 < len(text) <= MAX_STOP_CHARS:
                raise InvalidRequest.of("stop", text, f"each must have 1 to {MAX_STOP_CHARS} characters")
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise InvalidRequest.of(
                "stop_token_ids", self.stop_token_ids, f"must hold at most {MAX_STOP_TOKEN_IDS} ids"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """One choice to generate. `request_id` is unique among the requests in flight.

    A lower `priority` runs earlier. Requests share cached prefixes only with those of the same `cache_salt`.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    priority: int = 0
    cache_salt: str | None = None

    def check_fits(self, *, max_model_len: int, vocab_size: int) -> None:
        """Raise InvalidRequest unless the prompt, the tokens asked for and every token id fit the model."""
        num_prompt, max_tokens = len(self.prompt_token_ids), self.sampling.max_tokens
        if num_prompt == 0:
            raise InvalidRequest("prompt: is empty, must hold at least 1 token", param="prompt")
        if num_prompt >= max_model_len:
            raise PromptTooLong(
                f"prompt: {num_prompt} tokens leave no room for output in max_model_len {max_model_len}",
                param="prompt",
            )
        if num_prompt + max_tokens > max_model_len:
            raise PromptTooLong(
                f"max_tokens: {num_prompt} prompt tokens + max_tokens {max_tokens} = "
                f"{num_prompt + max_tokens} exceed max_model_len {max_model_len}",
                param="max_tokens",
            )
        check_token_ids("prompt", self.prompt_token_ids, vocab_size=vocab_size)
        check_token_ids("stop_token_ids", self.sampling.stop_token_ids, vocab_size=vocab_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Latencies:
    """A request's latencies by one clock, in milliseconds from its arrival at the frontend.

    None: the event did not happen (no token, or fewer than two for `tpot_ms`).
    """

    queue_ms: float | None  # until it was first scheduled
    ttft_ms: float | None
    tpot_ms: float | None  # (e2el - ttft) / (num_tokens - 1)
    e2el_ms: float

    @classmethod
    def between(
        cls,
        *,
        arrival_ns: int,
        scheduled_ns: int | None,
        first_token_ns: int | None,
        end_ns: int,
        num_tokens: int,
    ) -> "Latencies":
        """From the instants of a request, all by one clock; `end_ns` is that of the last token."""
        tpot_ms = None
        if first_token_ns is not None and num_tokens > 1:
            tpot_ms = (end_ns - first_token_ns) / (num_tokens - 1) / 1e6
        return cls(
            queue_ms=None if scheduled_ns is None else (scheduled_ns - arrival_ns) / 1e6,
            ttft_ms=None if first_token_ns is None else (first_token_ns - arrival_ns) / 1e6,
            tpot_ms=tpot_ms,
            e2el_ms=(end_ns - arrival_ns) / 1e6,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTimes:
    """What is known of a choice once it has ended."""

    simulated: Latencies
    wall: Latencies
    num_cached_tokens: int = 0  # of the prompt: found in the NPU's blocks or in the pool
    simulated_itl_ms: tuple[float, ...] = ()  # gaps between its chunks by the simulated clock


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenDelta:
    """The next tokens of one choice, in order; a slow reader may get several steps' tokens in one.

    The last delta has a `finish_reason` and `times`, and possibly no token. With "stop", the choice's last token is
    the end-of-sequence or stop token: it is counted, and not shown in the text; `stop_reason` is its id if
    `stop_token_ids` had it. "abort" means that the server gave the request up, "error" that it failed (`error` says
    how).
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None  # one per token id
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    times: RequestTimes | None = None
    error: str | None = None


class GenerationStream(Protocol):
    """The deltas of one admitted request. Ends after the delta that has a finish_reason.

    __anext__ raises EngineFailure when the request is lost. Whoever holds a stream calls `aclose` in the end,
    whatever happened; all releasing is decided before its first await, so no cancellation can interrupt it.
    """

    def __aiter__(self) -> AsyncIterator[TokenDelta]: ...
    async def __anext__(self) -> TokenDelta: ...
    def finish(self, *, stop_reason: str, num_tokens: int) -> RequestTimes:
        """End it now as finished by a stop string, of which only the text layer knows; no delta follows.

        The outcome is "finished, stop" after `num_tokens` output tokens, not "aborted".
        """
        ...

    async def aclose(self) -> None:
        """Free everything it holds; aborts the request if it has not ended. Calling it again does nothing."""
        ...


class Frontend(Protocol):
    """What the HTTP layer needs of the serving system."""

    @property
    def model_name(self) -> str: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def tokenizer(self) -> "Tokenizer": ...
    def submit(self, request: GenerateRequest) -> GenerationStream:
        """Admit a request. Raises RequestRejected (QueueFull, Draining, ...) before anything is held."""
        ...

    def health(self) -> bool: ...


def check_token_ids(field: str, token_ids: Sequence[int], *, vocab_size: int) -> None:
    """Raise InvalidRequest if a token id is outside [0, vocab_size)."""
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        first_bad = next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)
        raise InvalidRequest.of(field, first_bad, f"token ids must be at least 0 and below {vocab_size}")


def _check_range(field: str, value: float, least: float, most: float) -> None:
    if not value >= least:  # true of NaN too
        raise InvalidRequest.of(field, value, f"must be at least {least}")
    if value > most:
        raise InvalidRequest.of(field, value, f"must be at most {most}")
