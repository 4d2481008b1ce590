"""Arrival processes: when each request of a workload reaches the system.

Owns: gaps and arrival times as float64 arrays in seconds, drawn from a generator that the caller passes in;
the rule by which one seed is split into independent, named random streams.
Must not know: requests, prompts, HTTP, clocks.
Source: burstiness is the shape of a gamma distribution of gaps, as in `vllm bench serve`. Unlike vLLM the
times are not stretched to end exactly at count / rate: the process is the one that its name says.
"""

import math
import zlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from serving.errors import ConfigError

ArrivalKind = Literal["poisson", "gamma", "constant", "inf"]
ARRIVAL_KINDS: tuple[ArrivalKind, ...] = ("poisson", "gamma", "constant", "inf")
RampUpStrategy = Literal["linear", "exponential"]
RAMP_UP_STRATEGIES: tuple[RampUpStrategy, ...] = ("linear", "exponential")


def generator_for(seed: int, name: str) -> np.random.Generator:
    """A random stream that depends on `seed` and `name` only, so drawing from one never shifts another."""
    if seed < 0:
        raise ConfigError(f"seed: {seed} is below the limit 0")
    return np.random.default_rng(np.random.SeedSequence([seed, zlib.crc32(name.encode())]))


def poisson(rng: np.random.Generator, count: int, *, rate_per_s: float) -> NDArray[np.float64]:
    """Arrival times of a Poisson process, seconds from the start: exponential gaps with mean 1 / rate."""
    return np.cumsum(rng.exponential(1.0 / _positive("rate_per_s", rate_per_s), _count(count)))


def gamma(rng: np.random.Generator, count: int, *, rate_per_s: float, burstiness: float) -> NDArray[np.float64]:
    """Arrival times with gamma gaps of mean 1 / rate and coefficient of variation 1 / sqrt(burstiness).

    burstiness 1 is a Poisson process, below 1 comes in bursts, above 1 is more regular.
    """
    _positive("burstiness", burstiness)
    scale = 1.0 / (_positive("rate_per_s", rate_per_s) * burstiness)
    return np.cumsum(rng.gamma(burstiness, scale, _count(count)))


def constant(count: int, *, rate_per_s: float) -> NDArray[np.float64]:
    """One arrival every 1 / rate seconds, the first after one gap, like the other processes."""
    return np.arange(1, _count(count) + 1, dtype=np.float64) / _positive("rate_per_s", rate_per_s)


def all_at_once(count: int) -> NDArray[np.float64]:
    """Everything at time 0 (an infinite rate)."""
    return np.zeros(_count(count), dtype=np.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class RampUp:
    """A rate that moves from `start_rps` to `end_rps` over the requests, in requests per second."""

    strategy: RampUpStrategy
    start_rps: float
    end_rps: float

    def __post_init__(self) -> None:
        if self.strategy not in RAMP_UP_STRATEGIES:
            raise ConfigError(f"ramp_up.strategy: {self.strategy!r} is not one of {list(RAMP_UP_STRATEGIES)}")
        _positive("ramp_up.start_rps", self.start_rps)
        _positive("ramp_up.end_rps", self.end_rps)

    def rates_per_s(self, count: int) -> NDArray[np.float64]:
        """The rate in force at each request; request i is i / (count - 1) of the way, as in vLLM."""
        progress = np.arange(_count(count), dtype=np.float64) / max(count - 1, 1)
        if self.strategy == "linear":
            return self.start_rps + (self.end_rps - self.start_rps) * progress
        return np.asarray(self.start_rps * (self.end_rps / self.start_rps) ** progress, dtype=np.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrivals:
    """An open-loop arrival process, by name. With `ramp_up`, `rate_per_s` is not used."""

    kind: ArrivalKind = "poisson"
    rate_per_s: float = 1.0
    burstiness: float = 1.0
    ramp_up: RampUp | None = None

    def __post_init__(self) -> None:
        if self.kind not in ARRIVAL_KINDS:
            raise ConfigError(f"arrivals.kind: {self.kind!r} is not one of {list(ARRIVAL_KINDS)}")
        if self.kind == "inf" and self.ramp_up is not None:
            raise ConfigError("arrivals.kind: 'inf' sends everything at once and cannot have a ramp_up")
        _positive("arrivals.rate_per_s", self.rate_per_s)
        _positive("arrivals.burstiness", self.burstiness)

    @classmethod
    def from_request_rate(
        cls, request_rate: float, *, burstiness: float = 1.0, ramp_up: RampUp | None = None
    ) -> "Arrivals":
        """vLLM's spelling: rate `inf` is everything at once, burstiness `inf` is a constant gap."""
        if math.isnan(request_rate) or request_rate <= 0:
            raise ConfigError(f"request_rate: {request_rate} must be above the limit 0 (inf: all at once)")
        if math.isnan(burstiness) or burstiness <= 0:
            raise ConfigError(f"burstiness: {burstiness} must be above the limit 0 (1 is Poisson)")
        if math.isinf(request_rate) and ramp_up is None:
            return cls(kind="inf")
        rate = 1.0 if math.isinf(request_rate) else request_rate
        if math.isinf(burstiness):
            return cls(kind="constant", rate_per_s=rate, ramp_up=ramp_up)
        kind: ArrivalKind = "poisson" if burstiness == 1.0 else "gamma"
        return cls(kind=kind, rate_per_s=rate, burstiness=burstiness, ramp_up=ramp_up)

    def times_s(self, rng: np.random.Generator, count: int) -> NDArray[np.float64]:
        """`count` arrival times in seconds from the start, not decreasing."""
        if self.kind == "inf":
            return all_at_once(count)
        if self.ramp_up is not None:
            # Gaps of a process of rate 1, each divided by the rate in force at its request.
            unit = self._with_rate(rng, count, 1.0)
            return np.cumsum(np.diff(unit, prepend=0.0) / self.ramp_up.rates_per_s(count))
        return self._with_rate(rng, count, self.rate_per_s)

    def _with_rate(self, rng: np.random.Generator, count: int, rate_per_s: float) -> NDArray[np.float64]:
        if self.kind == "poisson":
            return poisson(rng, count, rate_per_s=rate_per_s)
        if self.kind == "gamma":
            return gamma(rng, count, rate_per_s=rate_per_s, burstiness=self.burstiness)
        return constant(count, rate_per_s=rate_per_s)


def _positive(name: str, value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{name}: {value} must be finite and above the limit 0")
    return value


def _count(count: int) -> int:
    if count < 0:
        raise ConfigError(f"count: {count} is below the limit 0")
    return count
