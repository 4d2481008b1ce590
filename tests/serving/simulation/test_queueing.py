"""The simulator against queueing theory: configurations that degenerate to queues whose answers are known.

Every queue is compared twice: request by request with a recursion that is the queue's definition, exactly, under both
drivers; and the recursion on average with the formula of theory, within a confidence interval from arrivals of many
seeds.
"""

import heapq
from math import factorial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import poisson, t

from serving.plan import block_bytes
from serving.simulation.fast import run_fast
from serving.simulation.plain import run_plain
from serving.simulator import run_in_virtual_time
from serving.workloads.arrivals import Arrivals, generator_for
from serving.workloads.load import load_workload
from serving.workloads.workload import to_ns

NUM_REQUESTS = 800
CONFIDENCE = 0.999
NUM_SEEDS = 200
NO_POOL = "kv_pool.enabled=false"
# A request of one token is over with its prefill: decode's slots are only what lets it in.
ONE_TOKEN = "input_len: 64, output_len: 1, range_ratio: 0.0, num_prefixes: 0, prefix_len: 0"
ROOMY = ("instances.decode.max_num_seqs=64", "scheduler.max_queued_requests=100000")


DRIVERS = pytest.mark.parametrize("drive", [run_plain, run_fast])


@pytest.fixture(scope="module")
def service_ns(make_config):
    """What a prompt of the queues' length costs alone."""
    _, times = run(run_plain, make_config, 1.0, *ROOMY, num_requests=1)
    return int(times[0])


def run(drive, make_config, rate, *overrides, num_requests=NUM_REQUESTS):
    """Poisson arrivals at prefill instances that take one request at a time: instants, and times in the system, ns."""
    workload = f"workload={{num_requests: {num_requests}, request_rate: {rate}, {ONE_TOKEN}}}"
    config = make_config("laptop", NO_POOL, "instances.prefill.max_num_seqs=1", workload, *overrides)
    requests = drive(config, load_workload(config)).requests
    assert requests.is_finished.all()
    return requests.arrival_ns, requests.last_token_ns - requests.arrival_ns


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


def check_mean(arrivals, service_ns, load, num_servers):
    """The mean of theory lies in the interval of the queue's, over arrivals of many seeds; the first are `arrivals`.

    One run alone says little: at a high load its mean is off by a quarter.
    """
    poisson_arrivals = Arrivals.from_request_rate(load * num_servers * 1e9 / service_ns)
    runs = [to_ns(poisson_arrivals.times_s(generator_for(seed, "arrivals"), NUM_REQUESTS)) for seed in range(NUM_SEEDS)]
    assert runs[0].tolist() == arrivals.tolist()
    means = np.array([waits_of_queue(instants, service_ns, num_servers).mean() for instants in runs]) / service_ns
    half = t.ppf((1 + CONFIDENCE) / 2, NUM_SEEDS - 1) * means.std(ddof=1) / np.sqrt(NUM_SEEDS)
    expected = mean_wait_of_theory(load, num_servers)
    assert half < 0.12 * expected, "too wide an interval to tell anything"
    assert abs(means.mean() - expected) < half


@DRIVERS
@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_one_prefill_instance_is_an_m_d_1_queue(drive, make_config, service_ns, load):
    arrivals, times = run(drive, make_config, load * 1e9 / service_ns, *ROOMY)
    waits = times - service_ns
    assert waits.tolist() == waits_of_queue(arrivals, service_ns, 1).tolist()
    check_mean(arrivals, service_ns, load, 1)


@DRIVERS
@pytest.mark.parametrize(("num_servers", "load"), [(2, 0.7), (4, 0.85)])
def test_instances_behind_a_full_house_are_an_m_d_c_queue(drive, make_config, service_ns, num_servers, load):
    """As many decode slots as prefill instances: requests wait in the one queue of the frontend."""
    arrivals, times = run(
        drive,
        make_config,
        load * num_servers * 1e9 / service_ns,
        f"instances.prefill.count={num_servers}",
        *("instances.decode.max_num_seqs=1", f"instances.decode.npus={num_servers}"),
        *("instances.decode.num_redundant_experts=4", "scheduler.max_queued_requests=100000"),
    )
    waits = times - service_ns
    assert waits.tolist() == waits_of_queue(arrivals, service_ns, num_servers).tolist()
    check_mean(arrivals, service_ns, load, num_servers)


