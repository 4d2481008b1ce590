"""Whether a run holds its latency objectives, and what it missed.

Owns: which requests count, the percentiles, what a stable run is, how a miss is told.
Must not know: how a run is chosen or driven.

The arrivals of a run span four quarters. Requests that arrive in the first fill the system, those of the last see it
empty; those of the middle two are measured, all of them to their end. A run holds the objectives if

- TTFT and TPOT of the measured requests are at most their limits at the percentile (linear interpolation; a request of
  one token has no TPOT);
- every measured request finished, but for those that no deployment of this model could serve (prompt_too_long);
- it is stable: the mean number of requests that have arrived and have no first token, in the last quarter less in the
  second, is at most 2 % of what arrives between the middles of the two, or three standard deviations of a Poisson
  count as large as the mean in the second, whichever is more. A system that takes in fewer requests than arrive has a
  queue that grows by the difference, in every quarter.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serving.errors import ConfigError
from serving.simulation.columns import NEVER, InstanceColumns, RunColumns
from serving.timings import tpot_of

MAX_GROWTH = 0.02  # of arrivals: a system that takes in 98 % of them counts as one that keeps up
NOISE_SIGMAS = 3.0  # standard deviations: chance goes beyond them once in about 740 runs (normal, above only)
MIN_REQUESTS = 8  # fewer make no quarters
RANK_BITS = 20  # of a number that tells all ranks apart: ranks are 16-bit columns
MAIN_SHARE = 0.5  # more than half of something is most of it

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """Objectives: at `percentile` of the requests, at most so many milliseconds."""

    ttft_ms: float
    tpot_ms: float
    percentile: float = 99.0

    def __post_init__(self) -> None:
        for name, value, most in (
            ("slo_ttft_ms", self.ttft_ms, math.inf),
            ("slo_tpot_ms", self.tpot_ms, math.inf),
            ("percentile", self.percentile, 100.0),
        ):
            if not (math.isfinite(value) and 0 < value <= most):
                limit = f" and at most {most:g}" if math.isfinite(most) else ""
                raise ConfigError(f"{name}: {value:g} must be a number above 0{limit}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Attained:
    """What a run attained. Milliseconds at the SLO's percentile, of the measured requests."""

    slo: Slo
    ttft_ms: float  # infinite if nothing finished
    tpot_ms: float  # 0 if no request has one
    place_wait_ms: float  # from arrival until a decode rank had room; part of TTFT
    prefill_hold_share: float  # of the time that places at decode ranks were held, the part before the first token
    num_measured: int
    num_lost: int  # measured, not finished, though they could have been served
    queue_growth: float  # requests, by the definition above
    max_growth: float
    prefill_busy: float  # share of the measured time
    decode_busy: float
    mean_decode_seqs: float  # rows of a decode step, over all ranks of an instance
    peak_rank_seqs: int  # most requests that one decode rank had, from their placement on
    output_tokens_per_s: float  # of requests that arrived in the measured time

    @property
    def is_stable(self) -> bool:
        """Whether the queue for a first token does not grow, by the definition above."""
        return self.queue_growth <= self.max_growth

    @property
    def holds_ttft(self) -> bool:
        """Whether TTFT is within its limit at the SLO's percentile; no matter whether requests were lost."""
        return self.ttft_ms <= self.slo.ttft_ms

    @property
    def holds_tpot(self) -> bool:
        """Whether TPOT is, likewise."""
        return self.tpot_ms <= self.slo.tpot_ms

    @property
    def keeps_up(self) -> bool:
        """Whether requests are served as they come, however slowly their tokens follow."""
        return self.holds_ttft and self.is_stable and not self.num_lost

    @property
    def holds(self) -> bool:
        """Whether the run holds its objectives."""
        return self.keeps_up and self.holds_tpot

    @property
    def is_decode_bound(self) -> bool:
        """Whether the time to a first token is mostly the wait for a decode rank, and that not for slow prefill.

        A request has its place at a decode rank while it waits for prefill, so slow prefill fills decode too: then most
        of the time that a place is held passes before the first token.
        """
        return self.place_wait_ms > MAIN_SHARE * self.ttft_ms and self.prefill_hold_share < MAIN_SHARE

    @property
    def excess(self) -> float:
        """How far the objectives are missed, in shares of them; 0 if they hold, above 1 where requests are lost."""
        parts = (self.ttft_ms / self.slo.ttft_ms - 1, self.tpot_ms / self.slo.tpot_ms - 1)
        growth = 0.0 if self.is_stable else self.queue_growth / self.max_growth
        return sum(max(0.0, part) for part in parts) + growth + (1.0 + self.num_lost if self.num_lost else 0.0)

    def reasons(self) -> list[str]:
        """Every miss, in words."""
        percentile = f"P{self.slo.percentile:g}"
        told = []
        if self.num_lost:
            told.append(f"{self.num_lost:,} of {self.num_measured:,} requests rejected or failed")
        if not self.is_stable:
            told.append(f"queue grows by {self.queue_growth:,.0f} requests in half the run")
        if not self.holds_ttft:
            told.append(f"{percentile} TTFT {self.ttft_ms:,.0f} ms > {self.slo.ttft_ms:,g}")
        if not self.holds_tpot:
            told.append(f"{percentile} TPOT {self.tpot_ms:,.2f} ms > {self.slo.tpot_ms:,g}")
        if not self.keeps_up:
            told.append(
                f"decode full, P{self.slo.percentile:g} wait for a rank {self.place_wait_ms:,.0f} ms"
                if self.is_decode_bound
                else f"prefill {100 * self.prefill_busy:.0f} % busy"
            )
        return told


