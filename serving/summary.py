"""The figures of a run, made of one record per request.

Owns: `summarize`, used alike by the load generator (wall time over HTTP, beside the simulated times that the
server reported) and by the simulator (virtual time only), and vectorized for a million records.
Must not know: HTTP, how a record came about, how figures are shown (serving/report.py), any clock.
Source: definitions of `vllm bench serve`: ttft and e2el from sending; tpot = (e2el - ttft) / (tokens - 1),
absent for one token and then 0 for goodput; itl = gaps between chunks; percentiles interpolate linearly; only
finished requests count; peaks over one-second buckets and over half-open intervals [start, end).
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from serving.records import OUTCOMES, Goodput, Outcome, RequestRecord, Timing

Metric = Literal["ttft", "tpot", "itl", "e2el", "queue"]
METRICS: tuple[Metric, ...] = ("ttft", "tpot", "itl", "e2el", "queue")
ClockName = Literal["wall", "simulated"]

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedGaps:
    """Gaps between chunks with how often each occurred, for runs too large to keep one array per request."""

    values_ns: ArrayLike
    counts: ArrayLike


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """Of one metric, in milliseconds; `percentiles` maps p in [0, 100] to its value."""

    count: int
    mean_ms: float
    median_ms: float
    std_ms: float
    percentiles: Mapping[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The figures of a run. The rates and peaks are by `clock`: wall if any request was timed by it."""

    clock: ClockName
    duration_s: float
    completed: int
    failed: int  # rejected or failed; what the client itself cancelled is neither
    outcomes: Mapping[Outcome, int]
    reasons: Mapping[str, int]  # "rejected: HTTP 429" -> count, finished ones left out
    total_input_tokens: int
    total_output_tokens: int
    num_without_usage: int
    num_cached_tokens: int | None
    cache_hit_rate: float | None
    request_throughput: float
    output_throughput: float
    total_token_throughput: float
    max_output_tokens_per_s: float
    max_concurrent_requests: int
    goodput: Goodput | None
    request_goodput: float | None
    slo_attainment: Mapping[ClockName, float | None]  # share of the finished requests that are good
    wall: Mapping[Metric, Distribution]  # a metric that nobody measured is absent
    simulated: Mapping[Metric, Distribution]


def summarize(
    records: Sequence[RequestRecord],
    *,
    duration_s: float,
    percentiles: Sequence[float] = (50.0, 90.0, 99.0),
    goodput: Goodput | None = None,
    simulated_gaps: WeightedGaps | None = None,
) -> Summary:
    """Figures of a run of `duration_s`. `simulated_gaps` replaces the records' own simulated gaps."""
    finished = [record for record in records if record.outcome == "finished"]
    wall = _Columns(finished, [record.wall for record in finished])
    simulated = _Columns(finished, [record.simulated for record in finished], gaps=simulated_gaps)
    clock: ClockName = "simulated" if simulated.count and not wall.count else "wall"
    main = simulated if clock == "simulated" else wall
    outcomes = Counter(record.outcome for record in records)
    reasons = Counter(f"{r.outcome}: {r.reason}" for r in records if r.outcome != "finished")
    num_input = sum(record.num_prompt_tokens for record in finished)
    num_output = sum(record.num_output_tokens for record in finished)
    reporting = [record for record in finished if record.num_cached_tokens is not None]
    num_cached = sum(record.num_cached_tokens or 0 for record in reporting) if reporting else None
    num_prompt = sum(record.num_prompt_tokens for record in reporting)
    num_good = main.num_good(goodput) if goodput else None
    per_s = 1.0 / duration_s if duration_s > 0 else 0.0
    return Summary(
        clock=clock,
        duration_s=duration_s,
        completed=len(finished),
        failed=outcomes["rejected"] + outcomes["failed"],
        outcomes={outcome: outcomes[outcome] for outcome in OUTCOMES},
        reasons=dict(reasons.most_common()),
        total_input_tokens=num_input,
        total_output_tokens=num_output,
        num_without_usage=sum(not record.has_usage for record in finished),
        num_cached_tokens=num_cached,
        cache_hit_rate=num_cached / num_prompt if num_cached is not None and num_prompt else None,
        request_throughput=len(finished) * per_s,
        output_throughput=num_output * per_s,
        total_token_throughput=(num_input + num_output) * per_s,
        max_output_tokens_per_s=main.peak_tokens_per_s(),
        max_concurrent_requests=main.peak_concurrency(),
        goodput=goodput,
        request_goodput=num_good * per_s if num_good is not None else None,
        slo_attainment={"wall": wall.attainment(goodput), "simulated": simulated.attainment(goodput)},
        wall=wall.distributions(percentiles),
        simulated=simulated.distributions(percentiles),
    )


