"""The request bodies of the OpenAI-compatible endpoint, checked.

Owns: which fields exist, their types and ranges, which are refused because nothing here implements them, and
how a bad body becomes an error that names the field, the value and the limit.
Must not know: HTTP, the tokenizer, responses (serving/openai_output.py).
Source: OpenAI's API reference; field names, defaults and extras of vLLM's `entrypoints/openai/protocol.py`.
"""

import logging
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from serving.errors import InvalidRequest, UnsupportedField, shown
from serving.messages import MAX_INT32, MAX_SEED, SamplingParams

logger = logging.getLogger(__name__)

MAX_CHOICES = 128  # prompts x n of one body
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's and vLLM's for /v1/completions
_GREEDY_BELOW = 1e-5  # vLLM's _SAMPLING_EPS: a smaller temperature divides logits into infinities
MAX_ID_CHARS = 256
REQUEST_ID_PATTERN = r"^[\x21-\x7e]+$"  # it goes into a response header

# Field -> the values (beside null) that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "echo": (False,),
    "best_of": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "min_p": (0,),
    "logit_bias": ({},),
    "use_beam_search": (False,),
    "prompt_logprobs": (),
    "truncate_prompt_tokens": (),
    "prompt_embeds": (),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "return_tokens_as_token_ids": (False,),
    "response_format": ({"type": "text"},),
    "structured_outputs": ({},),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "continue_final_message": (False,),
}
# Hints and labels that change nothing here. kv_transfer_params are transfer handles, never used from outside.
_WITHOUT_EFFECT = frozenset(
    {
        "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "verbosity",
        "parallel_tool_calls", "reasoning_effort", "spaces_between_special_tokens", "kv_transfer_params",
    }
)  # fmt: skip

Prompt: TypeAlias = str | tuple[int, ...]
BodyT = TypeVar("BodyT", bound="Body")


def _prompts(value: object) -> tuple[Prompt, ...]:
    """A text, a list of texts, a list of token ids or a list of those: always the tuple of single prompts."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        raise PydanticCustomError("prompt", "must be a string, a list of strings or a list of token ids")
    if value and all(type(item) is int for item in value):
        value = [value]
    prompts: list[Prompt] = []
    for index, item in enumerate(value):
        if isinstance(item, list) and all(type(token_id) is int for token_id in item):
            prompts.append(tuple(item))
        elif isinstance(item, str):
            prompts.append(item)
        else:
            raise PydanticCustomError(
                "prompt",
                "item {index} must be a string or a list of token ids, like every other item",
                {"index": index},
            )
    if len({type(prompt) for prompt in prompts}) > 1:
        raise PydanticCustomError("prompt", "must not mix strings and token ids")
    if not prompts or not all(prompts):
        raise PydanticCustomError("prompt", "is empty, must hold at least 1 token")
    return tuple(prompts)


def _strings(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _text(value: object) -> str:
    """A message's content: a string, null, or a list of text parts."""
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise PydanticCustomError("content", "must be a string or a list of text parts")
    texts: list[str] = []
    for index, part in enumerate(value):
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part
        if not isinstance(text, str):
            raise PydanticCustomError("content", "part {index} must be a text part", {"index": index})
        texts.append(text)
    return "\n".join(texts)  # as vLLM joins them


class Part(BaseModel):
    """Exact JSON types and finite numbers; unknown keys are kept so that they can be reported."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, frozen=True)


class Body(Part):
    """Base of every body. null is the same as leaving a field out."""

    model: str | None = None


class StreamOptions(Part):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class ChatMessage(Part):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_text)] = ""
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None


class GenerationBody(Body):
    """What completions and chat completions share."""

    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None  # 0 or -1: off
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None  # vLLM's range; -1: none
    stop: Annotated[list[str], BeforeValidator(_strings)] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: Annotated[int, Field(ge=-MAX_INT32, le=MAX_INT32)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_ID_CHARS)] | None = None
    request_id: Annotated[str, Field(max_length=MAX_ID_CHARS, pattern=REQUEST_ID_PATTERN)] | None = None
    return_token_ids: bool | None = None

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def asked_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        """None: no logprobs; k: those of the chosen tokens and of the k best."""
        raise NotImplementedError

    def sampling(self, *, max_tokens: int, choice_index: int) -> SamplingParams:
        """The parameters of one of the `n` choices; its seed is `seed + choice_index`, as vLLM derives it."""
        seed = None if self.seed in (None, -1) else (self.seed + choice_index) & MAX_SEED
        temperature = 1.0 if self.temperature is None else self.temperature
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=self.min_tokens or 0,
            temperature=0.0 if 0.0 <= temperature < _GREEDY_BELOW else temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=0 if self.top_k in (None, -1) else self.top_k,
            seed=seed,
            stop=tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=self.ignore_eos or False,
            logprobs=self.wanted_logprobs,
            include_stop_str_in_output=self.include_stop_str_in_output or False,
            skip_special_tokens=self.skip_special_tokens is not False,
        )

    def check(self) -> None:
        """Raise InvalidRequest for unsupported fields and for options without their switch."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options: only allowed when stream is true", param="stream_options")
        unknown: list[str] = []
        for name, value in (self.model_extra or {}).items():
            neutral = _NEUTRAL.get(name)
            if neutral is None:
                if name not in _WITHOUT_EFFECT:
                    unknown.append(name)
            elif value is not None and value not in neutral:
                allowed = " or ".join([*(repr(item) for item in neutral), "null"])
                raise UnsupportedField(
                    f"{name}: got {shown(value)}, which is not supported; leave it out (or {allowed})",
                    param=name,
                )
        if unknown:
            logger.warning("unknown fields in the request were ignored: %s", shown(unknown))


class CompletionBody(GenerationBody):
    prompt: Annotated[tuple[Prompt, ...], BeforeValidator(_prompts)]
    logprobs: int | None = None
    add_special_tokens: bool | None = None

    @property
    def wanted_logprobs(self) -> int | None:
        return self.logprobs


class ChatBody(GenerationBody):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None

    @property
    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def check(self) -> None:
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest(
                f"top_logprobs: got {self.top_logprobs}, needs logprobs to be true", param="top_logprobs"
            )


class TokenizeBody(Body):
    """Either `prompt` or `messages`."""

    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    tokens: list[int]


def parse(body_type: type[BodyT], body: bytes) -> BodyT:
    """The checked body. Raises InvalidRequest that names the first field at fault, its value and the rule."""
    try:
        parsed = body_type.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    else:
        if isinstance(parsed, GenerationBody):
            parsed.check()
        return parsed
    rule = first["msg"][:1].lower() + first["msg"][1:]
    if first["type"] == "json_invalid":
        raise InvalidRequest(f"body: {rule}")
    field = ".".join(str(part) for part in first["loc"]) or "body"
    if first["type"] == "missing":
        raise InvalidRequest(f"{field}: {rule}", param=field)
    raise InvalidRequest.of(field, first["input"], rule)
