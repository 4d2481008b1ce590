"""Counts of parameters, FLOPs and bytes against published numbers and against the tensors themselves."""

import math
from pathlib import Path

import pytest
import yaml

import configs
from model import work
from model.checkpoint import tensor_specs
from model.config import ModelConfig


@pytest.fixture(scope="module")
def r1() -> ModelConfig:
    path = Path(configs.__file__).parent / "model" / "deepseek-r1.yaml"
    return ModelConfig.from_dict(yaml.safe_load(path.read_text(encoding="utf-8")))


def test_r1_has_671_billion_parameters_of_which_11_6_in_its_mtp_module(r1):
    count = work.parameter_counts(r1)
    assert count.total == 671_026_419_200
    assert count.attention_per_layer == 187_105_280  # 187.1 M
    assert count.routed_expert == 44_040_192  # 44.04 M
    assert count.mtp_module == 11_610_068_224  # README_WEIGHTS of the hub rounds it to 11.5 B


@pytest.mark.parametrize(
    "changes",
    [{}, {"q_lora_rank": None}, {"tie_word_embeddings": True}, {"n_shared_experts": 2}, {"first_k_dense_replace": 3}],
)
def test_counts_equal_the_sizes_of_the_checkpoints_tensors(changes, make_config):
    config = make_config(**changes)
    sizes = {spec.name: math.prod(spec.shape) for spec in tensor_specs(config)}
    shared = ("embed_tokens.weight", "shared_head.head.weight")
    mtp = {name: size for name, size in sizes.items() if name.startswith(f"model.layers.{config.num_hidden_layers}.")}
    count = work.parameter_counts(config)
    assert count.total == sum(sizes.values()) - sum(mtp.values())
    assert count.mtp_module == sum(size for name, size in mtp.items() if not name.endswith(shared))


def test_int8_weights_of_r1_on_a_decode_die(r1):
    size = work.weight_bytes(r1)
    assert size.attention_per_layer == pytest.approx(187.1e6, rel=1e-3)
    assert size.routed_expert * 58 == pytest.approx(2.55e9, rel=2e-3)  # one expert of every layer
    assert size.dense_mlp_per_layer * 3 == pytest.approx(1.19e9, rel=2e-3)
    assert size.embedding + size.lm_head == pytest.approx(3.7e9, rel=2e-3)
    assert work.weight_bytes(r1, matrix_bytes=1, other_bytes=1).total == work.parameter_counts(r1).total


def test_latent_cache_of_r1_is_70_3_kilobytes_per_token(r1):
    assert work.kv_bytes_per_token(r1) == (512 + 64) * 61 * 2
    assert work.kv_bytes_per_token(r1, include_mtp=True) == (512 + 64) * 62 * 2
    assert work.kv_bytes_per_token(r1, element_bytes=1) == (512 + 64) * 61


def test_messages_of_r1_are_7_5_and_14_kib(r1):
    assert work.dispatch_message_bytes(r1) == 7.5 * 1024
    assert work.combine_message_bytes(r1) == 14 * 1024
    assert work.dispatch_message_bytes(r1, quantized=False) == 14 * 1024


def test_products_are_two_flops_per_parameter_and_token(r1):
    flops, count = work.operator_flops(r1), work.parameter_counts(r1)
    assert flops.q_a + flops.q_b + flops.kv_a + flops.kv_b + flops.o_proj == 2 * count.attention_per_layer
    # The absorbed form multiplies with the same kv_b parameters, split in keys and values.
    assert flops.absorb_k + flops.absorb_v == flops.kv_b
    assert flops.expert == flops.shared_expert == 2 * count.routed_expert
    assert flops.dense_mlp == 2 * count.dense_mlp_per_layer
    assert flops.lm_head == 2 * count.lm_head
    assert flops.mla_prolog == flops.q_a + flops.q_b + flops.kv_a + flops.absorb_k


def test_attention_of_one_decode_microbatch_is_55_gflop(r1):
    # 24 requests x 2 query tokens x 4,096 context: the constraint of the fact sheet
    per_pair = work.operator_flops(r1).attention_absorbed_per_context_token
    assert per_pair * 4096 * 48 == pytest.approx(54.8e9, rel=2e-3)


def test_without_q_lora_the_query_is_one_product(make_config):
    config = make_config(q_lora_rank=None)
    flops = work.operator_flops(config)
    assert flops.q_a == 0
    assert flops.q_b == 2 * config.hidden_size * config.num_attention_heads * config.qk_head_dim
