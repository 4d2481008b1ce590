"""`supernode estimate`: what it prints, its JSON, mistakes, and what it does not import."""

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

from serving import cli
from serving.estimation import estimate_command
from serving.estimation.estimates import ESTIMATES
from serving.estimation.measured_estimates import MEASURED

DATA = Path(__file__).parents[4] / "shared" / "data" / "aiconfigurator"
GEMM = ("gemm", "--groups", "4", "--m", "7168", "--n", "4096", "--k", "4096")
COMMON = {"estimate", "arguments", "coverage"}
STEP = {"tokens_per_s_per_npu", "tokens_per_s_per_tflops", "layer_us", "breakdown", "streams"}
DECODE = STEP | {"tpot_ms", "iteration_ms", "attention_stream_us", "moe_stream_us", "attention_aic"}


@pytest.fixture
def ask(monkeypatch, capsys):
    """Runs `supernode estimate` in this process; gives exit code, standard output and standard error."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["supernode", "estimate", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as end:
            cli.main()
        return (end.value.code or 0, *capsys.readouterr())

    return run


@pytest.mark.parametrize(
    ("arguments", "keys"),
    [
        (("decode",), DECODE),
        (("decode", "--microbatch", "off", "--mtp", "0", "--balance", "none", "--batch-per-npu", "7"), DECODE),
        (("prefill", "--reuse", "0.5", "--pool-plane", "vpc"), STEP | {"ttft_ms", "pool_load_ms"}),
        (("prefill", "--reuse", "0", "--pool-plane", "none"), STEP | {"ttft_ms", "pool_load_ms"}),
        (("dispatch", "--ep", "64", "--tokens", "128"), {"latency_us", "bandwidth_gb_per_s"}),
        (("combine", "--ep", "64", "--tokens", "128"), {"latency_us", "bandwidth_gb_per_s"}),
        (GEMM, {"time_us", "tops", "utilization", "bandwidth_gb_per_s"}),
        (("attention",), {"time_us", "tflops", "utilization", "bandwidth_gb_per_s", "memory_utilization"}),
        (
            ("transfer", "--plane", "ub", "--from", "npu", "--to", "cpu", "--op", "read", "--bytes", "4096", "--scope",
             "intra"),
            {"time_us", "bandwidth_gb_per_s"},
        ),
        (("load-model",), {"cold_start_s", "warm_start_s", "dram_copies", "hit_rate", "switch_s"}),
        (("switches", "--npus", "256"), {"nodes", "logical_switches", "utilization"}),
    ],
)  # fmt: skip
def test_json_is_one_object_and_nothing_else(ask, arguments, keys):
    code, out, err = ask(*arguments, "--json")
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert told.keys() == keys | COMMON
    assert told["estimate"] == arguments[0].replace("-", "_")
    assert told["coverage"].keys() == {"inside", "extrapolated", "notes"}
    again = ESTIMATES[told["estimate"]](**told["arguments"])
    assert again | told == told


def test_options_and_defaults_are_those_of_the_functions():
    commands = {command.callback.__name__: command.callback for command in estimate_command.app.registered_commands}
    assert commands.keys() == ESTIMATES.keys()
    for name, command in commands.items():
        options = dict(inspect.signature(command).parameters)
        assert options.pop("as_json").default is False
        assert (options.pop("tables", None) is not None) == (name in MEASURED)
        parameters = inspect.signature(ESTIMATES[name]).parameters
        assert {o.name: o.default for o in options.values()} == {p.name: p.default for p in parameters.values()}


def test_the_table(ask):
    code, out, err = ask(*GEMM)
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    figures = {line[0]: line[1:] for line in lines if len(line) == 3}
    assert {name: unit for name, (_, unit) in figures.items()} == {
        "time": "us",
        "rate": "TOPS",
        "utilization": "%",
        "bandwidth": "GB/s",
    }
    told = json.loads(ask(*GEMM, "--json")[1])
    assert float(figures["utilization"][0]) == pytest.approx(100 * told["utilization"], rel=1e-3)
    assert out.startswith("gemm: hardware cloudmatrix384, groups 4, m 7168, n 4096, k 4096\n")
    assert out.endswith("\ncoverage: every argument is inside what was published or measured\n")


def test_the_breakdown_is_sorted_and_adds_up(ask):
    out = ask("decode", "--kv-len", "8192", "--batch-per-npu", "32")[1]
    parts, streams, coverage = out.split("\n\n")[-3:]
    shares = [float(line.split()[-1]) for line in parts.splitlines()[1:]]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(100, abs=0.5)
    assert [line.split()[0] for line in streams.splitlines() if line.startswith("  ") and line[2] != " "] == [
        "attention",
        "moe",
    ]
    assert coverage == "coverage: extrapolated\n  extrapolated: kv_len 8192 above 4096\n"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("decode", "--batch-per-npu", "0"), "batch_per_npu: 0 must be at least 1"),
        (("decode", "--kv-len", "-4"), "kv_len: -4 must be at least 1"),
        (("decode", "--acceptance", "nan"), "acceptance: nan must be from 0 to 1"),
        (("decode", "--hardware", "h900"), "hardware: 'h900' is not shipped, only cloudmatrix384"),
        (("decode", "--model", "gpt"), "model: 'gpt' is not shipped, only deepseek-r1, mini-r1"),
        (("decode", "--ep", "1"), "does not fit in HBM: 637.6 GiB of weights + "),
        (("prefill", "--reuse", "1.5"), "reuse: 1.5 must be from 0 to 1"),
        (("gemm", "--m", "1" + "0" * 18, "--n", "1", "--k", "1"), "m: 1000000000000000000 must be at most 10^15"),
        (("transfer", "--bytes", "-1"), "num_bytes: -1 must be at least 0"),
        (("transfer", "--bytes", "1", "--plane", "rdma"), "plane rdma of cloudmatrix384 has no npu-cpu read inter"),
        (("load-model", "--model-bytes", "inf"), "model_bytes: inf must be above 0"),
        (("switches", "--npus", "385"), "num_npus: 385 must be in [1, 384]"),
        (("decode", "--tables", "package"), "tables: hardware 'cloudmatrix384' was not measured, only h100, h200"),
        (("decode", "--tables", "no", "--hardware", "h100"), "decode on h100: no: neither aic_dsv3_h100_"),
        (
            ("decode", "--tables", "no", "--hardware", "h100", "--attention-aic", "8"),
            "attention_aic: 8 was not measured",
        ),
        (("prefill", "--tables", "no", "--hardware", "h200", "--reuse", "0.5"), "reuse: 0.5 was not measured"),
    ],
)
def test_a_mistake_is_one_line(ask, tmp_path, monkeypatch, arguments, told):
    monkeypatch.chdir(tmp_path)
    code, out, err = ask(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: {told}")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "Usage: supernode estimate"),
        (("guess",), "No such command 'guess'"),
        (("gemm", "--m", "1", "--n", "1"), "Missing option '--k'"),
        (("decode", "--kv-len", "1e18"), "--kv-len"),
        (("decode", "--balance", "fair"), "'balanced', 'eplb', 'none'"),
        (("decode", "--json", "out.json"), "out.json"),
        (("attention", "--tables", "x"), "No such option: --tables"),
    ],
)
def test_what_cannot_be_parsed_is_refused(ask, arguments, told):
    code, out, err = ask(*arguments)
    assert code == 2
    assert told in out + err


@pytest.mark.skipif(not DATA.is_dir(), reason="the folder of measured tables is not beside the project")
@pytest.mark.parametrize(
    ("arguments", "keys"),
    [
        (("decode", "--ep", "64"), DECODE - {"attention_stream_us", "moe_stream_us", "attention_aic", "streams"}),
        (("prefill",), STEP - {"streams"} | {"ttft_ms"}),
        (("dispatch",), {"latency_us", "bandwidth_gb_per_s"}),
        (("combine",), {"latency_us", "bandwidth_gb_per_s"}),
        (GEMM, {"time_us", "tops", "utilization", "bandwidth_gb_per_s"}),
    ],
)
@pytest.mark.parametrize("gpu", ["h100", "h200"])
def test_measured_tables_answer_with_the_same_keys(ask, gpu, arguments, keys):
    code, out, err = ask(*arguments, "--hardware", gpu, "--tables", DATA, "--json")
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert told.keys() == keys | COMMON
    assert (told["coverage"]["inside"], told["coverage"]["extrapolated"]) == (True, {})
    if "breakdown" in told:
        whole = told["iteration_ms"] if arguments[0] == "decode" else told["ttft_ms"]
        assert sum(told["breakdown"].values()) == pytest.approx(whole)
        assert told["tokens_per_s_per_tflops"] == pytest.approx(told["tokens_per_s_per_npu"] / 1979)


@pytest.mark.skipif(not DATA.is_dir(), reason="the folder of measured tables is not beside the project")
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("decode",), "decode on h100: moe_decode: ep 320 is outside the measured 4 to 256"),
        (("decode", "--ep", "60"), "decode on h100: ep 60 is not a multiple of the 8 GPUs of a node"),
        (("dispatch", "--ep", "320"), "ep: 320 is outside the measured 8 to 64 of h100"),
        (("decode", "--ep", "64", "--mtp", "2"), "mtp: 2 must be at most 1"),
        (("decode", "--ep", "64", "--batch-per-npu", "512"), "does not fit in HBM: 30.2 GiB of weights + "),
    ],
)
def test_beyond_the_tables_there_is_no_answer(ask, arguments, told):
    code, out, err = ask(*arguments, "--hardware", "h100", "--tables", DATA)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: {told}")


def test_neither_torch_nor_ray_is_imported():
    """Nor what else is slow: an answer takes a fraction of a second from the shell."""
    slow = {"torch", "ray", "scipy", "matplotlib", "pyarrow", "fastapi"}
    program = f"""
import sys, serving.cli as cli
sys.argv = ["supernode", "estimate", *{GEMM!r}]
try:
    cli.main()
except SystemExit:
    print(sorted({slow!r} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
