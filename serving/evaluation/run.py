"""An evaluation from its questions to its result: of an endpoint that runs already, or of one booted for it.

Owns: which of the two, and what is said about the model that was evaluated.
Must not know: how questions are sent, tables.
"""

import dataclasses
import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from model.checkpoint_check import WeightsError, read_headers
from model.config import ModelConfigError
from model.quantization_config import QUANT_METHOD, read_config
from serving.bench_client import EndpointNotReady
from serving.client_process import run_in_process, run_until_interrupt
from serving.config import RunConfig
from serving.errors import ConfigError
from serving.evaluation.client import Asked, AskSettings, ask
from serving.evaluation.questions import Question
from serving.evaluation.result import EvaluationResult
from serving.system import System

_DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def evaluate_endpoint(
    settings: AskSettings, questions: Sequence[Question], *, subject: Mapping[str, str] | None = None
) -> EvaluationResult:
    """Ask an endpoint that runs. Raises ConfigError if it cannot be reached, or is none."""
    try:
        asked = run_until_interrupt(functools.partial(ask, settings, questions))
    except EndpointNotReady as error:
        raise ConfigError(f"--base-url: {error}") from None
    return _result(asked, settings, {"endpoint": settings.base_url, **(subject or {})})


def evaluate_config(
    config: RunConfig, settings: AskSettings, questions: Sequence[Question], *, address: str | None
) -> EvaluationResult:
    """Boot a system, ask it from a process of its own, shut down; `base_url` and `model` of `settings` are set here."""
    from serving.live import LiveRun  # Ray

    live = LiveRun(config.with_port(0), shards="torch", address=address)
    asked: Asked | None = None
    with live:

        async def ask_all(system: System) -> None:
            print(f"serving on {live.url}", file=sys.stderr, flush=True)
            nonlocal asked
            here = dataclasses.replace(
                settings, base_url=live.url, model=config.model.served_model_name, api_key=config.server.api_key
            )
            asked = await run_in_process(functools.partial(ask, here, questions))

        live.serve(ask_all)
    if asked is None:  # interrupted before it began
        raise KeyboardInterrupt
    return dataclasses.replace(_result(asked, settings, describe(config)), held_at_rest=live.held)


def describe(config: RunConfig) -> dict[str, str]:
    """What a configuration serves: checkpoint, number format, drafts."""
    section = config.model
    is_random = section.checkpoint == "random"
    drafts = config.speculative.num_speculative_tokens
    return {
        "checkpoint": f"random, seed {config.seed}" if is_random else Path(section.checkpoint).resolve().name,
        "quantization": "none (float32)" if is_random else _number_format(section.checkpoint),
        "dispatch": section.dispatch_dtype,
        "MTP drafts": f"{drafts} per step" if drafts else "off",
    }


def _number_format(directory: str) -> str:
    """How a checkpoint is quantized, or the dtype of its floats."""
    try:
        _, quantization = read_config(directory)
        if quantization is not None:
            return QUANT_METHOD
        dtype = read_headers(directory)["model.embed_tokens.weight"].dtype
    except (ModelConfigError, WeightsError, KeyError):  # it may be elsewhere: the endpoint's own, behind --base-url
        return "unknown"
    return f"none ({_DTYPE_NAMES.get(dtype, dtype)})"


def _result(asked: Asked, settings: AskSettings, subject: Mapping[str, str]) -> EvaluationResult:
    return EvaluationResult(
        subject={"model": asked.model, **subject},
        settings={"temperature": settings.temperature, "max_tokens": settings.max_tokens},
        answers=asked.answers,
        is_interrupted=asked.is_interrupted,
        num_not_asked=asked.num_not_asked,
    )
