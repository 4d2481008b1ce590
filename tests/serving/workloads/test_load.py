"""Which workload a run has: what comes first, what cuts it, and whose rate it has."""

import json
import subprocess
import sys

import numpy as np
import pytest

from serving.errors import ConfigError
from serving.workloads.generators import generate
from serving.workloads.load import load_workload

SYNTHETIC = "workload={input_len: 40, output_len: 8, prefix_len: 8}"  # all else is as by default


@pytest.fixture
def trace(tmp_path):
    """20 requests, two a second; each third one is longer than the context of the configurations here, 128."""
    path = tmp_path / "trace.jsonl"
    lengths = [(5000 if i % 3 == 2 else 100, 20) for i in range(20)]
    rows = [
        {"timestamp": 500 * i, "input_length": n, "output_length": m, "hash_ids": list(range(-(-n // 512)))}
        for i, (n, m) in enumerate(lengths)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_trace_comes_first_then_a_name_then_that_of_the_configuration_then_synthetic_prompts(make_config, trace):
    plain = make_config("disaggregated", SYNTHETIC)
    named = make_config("disaggregated", "workload={name: chat}")
    assert load_workload(plain).name == "synthetic"
    assert load_workload(named).name == "chat"
    assert load_workload(named, name="code").name == "code"
    assert load_workload(named, name="code", trace=trace).name == "trace.jsonl"


def test_a_trace_is_clipped_only_where_it_is_divided(make_config, trace):
    config = make_config("disaggregated", SYNTHETIC)
    full = load_workload(config, trace=trace)
    assert full.num_prompt_tokens[:3].tolist() == [100, 100, 5000]
    small = load_workload(config, trace=trace, trace_divisor=4)
    assert small.num_prompt_tokens[:3].tolist() == [25, 25, 64]
    assert small.max_tokens[:3].tolist() == [5, 5, 5]


def test_a_trace_runs_whole_unless_an_argument_says_how_much(make_config, trace):
    """The configuration's own numbers are those of its own workload."""
    counted = make_config("disaggregated", SYNTHETIC, "workload.num_requests=7")
    assert len(load_workload(counted, trace=trace)) == 20
    assert len(load_workload(counted, trace=trace, num_requests=9)) == 9
    assert len(load_workload(counted, trace=trace, duration_s=6.0)) == pytest.approx(12, abs=1)


def test_a_rate_scales_the_times_of_a_trace(make_config, trace):
    config = make_config("disaggregated", SYNTHETIC)
    plain, fast = load_workload(config, trace=trace), load_workload(config, trace=trace, rate=8.0)
    assert len(fast) / (fast.arrival_ns[-1] / 1e9) == pytest.approx(8.0)
    ratio = plain.arrival_ns[1:] / fast.arrival_ns[1:]
    assert ratio == pytest.approx(np.full(19, ratio[0]))


def test_a_generator_has_its_own_arrivals_where_nothing_is_set(make_config):
    plain = make_config("disaggregated", "workload={name: chat}")
    expected = generate("chat", num_requests=48, max_model_len=128, vocabulary=load_workload(plain).vocabulary)
    assert load_workload(plain) == expected
    assert load_workload(plain, rate=100.0).arrival_ns[-1] < expected.arrival_ns[-1] / 10
    assert load_workload(plain, seed=5).digest != expected.digest
    slow = make_config("disaggregated", "workload={name: chat, request_rate: 0.01, arrivals: constant}")
    assert np.diff(load_workload(slow).arrival_ns).tolist() == [100 * 10**9] * 47
    assert np.diff(load_workload(slow, rate=0.1).arrival_ns).tolist() == [10 * 10**9] * 47


@pytest.mark.parametrize("name", [None, "chat"])
def test_ramps_and_bursts_shape_the_arrivals(make_config, name):
    common = f"name: {name or 'null'}, arrivals: constant, input_len: 40, output_len: 8, prefix_len: 8, duration_s: 100"
    ramp = make_config("disaggregated", f"workload={{{common}, ramp: {{start_rps: 1.0, end_rps: 9.0}}}}")
    gaps = np.diff(load_workload(ramp).arrival_ns) / 1e9
    assert 1 / gaps[[0, -1]] == pytest.approx([1.0, 9.0], rel=0.1)
    bursts = "bursts: {factor: 4.0, period_s: 50.0, duration_s: 10.0}"
    config = make_config("disaggregated", f"workload={{{common}, request_rate: 2.0, {bursts}}}")
    times = load_workload(config).arrival_ns / 1e9
    assert np.histogram(times, bins=[0, 40, 50, 90, 100])[0].tolist() == pytest.approx([80, 80, 80, 80], abs=1)


def test_a_duration_decides_how_many_synthetic_requests_there_are(make_config):
    config = make_config("disaggregated", SYNTHETIC, "workload.duration_s=100", "workload.request_rate=20")
    workload = load_workload(config)
    assert len(workload) == pytest.approx(2000, rel=0.1)
    assert workload.arrival_ns[-1] < 100e9
    assert len(load_workload(config, num_requests=30)) == 30
    assert len(load_workload(config, duration_s=10.0)) == pytest.approx(200, rel=0.3)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["workload.bursts={factor: 2.0, period_s: 5.0, duration_s: 6.0}"], "bursts.duration_s: 6 exceeds period_s 5"),
        (["workload.duration_s=4", "workload.request_rate=inf"], "workload.duration_s: needs a finite request_rate"),
        (["workload.arrivals=poisson", "workload.burstiness=2"], "workload.burstiness: 2 is used with"),
        (["workload.name=poetry"], "workload.name"),
        (["workload.ramp={start_rps: 0.0, end_rps: 1.0}"], "workload.ramp.start_rps"),
        (
            [
                "workload.ramp={start_rps: 1.0, end_rps: 2.0}",
                "workload.bursts={factor: 2.0, period_s: 5.0, duration_s: 1.0}",
            ],
            "workload.bursts: cannot be had with workload.ramp",
        ),
    ],
)
def test_keys_that_contradict_each_other_are_named(make_config, overrides, message):
    with pytest.raises(ConfigError) as caught:
        make_config("disaggregated", SYNTHETIC, *overrides)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rate": 0.0}, "rate: 0.0 is not in [1e-06, 1e+09]"),
        ({"duration_s": float("nan")}, "duration_s: nan must be finite"),
        ({"num_requests": 0}, "num_requests: 0 is below the limit 1"),
        ({"name": "poetry"}, "workload 'poetry': is none of"),
        ({"duration_s": 1e-9}, "duration_s: no request arrives within 1e-09 s"),
    ],
)
def test_arguments_out_of_range_are_named(make_config, arguments, message):
    with pytest.raises(ConfigError) as caught:
        load_workload(make_config("disaggregated", SYNTHETIC), **arguments)
    assert message in str(caught.value)


def test_loading_a_workload_imports_neither_the_live_system_nor_a_tensor_library():
    program = "import sys, serving.workloads.load; print(*sorted(sys.modules))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert not {"torch", "ray", "pyarrow", "scipy", "serving.cluster", "serving.frontend"} & set(run.stdout.split())
