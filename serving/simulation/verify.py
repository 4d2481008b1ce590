"""Predicted against observed: the figures of a simulation beside those of a live run, and what makes them differ.

Owns: which figures are compared, and how much of each difference comes from the instants at which requests arrived.
Must not know: how either run is made (serving/simulation/observe.py), how a comparison is shown.

Simulated time stands still while real work is late (docs/architecture.md, Time), but a client sends by the wall: its
requests come closer together on the simulated clock. So the workload is simulated once more with the arrivals that the
server saw. What separates that from the prediction is the effect of the arrivals; what separates it from the
observation has other reasons, and is nothing at all where lengths are fixed and no request arrives at the very instant
of another or of a step's end: which of two such events comes first is chance, of sockets or of the machine's load.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from serving.config import Role
from serving.core.event_log import Event
from serving.records import RequestRecord
from serving.report import BenchResult
from serving.timings import Metric

LATENCIES: tuple[Metric, ...] = ("ttft", "tpot", "itl", "e2el")
SHOWN_SHARE_PERCENT = 5.0  # of the verdict where no tolerance is asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One figure. `same_arrivals` is that of the simulation with the arrivals that the server saw."""

    name: str
    predicted: float
    observed: float
    same_arrivals: float

    @property
    def difference(self) -> float:
        """Observed less predicted."""
        return self.observed - self.predicted

    @property
    def percent(self) -> float | None:
        """The difference in percent of what was predicted; None where nothing was, and something came."""
        if self.predicted:
            return 100 * self.difference / self.predicted
        return None if self.difference else 0.0

    @property
    def by_arrivals(self) -> float:
        """The part of the difference that the arrivals make."""
        return self.same_arrivals - self.predicted

    @property
    def rest(self) -> float:
        """The part that they do not."""
        return self.observed - self.same_arrivals

    def is_within(self, percent: float) -> bool:
        """Whether the difference is at most `percent` of what was predicted."""
        return self.percent is not None and abs(self.percent) <= percent


@dataclass(frozen=True, slots=True, kw_only=True)
class Reasons:
    """What was measured beside the figures. Seconds are of the wall unless they are called simulated."""

    scale: float  # wall seconds per simulated second
    wall_s: float  # from the first request sent to the last answer
    lag_s: float  # by which entries of the clock fired late
    hold_lag_s: float  # of it, for real work that was not finished; the rest is the processor's
    lag_ttft_s: float  # mean, per request: wall time in the server beyond scale * simulated time
    lag_e2el_s: float
    http_ttft_s: float  # mean, per request: wall time at the client beyond that in the server
    http_e2el_s: float
    workload_span_s: float  # simulated, from first to last arrival: as asked, and as the server saw them
    arrival_span_s: float
    mean_shift_s: float  # simulated, of an arrival against the workload; the first request is the origin
    most_early_s: float
    most_late_s: float
    num_requests: int
    num_same_instant: int  # arrivals at the very instant of another, or of a step's end: chance decides their order
    num_other_lengths: int  # requests whose output is not as long as predicted
    predicted_acceptance: float | None  # of drafts; None: there are none
    observed_acceptance: float | None
    num_events: int  # of the live run's log: arrivals, placements, steps, tokens, transfers, ends
    num_same_events: int  # of them, in that of the simulation with the same arrivals, at the same nanosecond

    @property
    def lag_percent(self) -> float:
        """Lag in percent of the wall time."""
        return 100 * self.lag_s / self.wall_s if self.wall_s else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """A comparison. `tolerance` in percent, None: figures are reported, and only failures decide."""

    rows: tuple[Row, ...]
    reasons: Reasons
    tolerance: float | None = None
    failures: tuple[str, ...] = ()  # requests that did not end as predicted, something still held

    @property
    def limit_percent(self) -> float:
        """What the share of figures is given for."""
        return SHOWN_SHARE_PERCENT if self.tolerance is None else self.tolerance

    @property
    def num_within(self) -> int:
        """Figures whose difference is at most the limit."""
        return sum(row.is_within(self.limit_percent) for row in self.rows)

    @property
    def exit_code(self) -> int:
        """0; 1 if a figure is beyond the tolerance, or there are failures."""
        is_beyond = self.tolerance is not None and self.num_within < len(self.rows)
        return 1 if self.failures or is_beyond else 0


