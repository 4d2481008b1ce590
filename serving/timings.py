"""Latencies of finished requests as arrays, and the formulas that make figures of them.

Owns: distributions, objectives and peaks, alike for requests that were recorded one by one and for the columns of a
simulated run; vectorized for a million requests.
Must not know: records, columns, HTTP, how figures are shown, any clock.
Source: definitions of `vllm bench serve`: tpot = (e2el - ttft) / (tokens - 1), absent for one token and then 0 for
goodput; itl = gaps between chunks; percentiles interpolate linearly; peaks over one-second buckets and over half-open
intervals [start, end).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from serving.records import Goodput

Metric = Literal["ttft", "tpot", "itl", "e2el", "queue"]
METRICS: tuple[Metric, ...] = ("ttft", "tpot", "itl", "e2el", "queue")

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """Of one metric, in milliseconds; `percentiles` maps p in [0, 100] to its value."""

    count: int
    mean_ms: float
    median_ms: float
    std_ms: float
    percentiles: Mapping[float, float]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenTimes:
    """So many tokens came at so many seconds after the first request started; shape (C,) each."""

    seconds: Floats
    num_tokens: Floats


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Timings:
    """N finished requests that one clock has timed, in nanoseconds; shape (N,), but for the gaps.

    What is not known is empty: `start_ns`, of which any origin will do, and `queue_ns` of some or all requests.
    """

    num_tokens: Floats
    ttft_ns: Floats
    e2el_ns: Floats
    tpot_ns: Floats  # NaN where a request has none, because it has one token
    queue_ns: Floats
    start_ns: Floats
    gaps_ns: Floats
    gap_counts: Floats | None = None  # how often each gap occurred; None: once

    @property
    def count(self) -> int:
        return self.ttft_ns.size

    def token_times(self) -> TokenTimes | None:
        """When tokens came; None where that was not kept."""
        return None

    def distributions(self, percentiles: Sequence[float]) -> dict[Metric, Distribution]:
        """Of every metric that was measured."""
        tpot_ns = self.tpot_ns[~np.isnan(self.tpot_ns)]
        columns: tuple[tuple[Metric, Floats, Floats | None], ...] = (
            ("ttft", self.ttft_ns, None),
            ("tpot", tpot_ns, None),
            ("itl", self.gaps_ns, self.gap_counts),
            ("e2el", self.e2el_ns, None),
            ("queue", self.queue_ns, None),
        )
        return {
            name: distribution(values / 1e6, counts, percentiles) for name, values, counts in columns if values.size
        }

    def num_good(self, goodput: Goodput) -> int:
        """Requests that meet all objectives that are set."""
        good = np.ones(self.count, dtype=bool)
        columns = (
            (goodput.ttft_ms, self.ttft_ns),
            (goodput.tpot_ms, self.tpot_ns),
            (goodput.e2el_ms, self.e2el_ns),
        )
        for limit_ms, values in columns:
            if limit_ms is not None:
                good &= np.nan_to_num(values) <= limit_ms * 1e6
        return int(good.sum())

    def attainment(self, goodput: Goodput | None) -> float | None:
        """Share of the requests that meet them; None for no objectives, or no request."""
        return self.num_good(goodput) / self.count if goodput and self.count else None

    def peak_concurrency(self) -> int:
        """Most requests at one time; 0 where starts are not known."""
        if not self.start_ns.size:
            return 0
        starts, ends = np.sort(self.start_ns), np.sort(self.start_ns + self.e2el_ns)
        # It peaks when one starts. At equal times a departure comes first.
        gone = np.searchsorted(ends, starts, side="right")
        here = np.searchsorted(starts, starts, side="right")
        return int((here - gone).max())

    def peak_tokens_per_s(self) -> float:
        """Most output tokens in any second since the first request was sent.

        A request's tokens are spread evenly in time where it is not known when they came.
        """
        if not self.start_ns.size:
            return 0.0
        times = self.token_times()
        if times is None:
            return self._peak_of_even_tokens()
        return float(np.bincount(times.seconds.astype(np.int64), times.num_tokens).max(initial=0.0))

    def _peak_of_even_tokens(self) -> float:
        first, last = (self.start_ns + self.ttft_ns) / 1e9, (self.start_ns + self.e2el_ns) / 1e9
        num_seconds = int(last.max()) + 2
        at_once = last <= first
        at_first = np.where(at_once, self.num_tokens, np.minimum(self.num_tokens, 1))
        rate = np.where(at_once, 0.0, (self.num_tokens - at_first) / np.where(at_once, 1.0, last - first))
        # Tokens so far are a sum of ramps that start at `first` and stop at `last`. At second k a ramp that began
        # at t has made rate * (k - t), so running sums of rate and of rate * t over seconds give all of them.
        begin = np.concatenate([first, last])
        slope = np.concatenate([rate, -rate])
        bucket = np.ceil(begin).astype(np.int64)
        slopes = np.cumsum(np.bincount(bucket, slope, num_seconds + 1))
        offsets = np.cumsum(np.bincount(bucket, slope * begin, num_seconds + 1))
        so_far = slopes * np.arange(num_seconds + 1) - offsets
        return float((np.diff(so_far) + np.bincount(first.astype(np.int64), at_first, num_seconds)).max())


def tpot_of(*, num_tokens: NDArray[Any], first_ns: NDArray[Any], last_ns: NDArray[Any]) -> Floats:
    """Nanoseconds per output token behind the first, (N,); NaN for one token.

    `first_ns` and `last_ns` are when the first and the last token came, since any instant, the same for both.
    """
    return np.where(num_tokens > 1, (last_ns - first_ns) / np.maximum(num_tokens - 1, 1), np.nan)


def distribution(values: Floats, counts: Floats | None, percentiles: Sequence[float]) -> Distribution:
    """Of `values` (N > 0,), each occurring `counts` times (once if None), exactly as if they were written out."""
    if counts is None:
        values = np.sort(values)
        upto, total = None, float(values.size)
        mean, variance = float(values.sum()) / total, float(((values - values.mean()) ** 2).sum()) / total
    else:
        order = np.argsort(values, kind="stable")
        values, counts = values[order], counts[order]
        upto = np.cumsum(counts)
        total = float(upto[-1])
        mean = float(values @ counts / total)
        variance = float((values - mean) ** 2 @ counts / total)
    at = _quantiles(values, upto, np.array([50.0, *percentiles]) / 100).tolist()
    return Distribution(
        count=int(total),
        mean_ms=mean,
        median_ms=at[0],
        std_ms=math.sqrt(variance),
        percentiles={float(p): value for p, value in zip(percentiles, at[1:], strict=True)},
    )


def weighted_quantiles(values: ArrayLike, weights: ArrayLike, shares: ArrayLike) -> Floats:
    """At `shares` in [0, 1] of `values` (N > 0,) that occur `weights` times each, exactly as if they were written out.

    Interpolated linearly; of the shape of `shares`.
    """
    ordered, counts = np.asarray(values, np.float64), np.asarray(weights, np.float64)
    order = np.argsort(ordered, kind="stable")
    return _quantiles(ordered[order], np.cumsum(counts[order]), np.asarray(shares, np.float64))


def _quantiles(values: Floats, upto: Floats | None, shares: Floats) -> Floats:
    """Of ascending values, of which `upto` occurrences are known up to each; None: each occurs once."""

    def at(ranks: Floats) -> Floats:
        return values[ranks.astype(np.int64) if upto is None else np.searchsorted(upto, ranks, side="right")]

    ranks = shares * ((values.size if upto is None else float(upto[-1])) - 1)
    below, above = at(np.floor(ranks)), at(np.ceil(ranks))
    return below + (above - below) * (ranks - np.floor(ranks))
