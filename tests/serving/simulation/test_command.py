"""`supernode simulate` as a person or a script meets it."""

import dataclasses
import json
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from serving import cli
from serving.errors import ConfigError
from serving.records import OUTCOMES
from serving.report import WIDTH
from serving.simulation.command import check_served, exit_code
from serving.simulation.figures import bench_result
from serving.workloads.load import load_workload
from serving.workloads.requests import WorkloadRequest
from serving.workloads.workload import Workload

SMALL = ("simulate", "laptop", "--set", "workload.num_requests=8")


def test_the_table_is_as_wide_as_the_load_generator_s_and_has_its_rows(supernode):
    code, out, err = supernode(*SMALL, "--goodput", "ttft:100", "--goodput", "tpot:19")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert all(len(line.rstrip()) <= WIDTH for line in lines)
    assert "Successful requests:                     8" in out
    for title in ("Throughput", "Instances", "Time of a Request (ms)", "Planes", "Pool (blocks)", "Simulation"):
        assert title.center(WIDTH, "-") in lines
    assert [line.split()[0] for line in lines if line.startswith(("prefill-", "decode-"))] == ["prefill-0", "decode-0"]
    assert "Within TTFT of 100 ms (%):               100.00" in out
    assert "Still held" not in out


def test_many_instances_share_rows(supernode):
    code, out, _ = supernode(*SMALL, "--set", "instances.prefill.count=17", "--set", "model.max_model_len=512")
    assert code == 0
    assert "prefill x17" in out
    assert "prefill-3" not in out


def test_files_hold_what_was_asked_for(supernode, tmp_path):
    values, requests = tmp_path / "out.json", tmp_path / "requests.csv"
    code, out, _ = supernode(*SMALL, "--json", str(values), "--requests", str(requests), "--digest")
    assert code == 0
    told = json.loads(values.read_text())
    assert told["completed"] == len(requests.read_text().splitlines()) - 1 == 8
    assert set(told["machine"]) >= {"date", "wall_s", "peak_rss_bytes"}
    assert told["digest"][:32] in out.splitlines()


def test_strict_names_the_first_request_that_cannot_be_served(make_config):
    lengths = [(100, 28), (100, 29), (10, 5), (140, 1)]
    requests = [
        WorkloadRequest(
            request_id=f"r{i}", num_prompt_tokens=num_prompt, max_tokens=max_tokens, prompt_token_ids=(20,) * num_prompt
        )
        for i, (num_prompt, max_tokens) in enumerate(lengths)
    ]
    config = make_config("disaggregated")
    check_served(config, Workload(name="given", requests=[requests[0], requests[2]]))
    with pytest.raises(ConfigError) as refused:
        check_served(config, Workload(name="given", requests=requests))
    assert str(refused.value) == (
        "--strict: request r1: prompt_too_long: 100 + 29 tokens exceed max_model_len 128; "
        "2 of 4 requests cannot be served"
    )


def test_what_is_rejected_is_counted_and_no_failure_of_the_run(supernode, tmp_path):
    values = tmp_path / "out.json"
    crowd = ("workload.request_rate=inf", "instances.decode.max_num_seqs=1", "scheduler.max_queued_requests=1")
    sets = [word for key in crowd for word in ("--set", key)]
    code, out, _ = supernode(*SMALL, *sets, "--json", str(values))
    assert code == 0
    assert "rejected: queue_full" in out
    told = json.loads(values.read_text())
    assert told["rejected_by_reason"] == {"queue_full": told["failed"]}
    assert told["failed"] == 8 - told["completed"] > 0


