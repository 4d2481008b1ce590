"""From a float checkpoint to an INT8 one that every arrangement of ranks computes alike."""

import json
import os
import shutil
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.checkpoint_check import WeightsError
from model.config import ModelConfig
from model.layout import make_layouts, uniform_placement
from model.quantization import ablation, names
from model.quantization.calibration import PlainModel, record_inputs
from model.quantization.model_card import model_card
from model.quantization.quantize import Techniques, quantize_tensors, read_float_checkpoint
from model.quantization.samples import self_generated
from model.quantization.scales import search_scales
from model.quantization_config import QuantizationConfig, read_config
from model.reference import ReferenceModel
from model.tensor_files import TensorDict, TensorFiles
from model.weights import load_rank_weights

NUM_TOKENS = 12


def test_the_file_holds_integers_scales_and_what_stays_in_high_precision(int8_checkpoint, base_config):
    stored = load_file(int8_checkpoint / "model.safetensors")
    quantized = set(names.quantized_modules(base_config))
    for name, tensor in stored.items():
        module = name.rpartition(".")[0]
        if name.endswith(".weight") and module in quantized:
            assert tensor.dtype == torch.int8, name
            assert stored[f"{name}_scale"].shape == (len(tensor), 1)
        else:
            assert tensor.dtype == torch.float32, name
    config, quantization = read_config(int8_checkpoint)
    assert config == base_config
    kept = {name.rpartition(".")[0] for name, tensor in stored.items() if tensor.ndim == 2} - quantized
    assert kept == set(quantization.ignore)
    assert quantization.techniques["rotation"] is True
    sizes = {file.name for file in int8_checkpoint.iterdir()}
    assert sizes >= {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"}


def test_a_rank_counts_the_bytes_of_integers(int8_checkpoint, checkpoint_of, base_config):
    (layout,) = make_layouts(base_config, world_size=1, max_num_tokens=8)
    whole = load_rank_weights(checkpoint_of(base_config), base_config, layout).num_bytes
    small = load_rank_weights(int8_checkpoint, base_config, layout).num_bytes
    modules = [m for m in names.quantized_modules(base_config) if not m.startswith("model.layers.3.")]
    files = TensorFiles(int8_checkpoint, base_config)
    shapes = [files.headers[f"{module}.weight"].shape for module in modules]
    assert whole - small == sum(3 * rows * columns - 4 * rows for rows, columns in shapes)


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(7, 263, (length,), generator=generator).tolist() for length in (9, 1, 17, 6, 30)]


@pytest.fixture(scope="module")
def expected(prompts, int8_checkpoint, base_config):
    model = ReferenceModel(base_config, int8_checkpoint)
    return [model.generate(prompt, NUM_TOKENS).token_ids for prompt in prompts]


