"""An evaluation from its questions to its result: of an endpoint that runs already, or of one booted for it.

Owns: which of the two, and what is said about the model that was evaluated.
Must not know: how questions are sent, tables.
"""

import dataclasses
import functools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from serving.bench_client import EndpointNotReady
from serving.client_process import run_in_process, run_until_interrupt
from serving.config import RunConfig
from serving.errors import ConfigError
from serving.evaluation.client import Asked, AskSettings, ask
from serving.evaluation.questions import Question
from serving.evaluation.result import EvaluationResult
from serving.system import System


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
    drafts = getattr(getattr(config, "speculative", None), "num_speculative_tokens", 0)
    return {
        "checkpoint": f"random, seed {config.seed}" if section.checkpoint == "random" else section.checkpoint,
        "quantization": _quantization(config),
        "dispatch": section.dispatch_dtype,
        "MTP drafts": f"{drafts} per step" if drafts else "off",
    }


def _quantization(config: RunConfig) -> str:
    """What config.json of the checkpoint says of its numbers."""
    if config.model.checkpoint == "random":
        return "none (float32)"
    try:
        told: dict[str, Any] = json.loads((Path(config.model.checkpoint) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "unknown"
    quantization = told.get("quantization_config")
    if isinstance(quantization, dict):
        return str(quantization.get("quant_method", "yes"))
    return f"none ({told.get('torch_dtype', 'float32')})"


def _result(asked: Asked, settings: AskSettings, subject: Mapping[str, str]) -> EvaluationResult:
    return EvaluationResult(
        subject={"model": asked.model, **subject},
        settings={"temperature": settings.temperature, "max_tokens": settings.max_tokens},
        answers=asked.answers,
        is_interrupted=asked.is_interrupted,
        num_not_asked=asked.num_not_asked,
    )
