"""`supernode expert-load`: the counts are those of generation, and a picture and a file come out."""

import json
import sys

import numpy as np
import pytest

from model.config import ModelConfig
from model.expert_load import measure_expert_load
from model.expert_load_picture import relative_load
from model.reference import ReferenceModel
from model.tasks.generator import KINDS
from model.tokenizer import Tokenizer
from serving import cli
from serving.config_file import load_config


@pytest.fixture
def supernode(monkeypatch, capsys):
    """Runs the command in this process; gives exit code, standard output and standard error."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["supernode", "expert-load", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return (end.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture
def model(checkpoint):
    return ReferenceModel(ModelConfig.from_file(checkpoint / "config.json"), checkpoint)


def test_every_token_chooses_top_k_experts_in_every_layer(model):
    counts = model.expert_counts(list(range(20, 70)))
    assert counts.sum(axis=1).tolist() == [50 * 4, 50 * 4]


def test_counts_add_up_over_tokens_that_see_the_same(model):
    """A token's experts depend on what precedes it alone, so a prefix is counted in every longer text."""
    prompt = list(range(20, 70))
    rest = model.expert_counts(prompt) - model.expert_counts(prompt[:30])
    assert rest.min() >= 0
    assert rest.sum() == 20 * 4 * 2


def test_the_load_follows_from_the_seed(model, checkpoint):
    tokenizer = Tokenizer.from_file(checkpoint / "tokenizer.json")

    def load(seed):
        return measure_expert_load(model, tokenizer, "clock", num_problems=2, seed=seed).tolist()

    assert load(0) == load(0) != load(1)


def test_a_picture_and_a_file_that_a_configuration_reads(supernode, checkpoint, config_folder, tmp_path):
    code, out, err = supernode(checkpoint, tmp_path / "out", "--kinds", "clock,story", "--num-problems", "2")
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == ["clock", "story", "overall", "wrote"]
    assert (tmp_path / "out" / "expert_load.png").read_bytes().startswith(b"\x89PNG")
    values = json.loads((tmp_path / "out" / "expert_load.json").read_text())
    assert list(values["kinds"]) == ["clock", "story"]
    assert values["source"] == "2 held-out problems per kind, seed 0, teacher-forced"
    file = tmp_path / "out" / "expert_load.json"
    config = load_config(str(config_folder / "disaggregated.yaml"), [f"model.expert_load={file}"])
    assert config.expert_load.tolist() == values["total"]


def test_all_kinds_are_measured_if_none_is_named(supernode, checkpoint, tmp_path):
    assert supernode(checkpoint, tmp_path, "--num-problems", "1")[0] == 0
    assert list(json.loads((tmp_path / "expert_load.json").read_text())["kinds"]) == list(KINDS)


def test_relative_load_is_one_on_average_and_zero_without_load():
    relative = relative_load(np.array([[1, 3, 0, 0], [0, 0, 0, 0]]))
    assert relative.tolist() == [[1.0, 3.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("--kinds", "poetry"), ("--kinds: 'poetry'", "story")), (("--kinds", ""), ("--kinds: is empty", "story"))],
)
def test_an_unknown_kind_is_told_in_one_line(supernode, checkpoint, tmp_path, arguments, words):
    code, out, err = supernode(checkpoint, tmp_path, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert all(word in err for word in words)


def test_a_directory_that_cannot_be_made_is_told_before_measuring(supernode, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("model.expert_load.measure_expert_load", None)
    (tmp_path / "file").write_text("")
    code, out, err = supernode(checkpoint, tmp_path / "file" / "out")
    assert (code, out, err) == (2, "", f"error: {tmp_path}/file/out: Not a directory\n")


def test_a_directory_without_a_checkpoint_is_told_in_one_line(supernode, tmp_path):
    code, out, err = supernode(tmp_path, tmp_path)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: {tmp_path}: ")
