"""The simulator against queueing theory: configurations that degenerate to queues whose answers are known.

Every queue is compared twice: request by request with a recursion that is the queue's definition, exactly; and on
average with the formula of theory, within a confidence interval from the run itself.
"""

import heapq
from math import factorial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import poisson, t

from serving.plan import block_bytes
from serving.simulator import load_workload, simulate

NUM_REQUESTS = 1500
CONFIDENCE = 0.999
NO_POOL = "kv_pool.enabled=false"
# A request of one token is over with its prefill: decode's slots are only what lets it in.
ONE_TOKEN = "input_len: 64, output_len: 1, range_ratio: 0.0, num_prefixes: 0, prefix_len: 0"
ROOMY = ("instances.decode.max_num_seqs=64", "scheduler.max_queued_requests=100000")


@pytest.fixture(scope="module")
def service_ns(make_config):
    """What a prompt of the queues' length costs alone."""
    result = run(make_config, 1.0, *ROOMY, num_requests=1)
    return round(result.bench.records[0].simulated.e2el_ns)


def run(make_config, rate, *overrides, num_requests=NUM_REQUESTS, seed=0):
    """Simulate Poisson arrivals at prefill instances that take one request at a time."""
    workload = f"workload={{num_requests: {num_requests}, request_rate: {rate}, {ONE_TOKEN}}}"
    config = make_config("laptop", NO_POOL, "instances.prefill.max_num_seqs=1", f"seed={seed}", workload, *overrides)
    return simulate(config, load_workload(config), keep_events=True)


def arrivals_and_waits(result, service_ns):
    """Instants and waiting times of all requests, nanoseconds, in the order of arrival."""
    timings = [record.simulated for record in result.bench.records]
    assert {record.outcome for record in result.bench.records} == {"finished"}
    arrivals = np.array([timing.start_ns for timing in timings])
    return arrivals, np.rint([timing.e2el_ns for timing in timings]).astype(int) - service_ns


def waits_of_queue(arrivals, service_ns, num_servers):
    """Of one queue in order of arrival: whoever is first goes to the server that is free first."""
    free = [0] * num_servers
    waits = []
    for arrival in arrivals.tolist():
        start = max(arrival, heapq.heappop(free))
        heapq.heappush(free, start + service_ns)
        waits.append(start - arrival)
    return np.array(waits)


def mean_wait_of_theory(load, num_servers):
    """Mean wait of M/D/c over the service time, at `load` per server.

    Crommelin (1932): whoever is in service now is gone one service time later, so the number present obeys
    N(t + D) = max(N(t) - c, 0) + Poisson(lambda D). Its stationary mean gives the queue's, and Little's law the wait.
    """
    states, mean_new = 400, load * num_servers
    new = poisson.pmf(np.arange(states), mean_new)
    moves = np.zeros((states, states))
    for present in range(states):
        left = max(present - num_servers, 0)
        moves[present, left:] = new[: states - left]
    equations = moves.T - np.eye(states)
    equations[0] = 1.0  # in place of an equation that follows from the others: shares add up to 1
    shares = np.linalg.solve(equations, np.eye(states)[0])
    return (shares @ np.arange(states) - mean_new) / mean_new


def check_mean(waits, expected):
    """`expected` lies in the interval of the mean; by means of batches, since neighbors wait alike."""
    batches = np.array([batch.mean() for batch in np.array_split(waits, 15)])
    half = t.ppf((1 + CONFIDENCE) / 2, len(batches) - 1) * batches.std(ddof=1) / np.sqrt(len(batches))
    assert half < 0.75 * expected, "too wide an interval to tell anything"
    assert abs(batches.mean() - expected) < half


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_one_prefill_instance_is_an_m_d_1_queue(make_config, service_ns, load):
    result = run(make_config, load * 1e9 / service_ns, *ROOMY)
    arrivals, waits = arrivals_and_waits(result, service_ns)
    assert waits.tolist() == waits_of_queue(arrivals, service_ns, 1).tolist()
    check_mean(waits, load * service_ns / (2 * (1 - load)))  # Pollaczek and Khinchine
    figures = result.bench.cluster
    assert figures["prefill-0 busy share"] == pytest.approx(NUM_REQUESTS * service_ns / 1e9 / result.simulated_s)


@pytest.mark.parametrize(("num_servers", "load"), [(2, 0.7), (4, 0.85)])
def test_instances_behind_a_full_house_are_an_m_d_c_queue(make_config, service_ns, num_servers, load):
    """As many decode slots as prefill instances: requests wait in the one queue of the frontend."""
    result = run(
        make_config,
        load * num_servers * 1e9 / service_ns,
        f"instances.prefill.count={num_servers}",
        *("instances.decode.max_num_seqs=1", f"instances.decode.npus={num_servers}"),
        *("instances.decode.num_redundant_experts=4", "scheduler.max_queued_requests=100000"),
    )
    arrivals, waits = arrivals_and_waits(result, service_ns)
    assert waits.tolist() == waits_of_queue(arrivals, service_ns, num_servers).tolist()
    check_mean(waits, mean_wait_of_theory(load, num_servers) * service_ns)


