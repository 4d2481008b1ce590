"""Reading, checking and writing of model configurations."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

import configs
from model.config import ModelConfig, ModelConfigError, RopeScaling, yarn_mscale

PARTS = Path(configs.__file__).parent / "model"


@pytest.mark.parametrize("name", ["mini-r1", "deepseek-r1"])
def test_the_shipped_shapes_load_and_survive_a_round_trip(name):
    config = ModelConfig.from_dict(yaml.safe_load((PARTS / f"{name}.yaml").read_text(encoding="utf-8")))
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_deepseek_r1_has_the_published_shape():
    config = ModelConfig.from_dict(yaml.safe_load((PARTS / "deepseek-r1.yaml").read_text(encoding="utf-8")))
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (7168, 61, 128)
    assert (config.latent_dim, config.qk_head_dim, config.num_moe_layers) == (576, 192, 58)
    assert (config.n_routed_experts, config.num_experts_per_tok, config.experts_per_group) == (256, 8, 32)
    # 192 ** -0.5 times (0.1 ln 40 + 1) squared
    assert config.softmax_scale == pytest.approx(0.1352337788608801)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 0}, "hidden_size: 0 is below 1"),
        ({"first_k_dense_replace": 4}, "first_k_dense_replace: 4 exceeds num_hidden_layers 3"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim: 7 must be even"),
        ({"n_group": 3}, "n_routed_experts: 16 is not a multiple of n_group 3"),
        ({"n_group": 16, "topk_group": 8}, "n_group: 16 leaves 1 experts per group"),
        ({"topk_group": 5}, "topk_group: 5 exceeds n_group 4"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok: 9 exceeds experts in topk_group groups 8"),
        ({"eos_token_id": 272}, r"eos_token_id: 272 is outside \[0, vocab_size 272\)"),
        ({"q_lora_rank": 0}, "q_lora_rank: 0 is below 1"),
        ({"rope_theta": float("inf")}, "rope_theta: inf must be finite"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps: 0.0 must be finite and above 0"),
    ],
)
def test_a_field_out_of_range_is_named_with_its_value_and_limit(changes, message, make_config):
    with pytest.raises(ModelConfigError, match=message):
        make_config(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hiden_size": 64}, "hiden_size: unknown key"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu' is not supported, only 'silu'"),
        ({"scoring_func": "softmax"}, "scoring_func: 'softmax' is not supported"),
        ({"num_key_value_heads": 2}, "num_key_value_heads: 2 must equal num_attention_heads"),
        ({"vocab_size": "272"}, "vocab_size: '272' is not an integer"),
        ({"vocab_size": 272.5}, "vocab_size: 272.5 is not an integer"),
        ({"vocab_size": True}, "vocab_size: True is not an integer"),
        ({"norm_topk_prob": 1}, "norm_topk_prob: 1 is not true or false"),
        ({"rope_theta": "1e4"}, "rope_theta: '1e4' is not a number"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.type: 'linear' is not supported"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "original_max_position_embeddings: missing"),
        (
            {"rope_scaling": {"factor": 0.5, "original_max_position_embeddings": 32}},
            "rope_scaling.factor: 0.5 is below 1.0",
        ),
        ({"hidden_size": None}, "hidden_size: None is not an integer"),
        ({"rope_parameters": 3}, "rope_parameters: 3 is not a mapping"),
        ({"rope_scaling": 3}, "rope_scaling: 3 is not a mapping"),
        ({"rope_scaling": False}, "rope_scaling: False is not a mapping"),
        ({"rope_scaling": ["yarn"]}, r"rope_scaling: \['yarn'\] is not a mapping"),
    ],
)
def test_a_config_file_that_asks_for_something_else_is_refused(changes, message, base_config):
    with pytest.raises(ModelConfigError, match=message):
        ModelConfig.from_dict({**base_config.to_dict(), **changes})


def test_a_missing_field_is_named(base_config):
    raw = base_config.to_dict()
    del raw["kv_lora_rank"]
    with pytest.raises(ModelConfigError, match="kv_lora_rank: missing"):
        ModelConfig.from_dict(raw)


def test_keys_without_effect_on_the_forward_pass_are_dropped(base_config):
    raw = {**base_config.to_dict(), "torch_dtype": "bfloat16", "ep_size": 1, "use_cache": True, "aux_loss_alpha": 0.001}
    assert ModelConfig.from_dict(raw) == base_config


def test_the_spelling_of_transformers_5_reads_as_the_published_one(base_config):
    raw = base_config.to_dict()
    scaling = raw.pop("rope_scaling")
    raw["rope_parameters"] = {**scaling, "rope_type": "yarn", "rope_theta": raw.pop("rope_theta")}
    raw["num_mtp_layers"] = raw.pop("num_nextn_predict_layers")
    assert ModelConfig.from_dict(raw) == base_config
    raw["rope_parameters"] = {"rope_type": "default", "rope_theta": 500.0}
    assert ModelConfig.from_dict(raw) == dataclasses.replace(base_config, rope_scaling=None, rope_theta=500.0)


def test_rope_fields_may_be_null(base_config):
    raw = {**base_config.to_dict(), "rope_parameters": None}
    assert ModelConfig.from_dict(raw) == base_config
    raw["rope_scaling"] = None
    assert ModelConfig.from_dict(raw) == dataclasses.replace(base_config, rope_scaling=None)


def test_yarn_without_extension_has_no_temperature():
    assert yarn_mscale(1.0, 1.0) == 1.0
    assert yarn_mscale(40.0, 1.0) == pytest.approx(1.3688879454113936)
    with pytest.raises(ModelConfigError, match=r"rope_scaling.beta_fast: 1.0 must exceed beta_slow 1.0"):
        RopeScaling(factor=2.0, original_max_position_embeddings=8, beta_fast=1.0)
