"""INT8 from the command line to the tokens of the served model."""

import asyncio
import json
import subprocess
import sys

import pytest
import yaml

from model.config import ModelConfig
from model.reference import ReferenceModel
from serving import cli
from serving.errors import ConfigError
from serving.local_devices import local_transport

REQUESTS = ((5, 9), (33, 6), (17, 12), (40, 3), (1, 8))  # tokens of prompt and output


@pytest.fixture
def supernode(monkeypatch, capsys):
    """Runs the command in this process; gives exit code, standard output and standard error."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["supernode", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return (end.value.code or 0, *capsys.readouterr())

    return run


SMALL = ("--num-sequences", 8, "--sequence-len", 32)


@pytest.fixture(scope="module")
def int8_checkpoint(checkpoint, tmp_path_factory):
    """The small model in INT8, made by the command."""
    directory = tmp_path_factory.mktemp("quantized") / "int8"
    command = [sys.executable, "-m", "serving.cli", "quantize", checkpoint, directory, *SMALL]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "rotation, scale_search, clipping, compensation" in done.stdout
    return directory


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("colocated", ("model.quantization=int8",)),
        ("colocated", ("instances.colocated.npus=4", "instances.colocated.num_redundant_experts=4")),
        ("disaggregated", ("instances.decode.npus=4",)),
        ("disaggregated", ("instances.prefill.npus=4", "instances.decode.npus=1", "model.dispatch_dtype=int8")),
        ("colocated", ("ray.pack=node", "ray.ranks=batched")),
    ],
    ids=str,
)
def test_a_served_int8_model_gives_the_tokens_of_one_rank(
    name, overrides, run_system, make_config, int8_checkpoint, prompt
):
    config = make_config(name, f"model.checkpoint={int8_checkpoint}", *overrides)

    async def program(system):
        readers = []
        for index, (length, limit) in enumerate(REQUESTS):
            tokens = prompt(length, seed=index)
            readers.append(asyncio.ensure_future(system.generate(f"r{index}", tokens, max_tokens=limit)))
        return await asyncio.gather(*readers)

    replies = run_system(config, program, transport=local_transport(config, int8_checkpoint))
    model = ReferenceModel(ModelConfig.from_file(int8_checkpoint / "config.json"), int8_checkpoint)
    for index, (length, limit) in enumerate(REQUESTS):
        expected = model.generate(prompt(length, seed=index), limit).token_ids
        assert replies[index].token_ids == expected


def test_the_key_must_be_what_the_checkpoint_says(make_config, checkpoint, int8_checkpoint, tmp_path):
    assert make_config("colocated", f"model.checkpoint={int8_checkpoint}").model.quantization is None
    with pytest.raises(ConfigError, match=r"model.quantization: int8, but .*config.json has no quantization_config"):
        make_config("colocated", f"model.checkpoint={checkpoint}", "model.quantization=int8")
    with pytest.raises(ConfigError, match=r"model.quantization: int8, but model.checkpoint random makes float32"):
        make_config("colocated", "model.quantization=int8")
    with pytest.raises(ConfigError, match=r"model.quantization: input should be 'int8', got 'fp8'"):
        make_config("colocated", "model.quantization=fp8")
    with pytest.raises(ConfigError, match=r"config.json: .*No such file"):
        make_config("colocated", f"model.checkpoint={tmp_path}", "model.quantization=int8")
    raw = json.loads((int8_checkpoint / "config.json").read_text())
    raw["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=r"quantization_config.quant_method: 'fp8' is not supported"):
        make_config("colocated", f"model.checkpoint={tmp_path}")


def test_another_shape_is_told_before_anything_is_started(int8_checkpoint, tmp_path):
    shape = json.loads((int8_checkpoint / "config.json").read_text()) | {"num_experts_per_tok": 3}
    del shape["quantization_config"]
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(shape))
    settings = (f"model.checkpoint={int8_checkpoint}", f"model.config={tmp_path / 'other.yaml'}", "server.port=0")
    command = [sys.executable, "-m", "serving.cli", "serve", "laptop", "--set", "model.max_model_len=256"]
    for setting in settings:
        command += ["--set", setting]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"error: model.checkpoint: {int8_checkpoint}/config.json: num_experts_per_tok: 4 is not 3\n" in done.stderr


def test_a_result_tells_sizes_errors_and_switches(supernode, checkpoint, tmp_path):
    text = tmp_path / "lines.txt"
    text.write_text("Seven and five are twelve.\n\n<｜User｜>Hello<｜Assistant｜>Hello!\nA third line.\n")
    arguments = ("--no-rotation", "--no-compensation", "--calibration", text, "--json", tmp_path / "result.json")
    code, out, err = supernode("quantize", checkpoint, tmp_path / "out", *arguments)
    assert (code, err) == (0, "")
    assert "techniques      scale_search, clipping\n" in out
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["techniques"] == {
        "rotation": False, "scale_search": True, "clipping": True, "compensation": False, "seed": 0
    }  # fmt: skip
    sizes = result["file_bytes"]
    assert sizes["after"] == (tmp_path / "out" / "model.safetensors").stat().st_size < 0.5 * sizes["before"]
    assert list(result["weight_error_by_layer"]) == ["0", "1", "2", "3"]
    assert all(error < 0.02 for error in result["weight_error_by_layer"].values())
    assert 0.5 < result["fidelity"]["top1_agreement"] <= 1


@pytest.mark.parametrize("source", ["own", "tasks"])
def test_sequences_come_from_the_model_or_from_problems(source, supernode, checkpoint, tmp_path):
    code, out, err = supernode("quantize", checkpoint, tmp_path / "out", "--calibration", source, *SMALL)
    assert (code, err) == (0, "")
    assert "same choice" in out


def test_the_table_has_the_float_model_as_its_measure(supernode, checkpoint, tmp_path):
    result = tmp_path / "table.json"
    code, out, err = supernode("quantize", checkpoint, "--ablate", *SMALL, "--json", result)
    assert (code, err) == (0, "")
    names = [row["name"] for row in json.loads(result.read_text())["variants"]]
    assert names[0] == "all"
    assert names[-1] == "none (rounding)"
    assert all(f"\n{name} " in out for name in names)


def test_a_result_that_cannot_be_written_is_refused_before_the_work(supernode, checkpoint, tmp_path):
    result = tmp_path / "no" / "out.json"
    code, out, err = supernode("quantize", checkpoint, tmp_path / "new", "--json", result)
    assert (code, out) == (2, "")
    assert "cannot be written" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("{checkpoint}",), "OUT: a directory to write to is needed"),
        (("{checkpoint}", "{tmp}/new", "--ablate"), "OUT: --ablate writes no checkpoint"),
        (("{checkpoint}", "{tmp}"), "is there already and is not an empty directory"),
        (("{checkpoint}", "{tmp}/file.txt"), "is there already and is not an empty directory"),
        (("{tmp}/nowhere", "{tmp}/new"), "config.json: "),
        (("{tmp}", "{tmp}/new"), "config.json: "),
        (
            ("{checkpoint}", "{tmp}/new", "--calibration", "{tmp}/file.txt"),
            "file.txt: 1 lines of text, at least 2 are needed",
        ),
        (("{checkpoint}", "{tmp}/new", "--calibration", "{tmp}/nowhere"), "--calibration: "),
        (("{int8}", "{tmp}/new"), "quantization_config: the checkpoint is INT8 already"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line_and_writes_nothing(arguments, words, supernode, checkpoint, int8_checkpoint, tmp_path):
    (tmp_path / "file.txt").write_text("one line\n")
    places = {"checkpoint": checkpoint, "int8": int8_checkpoint, "tmp": tmp_path}
    code, out, err = supernode("quantize", *(argument.format(**places) for argument in arguments))
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert words in err
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]