@DRIVERS
def test_round_robin_gives_every_instance_a_queue_of_its_own(drive, make_config, service_ns):
    overrides = ("instances.prefill.count=2", "router.policy=round_robin", *ROOMY)
    arrivals, times = run(drive, make_config, 1.6e9 / service_ns, *overrides)
    for first in (0, 1):
        waits = times[first::2] - service_ns
        assert waits.tolist() == waits_of_queue(arrivals[first::2], service_ns, 1).tolist()


@DRIVERS
def test_the_shorter_queue_lies_between_one_queue_and_chance(drive, make_config, service_ns):
    """Queues that requests join where fewer wait: never idle while two wait, but nobody changes the queue."""
    load = 0.8
    arrivals, times = run(drive, make_config, 2 * load * 1e9 / service_ns, "instances.prefill.count=2", *ROOMY)
    mean_ns = times.mean() - service_ns
    one_queue = waits_of_queue(arrivals, service_ns, 2).mean()
    by_chance = load * service_ns / (2 * (1 - load))
    assert one_queue <= mean_ns < 0.75 * by_chance
    assert mean_ns < 1.5 * one_queue


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
SMALL_RUNS = given(
    seed=st.integers(0, 10**6),
    rate=st.sampled_from([2.0, 20.0, 200.0]),
    output_len=st.integers(1, 12),
    preset=st.sampled_from(["laptop", "laptop-2p2d", "colocated"]),
)


def small_run(make_config, preset, seed, rate, output_len):
    workload = f"workload={{{LAPTOP}, request_rate: {rate}, output_len: {output_len}}}"
    config = make_config(preset, f"seed={seed}", workload)
    return config, load_workload(config)


@settings(max_examples=10, derandomize=True)
@SMALL_RUNS
def test_littles_law_holds_in_every_run(make_config, seed, rate, output_len, preset):
    """The time integral of the number present, by the log, is the sum of the requests' times, by their records."""
    result = run_in_virtual_time(*small_run(make_config, preset, seed, rate, output_len), keep_events=True)
    step_of = {"arrive": 1, "outcome": -1}
    changes = sorted((event.now_ns, step_of[event.kind]) for event in result.log.events if event.kind in step_of)
    instants, steps = np.array(changes, dtype=np.int64).T
    present_ns = int(np.diff(instants) @ np.cumsum(steps)[:-1])
    times_ns = [round(record.simulated.e2el_ns) for record in result.bench.records]
    assert (present_ns, len(times_ns)) == (sum(times_ns), 12)


@settings(max_examples=10, derandomize=True)
@SMALL_RUNS
def test_tokens_and_bytes_are_conserved_in_every_run(make_config, seed, rate, output_len, preset):
    config, workload = small_run(make_config, preset, seed, rate, output_len)
    for drive in (run_plain, run_fast) if config.disaggregated else (run_plain,):
        columns = drive(config, workload)
        requests = columns.requests
        assert requests.is_finished.all()
        # What is computed and what is found make the prompts; every token but a prompt's first comes from a step.
        computed = dict.fromkeys(config.instances, 0)
        for instance in columns.instances:
            computed[instance.role] += int(instance.num_tokens.sum())
        num_prompt = int((requests.num_prompt_tokens - requests.num_cached_tokens).sum())
        num_output = int((requests.num_output_tokens - 1).sum())
        if config.disaggregated:
            assert computed == {"prefill": num_prompt, "decode": num_output}
        else:
            assert computed == {"colocated": num_prompt + num_output}
        # A hand-over has the prompt's latents, the pool moves whole blocks.
        size = block_bytes(config)
        is_handed_over = (requests.num_output_tokens > 1) & config.disaggregated
        num_handed_over = int(requests.num_prompt_tokens[is_handed_over].sum())
        assert columns.planes["rdma"].num_bytes == num_handed_over * size // config.cache.block_size
        assert columns.planes["rdma"].num_transfers == is_handed_over.sum()
        if columns.pool is not None:
            num_blocks = columns.pool.num_loaded_blocks + columns.pool.num_stored_blocks
            assert columns.planes["ub"].num_bytes == num_blocks * size
            assert columns.pool.num_loaded_blocks * config.cache.block_size == requests.num_pool_tokens.sum()
        assert set(columns.held_at_rest.values()) == {0}
