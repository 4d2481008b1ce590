"""The workload of a run: which of trace, generator and synthetic prompts, at what rate, how much of it.

Owns: what comes before what, and how a configuration's keys become an arrival process.
Must not know: what runs the workload.
"""

import math
from pathlib import Path

from serving.config import RunConfig, WorkloadSection
from serving.errors import ConfigError
from serving.workloads.arrivals import ArrivalKind, Arrivals, Bursts, RampUp, generator_for
from serving.workloads.generators import generate, load_generator
from serving.workloads.synthetic import synthetic_workload
from serving.workloads.traces import TraceOptions, load_trace
from serving.workloads.workload import Workload, to_ns

FIRST_TEXT_TOKEN = 16  # of prompts made from random ids: above the control tokens of the shipped tokenizer

LEAST_RATE, MOST_RATE = 1e-6, 1e9  # requests per second: instants of a million requests stay far from 2**63 ns


def load_workload(
    config: RunConfig,
    *,
    trace: Path | None = None,
    trace_divisor: int = 1,
    name: str | None = None,
    rate: float | None = None,
    duration_s: float | None = None,
    num_requests: int | None = None,
    seed: int | None = None,
) -> Workload:
    """The workload of a run: `trace`, else the generator `name`, else the configuration's, else synthetic prompts.

    Asked for by `name`, a generator has its fitted arrivals, whatever rate the configuration has for its own workload.
    `rate`, in requests per second, stretches or compresses a trace's times, and sets that of the others. `duration_s`
    and `num_requests` cut; by default the configuration's own do, but for a trace, which is whole. `trace_divisor`
    divides the lengths of a trace or a generator. Lengths of a generator are cut to the context, those of a trace only
    with a divisor above 1: without one a request that does not fit is there, and is refused when it arrives.
    Raises TraceError, ConfigError.
    """
    section = config.workload
    seed = config.seed if seed is None else seed
    if rate is not None and not LEAST_RATE <= rate <= MOST_RATE:
        raise ConfigError(f"rate: {rate} is not in [{LEAST_RATE:g}, {MOST_RATE:g}] requests per second")
    if duration_s is not None and not (math.isfinite(duration_s) and duration_s > 0):
        raise ConfigError(f"duration_s: {duration_s} must be finite and above the limit 0")
    if num_requests is not None and num_requests < 1:
        raise ConfigError(f"num_requests: {num_requests} is below the limit 1")
    if duration_s is None and num_requests is None and trace is None:
        duration_s = section.duration_s
    vocabulary = range(FIRST_TEXT_TOKEN, min(256, config.shape.vocab_size))
    name = section.name if name is None else name
    if trace is not None:
        limit = config.model.max_model_len // 2 if trace_divisor > 1 else None
        options = TraceOptions(
            length_divisor=trace_divisor,
            max_input_tokens=limit,
            max_output_tokens=limit,
            seed=seed,
            vocabulary=vocabulary,
        )
        workload = load_trace(trace, options)
        workload = workload if rate is None else _at_rate(workload, rate)
        workload = workload.limited(num_requests=num_requests, duration_s=duration_s)
        if not len(workload):
            raise ConfigError(f"duration_s: no request of {trace} arrives within {duration_s} s")
        return workload
    if num_requests is None and duration_s is None:
        num_requests = section.num_requests
    if name is not None:
        return generate(
            name,
            max_model_len=config.model.max_model_len,
            num_requests=num_requests,
            duration_s=duration_s,
            seed=seed,
            arrivals=_arrivals(section, rate, load_generator(name).arrivals, is_own=name == section.name),
            length_divisor=trace_divisor,
            vocabulary=vocabulary,
        )
    arrivals = _arrivals(section, rate)
    times_s = None
    if duration_s is not None:
        times_s = arrivals.times_before_s(generator_for(seed, "arrivals"), duration_s)[:num_requests]
        num_requests = len(times_s)
        if not num_requests:
            raise ConfigError(f"duration_s: no request arrives within {duration_s} s")
    assert num_requests is not None
    workload = synthetic_workload(
        num_requests=num_requests,
        input_len=section.input_len,
        output_len=section.output_len,
        range_ratio=section.range_ratio,
        num_prefixes=section.num_prefixes,
        prefix_len=section.prefix_len,
        seed=seed,
        arrivals=None if times_s is not None else arrivals,
        vocabulary=vocabulary,
    )
    return workload if times_s is None else workload.with_arrival_ns(to_ns(times_s))


def _at_rate(workload: Workload, rate: float) -> Workload:
    """A trace at so many requests per second, from its first to its last."""
    assert workload.arrival_ns is not None
    span_s = float(workload.arrival_ns[-1]) / 1e9
    if span_s <= 0:
        raise ConfigError(f"rate: {rate} cannot be had of a trace whose requests arrive at one instant")
    return workload.with_rate_factor(rate * span_s / len(workload))


def _arrivals(
    section: WorkloadSection, rate: float | None, fitted: Arrivals | None = None, *, is_own: bool = True
) -> Arrivals:
    """The process that the section names; of a `fitted` one it changes what is set. A `rate` replaces a ramp too.

    A section whose own workload (`is_own`) is another one tells nothing of rates, only of ramps and bursts.
    """
    is_set = section.model_fields_set if is_own else frozenset[str]()
    ramp_up = None if rate is not None else _ramp_up(section)
    if rate is None:
        rate = math.inf if section.request_rate == "inf" else section.request_rate
        if fitted is not None and "request_rate" not in is_set:
            rate = fitted.rate_per_s
    kind: ArrivalKind = section.arrivals or ("poisson" if section.burstiness == 1.0 else "gamma")
    burstiness = section.burstiness
    if fitted is not None and not is_set & {"arrivals", "burstiness"}:
        kind, burstiness = fitted.kind, fitted.burstiness
    if math.isinf(rate):
        if ramp_up is None:
            return Arrivals(kind="inf")
        rate = 1.0  # not used
    return Arrivals(kind=kind, rate_per_s=rate, burstiness=burstiness, ramp_up=ramp_up, bursts=_bursts(section))


def _ramp_up(section: WorkloadSection) -> RampUp | None:
    return None if section.ramp is None else RampUp(**section.ramp.model_dump())


def _bursts(section: WorkloadSection) -> Bursts | None:
    return None if section.bursts is None else Bursts(**section.bursts.model_dump())
