"""`supernode expert-traffic`: what it prints, draws and writes, from the generator and from recorded counts."""

import json
import sys

import numpy as np
import pytest

from serving import cli
from serving.expert_load import KEY

RECORDED = {"num_layers": 2, "num_experts": 8, "top_k": 2, "first_layer": 1}
TOTAL = [[60, 10, 10, 10, 10, 10, 10, 10], [20, 20, 20, 20, 20, 20, 20, 20]]


@pytest.fixture
def supernode(monkeypatch, capsys):
    """Runs the command in this process; gives exit code, standard output and standard error."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["supernode", "expert-traffic", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return (end.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture
def recorded(tmp_path):
    """A file as `expert-load` writes it."""
    path = tmp_path / "expert_load.json"
    path.write_text(json.dumps({**RECORDED, "kinds": {"story": TOTAL}, "total": TOTAL}))
    return path


def test_a_drawn_load_is_told_side_by_side_and_drawn(supernode, tmp_path):
    code, out, err = supernode("--ep", 32, "--tokens", 16, "--out", tmp_path / "new", "--json", tmp_path / "t.json")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == ("EP32 of deepseek-r1 on 2 nodes of cloudmatrix384, 16 tokens per rank and step, top 8 of 256")
    assert lines[2] == "slots of routed experts: EPLB off 256, on 288; copies chosen evenly"
    assert "mean of 58 layers" in lines
    assert len([line for line in lines if line.startswith(("dispatch, ", "combine, "))]) == 2 * 10
    assert (tmp_path / "new" / "expert_traffic.png").read_bytes().startswith(b"\x89PNG")
    values = json.loads((tmp_path / "t.json").read_text())
    off, on = values["eplb_off"], values["eplb_on"]
    assert np.mean(on["rank_imbalance"]) < np.mean(off["rank_imbalance"])
    assert f"layer {3 + values['hottest_layer']}, the hottest" in lines
    (die_in,) = (one for one in on["links"] if (one["operator"], one["link"]) == ("dispatch", "die_in"))
    shown = next(line for line in lines if line.startswith("dispatch, die in"))
    assert float(shown.split("|")[1].split()[0]) == pytest.approx(np.mean(die_in["busiest_bytes"]) / 1e6, abs=6e-4)
    assert float(shown.split("|")[1].split()[3]) == pytest.approx(np.mean(die_in["busiest_us"]), abs=0.06)


def test_a_large_instance_is_drawn_by_node(supernode, tmp_path, monkeypatch):
    monkeypatch.setattr("serving.expert_traffic_picture.MOST_RANKS", 16)
    code, out, err = supernode("--tokens", 2, "--layer", 5, "--near", "--out", tmp_path)
    assert (code, err) == (0, "")
    assert "copies chosen in the own node first" in out
    assert [line for line in out.splitlines() if line.startswith(("mean of", "layer"))] == ["layer 5"]
    assert (tmp_path / "expert_traffic.png").stat().st_size > 10_000


def test_equal_seeds_draw_equal_traffic(supernode):
    assert supernode("--tokens", 2, "--seed", 1) == supernode("--tokens", 2, "--seed", 1)
    assert supernode("--tokens", 2, "--seed", 1) != supernode("--tokens", 2, "--seed", 2)


@pytest.mark.parametrize("wrap", [lambda load: load, lambda load: {"completed": 3, KEY: load}], ids=["load", "run"])
def test_recorded_counts_have_their_own_shape(supernode, recorded, wrap):
    recorded.write_text(json.dumps(wrap(json.loads(recorded.read_text()))))
    code, out, err = supernode("--load", recorded, "--ep", 4, "--tokens", 100)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].endswith("on 1 node of cloudmatrix384, 100 tokens per rank and step, top 2 of 8")
    assert lines[1] == f"load: {recorded}; drift 0"
    assert lines[2] == "slots of routed experts: EPLB off 8, on 12; copies chosen evenly"
    assert "mean of 2 layers" in lines
    assert "layer 1, the hottest" in lines
    assert not any("node" in line for line in lines if line.startswith(("dispatch, ", "combine, ")))
    hottest = [line for line in lines if line.startswith("hottest rank")][-1]
    # Rank 0 has experts 0 and 1 of 8, that is 70 of 130 choices, against a quarter of them: 2.15.
    assert float(hottest.split()[4].rstrip("|")) == pytest.approx(2.15, rel=0.03)


def test_the_skew_of_the_generator_is_told_and_matters(supernode, tmp_path):
    """0.197: expert_load_skew of cloudmatrix384, which estimates use."""
    hottest = {}
    for skew in ("0", "0.197", "1"):
        code, out, err = supernode("--tokens", 64, "--skew", skew, "--drift", 0, "--json", tmp_path / "t.json")
        assert (code, err) == (0, "")
        assert out.splitlines()[1] == f"load: generator, seed 0, skew {skew}; drift 0"
        values = json.loads((tmp_path / "t.json").read_text())
        assert values["skew"] == float(skew)
        hottest[skew] = np.mean(values["eplb_off"]["rank_imbalance"])
    assert hottest["0"] < hottest["0.197"] < hottest["1"]
    assert hottest["0"] < 1.1  # chance alone
    assert supernode("--tokens", 64, "--drift", 0) == supernode("--tokens", 64, "--drift", 0, "--skew", 1)


def test_recorded_load_has_its_own_skew(supernode, recorded):
    told = (2, "", "error: --skew: 0.5 is of the generator, recorded load has its own\n")
    assert supernode("--load", recorded, "--ep", 4, "--skew", 0.5) == told


def test_one_expert_is_no_mixture(supernode, recorded):
    recorded.write_text(json.dumps({**RECORDED, "top_k": 1, "num_experts": 1, "total": [[5], [5]]}))
    code, out, err = supernode("--load", recorded, "--ep", 4)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: {recorded}: ")


def test_a_run_without_counts_is_refused_and_a_file_without_top_k(supernode, recorded):
    recorded.write_text(json.dumps({"completed": 3, KEY: None}))
    assert supernode("--load", recorded) == (
        2, "", f"error: {recorded}: total: expected tokens per layer and expert, found keys completed, {KEY}\n"
    )  # fmt: skip
    recorded.write_text(json.dumps({"total": TOTAL, "first_layer": 1}))
    assert supernode("--load", recorded) == (
        2, "", f"error: {recorded}: top_k: expected an integer from 1, found None\n"
    )  # fmt: skip
    recorded.write_text(json.dumps({**RECORDED, "total": [1, 2]}))
    assert supernode("--load", recorded)[2] == f"error: {recorded}: total: expected layers x experts, found 2\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--ep", "800"), ("--ep: 800", "768 dies")),
        (("--slots", "100"), ("--slots 100", "100 slots do not divide over 32 ranks")),
        (("--slots", "224"), ("224 slots", "cannot hold 256 experts")),
        (("--layer", "2"), ("--layer: 2", "3 to 60")),
        (("--layer", "61"), ("--layer: 61", "3 to 60")),
        (("--drift", "11"), ("--drift 11", "[0, 10]")),
        (("--model", "nope"), ("model: 'nope' is not shipped, only deepseek-r1, mini-r1",)),
        (("--hardware", "nope.yaml"), ("hardware: no part 'nope.yaml'",)),
        (("--hardware", "nope"), ("hardware: 'nope' is not shipped, only cloudmatrix384",)),
        (("--load", "nope.json"), ("nope.json: No such file",)),
    ],
)
def test_a_mistake_is_one_line_with_what_and_why(supernode, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, out, err = supernode(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    assert all(word in err for word in words)


def test_a_directory_that_cannot_be_made_is_told_before_the_work(supernode, tmp_path, monkeypatch):
    monkeypatch.setattr("serving.expert_traffic.compare_traffic", None)
    (tmp_path / "file").write_text("")
    assert supernode("--out", tmp_path / "file" / "out") == (2, "", f"error: {tmp_path}/file/out: Not a directory\n")
