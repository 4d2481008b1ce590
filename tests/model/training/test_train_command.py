"""`train` as it is run: processes, an interruption and its resumption, and what is left at the end."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.config import ModelConfig
from model.reference import ReferenceModel
from model.tensor_files import TensorFiles
from model.tokenizer import Tokenizer
from model.training.loss_curve import draw_loss_curve
from model.training.processes import Run, run_processes
from model.training.trainer import StepReport


def command(output: Path, shape: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "model.train", str(output), "--shape", str(shape), "--tokens", "256", *options]


def run_for(config, settings, tokenizer_file, directory, *, processes):
    directory.mkdir()
    reports = []
    run = Run(
        config=config,
        settings=settings,
        tokenizer_file=tokenizer_file,
        directory=directory,
        processes=processes,
        evaluate_every=0,
    )
    assert run_processes(run, reports.append)
    return [report for report in reports if isinstance(report, StepReport)]


def test_two_processes_compute_what_one_does(tiny_training_config, tiny_settings, corpus_tokenizer, tmp_path):
    corpus_tokenizer.save(tmp_path / "tokenizer.json")
    one, two = (
        run_for(
            tiny_training_config, tiny_settings, tmp_path / "tokenizer.json", tmp_path / str(count), processes=count
        )
        for count in (1, 2)
    )
    assert len(one) == tiny_settings.num_steps
    assert one == two


def test_ctrl_c_saves_and_the_same_command_goes_on(tiny_training_config, tmp_path):
    shape = tmp_path / "shape.json"
    shape.write_text(json.dumps(tiny_training_config.to_dict()))
    output = tmp_path / "out"
    options = ("--steps", "30", "--processes", "1", "--evaluate-every", "0")
    process = subprocess.Popen(command(output, shape, *options), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    seen = ""
    while "/30" not in seen.replace("0/30", ""):
        seen += process.stderr.read(1)
    os.kill(process.pid, signal.SIGINT)
    rest = process.communicate(timeout=120)[1]
    assert process.returncode == 130, rest
    state = torch.load(output / "state.pt", weights_only=True)
    assert 0 < state["step"] < 30
    again = subprocess.run(command(output, shape, *options), capture_output=True, text=True, timeout=240, check=False)
    assert again.returncode == 0, again.stderr
    assert sorted(path.name for path in output.iterdir()) == [
        "README.md", "config.json", "generation_config.json", "loss_curve.png", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    refused = subprocess.run(command(output, shape), capture_output=True, text=True, timeout=60, check=False)
    assert refused.returncode == 2
    assert refused.stderr == f"error: {output}: already holds a checkpoint\n"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ('{"vocab_size": 272}', "missing"),
        ("[1, 2", "no hyper-parameters"),
        ("just words", "no hyper-parameters"),
    ],
)
def test_a_shape_that_is_none_is_one_line(tmp_path, content, complaint):
    shape = tmp_path / "shape.yaml"
    shape.write_text(content)
    done = subprocess.run(command(tmp_path / "o", shape), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert complaint in done.stderr
    assert done.stderr.endswith("\n")
    assert done.stderr.count("\n") == 1


def test_published_weights_are_bfloat16_and_load_in_both_libraries(trained_checkpoint):
    transformers = pytest.importorskip("transformers")
    config = ModelConfig.from_file(trained_checkpoint / "config.json")
    files = TensorFiles(trained_checkpoint, config)
    norm = files.read("model.norm.weight", (config.hidden_size,))
    assert torch.equal(norm, norm.to(torch.bfloat16).float())
    tokenizer = Tokenizer.from_file(trained_checkpoint / "tokenizer.json")
    prompt = tokenizer.encode("What is 12 + 30?", add_bos=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(trained_checkpoint, dtype=torch.float32)
    generated = theirs.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None)
    ours = ReferenceModel(config, trained_checkpoint).generate(prompt, 12)
    assert ours.token_ids == generated[0, len(prompt) :].tolist()


def test_the_model_card_names_the_run(trained_checkpoint):
    card = (trained_checkpoint / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n")
    assert "3 steps" in card
    assert "| addition |" in card


def test_loss_curve_is_a_picture(tmp_path):
    history = [{"loss": 1.0 / s, "mtp_loss": 2.0 / s, "num_tokens": 10, "max_load": 1.5} for s in range(1, 60)]
    draw_loss_curve(history, [], tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
