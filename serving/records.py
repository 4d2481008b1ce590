"""One record per request: how it ended and how long it took, by the wall clock, in simulated time, or both.

Owns: `RequestRecord`, its outcome and its latencies; the goodput objectives that a record is held against.
Must not know: HTTP, how a record came about, the figures made of many (serving/summary.py), any clock.
Source: outcomes of docs/architecture.md; `--goodput` of `vllm bench serve`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from numpy.typing import ArrayLike

from serving.errors import ConfigError, shown

Outcome = Literal["finished", "rejected", "aborted", "failed"]
OUTCOMES: tuple[Outcome, ...] = ("finished", "rejected", "aborted", "failed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """One request's latencies by one clock, in nanoseconds.

    `start_ns` is the instant it was sent (wall) or arrived (simulated), from any fixed origin; None when only
    durations are known. `tpot_ns` None means: derive it from the others. `itl_ns` are the gaps between
    chunks; None when they were not kept. `queue_ns` is the wait for the client to send it (wall), or in the
    server's queue (simulated).
    """

    ttft_ns: float
    e2el_ns: float
    start_ns: int | None = None
    tpot_ns: float | None = None
    itl_ns: ArrayLike | None = None
    queue_ns: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """How one request ended. `wall` and `simulated` are set as far as known, at least one if it finished.

    `reason` is short and common to many requests ("length", "HTTP 429"), `error` is the whole message.
    Where the server reports no usage, `has_usage` is False and `num_output_tokens` is the number of chunks.
    `num_cached_tokens` is None when not reported.
    """

    request_id: str
    outcome: Outcome
    reason: str
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int | None = None
    has_usage: bool = True
    wall: Timing | None = None
    simulated: Timing | None = None
    error: str | None = None
    text: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Goodput:
    """Objectives in milliseconds; a finished request is good when it meets all that are set."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2el_ms: float | None = None


def parse_goodput(pairs: Sequence[str]) -> Goodput | None:
    """Objectives from strings such as "ttft:200", "tpot:50 e2el:3000" (milliseconds); None for none."""
    limits: dict[str, float] = {}
    for pair in " ".join(pairs).replace(",", " ").split():
        name, separator, text = pair.partition(":")
        if name not in ("ttft", "tpot", "e2el") or not separator:
            raise ConfigError(f"goodput: {shown(pair)} is not NAME:MILLISECONDS, NAME ttft, tpot or e2el")
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value >= 0):
            raise ConfigError(f"goodput: {name}: {shown(text)} is not a number of milliseconds, at least 0")
        if f"{name}_ms" in limits:
            raise ConfigError(f"goodput: {name}: given twice")
        limits[f"{name}_ms"] = value
    return Goodput(**limits) if limits else None
