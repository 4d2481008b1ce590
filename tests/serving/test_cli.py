"""The command line: exit codes, and mistakes told in one line."""

import json
import socket
import subprocess
import sys

import pytest

from serving import cli

VERBS = (
    "bench", "calibrate", "check", "estimate", "eval", "expert-load", "expert-traffic", "plan", "presets", "quantize",
    "replay", "reproduce", "run", "serve", "simulate", "sweep", "train", "verify",
)  # fmt: skip


@pytest.fixture
def supernode(monkeypatch, capsys):
    """Runs the command in this process; gives exit code, standard output and standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["supernode", *arguments])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as end:
            cli.main()
        code = 0 if end.value.code is None else end.value.code
        assert isinstance(code, int)
        return (code, *capsys.readouterr())

    return run


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(supernode, verb):
    code, out, err = supernode(verb, "--help")
    assert (code, err) == (0, "")
    assert f"supernode {verb}" in out


def test_without_a_verb_the_verbs_are_listed(supernode):
    code, out, err = supernode()
    assert code == 2
    assert all(verb in out + err for verb in VERBS)


def test_a_plan_is_printed(supernode):
    code, out, err = supernode("check", "laptop")
    assert (code, err) == (0, "")
    assert "decode: 1 x 4 NPUs = 1 x 4 ranks (EP 4)" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("check", "nope"), ("nope: no such preset", "laptop-2p2d")),
        (("check", "nope.yaml"), ("nope.yaml: No such file",)),
        (("check", "laptop", "--set", "seed"), ("--set 'seed'", "a.b=value")),
        (("check", "laptop", "--set", "cache.blocksize=8"), ("cache.blocksize", "unknown key")),
        (("check", "laptop", "--set", "clock.scale=-1"), ("clock.scale", "-1", "0")),
        (("check", "laptop", "--set", "instances.decode.count=0"), ("instances.decode.count", "0")),
        (("check", "laptop", "--set", "instances.decode.num_redundant_experts=3"), ("19", "4 ranks")),
        (("check", "laptop", "--set", "instances.decode.num_blocks=9999999"), ("GiB", "blocks fit")),
        (("simulate", "laptop", "--trace", "nope.jsonl"), ("nope.jsonl: no such file",)),
        (("bench", "nonsense"), ("base_url: 'nonsense'",)),
        (("bench", "http://127.0.0.1:1", "--extra-body", "{"), ("--extra-body", "not valid JSON")),
        (("bench", "http://127.0.0.1:1", "--extra-body", "[1]"), ("--extra-body", "object")),
        (("bench", "http://127.0.0.1:1", "--goodput", "fast"), ("goodput: 'fast'",)),
        (("bench", "http://127.0.0.1:1", "--random-range-ratio", "2"), ("range_ratio: 2.0",)),
    ],
)
def test_a_mistake_is_one_line_with_what_and_why(supernode, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, out, err = supernode(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert all(word in err for word in words)


@pytest.mark.parametrize(
    "arguments",
    [("serf", "laptop"), ("check",), ("check", "laptop", "more"), ("check", "laptop", "--se", "seed=1")],
    ids=["verb", "missing", "too many", "prefix of an option"],
)
def test_what_cannot_be_parsed_is_refused(supernode, arguments):
    code, out, err = supernode(*arguments)
    assert (code, out) == (2, "")
    assert "Usage: supernode" in err


def test_a_result_that_cannot_be_written_is_refused_before_the_work(supernode, tmp_path):
    code, out, err = supernode("simulate", "laptop", "--json", str(tmp_path / "no" / "out.json"))
    assert (code, out) == (2, "")
    assert "cannot be written" in err


def test_nothing_listens_where_bench_looks(supernode):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    code, out, err = supernode("bench", f"http://127.0.0.1:{port}", "--ready-check-timeout-sec", "0.1")
    assert (code, out) == (1, "")
    assert f"http://127.0.0.1:{port}: not ready after 0.1 s" in err.splitlines()[-1]


def test_a_simulation_writes_its_result(supernode, tmp_path):
    result = tmp_path / "out.json"
    code, out, _ = supernode("simulate", "laptop", "--set", "workload.num_requests=5", "--json", str(result))
    assert code == 0
    assert "Successful requests:                     5" in out
    assert json.loads(result.read_text())["completed"] == 5


def refused(*arguments: str, cwd: str) -> str:
    """Standard error of a `serve` that is refused; in a process of its own, since it imports Ray."""
    command = [sys.executable, "-m", "serving.cli", "serve", "laptop", *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    return done.stderr


def test_a_port_in_use_is_told_before_anything_is_booted(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        told = refused("--port", str(port), cwd=str(tmp_path))
    assert told == f"error: server.port: 127.0.0.1:{port}: Address already in use\n"


def test_a_checkpoint_without_files_is_told_before_anything_is_started(tmp_path):
    told = refused("--port", "0", "--set", f"model.checkpoint={tmp_path}", cwd=str(tmp_path))
    assert f"error: model.checkpoint: {tmp_path} has no tokenizer.json\n" in told