@pytest.mark.parametrize("dispatch_dtype", ["float32", "int8"])
@pytest.mark.parametrize("attention", ["data_parallel", "sequence_tensor"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_give_the_tokens_of_one(
    world_size, attention, dispatch_dtype, prompts, expected, base_config, int8_checkpoint, make_request, instance_of
):
    """INT8 dispatch sends the rows that the experts' products would round to anyway: it changes nothing."""
    placement = uniform_placement(base_config, world_size=world_size, num_redundant=world_size)
    layouts = make_layouts(
        base_config,
        world_size=world_size,
        attention=attention,
        physical_to_logical=placement,
        dispatch_dtype=dispatch_dtype,
        max_num_tokens=128,
    )
    instance = instance_of(base_config, int8_checkpoint, layouts)
    requests = [make_request(prompt, NUM_TOKENS) for prompt in prompts]
    per_rank = [requests[rank::world_size] for rank in range(world_size)]
    instance.run(per_rank if attention == "data_parallel" else [requests], chunk=7)
    assert [request.tokens for request in requests] == expected


def test_int8_is_close_to_float_and_closer_with_the_techniques(base_config, tensors, sequences):
    plain = quantize_tensors(base_config, tensors, sequences[:8], Techniques.none())
    best = quantize_tensors(base_config, tensors, sequences[:8], Techniques())
    rough, good = (ablation.compare(base_config, tensors, model, sequences[8:]) for model in (plain, best))
    assert good.error_median < rough.error_median < 0.1
    assert good.top1_agreement > 0.8
    for layer, error in best.layer_errors().items():
        assert error < plain.layer_errors()[layer] < 0.01


@pytest.mark.parametrize("switch", ["rotation", "scale_search"])
def test_either_way_against_outliers_helps_where_there_are_some(switch, base_config, tensors, sequences):
    """One large channel of the stream takes the scale of every row; rotation or scales give it back."""
    spiked = with_outlier(base_config, tensors, channel=5, factor=20)
    rows = {}
    for name, techniques in (("none", Techniques.none()), (switch, ablation.variants()[f"only {switch}"])):
        model = quantize_tensors(base_config, spiked, sequences[:8], techniques)
        rows[name] = ablation.compare(base_config, spiked, model, sequences[8:])
    assert rows[switch].error_median < 0.7 * rows["none"].error_median


def with_outlier(config, tensors, *, channel, factor):
    """About the same model, one channel of whose stream is `factor` times as large: what reads it is small there."""
    spiked = {name: tensor.clone() for name, tensor in tensors.items()}
    spiked["model.embed_tokens.weight"][:, channel] *= factor
    readers = ["lm_head"]
    for layer in range(config.num_hidden_layers):
        readers += names.attention_readers(config, layer) + names.mlp_readers(config, layer)
        readers += [f"model.layers.{layer}.mlp.gate"] if names.is_moe(config, layer) else []
    for name, tensor in spiked.items():
        if name.removesuffix(".weight") in readers:
            tensor[:, channel] /= factor
        elif name.endswith(("input_layernorm.weight", "post_attention_layernorm.weight", "model.norm.weight")):
            tensor *= (1 + factor**2 / config.hidden_size) ** 0.5
    return spiked


def test_scales_change_nothing_before_rounding(base_config, tensors, sequences):
    scaled = dict(tensors)
    # The search finds little to gain in random weights: a spiked channel makes it choose.
    scaled["model.layers.1.post_attention_layernorm.weight"] = spike(tensors, "post_attention_layernorm", 1)
    before = {name: tensor.clone() for name, tensor in scaled.items()}
    statistics = record_inputs(base_config, scaled, sequences[:2])
    search_scales(base_config, scaled, statistics)
    name = "model.layers.1.mlp.experts.0.gate_proj.weight"
    assert not torch.equal(scaled[name], before[name])
    model = PlainModel(base_config, TensorDict(before), max_len=48, with_mtp=True)
    same = PlainModel(base_config, TensorDict(scaled), max_len=48, with_mtp=True)
    for wanted, found in (
        (model.logits(sequences[3]), same.logits(sequences[3])),
        (model.mtp_logits(sequences[3])[0], same.mtp_logits(sequences[3])[0]),
    ):
        assert (wanted - found).norm() / wanted.norm() < 1e-4
    read = record_inputs(base_config, scaled, sequences[:2])
    for module, entry in read.items():  # what was divided is what the scaled model reads
        torch.testing.assert_close(statistics[module].gram, entry.gram, rtol=1e-3, atol=1e-3)


def spike(tensors, norm, layer):
    gains = tensors[f"model.layers.{layer}.{norm}.weight"].clone()
    gains[5] *= 50
    return gains


def test_the_same_arguments_give_the_same_bytes_and_a_switch_is_recorded(base_config, tensors, sequences):
    first, again = (quantize_tensors(base_config, tensors, sequences[:3], Techniques()) for _ in range(2))
    assert all(torch.equal(first.tensors[name], again.tensors[name]) for name in first.tensors)
    off = quantize_tensors(base_config, tensors, sequences[:3], Techniques(rotation=False))
    assert off.quantization.techniques["rotation"] is False
    assert "model.layers.3.h_proj.weight" not in off.tensors


def test_calibration_text_of_the_model_has_no_ends_and_depends_on_its_seed(base_config, tensors):
    first, again, other = (self_generated(base_config, tensors, num=3, length=20, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert [len(tokens) for tokens in first] == [20] * 3
    assert all(base_config.eos_token_id not in tokens[8:] for tokens in first)


def test_half_precision_checkpoints_keep_their_large_tensors_small(base_config, checkpoint_of, tmp_path, sequences):
    from model.quantization.quantize import write_checkpoint

    source = tmp_path / "half"
    source.mkdir()
    stored = load_file(checkpoint_of(base_config) / "model.safetensors")
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in stored.items()}, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps(base_config.to_dict()), encoding="utf-8")
    config, tensors = read_float_checkpoint(source)
    write_checkpoint(source, tmp_path / "out", quantize_tensors(config, tensors, sequences[:1], Techniques.none()))
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written["lm_head.weight"].dtype == torch.bfloat16
    assert written["model.layers.1.mlp.gate.weight"].dtype == torch.float32
    ReferenceModel(ModelConfig.from_file(tmp_path / "out/config.json"), tmp_path / "out").generate([9], 2)


def test_the_model_card_is_the_int8_checkpoints_own(base_config, checkpoint_of, tensors, sequences, tmp_path):
    from model.quantization.quantize import write_checkpoint

    source, target = tmp_path / "tiny", tmp_path / "tiny-int8"
    shutil.copytree(checkpoint_of(base_config), source)
    (source / "README.md").write_text("---\nlicense: mit\ntags:\n- x\n---\n\n# tiny\n\n![Loss](loss_curve.png) 98.7\n")
    model = quantize_tensors(base_config, tensors, sequences[:1], Techniques(clipping=False))
    before = os.umask(0o022)
    try:
        write_checkpoint(source, target, model)
    finally:
        os.umask(before)
    card = (target / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlicense: mit\nlibrary_name: supernode-infer\n")
    assert "# tiny in INT8\n" in card
    assert "model.checkpoint=tiny-int8 --set model.quantization=int8" in card
    assert [word in card for word in ("- rotation:", "- scale search:", "- clipping:", "- compensation:")] == [
        True, True, False, True
    ]  # fmt: skip
    assert card.count("`model.layers.N.self_attn.kv_b_proj`") == 1
    assert not any(word in card for word in ("98.7", "loss_curve", str(tmp_path)))
    assert max(map(len, card.splitlines())) <= 120
    assert {stat.S_IMODE(file.stat().st_mode) for file in target.iterdir()} == {0o644}


def test_the_model_card_of_a_plain_checkpoint_without_a_card(tmp_path):
    card = model_card(tmp_path / "tiny", tmp_path / "out", QuantizationConfig(ignore=("lm_head",)))
    assert card.startswith("---\nlibrary_name: supernode-infer\n")
    assert "- nothing\n" in card
    assert "whose card names none" in card


def test_an_int8_checkpoint_is_not_quantized_again(int8_checkpoint):
    with pytest.raises(WeightsError, match="quantization_config: the checkpoint is INT8 already"):
        read_float_checkpoint(int8_checkpoint)


def test_the_table_has_a_row_for_every_switch(base_config, tensors, sequences):
    rows = {row.name: row for row in ablation.ablate(base_config, tensors, sequences[:4], sequences[10:])}
    assert list(rows) == list(ablation.variants())
    assert rows["all"].weight_error < rows["without compensation"].weight_error
    assert all(0 <= row.fidelity.top1_agreement <= 1 and row.fidelity.kl_mean >= 0 for row in rows.values())


def test_the_configuration_survives_a_round_trip():
    config = QuantizationConfig(ignore=("lm_head",), techniques={"rotation": True})
    assert QuantizationConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.is_quantized("model.layers.0.mlp.down_proj")
    assert not config.is_quantized("model.layers.0.mlp.gate")
    assert not QuantizationConfig(ignore=("a.o_proj",)).is_quantized("a.o_proj")