def compare(
    predicted: Mapping[str, float], observed: Mapping[str, float], same_arrivals: Mapping[str, float]
) -> tuple[Row, ...]:
    """One row per figure, in the order of `predicted`. Raises KeyError if a figure is missing on another side."""
    return tuple(
        Row(name=name, predicted=value, observed=observed[name], same_arrivals=same_arrivals[name])
        for name, value in predicted.items()
    )


def figures_of(bench: BenchResult, events: Sequence[Event]) -> dict[str, float]:
    """The figures of a run on the simulated clock, name with unit to value; a latency that nobody has is 0.

    `events` are all of the run's log: they have its steps, preemptions and duration.
    """
    summary = bench.summary
    figures: dict[str, float] = {}
    for metric in LATENCIES:
        values = summary.simulated.get(metric)
        figures[f"{metric.upper()} mean (ms)"] = values.mean_ms if values else 0.0
        for p in (50.0, 99.0):
            figures[f"{metric.upper()} P{p:g} (ms)"] = values.percentiles[p] if values else 0.0
    duration_s = _duration_s(events)
    figures["requests (1/s)"] = summary.completed / duration_s if duration_s else 0.0
    figures["output tokens (1/s)"] = summary.total_output_tokens / duration_s if duration_s else 0.0
    figures["cache hits (% of prompt)"] = 100 * (summary.cache_hit_rate or 0.0)
    figures["preemptions"] = float(sum(event.kind == "preempt" for event in events))
    num_steps, num_rows = Counter[str](), Counter[str]()
    for event in events:
        if event.kind == "step":
            num_steps[event.subject] += 1
            num_rows[event.subject] += int(dict(event.details)["rows"])
    for instance_id in sorted(num_steps, key=_by_role):
        figures[f"{instance_id} steps"] = float(num_steps[instance_id])
        figures[f"{instance_id} mean batch"] = num_rows[instance_id] / num_steps[instance_id]
    return figures


def with_all_instances(*runs: dict[str, float]) -> list[dict[str, float]]:
    """The same figures, with 0 for an instance that had no step in one of the runs; all have the same names."""
    names = list(dict.fromkeys(name for run in runs for name in run))
    return [{name: run.get(name, 0.0) for name in names} for run in runs]


def num_same_events(events: Sequence[Event], others: Sequence[Event]) -> int:
    """Events that are in both logs, details and nanosecond included; the order within an instant does not matter."""
    return (Counter(events) & Counter(others)).total()


def arrivals_of(events: Sequence[Event]) -> list[tuple[str, int]]:
    """Request and instant of every arrival, in order."""
    return [(event.subject, event.now_ns) for event in events if event.kind == "arrive"]


def shifts_s(due_ns: Sequence[int], arrived_ns: Sequence[int]) -> list[float]:
    """How much later than due each request arrived, in simulated seconds; the first one is the origin of both."""
    origin_ns = arrived_ns[0] - due_ns[0]
    return [(arrived - due - origin_ns) / 1e9 for due, arrived in zip(due_ns, arrived_ns, strict=True)]


def num_same_instant(events: Sequence[Event]) -> int:
    """Arrivals at the very instant of another arrival or of a step's end; of several, all but one count.

    Where real work is late, time stands still at a step's end, and whoever arrives meanwhile arrives at that instant.
    """
    ends = {event.now_ns + int(dict(event.details)["charged_ns"]) for event in events if event.kind == "step"}
    instants = [instant_ns for _, instant_ns in arrivals_of(events)]
    return sum(instant_ns in ends for instant_ns in set(instants)) + len(instants) - len(set(instants))


def num_other_lengths(predicted: Sequence[RequestRecord], observed: Sequence[RequestRecord]) -> int:
    """Requests, by their place in the workload, whose number of output tokens differs."""
    pairs = zip(predicted, observed, strict=True)
    return sum(one.num_output_tokens != other.num_output_tokens for one, other in pairs)


def num_other_outcomes(predicted: Sequence[RequestRecord], observed: Sequence[RequestRecord]) -> int:
    """Requests, by their place in the workload, that were refused or failed on one side only."""
    return sum(one.outcome != other.outcome for one, other in zip(predicted, observed, strict=True))


def _duration_s(events: Sequence[Event]) -> float:
    """From the first arrival to the last outcome."""
    instants = [event.now_ns for event in events if event.kind in ("arrive", "outcome")]
    return (max(instants) - min(instants)) / 1e9 if instants else 0.0


def _by_role(instance_id: str) -> tuple[int, int]:
    role, _, number = instance_id.rpartition("-")
    return get_args(Role).index(role), int(number)