class _Columns:
    """The finished requests that one clock has timed, as arrays (N,), nanoseconds."""

    def __init__(
        self,
        records: Sequence[RequestRecord],
        timings: Sequence[Timing | None],
        *,
        gaps: WeightedGaps | None = None,
    ) -> None:
        pairs = [(r, t) for r, t in zip(records, timings, strict=True) if t is not None]
        timed = [timing for _, timing in pairs]
        self.count = len(timed)
        self._tokens = np.array([record.num_output_tokens for record, _ in pairs], dtype=np.float64)
        self._ttft = np.array([timing.ttft_ns for timing in timed], dtype=np.float64)
        self._e2el = np.array([timing.e2el_ns for timing in timed], dtype=np.float64)
        self._queue = np.array([t.queue_ns for t in timed if t.queue_ns is not None], dtype=np.float64)
        given = np.array([np.nan if t.tpot_ns is None else t.tpot_ns for t in timed], dtype=np.float64)
        derived = (self._e2el - self._ttft) / np.maximum(self._tokens - 1, 1)
        # NaN where a request has no tpot, because it has one token.
        self._tpot = np.where(self._tokens > 1, np.where(np.isnan(given), derived, given), np.nan)
        starts = np.array([t.start_ns for t in timed if t.start_ns is not None], dtype=np.int64)
        self._has_start = 0 < starts.size == self.count
        self._start = (starts - starts.min()).astype(np.float64) if self._has_start else np.empty(0)
        kept = [np.asarray(t.itl_ns, dtype=np.float64) for t in timed if t.itl_ns is not None]
        # One array per request; None as soon as one request did not keep its gaps.
        self._itl = kept if len(kept) == self.count else None
        self._gaps = np.concatenate(kept) if kept else np.empty(0)
        self._gap_counts: Floats | None = None
        if gaps is not None:
            self._gaps = np.asarray(gaps.values_ns, dtype=np.float64)
            self._gap_counts = np.asarray(gaps.counts, dtype=np.float64)

    def distributions(self, percentiles: Sequence[float]) -> dict[Metric, Distribution]:
        tpot = self._tpot[~np.isnan(self._tpot)]
        columns: tuple[tuple[Metric, Floats, Floats | None], ...] = (
            ("ttft", self._ttft, None),
            ("tpot", tpot, None),
            ("itl", self._gaps, self._gap_counts),
            ("e2el", self._e2el, None),
            ("queue", self._queue, None),
        )
        return {
            name: _distribution(values / 1e6, counts, percentiles) for name, values, counts in columns if values.size
        }

    def num_good(self, goodput: Goodput) -> int:
        good = np.ones(self.count, dtype=bool)
        columns = (
            (goodput.ttft_ms, self._ttft),
            (goodput.tpot_ms, self._tpot),
            (goodput.e2el_ms, self._e2el),
        )
        for limit_ms, values in columns:
            if limit_ms is not None:
                good &= np.nan_to_num(values) <= limit_ms * 1e6
        return int(good.sum())

    def attainment(self, goodput: Goodput | None) -> float | None:
        return self.num_good(goodput) / self.count if goodput and self.count else None

    def peak_concurrency(self) -> int:
        if not self._has_start:
            return 0
        times = np.concatenate([self._start, self._start + self._e2el])
        deltas = np.repeat([1, -1], self.count)
        order = np.lexsort((deltas, times))  # at equal times a departure comes first
        return int(np.cumsum(deltas[order]).max())

    def peak_tokens_per_s(self) -> float:
        """Most output tokens in any second since the first request was sent.

        A request's tokens are spread evenly over its chunks, or evenly in time where chunks were not kept.
        """
        if not self._has_start:
            return 0.0
        if self._itl is None:
            return self._peak_of_even_tokens()
        num_chunks = np.array([gaps.size + 1 for gaps in self._itl])
        ends = np.cumsum(num_chunks)
        steps = np.concatenate([np.concatenate(([0.0], gaps)) for gaps in self._itl])
        elapsed = np.cumsum(steps)
        elapsed -= np.repeat(elapsed[ends - num_chunks], num_chunks)  # restart at each request's first chunk
        seconds = (np.repeat(self._start + self._ttft, num_chunks) + elapsed) / 1e9
        weights = np.repeat(self._tokens / num_chunks, num_chunks)
        return float(np.bincount(seconds.astype(np.int64), weights).max())

    def _peak_of_even_tokens(self) -> float:
        first, last = (self._start + self._ttft) / 1e9, (self._start + self._e2el) / 1e9
        num_seconds = int(last.max()) + 2
        at_once = last <= first
        at_first = np.where(at_once, self._tokens, np.minimum(self._tokens, 1))
        rate = np.where(at_once, 0.0, (self._tokens - at_first) / np.where(at_once, 1.0, last - first))
        # Tokens so far are a sum of ramps that start at `first` and stop at `last`. At second k a ramp that began
        # at t has made rate * (k - t), so running sums of rate and of rate * t over seconds give all of them.
        begin = np.concatenate([first, last])
        slope = np.concatenate([rate, -rate])
        bucket = np.ceil(begin).astype(np.int64)
        slopes = np.cumsum(np.bincount(bucket, slope, num_seconds + 1))
        offsets = np.cumsum(np.bincount(bucket, slope * begin, num_seconds + 1))
        so_far = slopes * np.arange(num_seconds + 1) - offsets
        return float((np.diff(so_far) + np.bincount(first.astype(np.int64), at_first, num_seconds)).max())


def _distribution(values: Floats, counts: Floats | None, percentiles: Sequence[float]) -> Distribution:
    """Of `values`, each occurring `counts` times (once if None), exactly as if they were written out."""
    order = np.argsort(values, kind="stable")
    values = values[order]
    counts = np.ones(values.size) if counts is None else counts[order]
    upto = np.cumsum(counts)
    total = upto[-1]
    mean = float(values @ counts / total)
    std = float(np.sqrt((values - mean) ** 2 @ counts / total))

    def percentile(p: float) -> float:
        rank = p / 100 * (total - 1)
        below = values[np.searchsorted(upto, math.floor(rank), side="right")]
        above = values[np.searchsorted(upto, math.ceil(rank), side="right")]
        return float(below + (above - below) * (rank - math.floor(rank)))

    return Distribution(
        count=int(total),
        mean_ms=mean,
        median_ms=percentile(50),
        std_ms=std,
        percentiles={float(p): percentile(p) for p in percentiles},
    )
