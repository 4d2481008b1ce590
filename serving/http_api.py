"""The OpenAI-compatible endpoint.

Owns: the routes, and the way from a checked body to the requests that the frontend gets.
Must not know: instances, engines, time beyond a timestamp for `created`.
Source: OpenAI's API reference; vLLM's server for routes, extras and statuses.

/v1/completions, /v1/chat/completions, /v1/models, /tokenize, /detokenize, /health, /ping, /version, /metrics.
"""

import itertools
import time
import uuid
from collections.abc import Callable, Sequence
from typing import TypeVar

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from model.chat import ChatError, Message
from model.tokenizer import TokenizerError
from serving.choices import ChoiceSet
from serving.errors import InvalidRequest, ModelNotFound, PromptTooLong, shown
from serving.http_errors import Guard, add_error_handlers
from serving.http_stream import EventStream, read_body, until_disconnect
from serving.messages import Frontend, GenerateRequest, check_token_ids
from serving.metrics import CONTENT_TYPE, Metrics
from serving.openai_output import Json, OutputFormat
from serving.openai_protocol import (
    DEFAULT_COMPLETION_TOKENS,
    MAX_CHOICES,
    Body,
    ChatBody,
    ChatMessage,
    CompletionBody,
    DetokenizeBody,
    GenerationBody,
    Prompt,
    TokenizeBody,
    parse,
)

DEFAULT_MAX_BODY_BYTES = 8 * 1024 * 1024
BodyT = TypeVar("BodyT", bound=Body)


def create_app(
    frontend: Frontend,
    *,
    metrics: Metrics,
    api_keys: Sequence[str] = (),
    max_body_bytes: int = DEFAULT_MAX_BODY_BYTES,
    version: str = "0.0.0",
    new_id: Callable[[], str] = lambda: uuid.uuid4().hex,
    now_s: Callable[[], float] = time.time,
) -> FastAPI:
    """The ASGI application. Without `api_keys` everybody is let in; otherwise /v1 wants one of them.

    The HTTP layer counts rejections and `n` in `metrics`; the frontend counts everything else.
    """
    api = _Api(frontend, metrics=metrics, max_body_bytes=max_body_bytes, version=version, now_s=now_s)
    app = FastAPI(title="supernode", version=version, openapi_url=None)
    routes: list[tuple[str, str, Callable[..., object]]] = [
        ("POST", "/v1/completions", api.completions),
        ("POST", "/v1/chat/completions", api.chat_completions),
        ("GET", "/v1/models", api.models),
        ("GET", "/v1/models/{model_name:path}", api.model),
        ("POST", "/tokenize", api.tokenize),
        ("POST", "/detokenize", api.detokenize),
        ("GET", "/health", api.health),
        ("GET", "/ping", api.health),
        ("POST", "/ping", api.health),
        ("GET", "/version", api.show_version),
        ("GET", "/metrics", api.show_metrics),
    ]
    for method, path, endpoint in routes:
        app.add_api_route(path, endpoint, methods=[method], response_model=None)
    add_error_handlers(app, metrics)
    app.add_middleware(Guard, api_keys=api_keys, metrics=metrics, new_id=new_id)
    return app


