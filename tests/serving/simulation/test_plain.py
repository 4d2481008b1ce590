"""Columns of the plain plane, and of whatever `simulate` takes, against the events and records of the same run."""

import subprocess
import sys

import numpy as np
import pytest

from serving.pool_moves import MOVE_KINDS
from serving.simulation.columns import NEVER
from serving.simulation.plain import run_plain
from serving.simulation.run import peak_rss_bytes, simulate
from serving.simulator import run_in_virtual_time
from serving.workloads.load import load_workload
from serving.workloads.requests import WorkloadRequest
from serving.workloads.workload import Workload

LOAD = "workload={num_requests: 30, input_len: 60, output_len: 9, prefix_len: 32, request_rate: 60}"


PRESETS = ("laptop", "laptop-2p2d", "colocated")


@pytest.fixture(scope="module", params=[(run, name) for run in (run_plain, simulate) for name in PRESETS])
def both(request, make_config):
    """A run as columns, and the same run as events and records."""
    run, name = request.param
    config = make_config(name, LOAD)
    workload = load_workload(config)
    return run(config, workload, moves=True, digest=True), run_in_virtual_time(config, workload, keep_events=True)


def events(result, *kinds):
    return [
        (event.now_ns, event.kind, event.subject, dict(event.details))
        for event in result.log.events
        if event.kind in kinds
    ]


def test_the_run_is_the_same(both):
    run, result = both
    assert run.digest == result.digest
    assert run.simulated_s == result.simulated_s
    assert (run.interrupted, run.num_not_arrived) == (False, 0)


def test_instants_of_requests_are_those_of_the_events(both):
    run, result = both
    requests = run.requests
    assert list(requests.request_ids) == [record.request_id for record in result.bench.records]
    names = [instance.instance_id for instance in run.instances]
    index = {request_id: i for i, request_id in enumerate(requests.request_ids)}
    for now_ns, kind, subject, details in events(result, "arrive", "place", "kv_transfer", "outcome"):
        i = index[subject]
        if kind == "arrive":
            assert (requests.arrival_ns[i], requests.num_prompt_tokens[i]) == (now_ns, details["prompt"])
        elif kind == "place":
            assert requests.scheduled_ns[i] == now_ns
            placed = names[requests.prefill_instance[i]], names[requests.decode_instance[i]], requests.decode_rank[i]
            assert placed == (details["prefill"], details["decode"], details["rank"])
        elif kind == "kv_transfer":
            assert requests.first_token_ns[i] == now_ns < requests.decode_start_ns[i]
        else:
            assert (requests.last_token_ns[i], requests.num_output_tokens[i]) == (now_ns, details["tokens"])
            assert requests.reasons[requests.reason[i]] == details["reason"]
    assert requests.is_finished.all()
    assert (requests.num_pool_tokens <= requests.num_cached_tokens).all()
    if run.pool is None:
        assert (requests.decode_start_ns == NEVER).all()


