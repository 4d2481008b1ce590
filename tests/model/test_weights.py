"""Reading checkpoints: what a rank takes, and what is wrong with a file is named."""

import json
import os
import shutil
import stat

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from model.layout import make_layouts, uniform_placement
from model.weights import WeightsError, load_rank_weights, save_weights, write_tensors


@pytest.fixture
def layout(base_config):
    return make_layouts(base_config, world_size=1, max_num_tokens=8)[0]


@pytest.fixture
def broken(base_config, checkpoint_of, tmp_path):
    """A copy of the checkpoint whose tensors a test may change."""

    def make(change):
        tensors = load_file(checkpoint_of(base_config) / "model.safetensors")
        change(tensors)
        save_file(tensors, tmp_path / "model.safetensors")
        return tmp_path

    return make


EXPERT = "model.layers.2.mlp.experts.7.up_proj.weight"


@pytest.mark.parametrize("name", [EXPERT, "lm_head.weight", "model.layers.0.self_attn.kv_a_layernorm.weight"])
def test_a_missing_tensor_is_named(name, broken, base_config, layout):
    directory = broken(lambda tensors: tensors.pop(name))
    with pytest.raises(WeightsError, match=f"{name}: missing from"):
        load_rank_weights(directory, base_config, layout)


def test_a_misshapen_tensor_is_named_with_both_shapes(broken, base_config, layout):
    def change(tensors):
        tensors[EXPERT] = tensors[EXPERT][:-1]

    with pytest.raises(WeightsError, match=rf"{EXPERT}: shape \(31, 64\) is not \(32, 64\)"):
        load_rank_weights(broken(change), base_config, layout)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_tensor_that_is_not_finite_is_named(value, broken, base_config, layout):
    def change(tensors):
        tensors[EXPERT][3, 4] = value

    with pytest.raises(WeightsError, match=f"{EXPERT}: holds NaN or infinity"):
        load_rank_weights(broken(change), base_config, layout)


def test_a_dtype_that_needs_scales_is_named(broken, base_config, layout):
    def change(tensors):
        tensors[EXPERT] = tensors[EXPERT].astype(np.int8)

    with pytest.raises(WeightsError, match=f"{EXPERT}: dtype I8 is not one of F32, F16, BF16"):
        load_rank_weights(broken(change), base_config, layout)


def test_a_directory_without_weights_and_a_damaged_file_are_named(base_config, layout, tmp_path):
    with pytest.raises(WeightsError, match=r"neither model.safetensors nor model.safetensors.index.json"):
        load_rank_weights(tmp_path, base_config, layout)
    (tmp_path / "model.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(WeightsError, match=r"model\.safetensors: "):
        load_rank_weights(tmp_path, base_config, layout)


def test_half_precision_is_widened(broken, base_config, layout):
    def change(tensors):
        tensors[EXPERT] = tensors[EXPERT].astype(np.float16)

    weights = load_rank_weights(broken(change), base_config, layout)
    moe = weights.blocks[2].mlp
    assert moe.experts_gate_up.dtype == torch.float32


def test_shards_with_an_index_read_like_one_file(base_config, checkpoint_of, layout, tmp_path):
    tensors = load_file(checkpoint_of(base_config) / "model.safetensors")
    weight_map = {}
    for index, part in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2])):
        file = f"model-{index}.safetensors"
        save_file({name: tensors[name] for name in part}, tmp_path / file)
        weight_map |= dict.fromkeys(part, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    whole = load_rank_weights(checkpoint_of(base_config), base_config, layout)
    sharded = load_rank_weights(tmp_path, base_config, layout)
    assert whole.num_bytes == sharded.num_bytes
    torch.testing.assert_close(whole.blocks[2].mlp.experts_down, sharded.blocks[2].mlp.experts_down, rtol=0, atol=0)


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None}, {"tie_word_embeddings": True}, {"n_shared_experts": 2}])
def test_saved_weights_are_the_loaded_ones_bit_for_bit(changes, make_config, checkpoint_of, tmp_path):
    config = make_config(**changes)
    source = checkpoint_of(config)
    (layout,) = make_layouts(config, world_size=1, max_num_tokens=8)
    save_weights(tmp_path, config, load_rank_weights(source, config, layout, with_mtp=True))
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert set(before) == set(after)
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor, err_msg=name)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_who_can_read_the_file_is_up_to_the_umask(mask, mode, base_config, checkpoint_of, tmp_path):
    (layout,) = make_layouts(base_config, world_size=1, max_num_tokens=8)
    weights = load_rank_weights(checkpoint_of(base_config), base_config, layout)
    (tmp_path / "model.safetensors.part").write_text("left by a process that was killed")
    before = os.umask(mask)
    try:
        save_weights(tmp_path, base_config, weights)
    finally:
        os.umask(before)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    assert stat.S_IMODE((tmp_path / "model.safetensors").stat().st_mode) == mode