class _Api:
    """The routes' functions and what they share."""

    def __init__(
        self,
        frontend: Frontend,
        *,
        metrics: Metrics,
        max_body_bytes: int,
        version: str,
        now_s: Callable[[], float],
    ) -> None:
        self._frontend = frontend
        self._metrics = metrics
        self._max_body_bytes = max_body_bytes
        self._version = version
        self._now_s = now_s
        self._created_s = int(now_s())
        self._sequence = itertools.count()
        tokenizer = frontend.tokenizer
        # No text of more bytes than this per token of context can fit; it is refused without being encoded.
        self._max_token_bytes = max(
            len(tokenizer.token_bytes(token_id))
            for token_id in range(tokenizer.vocab_size)
            if not tokenizer.is_hidden(token_id)
        )

    async def completions(self, request: Request) -> Response:
        body = await self._read(request, CompletionBody)
        prompts = [self._encode(prompt, add_bos=body.add_special_tokens is not False) for prompt in body.prompt]
        return await self._generate(request, body, prompts)

    async def chat_completions(self, request: Request) -> Response:
        body = await self._read(request, ChatBody)
        prompt = self._encode_chat(body.messages, add_generation_prompt=body.add_generation_prompt is not False)
        return await self._generate(request, body, [prompt])

    async def _generate(self, request: Request, body: GenerationBody, prompts: Sequence[tuple[int, ...]]) -> Response:
        is_chat = isinstance(body, ChatBody)
        if body.request_id is not None and "x-request-id" not in request.headers:
            request.state.request_id = body.request_id
        response_id = f"{'chatcmpl' if is_chat else 'cmpl'}-{request.state.request_id}"
        options = body.stream_options
        output = OutputFormat(
            "chat" if is_chat else "completion",
            response_id=response_id,
            model_name=self._frontend.model_name,
            created_s=int(self._now_s()),
            tokenizer=self._frontend.tokenizer,
            num_choices_per_prompt=body.num_choices,
            returns_token_ids=body.return_token_ids or False,
            include_usage=options is not None and (options.include_usage or False),
            continuous_usage=options is not None and (options.continuous_usage_stats or False),
        )
        choice_set = ChoiceSet(self._frontend, self._requests(body, prompts, response_id))
        self._metrics.observe_num_choices(body.num_choices)
        if body.stream:
            return EventStream(choice_set, output)
        async with choice_set:
            wholes = await until_disconnect(request.receive, choice_set.collect())
        return JSONResponse(output.body(wholes))

    def _requests(
        self, body: GenerationBody, prompts: Sequence[tuple[int, ...]], response_id: str
    ) -> list[GenerateRequest]:
        """One request per choice: prompt by prompt, `n` for each. Raises InvalidRequest before any is submitted."""
        num_choices = len(prompts) * body.num_choices
        if num_choices > MAX_CHOICES:
            raise InvalidRequest(
                f"prompt: {len(prompts)} prompts with n {body.num_choices} are {num_choices} choices, "
                f"must be at most {MAX_CHOICES}",
                param="prompt",
            )
        frontend = self._frontend
        requests: list[GenerateRequest] = []
        for prompt in prompts:
            room = max(1, frontend.max_model_len - len(prompt))
            default = room if isinstance(body, ChatBody) else min(DEFAULT_COMPLETION_TOKENS, room)
            max_tokens = default if body.asked_tokens is None else body.asked_tokens
            for choice_index in range(body.num_choices):
                request = GenerateRequest(
                    # Clients may repeat an id; the sequence number keeps ours apart.
                    request_id=f"{response_id}-{len(requests)}-{next(self._sequence)}",
                    prompt_token_ids=prompt,
                    sampling=body.sampling(max_tokens=max_tokens, choice_index=choice_index),
                    priority=body.priority or 0,
                    cache_salt=body.cache_salt,
                )
                if choice_index == 0:
                    request.check_fits(max_model_len=frontend.max_model_len, vocab_size=frontend.vocab_size)
                requests.append(request)
        return requests

    async def models(self) -> Response:
        return JSONResponse({"object": "list", "data": [self._model_card()]})

    async def model(self, model_name: str) -> Response:
        self._check_model(model_name)
        return JSONResponse(self._model_card())

    def _model_card(self) -> Json:
        name = self._frontend.model_name
        return {
            "id": name,
            "object": "model",
            "created": self._created_s,
            "owned_by": "supernode",
            "root": name,
            "parent": None,
            "max_model_len": self._frontend.max_model_len,
            "permission": [],
        }

    async def tokenize(self, request: Request) -> Response:
        body = await self._read(request, TokenizeBody)
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequest("prompt: exactly one of prompt and messages must be given", param="prompt")
        if body.messages is not None:
            token_ids = self._encode_chat(body.messages, add_generation_prompt=body.add_generation_prompt is not False)
        else:
            token_ids = self._encode(body.prompt or "", add_bos=body.add_special_tokens is not False)
        tokenizer, token_strs = self._frontend.tokenizer, None
        if body.return_token_strs:
            token_strs = [tokenizer.token_bytes(token_id).decode(errors="replace") for token_id in token_ids]
        return JSONResponse(
            {
                "count": len(token_ids),
                "max_model_len": self._frontend.max_model_len,
                "tokens": list(token_ids),
                "token_strs": token_strs,
            }
        )

    async def detokenize(self, request: Request) -> Response:
        body = await self._read(request, DetokenizeBody)
        tokenizer = self._frontend.tokenizer
        check_token_ids("tokens", body.tokens, vocab_size=tokenizer.vocab_size)
        return JSONResponse({"prompt": tokenizer.decode(body.tokens, skip_special_tokens=False)})

    async def health(self) -> Response:
        return Response(status_code=200 if self._frontend.health() else 503)

    async def show_version(self) -> Response:
        return JSONResponse({"version": self._version})

    async def show_metrics(self) -> Response:
        return Response(self._metrics.render(), headers={"content-type": CONTENT_TYPE})

    async def _read(self, request: Request, body_type: type[BodyT]) -> BodyT:
        body = parse(body_type, await read_body(request, max_body_bytes=self._max_body_bytes))
        if body.model is not None:
            self._check_model(body.model)
        return body

    def _check_model(self, name: str) -> None:
        if name != self._frontend.model_name:
            raise ModelNotFound(
                f"model: got {shown(name)}, this server has {self._frontend.model_name!r}", param="model"
            )

    def _encode(self, prompt: Prompt, *, add_bos: bool) -> tuple[int, ...]:
        if isinstance(prompt, tuple):
            return prompt
        self._check_text("prompt", prompt)
        return tuple(self._frontend.tokenizer.encode(prompt, add_bos=add_bos))

    def _encode_chat(self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool) -> tuple[int, ...]:
        self._check_text("messages", "".join(message.content for message in messages))
        turns = [
            Message(role="system" if message.role == "developer" else message.role, content=message.content)
            for message in messages
        ]
        tokenizer = self._frontend.tokenizer
        try:
            return tuple(tokenizer.encode_chat(turns, add_generation_prompt=add_generation_prompt))
        except (ChatError, TokenizerError) as error:
            raise InvalidRequest(str(error), param="messages") from error

    def _check_text(self, field: str, text: str) -> None:
        limit = self._frontend.max_model_len * self._max_token_bytes
        if len(text) > limit:
            raise PromptTooLong(
                f"{field}: {len(text)} characters cannot fit in max_model_len {self._frontend.max_model_len}",
                param=field,
            )
