"""INT8 checkpoints that do not fit: refused at load, with the name of the tensor or field."""

import dataclasses
import json
import shutil

import pytest
import torch

from model.checkpoint_check import WeightsError, check_checkpoint
from model.layout import make_layouts
from model.weights import load_rank_weights

O_PROJ = "model.layers.1.self_attn.o_proj"
EXPERT = "model.layers.2.mlp.experts.7.up_proj"


@pytest.fixture
def load(base_config):
    """A function: load a directory on one rank."""
    (layout,) = make_layouts(base_config, world_size=1, max_num_tokens=8)
    return lambda directory, **options: load_rank_weights(directory, base_config, layout, **options)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (f"{O_PROJ}.weight", None, "missing from"),
        (f"{O_PROJ}.weight_scale", None, "missing from"),
        (f"{O_PROJ}.weight", lambda t: t.float(), "dtype F32 is not I8"),
        (f"{O_PROJ}.weight", lambda t: t[:-1].clone(), r"shape \(63, 128\) is not \(64, 128\)"),
        (f"{O_PROJ}.weight_scale", lambda t: t[:, 0].clone(), r"shape \(64,\) is not \(64, 1\)"),
        (f"{O_PROJ}.weight_scale", lambda t: t * 0, "holds a scale that is not above 0"),
        (f"{EXPERT}.weight_scale", lambda t: -t, "holds a scale that is not above 0"),
        (f"{EXPERT}.weight_scale", lambda t: t / 0, "holds NaN or infinity"),
        ("model.layers.1.mlp.gate.weight", lambda t: t.to(torch.int8), "dtype I8 is not one of F32, F16, BF16"),
        ("model.norm.weight", lambda t: t * torch.nan, "holds NaN or infinity"),
        ("model.layers.4.mlp.gate.weight", lambda _: torch.zeros(2), "not a tensor of a model of 3 layers"),
        ("model.layers.1.mlp.gate.weight_scale", lambda _: torch.ones(16, 1), "not a tensor of a model"),
    ],
)
def test_a_tensor_at_fault_is_named(name, change, message, broken, load):
    def apply(stored):
        before = stored.pop(name, None)
        if change is not None:
            stored[name] = change(before)

    with pytest.raises(WeightsError, match=f"^{name}: {message}"):
        load(broken(apply))


def test_mtp_tensors_are_needed_by_who_drafts(broken, load):
    directory = broken(lambda stored: stored.pop("model.layers.3.eh_proj.weight"))
    load(directory)
    with pytest.raises(WeightsError, match=r"model.layers.3.eh_proj.weight: missing"):
        load(directory, with_mtp=True)


def test_buffers_that_transformers_ignores_are_ignored(broken, load):
    load(broken(lambda stored: stored.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})))


def edited(directory, tmp_path, change):
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    raw = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    change(raw)
    (tmp_path / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    return tmp_path


def quantization(**changes):
    return lambda raw: raw["quantization_config"].update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (quantization(quant_method="fp8"), "quantization_config.quant_method: 'fp8' is not supported"),
        (quantization(format="pack-quantized"), "quantization_config.format: 'pack-quantized' is not supported"),
        (quantization(config_groups={}), "quantization_config.config_groups: must be an object with one group"),
        (quantization(ignore="lm_head"), "quantization_config.ignore: must be a list"),
        (quantization(techniques=3), "quantization_config.techniques: must be an object"),
        (lambda raw: raw.update(quantization_config="int8"), "quantization_config: 'int8' is not an object"),
        (
            lambda raw: raw["quantization_config"]["config_groups"]["group_0"]["weights"].update(num_bits=4),
            r"config_groups.group_0.weights.num_bits: 4 is not supported, only 8",
        ),
        (lambda raw: raw.update(hidden_size=128), "config.json: hidden_size: 128 is not 64"),
        (lambda raw: raw.update(num_hidden_layers=2), "config.json: num_hidden_layers: 2 is not 3"),
        (lambda raw: raw.pop("quantization_config"), "dtype I8 is not one of F32"),
        (quantization(ignore=[EXPERT]), rf"{EXPERT}.weight: dtype I8 is not one of F32"),
    ],
)
def test_a_configuration_at_fault_is_named(change, message, int8_checkpoint, load, tmp_path):
    with pytest.raises(WeightsError, match=message):
        load(edited(int8_checkpoint, tmp_path, change))


def test_parts_of_one_product_must_be_of_one_kind(broken, load, tmp_path):
    def widen(stored):
        stored[f"{EXPERT}.weight"] = stored[f"{EXPERT}.weight"] * stored.pop(f"{EXPERT}.weight_scale")

    directory = broken(widen)
    raw = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    raw["quantization_config"]["ignore"].append(EXPERT)
    (directory / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(WeightsError, match=r"quantization_config.ignore: model.layers.2.mlp.experts.7.gate_proj and"):
        load(directory)


@pytest.mark.parametrize("config_text", ["{", "[]"])
def test_a_configuration_that_is_none_is_told(config_text, int8_checkpoint, load, tmp_path):
    shutil.copytree(int8_checkpoint, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text(config_text, encoding="utf-8")
    with pytest.raises(WeightsError, match=r"config\.json: "):
        load(tmp_path)


def test_a_model_with_fewer_layers_than_its_file_is_refused(base_config, checkpoint_of, tmp_path):
    shutil.copy(checkpoint_of(base_config) / "model.safetensors", tmp_path)
    config = dataclasses.replace(base_config, num_hidden_layers=2)
    with pytest.raises(WeightsError, match=r"model.layers.2.enorm.weight: missing|not a tensor of a model of 2 layers"):
        check_checkpoint(tmp_path, config)


@pytest.mark.parametrize("index", ["{", '{"weight_map": 3}', '{"weight_map": {"a": "nowhere.safetensors"}}', "[]"])
def test_a_damaged_index_is_told(index, base_config, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    with pytest.raises(WeightsError, match=r"safetensors"):
        check_checkpoint(tmp_path, base_config)


def test_a_file_that_was_cut_is_told(int8_checkpoint, load, tmp_path):
    shutil.copytree(int8_checkpoint, tmp_path, dirs_exist_ok=True)
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(WeightsError, match=r"model\.safetensors: "):
        load(tmp_path)