def test_round_robin_gives_every_instance_a_queue_of_its_own(make_config, service_ns):
    result = run(make_config, 1.6e9 / service_ns, "instances.prefill.count=2", "router.policy=round_robin", *ROOMY)
    arrivals, waits = arrivals_and_waits(result, service_ns)
    for first in (0, 1):
        assert waits[first::2].tolist() == waits_of_queue(arrivals[first::2], service_ns, 1).tolist()


def test_the_shorter_queue_lies_between_one_queue_and_chance(make_config, service_ns):
    """Queues that requests join where fewer wait: never idle while two wait, but nobody changes the queue."""
    load = 0.8
    result = run(make_config, 2 * load * 1e9 / service_ns, "instances.prefill.count=2", *ROOMY)
    arrivals, waits = arrivals_and_waits(result, service_ns)
    one_queue = waits_of_queue(arrivals, service_ns, 2).mean()
    by_chance = load * service_ns / (2 * (1 - load))
    assert one_queue <= waits.mean() < 0.75 * by_chance
    assert waits.mean() < 1.5 * one_queue


def test_the_oracle_of_many_servers_is_the_formula_for_one():
    for load in (0.3, 0.6, 0.8):
        assert mean_wait_of_theory(load, 1) == pytest.approx(load / (2 * (1 - load)), rel=1e-9)


@pytest.mark.parametrize(("load", "num_servers"), [(0.5, 2), (0.7, 2), (0.85, 4)])
def test_fixed_service_takes_a_little_more_than_half_of_the_wait_of_random_service(load, num_servers):
    """Exactly half for one server, by Pollaczek and Khinchine; above it for more, and less so the higher the load."""
    offered = load * num_servers
    all_busy = offered**num_servers / factorial(num_servers) / (1 - load)
    some_free = sum(offered**n / factorial(n) for n in range(num_servers))
    erlang_c = (
        all_busy / (all_busy + some_free) / (num_servers * (1 - load))
    )  # mean wait of M/M/c over the service time
    assert 0.5 < mean_wait_of_theory(load, num_servers) / erlang_c < 0.55


LAPTOP = "num_requests: 12, input_len: 70, num_prefixes: 2, prefix_len: 32"


@settings(max_examples=12, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    rate=st.sampled_from([2.0, 20.0, 200.0]),
    output_len=st.integers(1, 12),
    preset=st.sampled_from(["laptop", "laptop-2p2d", "colocated"]),
)
def test_what_is_conserved_in_every_run(make_config, seed, rate, output_len, preset):
    workload = f"workload={{{LAPTOP}, request_rate: {rate}, output_len: {output_len}}}"
    config = make_config(preset, f"seed={seed}", workload)
    result = simulate(config, load_workload(config), keep_events=True)
    records = result.bench.records
    events = [(event.now_ns, event.kind, event.subject, dict(event.details)) for event in result.log.events]
    assert {record.outcome for record in records} == {"finished"}
    # Little's law: the time integral of the number present is the sum of the times that requests are present.
    changes = [(now, {"arrive": 1, "outcome": -1}[kind]) for now, kind, _, _ in events if kind in ("arrive", "outcome")]
    changes.sort()
    instants, steps = np.array(changes, dtype=np.int64).T
    present_ns = int(np.diff(instants) @ np.cumsum(steps)[:-1])
    assert present_ns == pytest.approx(sum(record.simulated.e2el_ns for record in records), abs=len(records))
    # Tokens: what is computed and what is found make the prompts; every token but a prompt's first comes from a step.
    num_computed = sum(d["tokens"] for _, kind, name, d in events if kind == "step" and not name.startswith("decode"))
    num_decoded = sum(d["tokens"] for _, kind, name, d in events if kind == "step" and name.startswith("decode"))
    num_prompt = sum(record.num_prompt_tokens - record.num_cached_tokens for record in records)
    num_output = sum(record.num_output_tokens - 1 for record in records)
    assert num_computed + num_decoded == num_prompt + num_output
    if config.disaggregated:
        assert (num_computed, num_decoded) == (num_prompt, num_output)
    # Bytes: a hand-over has the prompt's latents, the pool moves whole blocks.
    figures, size = result.bench.cluster, block_bytes(config)
    handed_over = [r.num_prompt_tokens for r in records if r.num_output_tokens > 1 and config.disaggregated]
    assert figures["rdma bytes"] == sum(handed_over) * size // config.cache.block_size
    if config.kv_pool.enabled:
        assert figures["ub bytes"] == (figures["pool blocks loaded"] + figures["pool blocks stored"]) * size
        num_found = sum(record.num_cached_tokens for record in records)
        assert figures["pool blocks loaded"] * config.cache.block_size == num_found