def test_a_file_that_cannot_be_written_leaves_the_one_before(tmp_path):
    write_tensors(tmp_path / "model.safetensors", {"a": torch.ones(2)})
    shared = torch.zeros(2)
    with pytest.raises(RuntimeError, match="share memory"):
        write_tensors(tmp_path / "model.safetensors", {"a": shared, "b": shared})
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    assert load_file(tmp_path / "model.safetensors")["a"].tolist() == [1.0, 1.0]


def test_weights_of_one_rank_among_several_are_not_saved_as_a_whole(base_config, checkpoint_of, tmp_path):
    layout = make_layouts(base_config, world_size=2, max_num_tokens=8)[0]
    weights = load_rank_weights(checkpoint_of(base_config), base_config, layout)
    with pytest.raises(AssertionError, match="weights are not whole"):
        save_weights(tmp_path, base_config, weights)


def test_a_rank_holds_its_experts_and_heads_and_no_others(base_config, checkpoint_of):
    source = checkpoint_of(base_config)
    tensors = load_file(source / "model.safetensors")
    placement = uniform_placement(base_config, world_size=4, num_redundant=4)
    layouts = make_layouts(
        base_config,
        world_size=4,
        attention="sequence_tensor",
        physical_to_logical=placement,
        max_num_tokens=8,
    )
    weights = load_rank_weights(source, base_config, layouts[2])
    moe, attention = weights.blocks[1].mlp, weights.blocks[1].attention
    assert moe.experts_down.shape[0] == 5
    for slot, expert in enumerate([2, 6, 10, 14, 3]):
        stored = tensors[f"model.layers.1.mlp.experts.{expert}.down_proj.weight"]
        np.testing.assert_array_equal(moe.experts_down[slot].numpy(), stored)
    assert attention.w_uk.shape == (2, 16, 32)
    kv_b = tensors["model.layers.1.self_attn.kv_b_proj.weight"].reshape(8, 32, 32)
    np.testing.assert_array_equal(attention.w_uk.numpy(), kv_b[4:6, :16])
    np.testing.assert_array_equal(attention.w_uv.numpy(), kv_b[4:6, 16:])


def test_a_rank_holds_fewer_bytes_the_more_ranks_there_are(base_config, checkpoint_of):
    source = checkpoint_of(base_config)
    whole = load_rank_weights(source, base_config, make_layouts(base_config, world_size=1, max_num_tokens=8)[0])
    sizes = {}
    for attention in ("data_parallel", "sequence_tensor"):
        layouts = make_layouts(base_config, world_size=8, attention=attention, max_num_tokens=8)
        sizes[attention] = load_rank_weights(source, base_config, layouts[5]).num_bytes
    expert_bytes = 3 * base_config.hidden_size * base_config.moe_intermediate_size * 4
    saved = whole.num_bytes - sizes["data_parallel"]
    assert saved == base_config.num_moe_layers * 14 * expert_bytes  # 2 of 16 experts stay
    assert sizes["sequence_tensor"] < sizes["data_parallel"] < whole.num_bytes


def test_a_tied_head_is_the_embedding_and_counts_once(make_config, checkpoint_of):
    sizes = []
    for is_tied in (False, True):
        config = make_config(tie_word_embeddings=is_tied)
        (layout,) = make_layouts(config, world_size=1, max_num_tokens=8)
        sizes.append(load_rank_weights(checkpoint_of(config), config, layout).num_bytes)
    assert sizes[0] - sizes[1] == 272 * 64 * 4


def test_the_configuration_must_match_the_checkpoint(make_config, checkpoint_of, base_config, tmp_path):
    shutil.copy(checkpoint_of(base_config) / "model.safetensors", tmp_path)
    config = make_config(hidden_size=128)
    (layout,) = make_layouts(config, world_size=1, max_num_tokens=8)
    with pytest.raises(WeightsError, match=r"model.embed_tokens.weight: shape \(272, 64\) is not \(272, 128\)"):
        load_rank_weights(tmp_path, config, layout)
