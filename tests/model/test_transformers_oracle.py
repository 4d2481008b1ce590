"""Our forward against transformers' DeepseekV3ForCausalLM on checkpoints that both load."""

import logging

import numpy as np
import pytest
import torch

from model.collectives import run_lockstep
from model.config import ModelConfig, RopeScaling
from model.latent_cache import LatentCache
from model.layout import make_layouts
from model.transformer import Transformer
from model.weights import load_rank_weights

transformers = pytest.importorskip("transformers")

NUM_GREEDY = 64
ODD_YARN = RopeScaling(factor=8.0, original_max_position_embeddings=16, beta_fast=16.0, mscale=1.0, mscale_all_dim=0.8)
SHAPES = {
    "base": {},
    "no_q_lora": {
        "q_lora_rank": None, "num_attention_heads": 4, "num_experts_per_tok": 2, "n_group": 8, "topk_group": 1,
    },
    "plain_rope_all_moe": {
        "rope_scaling": None, "first_k_dense_replace": 0, "norm_topk_prob": False, "rope_theta": 500.0,
    },
    "one_group": {
        "n_group": 1, "topk_group": 1, "num_experts_per_tok": 6, "n_shared_experts": 2, "num_hidden_layers": 4,
    },
    "all_dense": {"first_k_dense_replace": 3, "num_nextn_predict_layers": 0},
    "tied": {"tie_word_embeddings": True},
    "odd_sizes": {
        "hidden_size": 60, "moe_intermediate_size": 20, "kv_lora_rank": 17, "q_lora_rank": 13, "qk_rope_head_dim": 6,
        "qk_nope_head_dim": 10, "v_head_dim": 14, "num_attention_heads": 3, "rms_norm_eps": 1e-5,
        "rope_scaling": ODD_YARN,
    },
}  # fmt: skip


@pytest.fixture(params=SHAPES, ids=list(SHAPES))
def config(request, make_config) -> ModelConfig:
    return make_config(**SHAPES[request.param])


@pytest.fixture
def oracle(config, checkpoint_of):
    # transformers reports the MTP module's tensors as unexpected; it has no place for them, we have.
    transformers.logging.set_verbosity(logging.CRITICAL)
    return transformers.DeepseekV3ForCausalLM.from_pretrained(
        checkpoint_of(config), dtype=torch.float32, attn_implementation="eager"
    ).eval()


def test_logits_agree_within_1e_4(config, oracle, checkpoint_of, make_request, make_step, random_prompt):
    prompt = random_prompt(90)  # beyond the original context of the YaRN shapes
    (layout,) = make_layouts(config, world_size=1, max_num_tokens=128)
    cache = LatentCache(config, 24, 4)
    model = Transformer(config, layout, load_rank_weights(checkpoint_of(config), config, layout), cache)
    request = make_request(prompt, 1, blocks=list(range(24)))
    ((hidden, _),) = run_lockstep([model.hidden_states(make_step([request], [len(prompt)]))])
    with torch.no_grad():
        expected = oracle(torch.tensor([prompt]), use_cache=False).logits[0]
    assert float(expected.std()) > 1, "logits of a lively model spread"
    np.testing.assert_allclose(model.logits(hidden).numpy(), expected.numpy(), rtol=0, atol=1e-4)


def test_64_greedy_tokens_are_identical(config, oracle, reference_of, random_prompt):
    prompt = random_prompt(12)
    with torch.no_grad():
        generated = oracle.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=NUM_GREEDY,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=2,
        )
    ours = reference_of(config).generate(prompt, NUM_GREEDY).token_ids
    assert ours == generated[0, len(prompt) :].tolist()
    # A random model whose head is its embedding repeats the last token; the others must give varied text.
    assert config.tie_word_embeddings or len(set(ours)) > 8


def test_the_configuration_that_transformers_saves_reads_back_the_same(config, oracle, tmp_path):
    oracle.config.save_pretrained(tmp_path)
    assert ModelConfig.from_file(tmp_path / "config.json") == config
