"""The fast driver takes the decisions of the plain control plane, at the same instants; so do torch shards."""

import dataclasses

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving.local_devices import local_transport
from serving.simulation.columns import InstanceColumns, RunColumns
from serving.simulation.fast import run_fast
from serving.simulation.plain import run_plain
from serving.simulator import run_in_virtual_time
from serving.workloads.load import load_workload

QUICK = settings(
    max_examples=60, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def gaps_of(instance: InstanceColumns) -> list[int]:
    """All gaps between tokens, however the columns divide them."""
    ends = instance.start_ns + instance.charged_ns
    followers = (instance.num_seqs - instance.num_joined)[1:]
    assert (followers >= 0).all()
    return sorted([*instance.first_gaps_ns.tolist(), *np.repeat(np.diff(ends), followers).tolist()])


def comparable(run: RunColumns) -> dict[str, object]:
    """Every figure of a run, in a form in which equal runs are equal."""
    values: dict[str, object] = {
        "digest": run.digest,
        "planes": run.planes,
        "drafts": (run.num_drafts, run.num_accepted),
        "simulated_s": run.simulated_s,
    }
    for name, columns in (("requests", run.requests), ("pool", run.pool), ("moves", run.moves)):
        if columns is not None:
            for field in dataclasses.fields(columns):
                value = getattr(columns, field.name)
                if (name, field.name) != ("moves", "instance"):  # of a preempted request, plain knows the last one only
                    values[f"{name}.{field.name}"] = np.asarray(value).tolist()
    for instance in run.instances:
        for field in dataclasses.fields(instance):
            if field.name not in ("num_joined", "first_gaps_ns"):
                value = getattr(instance, field.name)
                values[f"{instance.instance_id}.{field.name}"] = (
                    value.tolist() if isinstance(value, np.ndarray) else value
                )
        if instance.role == "decode":
            values[f"{instance.instance_id}.gaps"] = gaps_of(instance)
    return values


def assert_alike(config, workload, **options) -> RunColumns:
    plain = run_plain(config, workload, moves=True, digest=True)
    fast = run_fast(config, workload, moves=True, digest=True, **options)
    expected, found = comparable(plain), comparable(fast)
    assert {name for name in expected if expected[name] != found[name]} == set()
    assert not any(fast.held_at_rest.values())
    return fast


@st.composite
def overrides(draw):
    """A small run: often too small for its workload, so that requests queue, stall and are preempted."""
    seqs = draw(st.integers(1, 5))
    block_size = draw(st.sampled_from([1, 2, 4, 16, 64]))
    blocks = -(-128 // block_size)
    values = {
        "model.max_model_len": 128,
        "cache.block_size": block_size,
        "instances.decode.npus": draw(st.sampled_from([1, 2, 4])),
        "instances.decode.count": 1,
        "instances.decode.num_blocks": blocks + draw(st.one_of(st.integers(0, 8), st.integers(0, 100))),
        "instances.decode.max_num_seqs": seqs,
        "instances.decode.max_num_batched_tokens": 2 * seqs + draw(st.integers(0, 30)),
        "instances.prefill.count": draw(st.sampled_from([1, 2, 3])),
        "instances.prefill.num_blocks": blocks + draw(st.integers(0, 60)),
        "instances.prefill.max_num_batched_tokens": draw(st.sampled_from([8, 30, 64])),
        "instances.prefill.max_num_seqs": draw(st.sampled_from([1, 2, 8])),
        "instances.prefill.prefix_caching": draw(st.sampled_from(["true", "false"])),
        "router.policy": draw(st.sampled_from(["least_loaded", "round_robin", "power_of_two", "prefix_affinity"])),
        "scheduler.policy": draw(st.sampled_from(["fcfs", "priority"])),
        "scheduler.max_queued_requests": draw(st.sampled_from([0, 1, 3, 256])),
        "kv_pool.enabled": draw(st.sampled_from(["true", "false"])),
        "kv_pool.dram_bytes_per_host": draw(st.sampled_from([5_000_000, 20_000_000, 2**30])),
        "kv_pool.lease_s": draw(st.sampled_from(["0.000001", "10.0"])),
        "speculative.num_speculative_tokens": draw(st.sampled_from([0, 1])),
        "speculative.acceptance": draw(st.sampled_from([0.0, 0.3, 0.7, 1.0])),
        "workload.request_rate": draw(st.sampled_from(["5", "50", "500", "inf"])),
        "workload.max_concurrency": draw(st.sampled_from(["null", "2", "5"])),
        "workload.input_len": draw(st.integers(17, 57)),
        "workload.output_len": draw(st.integers(1, 45)),  # 102 and a quarter fit the context
        "workload.num_requests": draw(st.integers(1, 20)),
        "workload.prefix_len": draw(st.integers(0, 16)),
        "seed": draw(st.integers(0, 100)),
    }
    return [f"{key}={value}" for key, value in values.items()]


@given(changes=overrides(), max_run_steps=st.sampled_from([1, 3, 16]))
@QUICK
def test_any_small_run_is_the_same_in_every_figure(make_config, changes, max_run_steps):
    config = make_config("laptop", *changes)
    assert_alike(config, load_workload(config), max_run_steps=max_run_steps)


@pytest.mark.parametrize("name", ["laptop", "laptop-2p2d"])
def test_shipped_presets_run_the_same(make_config, name):
    config = make_config(name)
    run = assert_alike(config, load_workload(config))
    assert run.requests.is_finished.all()


def test_steps_decided_together_are_those_decided_one_by_one(make_config):
    config = make_config("laptop", "workload.num_requests=40", "speculative.num_speculative_tokens=1")
    workload = load_workload(config)
    one, many = (run_fast(config, workload, digest=True, max_run_steps=most) for most in (1, 16))
    assert comparable(one) == comparable(many)


def test_blocks_that_do_not_last_preempt_and_stall_alike(make_config):
    """One decode rank with few blocks: requests outgrow them, are preempted and come back."""
    config = make_config(
        "laptop",
        "model.max_model_len=128",
        "cache.block_size=4",
        "instances.decode={npus: 1, dies_per_npu: 1, num_blocks: 40, max_num_seqs: 5, max_num_batched_tokens: 10}",
        "workload={num_requests: 12, input_len: 24, output_len: 60, num_prefixes: 0, prefix_len: 0, request_rate: 50}",
    )
    run = assert_alike(config, load_workload(config))
    assert run.requests.num_preemptions.sum() > 0
    assert run.requests.is_finished.all()


def test_torch_shards_decide_as_the_fast_driver(make_config, checkpoint):
    few = "workload={num_requests: 8, input_len: 24, output_len: 5, num_prefixes: 2, prefix_len: 16, request_rate: 40}"
    for name in ("laptop", "laptop-2p2d"):
        config = make_config(name, few)
        workload = load_workload(config)
        replayed = run_in_virtual_time(config, workload, open_transport=lambda c=config: local_transport(c, checkpoint))
        assert run_fast(config, workload, digest=True).digest == replayed.digest
