"""Timing shards and torch shards make the same decisions at the same instants, and so does every repetition."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.config import ModelConfig
from model.reference import ReferenceModel
from serving.local_devices import local_transport
from serving.report import to_json
from serving.simulation.run import simulate
from serving.simulator import run_in_virtual_time
from serving.workloads.load import load_workload

FEW = "workload={num_requests: 8, input_len: 24, output_len: 5, num_prefixes: 2, prefix_len: 16, request_rate: 40}"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def both(checkpoint):
    """A function: run a configuration with timing shards and with torch shards; the two results."""

    def run(config):
        workload = load_workload(config)
        simulated = run_in_virtual_time(config, workload, keep_events=True)
        replayed = run_in_virtual_time(
            config, workload, open_transport=lambda: local_transport(config, checkpoint), keep_events=True
        )
        return simulated, replayed

    return run


@pytest.fixture(scope="module")
def reference(checkpoint):
    return ReferenceModel(ModelConfig.from_file(checkpoint / "config.json"), checkpoint)


def without_wall(result) -> str:
    """A result as JSON, but for what a machine's clock shows."""
    payload = to_json(result.bench)
    assert payload.pop("date")
    cluster = payload["cluster"]
    assert cluster.pop("wall_s") > 0
    return json.dumps(payload, sort_keys=True)


@pytest.mark.parametrize("name", ["laptop", "laptop-2p2d", "colocated"])
def test_simulate_and_replay_decide_alike(both, make_config, name):
    simulated, replayed = both(make_config(name, FEW))
    assert simulated.log.events == replayed.log.events
    assert simulated.digest == replayed.digest
    assert simulated.simulated_s == replayed.simulated_s
    assert simulated.bench.summary == replayed.bench.summary
    assert [record.simulated for record in simulated.bench.records] == [
        record.simulated for record in replayed.bench.records
    ]
    assert all(record.outcome == "finished" for record in replayed.bench.records)


@st.composite
def overrides(draw, role):
    """Overrides of a small run: some too small for their workload, so that requests queue and are preempted."""
    seqs = draw(st.integers(1, 4))
    block_size = draw(st.sampled_from([2, 4, 16]))
    values = {
        "cache.block_size": block_size,
        f"instances.{role}.npus": draw(st.sampled_from([1, 2, 4])),
        f"instances.{role}.num_blocks": -(-128 // block_size) + draw(st.integers(0, 8)),
        f"instances.{role}.max_num_seqs": seqs,
        f"instances.{role}.max_num_batched_tokens": seqs + draw(st.integers(0, 30)),
        f"instances.{role}.prefix_caching": draw(st.sampled_from(["true", "false"])),
        "router.policy": draw(st.sampled_from(["least_loaded", "round_robin", "power_of_two", "prefix_affinity"])),
        "scheduler.policy": draw(st.sampled_from(["fcfs", "priority"])),
        "scheduler.max_queued_requests": draw(st.sampled_from([1, 3, 256])),
        "kv_pool.enabled": draw(st.sampled_from(["true", "false"])),
        "kv_pool.dram_bytes_per_host": draw(st.sampled_from([1_200_000, 5_000_000, 2**30])),
        "kv_pool.lease_s": draw(st.sampled_from([1e-6, 10.0])),
        "workload.request_rate": draw(st.sampled_from(["5", "50", "inf"])),
        "workload.max_concurrency": draw(st.sampled_from(["null", "2"])),
        "workload.input_len": draw(st.integers(17, 60)),
        "workload.output_len": draw(st.integers(1, 40)),
        "workload.num_requests": draw(st.integers(1, 6)),
        "workload.prefix_len": draw(st.integers(0, 16)),
        "seed": draw(st.integers(0, 100)),
    }
    if role == "decode":
        values["instances.prefill.prefix_caching"] = draw(st.sampled_from(["true", "false"]))
        values["instances.prefill.count"] = draw(st.sampled_from([1, 2]))
        values["instances.prefill.max_num_batched_tokens"] = draw(st.sampled_from([8, 30, 64]))
    return [f"{key}={value:.6f}" if isinstance(value, float) else f"{key}={value}" for key, value in values.items()]


@given(data=st.data(), name=st.sampled_from(["disaggregated", "colocated"]))
@settings(max_examples=25, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_small_run_decides_alike_and_gives_the_reference_tokens(both, make_config, reference, data, name):
    config = make_config(name, *data.draw(overrides("decode" if name == "disaggregated" else "colocated")))
    workload = load_workload(config)
    simulated, replayed = both(config)
    assert simulated.log.events == replayed.log.events
    assert simulated.digest == replayed.digest == simulate(config, workload, digest=True).digest
    assert not any(replayed.bench.held_at_rest.values())
    finished = {record.request_id for record in replayed.bench.records if record.outcome == "finished"}
    assert len(replayed.bench.records) == len(workload)
    for item in workload.requests[:3]:
        if item.request_id in finished:
            prompt = workload.prompt_token_ids(item).tolist()
            expected = reference.generate(prompt, item.max_tokens)
            assert replayed.token_ids[item.request_id] == expected.token_ids


def test_a_repetition_is_equal_to_the_byte_and_another_seed_is_another_run(make_config):
    config, other = make_config("laptop", FEW), make_config("laptop", FEW, "seed=1")
    first, again = (run_in_virtual_time(config, load_workload(config)) for _ in range(2))
    assert first.digest == again.digest
    assert without_wall(first) == without_wall(again)
    assert run_in_virtual_time(other, load_workload(other)).digest != first.digest


@pytest.mark.parametrize("policy", ["least_loaded", "power_of_two"])
def test_no_decision_depends_on_the_seed_of_pythons_hashes(policy):
    script = (
        "from serving.config_file import load_config\n"
        "from serving.simulator import run_in_virtual_time\n"
        "from serving.workloads.load import load_workload\n"
        f"config = load_config('laptop-2p2d', ['workload.num_requests=30', 'router.policy={policy}'])\n"
        "print(run_in_virtual_time(config, load_workload(config)).digest)"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", script],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "4242")
    }
    assert len(digests) == 1
