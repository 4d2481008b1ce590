"""The figures of a run, made of the requests' latencies and of how they ended.

Owns: `Summary`, and `summarize` of one record per request, used by the load generator (wall time over HTTP, beside the
simulated times that the server reported) and by runs on devices in virtual time. Columns of a simulated run come to the
same `summary_of` (serving/simulation/figures.py).
Must not know: HTTP, how a record came about, how figures are shown (serving/report.py), any clock.
Source: definitions of `vllm bench serve`: ttft and e2el from sending; only finished requests count; the formulas are
in serving/timings.py.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from serving.records import OUTCOMES, Goodput, Outcome, RequestRecord, Timing
from serving.timings import Distribution, Floats, Metric, Timings, TokenTimes, tpot_of

ClockName = Literal["wall", "simulated"]


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


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestCounts:
    """How requests ended, and the tokens of the finished ones."""

    outcomes: Mapping[Outcome, int]
    reasons: Mapping[str, int]  # as in Summary
    num_input_tokens: int
    num_output_tokens: int
    num_cached_tokens: int | None  # None: nobody says
    num_reported_prompt_tokens: int  # of those who say how much was cached
    num_without_usage: int = 0


def summarize(
    records: Sequence[RequestRecord],
    *,
    duration_s: float,
    percentiles: Sequence[float] = (50.0, 90.0, 99.0),
    goodput: Goodput | None = None,
) -> Summary:
    """Figures of a run of `duration_s`."""
    finished = [record for record in records if record.outcome == "finished"]
    outcomes = Counter(record.outcome for record in records)
    reporting = [record for record in finished if record.num_cached_tokens is not None]
    return summary_of(
        RequestCounts(
            outcomes={outcome: outcomes[outcome] for outcome in OUTCOMES},
            reasons=dict(Counter(f"{r.outcome}: {r.reason}" for r in records if r.outcome != "finished").most_common()),
            num_input_tokens=sum(record.num_prompt_tokens for record in finished),
            num_output_tokens=sum(record.num_output_tokens for record in finished),
            num_cached_tokens=sum(record.num_cached_tokens or 0 for record in reporting) if reporting else None,
            num_reported_prompt_tokens=sum(record.num_prompt_tokens for record in reporting),
            num_without_usage=sum(not record.has_usage for record in finished),
        ),
        wall=_timings(finished, [record.wall for record in finished]),
        simulated=_timings(finished, [record.simulated for record in finished]),
        duration_s=duration_s,
        percentiles=percentiles,
        goodput=goodput,
    )


def summary_of(
    counts: RequestCounts,
    *,
    wall: Timings,
    simulated: Timings,
    duration_s: float,
    percentiles: Sequence[float],
    goodput: Goodput | None,
) -> Summary:
    """Figures of a run of `duration_s` from what is known of its requests."""
    clock: ClockName = "simulated" if simulated.count and not wall.count else "wall"
    main = simulated if clock == "simulated" else wall
    num_finished = counts.outcomes["finished"]
    num_tokens = counts.num_input_tokens + counts.num_output_tokens
    num_cached, num_prompt = counts.num_cached_tokens, counts.num_reported_prompt_tokens
    num_good = main.num_good(goodput) if goodput else None
    per_s = 1.0 / duration_s if duration_s > 0 else 0.0
    return Summary(
        clock=clock,
        duration_s=duration_s,
        completed=num_finished,
        failed=counts.outcomes["rejected"] + counts.outcomes["failed"],
        outcomes=counts.outcomes,
        reasons=counts.reasons,
        total_input_tokens=counts.num_input_tokens,
        total_output_tokens=counts.num_output_tokens,
        num_without_usage=counts.num_without_usage,
        num_cached_tokens=num_cached,
        cache_hit_rate=num_cached / num_prompt if num_cached is not None and num_prompt else None,
        request_throughput=num_finished * per_s,
        output_throughput=counts.num_output_tokens * per_s,
        total_token_throughput=num_tokens * per_s,
        max_output_tokens_per_s=main.peak_tokens_per_s(),
        max_concurrent_requests=main.peak_concurrency(),
        goodput=goodput,
        request_goodput=num_good * per_s if num_good is not None else None,
        slo_attainment={"wall": wall.attainment(goodput), "simulated": simulated.attainment(goodput)},
        wall=wall.distributions(percentiles),
        simulated=simulated.distributions(percentiles),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _ChunkTimings(Timings):
    """With the gaps between the chunks of each request, if all of them kept theirs."""

    chunk_gaps_ns: Sequence[Floats] | None

    def token_times(self) -> TokenTimes | None:
        """A request's tokens are spread evenly over its chunks; None if a request did not keep theirs."""
        if self.chunk_gaps_ns is None:
            return None
        num_chunks = np.array([gaps.size + 1 for gaps in self.chunk_gaps_ns])
        ends = np.cumsum(num_chunks)
        steps = np.concatenate([np.concatenate(([0.0], gaps)) for gaps in self.chunk_gaps_ns])
        elapsed = np.cumsum(steps)
        elapsed -= np.repeat(elapsed[ends - num_chunks], num_chunks)  # restart at each request's first chunk
        return TokenTimes(
            seconds=(np.repeat(self.start_ns + self.ttft_ns, num_chunks) + elapsed) / 1e9,
            num_tokens=np.repeat(self.num_tokens / num_chunks, num_chunks),
        )


def _timings(records: Sequence[RequestRecord], timings: Sequence[Timing | None]) -> Timings:
    """Of the records that have a timing."""
    pairs = [(record, timing) for record, timing in zip(records, timings, strict=True) if timing is not None]
    timed = [timing for _, timing in pairs]
    num_tokens = np.array([record.num_output_tokens for record, _ in pairs], dtype=np.float64)
    ttft_ns = np.array([timing.ttft_ns for timing in timed], dtype=np.float64)
    e2el_ns = np.array([timing.e2el_ns for timing in timed], dtype=np.float64)
    given_ns = np.array([np.nan if t.tpot_ns is None else t.tpot_ns for t in timed], dtype=np.float64)
    derived_ns = tpot_of(num_tokens=num_tokens, first_ns=ttft_ns, last_ns=e2el_ns)
    starts = np.array([t.start_ns for t in timed if t.start_ns is not None], dtype=np.int64)
    has_start = 0 < starts.size == len(timed)
    kept = [np.asarray(t.itl_ns, dtype=np.float64) for t in timed if t.itl_ns is not None]
    return _ChunkTimings(
        num_tokens=num_tokens,
        ttft_ns=ttft_ns,
        e2el_ns=e2el_ns,
        tpot_ns=np.where(np.isnan(given_ns) | (num_tokens <= 1), derived_ns, given_ns),
        queue_ns=np.array([t.queue_ns for t in timed if t.queue_ns is not None], dtype=np.float64),
        start_ns=(starts - starts.min()).astype(np.float64) if has_start else np.empty(0),
        gaps_ns=np.concatenate(kept) if kept else np.empty(0),
        chunk_gaps_ns=kept if len(kept) == len(timed) else None,
    )
