"""Random checkpoints: deterministic, complete, and lively enough to test with."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from model.checkpoint import random_tensors, tensor_specs, write_byte_tokenizer, write_random_checkpoint
from model.config import ModelConfig
from model.tokenizer import Tokenizer


def test_equal_seeds_give_equal_files_and_another_seed_other_values(base_config, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_random_checkpoint(tmp_path / name, base_config, seed)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)
    assert (tmp_path / "a/model.safetensors").read_bytes() != (tmp_path / "c/model.safetensors").read_bytes()


def test_a_tensor_does_not_depend_on_the_others(make_config):
    small, large = random_tensors(make_config(num_hidden_layers=2), 0), random_tensors(make_config(), 0)
    name = "model.layers.1.mlp.experts.5.down_proj.weight"
    np.testing.assert_array_equal(small[name], large[name])


def test_the_files_hold_every_tensor_config_and_tokenizer(base_config, tmp_path):
    write_random_checkpoint(tmp_path, base_config, 0)
    stored = load_file(tmp_path / "model.safetensors")
    assert {name: tensor.shape for name, tensor in stored.items()} == {
        s.name: s.shape for s in tensor_specs(base_config)
    }
    assert ModelConfig.from_file(tmp_path / "config.json") == base_config
    assert Tokenizer.from_file(tmp_path / "tokenizer.json").vocab_size == base_config.vocab_size
    generation = json.loads((tmp_path / "generation_config.json").read_text(encoding="utf-8"))
    assert (generation["temperature"], generation["top_p"], generation["eos_token_id"]) == (0.6, 0.95, 1)
    for name in ("embed_tokens", "shared_head.head"):
        main = "model.embed_tokens.weight" if name == "embed_tokens" else "lm_head.weight"
        np.testing.assert_array_equal(stored[f"model.layers.3.{name}.weight"], stored[main])
    assert np.abs(stored["model.layers.1.mlp.gate.e_score_correction_bias"]).min() > 0


def test_a_vocabulary_that_does_not_fit_the_tokenizer_is_refused(make_config, tmp_path):
    with pytest.raises(ValueError, match="eos_token_id: 5 differs from the tokenizer's 1"):
        write_random_checkpoint(tmp_path, make_config(eos_token_id=5), 0)
    with pytest.raises(ValueError, match="vocab_size: 128 is below 263"):
        write_random_checkpoint(tmp_path, make_config(vocab_size=128), 0)
    assert list(tmp_path.iterdir()) == []


def test_generated_text_varies_and_every_expert_is_used(base_config, reference_of, make_instance, make_request):
    tokens = reference_of(base_config).generate(list(range(20, 40)), 60).token_ids
    assert len(set(tokens)) > 20
    instance = make_instance(base_config, 1)
    request = make_request(np.random.default_rng(0).integers(7, 263, 120).tolist(), 1)
    instance.allocate(request, 0)
    (output,) = instance.step([[request]])
    share = output.expert_counts / output.expert_counts.sum(axis=1, keepdims=True)
    assert share.min() > 0.005
    assert share.max() < 0.25


def test_the_best_token_leads_by_far_more_than_rounding(base_config, reference_of):
    from model.reference import Sampling

    generation = reference_of(base_config).generate(list(range(20, 40)), 60, Sampling(num_logprobs=2))
    leads = [entry.top[0][1] - entry.top[1][1] for entry in generation.logprobs]
    assert min(leads) > 1e-3
    assert np.median(leads) > 0.3


def test_a_tokenizer_alone_has_no_placeholders(make_config, tmp_path):
    """263 ids instead of 129,280: enough to read prompts where nothing is computed."""
    write_byte_tokenizer(tmp_path / "new", make_config(vocab_size=129280))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["tokenizer.json"]
    tokenizer = Tokenizer.from_file(tmp_path / "new" / "tokenizer.json")
    assert tokenizer.vocab_size == 263
    assert tokenizer.decode(tokenizer.encode("2 + 3 = 5 ✓")) == "2 + 3 = 5 ✓"
    with pytest.raises(ValueError, match="vocab_size: 128 is below 263"):
        write_byte_tokenizer(tmp_path, make_config(vocab_size=128))
