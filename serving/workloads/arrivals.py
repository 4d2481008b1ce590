"""Arrival processes: when each request of a workload reaches the system.

Owns: gaps and arrival times as float64 arrays in seconds, drawn from a generator that the caller passes in;
the rule by which one seed is split into independent, named random streams.
Must not know: requests, prompts, HTTP, clocks.
Source: burstiness is the shape of a gamma distribution of gaps, as in `vllm bench serve`; Weibull gaps of production
traces: ServeGen (arXiv:2505.09999). Unlike vLLM the times are not stretched to end exactly at count / rate: the process
is the one that its name says.
"""

import math
import zlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from serving.errors import ConfigError

ArrivalKind = Literal["poisson", "gamma", "weibull", "constant", "inf"]
ARRIVAL_KINDS: tuple[ArrivalKind, ...] = ("poisson", "gamma", "weibull", "constant", "inf")
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


def weibull(rng: np.random.Generator, count: int, *, rate_per_s: float, burstiness: float) -> NDArray[np.float64]:
    """Arrival times with Weibull gaps of the same mean and coefficient of variation as `gamma` has.

    Below burstiness 1 its longest gaps are more extreme than gamma's, its shortest less.
    """
    _positive("rate_per_s", rate_per_s)
    shape = _weibull_shape(_positive("burstiness", burstiness))
    return np.cumsum(rng.weibull(shape, _count(count))) / (rate_per_s * math.gamma(1 + 1 / shape))


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

    @property
    def mean_gap_s(self) -> float:
        """Seconds per request, over all of the ramp."""
        start, end = self.start_rps, self.end_rps
        if start == end:
            return 1 / start
        doublings = math.log(end / start)
        return doublings / (end - start) if self.strategy == "linear" else (1 / start - 1 / end) / doublings


@dataclass(frozen=True, slots=True, kw_only=True)
class Bursts:
    """Every `period_s` ends with `duration_s` in which the rate is `factor` times what it is otherwise."""

    factor: float
    period_s: float
    duration_s: float

    def __post_init__(self) -> None:
        _positive("bursts.factor", self.factor)
        _positive("bursts.period_s", self.period_s)
        if _positive("bursts.duration_s", self.duration_s) > self.period_s:
            raise ConfigError(f"bursts.duration_s: {self.duration_s} exceeds period_s {self.period_s}")

    def expected_count(self, rate_per_s: float, duration_s: float) -> float:
        """Arrivals in the first `duration_s`, on average."""
        periods, rest_s = divmod(duration_s, self.period_s)
        quiet_s = self.period_s - self.duration_s
        extra_s = periods * self.duration_s + max(rest_s - quiet_s, 0.0)
        return rate_per_s * (duration_s + (self.factor - 1) * extra_s)

    def times_s(self, counts: NDArray[np.float64], rate_per_s: float) -> NDArray[np.float64]:
        """When so many arrivals are expected: the inverse of `expected_count`. Turns times of rate 1 into ours."""
        quiet_s = self.period_s - self.duration_s
        periods, rest = np.divmod(counts / rate_per_s, quiet_s + self.factor * self.duration_s)
        return periods * self.period_s + np.minimum(rest, quiet_s) + np.maximum(rest - quiet_s, 0.0) / self.factor


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrivals:
    """An open-loop arrival process, by name. With `ramp_up`, `rate_per_s` is not used; with `bursts` it is the rate
    between them.
    """

    kind: ArrivalKind = "poisson"
    rate_per_s: float = 1.0
    burstiness: float = 1.0  # of gamma and weibull: 1 / square of the gaps' coefficient of variation
    ramp_up: RampUp | None = None
    bursts: Bursts | None = None

    def __post_init__(self) -> None:
        if self.kind not in ARRIVAL_KINDS:
            raise ConfigError(f"arrivals.kind: {self.kind!r} is not one of {list(ARRIVAL_KINDS)}")
        if self.kind == "inf" and self.ramp_up is not None:
            raise ConfigError("arrivals.kind: 'inf' sends everything at once and cannot have a ramp_up")
        if self.bursts is not None and (self.kind == "inf" or self.ramp_up is not None):
            raise ConfigError("arrivals.bursts: needs a finite rate and no ramp_up")
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
        if self.bursts is not None:
            return self.bursts.times_s(self._with_rate(rng, count, 1.0), self.rate_per_s)
        return self._with_rate(rng, count, self.rate_per_s)

    def expected_count(self, duration_s: float) -> float:
        """Arrivals in the first `duration_s`, on average; a ramp takes as many requests as make it last so long."""
        if self.kind == "inf":
            raise ConfigError("duration_s: everything arrives at once; needs a finite request rate")
        if self.ramp_up is not None:
            return _positive("duration_s", duration_s) / self.ramp_up.mean_gap_s
        if self.bursts is not None:
            return self.bursts.expected_count(self.rate_per_s, _positive("duration_s", duration_s))
        return self.rate_per_s * _positive("duration_s", duration_s)

    def times_before_s(self, rng: np.random.Generator, duration_s: float) -> NDArray[np.float64]:
        """Arrival times in [0, duration_s), as many as there are."""
        expected = self.expected_count(duration_s)
        # Ten standard deviations more, so that none is missing; a ramp is as long as it is.
        spare = 0.0 if self.ramp_up is not None else 100 + 10 * math.sqrt(expected / min(self.burstiness, 1.0))
        times = self.times_s(rng, math.ceil(expected + spare))
        return times[: int(np.searchsorted(times, duration_s))]

    def _with_rate(self, rng: np.random.Generator, count: int, rate_per_s: float) -> NDArray[np.float64]:
        if self.kind == "poisson":
            return poisson(rng, count, rate_per_s=rate_per_s)
        if self.kind == "gamma":
            return gamma(rng, count, rate_per_s=rate_per_s, burstiness=self.burstiness)
        if self.kind == "weibull":
            return weibull(rng, count, rate_per_s=rate_per_s, burstiness=self.burstiness)
        return constant(count, rate_per_s=rate_per_s)


def _weibull_shape(burstiness: float) -> float:
    """The shape whose gaps have the coefficient of variation 1 / sqrt(burstiness), which falls as the shape rises."""
    low, high = 0.05, 1000.0  # a variation of 4e8, and of 0.0013
    for _ in range(80):
        middle = math.sqrt(low * high)
        variance = math.exp(math.lgamma(1 + 2 / middle) - 2 * math.lgamma(1 + 1 / middle)) - 1
        low, high = (middle, high) if variance > 1 / burstiness else (low, middle)
    return high


def _positive(name: str, value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{name}: {value} must be finite and above the limit 0")
    return value


def _count(count: int) -> int:
    if count < 0:
        raise ConfigError(f"count: {count} is below the limit 0")
    return count
