"""`supernode sweep` and `supernode plan` as typed: output, exit codes, mistakes in one line."""

import json
import signal
import subprocess
import sys
import time

import pytest

from serving.simulation import planner
from serving.simulation.sweep_rows import read_rows

SMALL = "workload={num_requests: 8, input_len: 40, output_len: 5, prefix_len: 16, request_rate: 50}"


def test_a_sweep_prints_the_front_and_draws_it(supernode, tmp_path):
    out, plot = tmp_path / "a.parquet", tmp_path / "a.png"
    asked = ("sweep", "laptop", "--set", SMALL, "--set-grid", "instances.prefill.count=1,2,400", "--rate", "20,50")
    code, text, err = supernode(*asked, "--out", out, "--plot", plot)
    assert code == 0, err
    assert text.startswith("Pareto front: ")
    assert "instances.prefill.count  rate" in text
    assert "6 points simulated" not in err
    assert "4 points simulated, 0 known before, 2 without figures" in err
    assert "invalid: instances.prefill.count=400, rate=20 and 1 more: laptop: instances: 804 NPUs" in err
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert len(read_rows(out)) == 6
    code, again, err = supernode(*asked, "--out", out)
    assert (code, again) == (0, text)
    assert "0 points simulated, 4 known before" in err


def test_a_search_prints_the_best(supernode, tmp_path):
    code, text, err = supernode(
        *("sweep", "laptop", "--set", SMALL, "--set-grid", "instances.prefill.count=1,2,3", "--out"),
        *(tmp_path / "a.parquet", "--search", "min:p99_ttft_ms", "--where", "num_npus<=8"),
    )
    assert code == 0, err
    assert "Best: instances.prefill.count=2: p99_ttft_ms" in text


def test_ctrl_c_keeps_what_is_done_and_prints_it(tmp_path):
    out = tmp_path / "a.parquet"
    command = [sys.executable, "-m", "serving.cli", "sweep", "laptop", "--seed", "0:300", "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    journal = tmp_path / "a.parquet.journal"
    while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") >= 2):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    text, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    num_done = len(read_rows(out))
    assert 2 <= num_done < 300
    assert f"{num_done} points simulated" in err
    assert text.startswith("Pareto front: ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--seed", "1"), ("--out",)),
        (("--out", "F/a.parquet"), ("nothing is varied",)),
        (("--out", "F/a.csv", "--seed", "1"), ("a.csv must end in .parquet",)),
        (("--out", "F/a.parquet", "--seed", "1", "--plot", "F/a.svg"), ("a.svg must end in .html or .png",)),
        (("--out", "F/a.parquet", "--seed", "1", "--color", "x"), ("--color", "x", "there are seed")),
        (("--out", "F/a.parquet", "--seed", "1", "--where", "a<=1"), ("--where", "needs --search")),
        (("--out", "F/a.parquet", "--set-grid", "instances.prefil.count=1"), ("instances.prefil",)),
        (("--out", "F/a.parquet", "--set-grid", "seed="), ("--set-grid seed", "at least one value")),
        (("--out", "F/a.parquet", "--rate", "-1"), ("--rate", "-1", "above 0")),
        (("--out", "F/no/a.parquet", "--seed", "1"), ("a.parquet", "cannot be written")),
        (("--out", "F/a.parquet", "--seed", "1", "--trace", "F/no.jsonl"), ("no.jsonl",)),
    ],
)
def test_a_mistake_is_told_and_nothing_is_written(supernode, tmp_path, arguments, words):
    code, _, err = supernode("sweep", "laptop", *(argument.replace("F/", f"{tmp_path}/") for argument in arguments))
    assert code == 2
    assert all(word in err.replace("\n", " ") for word in words), err
    assert list(tmp_path.iterdir()) == []


PLAN = ("plan", "--hardware", "laptop", "--slo-ttft-ms", 400, "--slo-tpot-ms", 30, "--set", SMALL, "--duration", 2)


def test_a_plan_names_what_holds_and_why_others_lost(supernode, tmp_path):
    code, text, err = supernode(*PLAN, "--rate", 400, "--json", tmp_path / "p.json")
    assert code == 0, err
    told = json.loads((tmp_path / "p.json").read_text())
    chosen = told["chosen"]
    assert f"{chosen['prefill_instances']} prefill, {chosen['decode_instances']} decode" in text
    assert chosen["holds"]
    assert chosen["ttft_ms"] <= 400
    assert told["num_simulations"] == len(told["trials"])
    assert f"{told['num_simulations']} simulations in " in text
    assert "Why the others lost:" in text
    assert all(trial["holds"] or trial["reasons"] for trial in told["trials"])
    again = supernode(*PLAN, "--rate", 400, "--json", tmp_path / "q.json")
    other = json.loads((tmp_path / "q.json").read_text())
    assert again[0] == 0
    assert {k: v for k, v in told.items() if k != "wall_s"} == {k: v for k, v in other.items() if k != "wall_s"}


def test_a_plan_that_nothing_holds_ends_with_1_and_the_closest_miss(supernode):
    code, text, _ = supernode(*PLAN, "--slo-tpot-ms", 5, "--rate", 10)
    assert code == 1
    assert "Nothing holds it. Closest:" in text
    assert "It misses: P99 TPOT " in text


def test_the_smallest_deployment_has_nothing_to_lose_against(supernode):
    code, text, _ = supernode(*PLAN, "--rate", 5)
    assert code == 0
    assert "No smaller deployment exists." in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "give one of --rate and --npus"),
        (("--rate", 1, "--npus", 6), "give one of --rate and --npus"),
        (("--rate", -1), "--rate: -1 must be"),
        (("--npus", 5), "--npus: 5"),
        (("--rate", 1, "--slo-ttft-ms", 0), "slo_ttft_ms: 0"),
        (("--rate", 1, "--hardware", "nope"), "nope: no such preset"),
    ],
)
def test_a_mistake_in_a_question_is_told(supernode, arguments, words):
    code, _, err = supernode(*PLAN, *arguments)
    assert code == 2
    assert words in err


def test_ctrl_c_prints_the_plan_so_far(supernode, tmp_path, monkeypatch):
    runs = iter([planner.attain, planner.attain])

    def attain(run, slo):
        try:
            return next(runs)(run, slo)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(planner, "attain", attain)
    code, text, err = supernode(*PLAN, "--rate", 400, "--json", tmp_path / "p.json")
    assert code == 130, err
    assert "Nothing holds it. Closest:" in text
    assert "The search was interrupted after 2 simulations" in text
    told = json.loads((tmp_path / "p.json").read_text())
    assert (told["interrupted"], told["num_simulations"], len(told["trials"])) == (True, 2, 2)
