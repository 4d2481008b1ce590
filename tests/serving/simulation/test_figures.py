"""Figures of columns against the records of the same run, against made columns, and byte for byte."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from serving.records import Goodput
from serving.simulation.figures import figures, summarize_columns
from serving.simulation.run import simulate
from serving.simulation.usage import admission_figures, phase_figures, pool_figures
from serving.simulator import run_in_virtual_time
from serving.summary import Summary, summarize
from serving.workloads.load import load_workload

GOODPUT = Goodput(ttft_ms=60, tpot_ms=19)


def flat(values):
    return {k: v for k, v in dataclasses.asdict(values).items() if k != "percentiles"} | values.percentiles


def assert_equal(one: Summary, other: Summary, *, but=()):
    for field in dataclasses.fields(Summary):
        if field.name in but:
            continue
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        if field.name == "simulated":
            assert mine.keys() == theirs.keys()
            for metric, values in mine.items():
                for key, value in flat(values).items():
                    assert value == pytest.approx(flat(theirs[metric])[key], rel=1e-12), (metric, key)
        else:
            assert mine == theirs, field.name


@pytest.mark.parametrize("name", ["laptop", "laptop-2p2d", "colocated"])
def test_the_summary_of_columns_is_that_of_the_records(make_config, name):
    config = make_config(name, "workload={num_requests: 60, input_len: 60, prefix_len: 32, request_rate: 40}")
    workload = load_workload(config)
    run, result = simulate(config, workload), run_in_virtual_time(config, workload)
    seen = summarize(result.bench.records, duration_s=result.simulated_s).simulated
    goodput = Goodput(ttft_ms=seen["ttft"].median_ms, tpot_ms=seen["tpot"].percentiles[90.0])
    records = summarize(result.bench.records, duration_s=result.simulated_s, goodput=goodput)
    assert 0 < records.slo_attainment["simulated"] < 1
    assert_equal(summarize_columns(run, goodput=goodput), records)


def test_with_drafts_only_the_peak_differs_since_steps_know_when_tokens_came(make_config):
    config = make_config("laptop", "speculative.num_speculative_tokens=1", "workload.num_requests=30")
    workload = load_workload(config)
    run, result = simulate(config, workload), run_in_virtual_time(config, workload)
    assert run.num_accepted > 0
    records = summarize(result.bench.records, duration_s=result.simulated_s)
    assert_equal(summarize_columns(run), records, but=("max_output_tokens_per_s",))


def test_nothing_finished_is_a_summary_too(make_config, made_run):
    run = made_run(20, num_unfinished=20)
    summary = summarize_columns(run, goodput=GOODPUT)
    assert (summary.completed, summary.simulated, summary.cache_hit_rate) == (0, {}, None)
    values = figures(make_config("disaggregated"), load_workload(make_config("disaggregated")), run, goodput=GOODPUT)
    json.dumps(values, allow_nan=False)
    assert values["phases_ms"] == {}


def test_the_reasons_of_what_did_not_finish(made_run):
    run = made_run(50)
    reasons = ("length", "prompt_too_long", "queue_full")
    outcome, reason = np.zeros(50, np.int16), np.zeros(50, np.int16)
    outcome[:4], reason[:3], reason[3] = 1, 2, 1
    requests = dataclasses.replace(run.requests, outcome=outcome, reason=reason, reasons=reasons)
    run = dataclasses.replace(run, requests=requests)
    summary = summarize_columns(run)
    assert summary.reasons == {"rejected: queue_full": 3, "rejected: prompt_too_long": 1}
    assert (summary.completed, summary.failed) == (46, 4)


def test_keys_and_sums_of_a_small_run(make_config):
    config = make_config("laptop", "workload={num_requests: 30, input_len: 60, prefix_len: 32, request_rate: 40}")
    workload = load_workload(config)
    run = simulate(config, workload)
    values = figures(config, workload, run, goodput=GOODPUT)
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert "date" not in values
    cache = values["cache"]
    assert cache["hit_rate_tokens"] == values["cache_hit_rate"] == cache["cached_tokens"] / cache["prompt_tokens"]
    assert cache["cached_blocks"] * config.cache.block_size == cache["cached_tokens"]
    slo = values["slo"]
    assert slo["attainment"] <= min(slo["ttft_attainment"], slo["tpot_attainment"])
    prefill, decode = values["instances"]
    for instance in (prefill, decode):
        assert sum(part["share"] for part in instance["breakdown"].values()) == pytest.approx(1)
        parts_ms = sum(part["ms_per_step"] for part in instance["breakdown"].values())
        assert parts_ms == pytest.approx(instance["mean_step_ms"])
        assert 0 < instance["busy_share"] <= 1
        assert 0 < instance["kv_occupancy"]["mean"] <= instance["kv_occupancy"]["max"] <= 1
    assert prefill["batch_fill"] is None
    seqs, time_ns = run.instances[1].num_seqs, run.instances[1].charged_ns
    slots = 4 * config.instances["decode"].max_num_seqs  # of four ranks
    assert decode["batch_fill"]["mean"] == pytest.approx(np.average(seqs, weights=time_ns) / slots)
    assert decode["batch_fill"]["max"] == seqs.max() / slots
    rates = values["throughput"]
    assert rates["output"]["num_tokens"] == values["total_output_tokens"]
    assert prefill["tokens"] == rates["prefill"]["num_tokens"] == cache["prompt_tokens"] - cache["cached_tokens"]
    # Four live NPUs of one die with 752 TFLOPS of INT8 each (configs/hardware/cloudmatrix384.yaml).
    tokens_per_s = decode["output_tokens"] / values["simulated_s"]
    assert rates["decode"]["tokens_per_s_per_npu"] == pytest.approx(tokens_per_s / 4)
    assert rates["decode"]["tokens_per_s_per_tflops"] == pytest.approx(tokens_per_s / 4 / 752)
    assert set(values["planes"]) == {"rdma", "ub", "vpc"}
    assert values["pool"]["stored"] * run.pool.block_bytes == values["pool"]["used_bytes"]


def test_a_queue_is_weighted_by_time(made_run):
    """Three wait: [0, 4) s, [1, 4) s, [1, 2) s of 10 s."""
    run = made_run(4)
    arrival, scheduled = np.array([0, 1, 1, 5]) * 10**9, np.array([4, 4, 2, 5]) * 10**9
    requests = dataclasses.replace(run.requests, arrival_ns=arrival, scheduled_ns=scheduled)
    queue = admission_figures(dataclasses.replace(run, requests=requests, simulated_s=10.0))
    # 1 for 1 s, 3 for 1 s, 2 for 2 s
    assert queue == {"mean": 0.8, "p99": 3.0, "max": 3, "waited_requests": 3}


def test_phases_add_up_to_the_latencies(made_run):
    run = made_run(200)
    phases = phase_figures(run)
    requests = run.requests
    counted = requests.decode_start_ns >= 0
    ttft_ms = (requests.first_token_ns - requests.arrival_ns).mean() / 1e6
    assert sum(phases[name]["mean"] for name in ("admission", "prefill_queue", "prefill")) == pytest.approx(ttft_ms)
    later_ms = (requests.last_token_ns - requests.first_token_ns)[counted].mean() / 1e6
    assert phases["hand_over"]["mean"] + phases["decode"]["mean"] == pytest.approx(later_ms)


def test_the_pool_s_occupancy_is_over_time(made_run):
    """Empty for 1 s, a quarter for 2 s, half for 1 s."""
    pool = dataclasses.replace(
        made_run(10).pool,
        capacity_bytes=400,
        time_ns=np.array([10**9, 3 * 10**9]),
        used_bytes=np.array([100, 200]),
    )
    assert pool_figures(pool, 4.0)["occupancy"] == {"mean": 0.25, "p99": 0.5, "max": 0.5}


PROGRAM = """
import json
from serving.config_file import load_config
from serving.simulation.figures import figures
from serving.simulation.run import simulate
from serving.workloads.load import load_workload
config = load_config("laptop-2p2d", ["workload.num_requests=12"])
workload = load_workload(config)
values = figures(config, workload, simulate(config, workload, digest=True))
del values["machine"]
print(json.dumps(values))
"""


def test_the_same_bytes_whatever_strings_hash_to():
    def output(hash_seed: str) -> str:
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", PROGRAM]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True).stdout

    assert output("1") == output("2") != ""