@pytest.mark.parametrize("strict", [False, True])
def test_a_request_of_a_trace_that_does_not_fit_is_rejected_or_with_strict_stops_the_run(supernode, tmp_path, strict):
    trace = tmp_path / "trace.jsonl"
    rows = [{"timestamp": 3000 * i, "input_length": n, "output_length": 8} for i, n in enumerate((90, 300, 90))]
    trace.write_text("".join(json.dumps(row | {"hash_ids": [i]}) + "\n" for i, row in enumerate(rows)))
    arguments = ("simulate", "laptop", "--trace", str(trace), "--set", "model.max_model_len=256")
    code, out, err = supernode(*arguments, *(["--strict"] if strict else []))
    if strict:
        assert (code, out) == (2, "")
        assert "prompt_too_long: 300 + 8 tokens exceed max_model_len 256; 1 of 3 requests cannot be served" in err
    else:
        assert (code, err) == (0, "")
        assert "Rejected:                                1" in out
        assert "prompt_too_long" in out


@pytest.mark.parametrize(
    ("outcome", "held", "interrupted", "code"),
    [("rejected", 0, False, 0), ("failed", 0, False, 1), ("rejected", 2, False, 1), ("aborted", 0, True, 130)],
)
def test_exit_codes(make_config, made_run, outcome, held, interrupted, code):
    run = made_run(5)
    outcomes = run.requests.outcome.copy()
    outcomes[0] = OUTCOMES.index(outcome)
    requests = dataclasses.replace(run.requests, outcome=outcomes)
    run = dataclasses.replace(run, requests=requests, held_at_rest={"blocks": held}, interrupted=interrupted)
    config = make_config("disaggregated")
    assert exit_code(bench_result(config, load_workload(config), run)) == code


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--requests", "r.txt"), ("--requests: r.txt", ".parquet, .csv")),
        (("--perfetto", "t.txt"), ("--perfetto: t.txt", ".json or .json.gz")),
        (("--goodput", "fast"), ("goodput: 'fast'",)),
    ],
)
def test_a_mistake_is_told_before_the_run(supernode, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, out, err = supernode(*SMALL, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert all(word in err for word in words)


INTERRUPTED = """
import os, signal, sys
import serving.simulation.plain as plain
from serving import cli
run_plain = plain.run_plain
def interrupted(config, workload, *, on_progress, **options):
    return run_plain(config, workload, on_progress=lambda n: n == 9 and os.kill(os.getpid(), signal.SIGINT), **options)
plain.run_plain = interrupted
sys.argv = ["supernode", *sys.argv[1:]]
cli.main()
"""


def test_ctrl_c_prints_what_was_finished(tmp_path):
    values = tmp_path / "out.json"
    command = [sys.executable, "-c", INTERRUPTED, "simulate", "colocated", "--json", str(values)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (130, "")
    assert done.stdout.startswith("===== Serving Benchmark Result (interrupted) =====\n")
    told = json.loads(values.read_text())
    assert told["interrupted"] is True
    assert 9 <= told["completed"] < told["num_prompts"]
    assert sum(told["outcomes"].values()) + told["not_sent"] == told["num_prompts"]


def test_nothing_slow_is_imported():
    """A first result is a matter of a second."""
    slow = {"torch", "ray", "transformers", "scipy", "matplotlib", "fastapi", "uvicorn", "aiohttp", "tqdm", "pyarrow",
            "plotly", "pandas"}  # fmt: skip
    program = f"""
import sys, serving.cli as cli
sys.argv = ["supernode", *{SMALL!r}]
try:
    cli.main()
except SystemExit:
    pass
print(sorted({slow!r} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--json", "a.json", "--perfetto", "a.json"), "--perfetto: a.json: the same file as --json"),
        (("--report", "a.pdf"), "--report: a.pdf: the suffix must be .html or .htm"),
        (("--perfetto", "a.txt"), "--perfetto: a.txt: the suffix must be .json or .json.gz"),
    ],
)
def test_files_that_would_overwrite_each_other_are_refused_before_the_run(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=re.escape(message)):
        CliRunner().invoke(cli.app, ["simulate", "laptop", *options], catch_exceptions=False)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_costs_no_other(tmp_path):
    report = tmp_path / "report.html"
    arguments = ["simulate", "laptop", "--num-requests", "3", "--json", "/dev/full", "--report", str(report)]
    with pytest.raises(ConfigError, match="--json: /dev/full: No space left"):
        CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert report.stat().st_size > 1000
