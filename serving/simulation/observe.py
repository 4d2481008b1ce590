"""A workload simulated, then served live over HTTP on a scaled clock, and simulated once more with the arrivals seen.

Owns: these three runs, and what is read from the live one beside its result.
Must not know: what is compared (serving/simulation/verify.py), the command line.
"""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass

from devices.clock import ScaledClock
from serving.config import RunConfig
from serving.core.block_hash import hash_prompt
from serving.core.event_log import Event
from serving.errors import ConfigError, ServingError
from serving.live import run_workload
from serving.report import BenchResult
from serving.simulation.verify import (
    Reasons,
    Verification,
    arrivals_of,
    compare,
    figures_of,
    num_other_lengths,
    num_other_outcomes,
    num_same_events,
    num_same_instant,
    shifts_s,
    with_all_instances,
)
from serving.simulator import SimulationResult, run_in_virtual_time
from serving.system import System
from serving.timings import Metric
from serving.workloads.workload import Workload

_SERVED_ID = re.compile(r"cmpl-(.+)-\d+-\d+")  # of the HTTP layer, around the client's own
_HISTOGRAMS: dict[Metric, str] = {  # of wall seconds in the server
    "ttft": "vllm:time_to_first_token_seconds",
    "e2el": "vllm:e2e_request_latency_seconds",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """A live run. The means are over its finished requests, in seconds of the wall, as the server measured them."""

    bench: BenchResult
    events: Sequence[Event]
    lag_s: float
    hold_lag_s: float
    server_ttft_s: float
    server_e2el_s: float


def observe(config: RunConfig, workload: Workload, *, shards: str, address: str | None) -> Observation:
    """Serve `workload` at the configuration's clock scale, which must be above 0. Raises ConfigError if it is not."""
    if not config.clock.scale:
        raise ConfigError("clock.scale: 0 lets time run as fast as real work allows; verify needs a scale above 0")
    systems: list[System] = []
    bench = run_workload(config, workload, shards=shards, address=address, keep_events=True, on_ready=systems.append)
    (system,) = systems
    assert isinstance(system.clock, ScaledClock)
    return Observation(
        bench=bench,
        events=system.log.events,
        lag_s=system.clock.lag_ns / 1e9,
        hold_lag_s=system.clock.hold_lag_ns / 1e9,
        server_ttft_s=_server_mean_s(system, "ttft"),
        server_e2el_s=_server_mean_s(system, "e2el"),
    )


def predict(config: RunConfig, workload: Workload) -> SimulationResult:
    """What `simulate` says."""
    return run_in_virtual_time(config, workload, keep_events=True)


def verify(
    config: RunConfig,
    workload: Workload,
    prediction: SimulationResult,
    *,
    tolerance: float | None = None,
    shards: str = "torch",
    address: str | None = None,
) -> Verification:
    """Run `workload` live, and compare with `prediction` of the same. Raises KeyboardInterrupt at a signal.

    Raises ServingError if no request came to the server: then there is nothing to compare.
    """
    observation = observe(config, workload, shards=shards, address=address)
    bench = observation.bench
    if bench.interrupted:
        raise KeyboardInterrupt
    arrived = arrivals_of(observation.events)
    if not arrived:
        raise ServingError(f"verify: none of {len(workload)} requests came to the server")
    same = run_in_virtual_time(config, as_arrived(workload, arrived), keep_events=True)
    figures = with_all_instances(
        figures_of(prediction.bench, prediction.log.events),
        figures_of(bench, observation.events),
        figures_of(same.bench, same.log.events),
    )
    failures = [f"{number} {name} still held" for name, number in (bench.held_at_rest or {}).items() if number]
    num_other = num_other_outcomes(prediction.bench.records, bench.records)
    if num_other:
        failures.append(f"{num_other} of {len(workload)} requests did not end as predicted")
    return Verification(
        rows=compare(*figures),
        reasons=_reasons(config, prediction, observation, arrived, same_events=same.log.events),
        tolerance=tolerance,
        failures=tuple(failures),
    )


class ServedWorkload(Workload):
    """A workload as a server sees it: it knows tokens only, and names blocks by them.

    The pool's host for a block follows from its name, and with it the last microsecond of a transfer.
    """

    __slots__ = ()

    def block_hashes(self, index: int, block_size: int) -> list[int]:
        """Implements Workload."""
        token_ids = self.prompt_token_ids(self.requests[index]).tolist()
        return list(hash_prompt(tuple(token_ids), block_size))


def as_arrived(workload: Workload, arrived: Sequence[tuple[str, int]]) -> Workload:
    """The requests of `workload` under the server's names, at the instants and in the order of their arrivals.

    `arrived`: name, the client's or the HTTP layer's, and nanosecond. Raises ServingError for a name that is unknown.
    """
    known = {request.request_id: request for request in workload.requests}
    requests = []
    for served_id, arrival_ns in arrived:
        request = known.get(client_id(served_id))
        if request is None:
            raise ServingError(f"request {served_id} is not of workload {workload.name}")
        requests.append(dataclasses.replace(request, request_id=served_id, arrival_ns=arrival_ns))
    return ServedWorkload(
        name=workload.name,
        requests=requests,
        seed=workload.seed,
        vocabulary=workload.vocabulary,
        hash_block_size=workload.hash_block_size,
    )


def client_id(served_id: str) -> str:
    """The client's name of a request, from that in the server's log."""
    match = _SERVED_ID.fullmatch(served_id)
    return match[1] if match else served_id


def _reasons(
    config: RunConfig,
    prediction: SimulationResult,
    observation: Observation,
    arrived: Sequence[tuple[str, int]],
    *,
    same_events: Sequence[Event],
) -> Reasons:
    bench, scale = observation.bench, config.clock.scale
    # A closed loop's requests are due when the simulation sends them.
    due_ns = dict(arrivals_of(prediction.log.events))
    instants = [instant for _, instant in arrived]
    dues = [due_ns[client_id(name)] for name, _ in arrived]
    shifts = shifts_s(dues, instants)
    wall, simulated = bench.summary.wall, bench.summary.simulated
    wall_s = {metric: wall[metric].mean_ms / 1e3 if metric in wall else 0.0 for metric in _HISTOGRAMS}
    charged_s = {metric: scale * simulated[metric].mean_ms / 1e3 if metric in simulated else 0.0 for metric in wall_s}
    return Reasons(
        scale=scale,
        wall_s=bench.summary.duration_s,
        lag_s=observation.lag_s,
        hold_lag_s=observation.hold_lag_s,
        lag_ttft_s=observation.server_ttft_s - charged_s["ttft"],
        lag_e2el_s=observation.server_e2el_s - charged_s["e2el"],
        http_ttft_s=wall_s["ttft"] - observation.server_ttft_s,
        http_e2el_s=wall_s["e2el"] - observation.server_e2el_s,
        workload_span_s=(max(dues) - min(dues)) / 1e9,
        arrival_span_s=(max(instants) - min(instants)) / 1e9,
        mean_shift_s=sum(shifts) / len(shifts),
        most_early_s=min(shifts),
        most_late_s=max(shifts),
        num_requests=len(arrived),
        num_same_instant=num_same_instant(observation.events),
        num_other_lengths=num_other_lengths(prediction.bench.records, bench.records),
        predicted_acceptance=_acceptance(prediction.bench),
        observed_acceptance=_acceptance(bench),
        num_events=len(observation.events),
        num_same_events=num_same_events(observation.events, same_events),
    )


def _acceptance(bench: BenchResult) -> float | None:
    drafts = bench.spec_decode
    return None if drafts is None or not drafts.num_drafts else drafts.num_accepted_tokens / drafts.num_draft_tokens


def _server_mean_s(system: System, metric: Metric) -> float:
    """Mean over all instances of one of the server's histograms."""
    totals = {"sum": 0.0, "count": 0.0}
    for family in system.metrics.registry.collect():
        for sample in family.samples:
            for part in totals:
                if sample.name == f"{_HISTOGRAMS[metric]}_{part}":
                    totals[part] += sample.value
    return totals["sum"] / totals["count"] if totals["count"] else 0.0