def test_steps_are_those_of_the_events(both):
    run, result = both
    for instance in run.instances:
        steps = [(now, d) for now, _, subject, d in events(result, "step") if subject == instance.instance_id]
        assert instance.start_ns.tolist() == [now_ns for now_ns, _ in steps]
        for column, name in (("charged_ns", "charged_ns"), ("num_seqs", "rows"), ("num_tokens", "tokens")):
            assert getattr(instance, column).tolist() == [details[name] for _, details in steps]
        assert sum(instance.breakdown_ns.values()) == instance.busy_ns
        assert (instance.num_joined <= instance.num_seqs).all()
        assert (instance.num_used_blocks <= instance.num_blocks).all()
        assert instance.num_used_blocks.max() > 0
        assert (instance.max_kv_tokens >= instance.num_tokens // instance.num_ranks).all()
    assert sum(int(instance.num_sampled.sum()) for instance in run.instances) == run.requests.num_output_tokens.sum()


def test_gaps_between_tokens_are_those_of_the_records(both):
    run, result = both
    gaps = []
    for instance in run.instances:
        gaps.append(instance.first_gaps_ns)
        if instance.role != "prefill":
            ends = instance.start_ns + instance.charged_ns
            gaps.append(np.repeat(np.diff(ends), (instance.num_seqs - instance.num_joined)[1:]))
        else:
            assert (instance.num_joined == instance.num_seqs).all()
    kept = np.concatenate([record.simulated.itl_ns for record in result.bench.records])
    assert np.sort(np.concatenate(gaps)).tolist() == np.sort(kept).tolist()


def test_movements_are_those_of_the_events(both):
    run, result = both
    moves, requests = run.moves, run.requests
    told = [
        (MOVE_KINDS[kind], requests.request_ids[request], start_ns)
        for kind, request, start_ns in zip(moves.kind, moves.request, moves.start_ns, strict=True)
    ]
    assert told == [(kind, subject, now_ns) for now_ns, kind, subject, _ in events(result, *MOVE_KINDS)]
    assert (moves.end_ns > moves.start_ns).all()
    by_kind = {kind: int(moves.num_bytes[moves.kind == code].sum()) for code, kind in enumerate(MOVE_KINDS)}
    assert by_kind["kv_transfer"] == run.planes["rdma"].num_bytes
    assert by_kind["pool_load"] + by_kind["pool_store"] == run.planes["ub"].num_bytes


def test_the_pool_is_filled_by_what_is_stored(both):
    run, _ = both
    if run.pool is None:
        return
    assert run.pool.num_stored_blocks > 0
    assert run.pool.num_loaded_blocks * run.instances[0].num_ranks > 0
    assert (
        run.pool.host_used_bytes.sum() == run.pool.used_bytes[-1] == run.pool.num_stored_blocks * run.pool.block_bytes
    )
    assert (np.diff(run.pool.time_ns) > 0).all()


def test_what_a_run_cost_this_machine_is_noted(make_config):
    config = make_config("laptop", LOAD)
    run = simulate(config, load_workload(config))
    assert run.wall_s > 0
    assert 2**24 < run.peak_rss_bytes <= peak_rss_bytes()


@pytest.mark.parametrize("run_driver", [run_plain, simulate])
def test_refused_and_preempted_requests(make_config, run_driver):
    """128 tokens of KV for two requests that grow to 90 each: the later one is preempted, and prefilled again."""
    config = make_config(
        "disaggregated", "instances.decode={npus: 1, dies_per_npu: 1, num_blocks: 32, max_num_seqs: 8, "
        "max_num_batched_tokens: 64}", "scheduler.max_queued_requests=0", "model.max_model_len=128"
    )  # fmt: skip
    asked = [(20, 70, 0), (20, 70, 0), (120, 9, 10), (20, 5, 10**11)]
    given = [
        WorkloadRequest(
            request_id=f"r{i}",
            num_prompt_tokens=num_prompt,
            max_tokens=max_tokens,
            arrival_ns=arrival_ns,
            prompt_token_ids=tuple(range(16, 16 + num_prompt)),
        )
        for i, (num_prompt, max_tokens, arrival_ns) in enumerate(asked)
    ]
    workload = Workload(name="given", requests=given)
    run = run_driver(config, workload)
    requests = run.requests
    assert requests.num_preemptions.tolist() == [0, 1, 0, 0]
    assert [requests.reasons[code] for code in requests.reason] == ["length", "length", "prompt_too_long", "length"]
    assert requests.scheduled_ns[2] == requests.prefill_start_ns[2] == requests.last_token_ns[2] == NEVER
    assert requests.prefill_instance[2] == requests.decode_rank[2] == NEVER
    assert requests.decode_start_ns[1] > requests.first_token_ns[1] + 10**9  # of its second time
    prefill, decode = run.instances
    assert prefill.first_gaps_ns.size == 1  # from its last token to the one of its second prefill
    assert decode.first_gaps_ns.size == 4


PROGRAM = """
import os, signal
import numpy as np
from serving.config_file import load_config
from serving.simulation.figures import summarize_columns
from serving.simulation.plain import run_plain
from serving.simulation.run import simulate
from serving.workloads.load import load_workload
config = load_config("laptop", ["workload.num_requests=4000"])
was_interrupted = False
def interrupt(num_over):
    global was_interrupted
    if num_over >= 20 and not was_interrupted:
        was_interrupted = True
        os.kill(os.getpid(), signal.SIGINT)
run = {driver}(config, load_workload(config), on_progress=interrupt)
print(run.interrupted, run.num_not_arrived + len(run.requests), int(run.requests.is_finished.sum()) >= 20,
      int(run.requests.is_finished.sum()) < 4000, any(run.held_at_rest.values()))
summary = summarize_columns(run)
num_started = np.count_nonzero(run.requests.first_token_ns >= 0)
num_tokens = sum(int(instance.num_sampled.sum()) for instance in run.instances)
print(summary.simulated["ttft"].count == summary.completed < num_started, summary.total_output_tokens < num_tokens,
      summary.simulated["itl"].count == num_tokens - num_started)
"""


@pytest.mark.parametrize("driver", ["run_plain", "simulate"])
def test_an_interrupt_leaves_what_was_finished(driver):
    program = PROGRAM.format(driver=driver)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    first, second = done.stdout.splitlines()
    assert first.split() == ["True", "4000", "True", "True", "False"]
    # Requests count when they have finished, steps as soon as they are over, whoever's tokens they were.
    assert second.split() == ["True", "True", "True"]