def attain(run: RunColumns, slo: Slo) -> Attained:
    """What `run` attained. Raises ConfigError if it has too few requests to tell."""
    requests = run.requests
    if len(requests) < MIN_REQUESTS or requests.arrival_ns[-1] == requests.arrival_ns[0]:
        raise ConfigError(
            f"workload: {len(requests)} requests that arrive over "
            f"{(int(requests.arrival_ns[-1]) - int(requests.arrival_ns[0])) / 1e9 if len(requests) else 0:g} s are too "
            f"few to plan with; the limit is {MIN_REQUESTS}, at different times"
        )
    arrival = requests.arrival_ns
    quarters = np.linspace(arrival[0], arrival[-1], 5)
    measured = (arrival >= quarters[1]) & (arrival < quarters[3])
    done = measured & requests.is_finished
    impossible = requests.reason == _index(requests.reasons, "prompt_too_long")
    several = done & (requests.num_output_tokens > 1)
    tpot = tpot_of(
        num_tokens=requests.num_output_tokens[several],
        first_ns=requests.first_token_ns[several],
        last_ns=requests.last_token_ns[several],
    )
    window = (float(quarters[1]), float(quarters[3]))
    second, last = (_mean_waiting(run, float(quarters[i]), float(quarters[i + 1])) for i in (1, 3))
    between = np.count_nonzero(arrival >= quarters[2])  # two quarters, as between the middles of the two
    by_role = {role: [i for i in run.instances if i.role == role] for role in ("prefill", "decode", "colocated")}
    decode = by_role["decode"] or by_role["colocated"]
    return Attained(
        slo=slo,
        ttft_ms=_percentile(requests.first_token_ns[done] - arrival[done], slo.percentile, empty=math.inf),
        tpot_ms=_percentile(tpot, slo.percentile, empty=0.0),
        place_wait_ms=_percentile(requests.scheduled_ns[done] - arrival[done], slo.percentile, empty=0.0),
        prefill_hold_share=_share(
            (requests.first_token_ns - requests.scheduled_ns)[done],
            (requests.last_token_ns - requests.scheduled_ns)[done],
        ),
        num_measured=int(measured.sum()),
        num_lost=int((measured & ~done & ~impossible).sum()),
        queue_growth=last - second,
        max_growth=max(MAX_GROWTH * between, NOISE_SIGMAS * math.sqrt(max(1.0, second))),
        prefill_busy=_busy(by_role["prefill"] or by_role["colocated"], window),
        decode_busy=_busy(decode, window),
        mean_decode_seqs=_mean_seqs(decode, window),
        peak_rank_seqs=_peak_rank_seqs(run),
        output_tokens_per_s=float(requests.num_output_tokens[done].sum()) / ((window[1] - window[0]) / 1e9),
    )


def _index(words: tuple[str, ...], word: str) -> int:
    return words.index(word) if word in words else NEVER - 1


def _percentile(values_ns: NDArray[np.int64] | Floats, percentile: float, *, empty: float) -> float:
    return float(np.percentile(values_ns, percentile)) / 1e6 if values_ns.size else empty


def _share(part_ns: NDArray[np.int64], whole_ns: NDArray[np.int64]) -> float:
    return float(part_ns.sum() / whole_ns.sum()) if whole_ns.sum() else 0.0


def _mean_waiting(run: RunColumns, start_ns: float, end_ns: float) -> float:
    """Mean number of requests without a first token over a time; one that never has one and ended does not wait."""
    requests = run.requests
    has_first = requests.first_token_ns != NEVER
    waited_ns = np.minimum(requests.first_token_ns, end_ns) - np.maximum(requests.arrival_ns, start_ns)
    return float(np.maximum(waited_ns[has_first], 0.0).sum()) / (end_ns - start_ns)


def _peak_rank_seqs(run: RunColumns) -> int:
    """Over the whole run; of a preempted request's attempts the last."""
    requests = run.requests
    held = (requests.scheduled_ns != NEVER) & (requests.decode_rank != NEVER)
    if not held.any():
        return 0
    start_ns = requests.scheduled_ns[held]
    times = np.concatenate([start_ns, np.maximum(requests.last_token_ns[held], start_ns)])
    deltas = np.repeat([1, -1], len(start_ns))
    ranks = np.tile(requests.decode_instance[held].astype(np.int64) << RANK_BITS | requests.decode_rank[held], 2)
    order = np.lexsort((-deltas, times, ranks))  # at one instant arrivals first: rather too many
    # Every rank ends with none, so one running sum does for all.
    return int(np.cumsum(deltas[order]).max())


def _overlaps(instance: InstanceColumns, window: tuple[float, float]) -> Floats:
    """How much of every step lies in the window, ns."""
    ends = np.minimum(instance.start_ns + instance.charged_ns, window[1])
    overlaps: Floats = np.maximum(ends - np.maximum(instance.start_ns, window[0]), 0.0)
    return overlaps


def _busy(instances: list[InstanceColumns], window: tuple[float, float]) -> float:
    total = sum(float(_overlaps(instance, window).sum()) for instance in instances)
    return total / (max(1, len(instances)) * (window[1] - window[0]))


def _mean_seqs(instances: list[InstanceColumns], window: tuple[float, float]) -> float:
    weights = [_overlaps(instance, window) for instance in instances]
    total = sum(float(w.sum()) for w in weights)
    rows = sum(float(w @ instance.num_seqs) for w, instance in zip(weights, instances, strict=True))
    return rows / total if total else 0.0
