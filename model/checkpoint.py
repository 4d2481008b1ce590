"""Random checkpoints in the hub's format, for tests and for serving without a trained model.

Owns: the names and shapes of a checkpoint's tensors, and random values that make a lively model.
Must not know: ranks, torch, how weights are used.
Source: tensor names of deepseek-ai/DeepSeek-R1; model.layers.{num_hidden_layers}.* is the first MTP module.
"""

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from model.chat import BOS, EOS, PAD
from model.config import ModelConfig
from model.tokenizer import MIN_VOCAB_SIZE, Tokenizer

# Gains over unit-variance initialization. They keep every mechanism visible in the logits: attention that
# picks out tokens rather than averaging them, experts that the router tells apart, and logits far enough
# apart that rounding differences between parallel layouts (about 1e-5) change no token.
_QUERY_GAIN = 2.0
_GATE_GAIN = 2.0
_LM_HEAD_GAIN = 8.0
_BIAS_STD = 0.1
_NORM_STD = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One tensor of a checkpoint and the normal distribution its random values come from."""

    name: str
    shape: tuple[int, ...]
    std: float
    mean: float = 0.0


def tensor_specs(config: ModelConfig) -> Iterator[TensorSpec]:
    """Every tensor of a checkpoint, in layer order, MTP modules last."""
    hidden = config.hidden_size
    yield TensorSpec(name="model.embed_tokens.weight", shape=(config.vocab_size, hidden), std=1.0)
    for layer in range(config.num_hidden_layers):
        yield from _block_specs(config, layer, is_moe=layer >= config.first_k_dense_replace)
    yield _norm("model.norm.weight", hidden)
    if not config.tie_word_embeddings:
        yield _matrix("lm_head.weight", config.vocab_size, hidden, gain=_LM_HEAD_GAIN)
    for layer in range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers):
        prefix = f"model.layers.{layer}."
        yield TensorSpec(name=f"{prefix}embed_tokens.weight", shape=(config.vocab_size, hidden), std=1.0)
        yield _norm(f"{prefix}enorm.weight", hidden)
        yield _norm(f"{prefix}hnorm.weight", hidden)
        yield _matrix(f"{prefix}eh_proj.weight", hidden, 2 * hidden)
        yield from _block_specs(config, layer, is_moe=True)
        yield _norm(f"{prefix}shared_head.norm.weight", hidden)
        yield _matrix(f"{prefix}shared_head.head.weight", config.vocab_size, hidden, gain=_LM_HEAD_GAIN)


def random_tensors(config: ModelConfig, seed: int) -> dict[str, NDArray[np.float32]]:
    """Random float32 values of every tensor. A tensor depends on (seed, its name, its shape) only."""
    tensors: dict[str, NDArray[np.float32]] = {}
    for spec in tensor_specs(config):
        generator = np.random.default_rng([seed, zlib.crc32(spec.name.encode())])
        values = generator.standard_normal(spec.shape, np.float32)
        tensors[spec.name] = values * np.float32(spec.std) + np.float32(spec.mean)
    # An MTP module shares the main model's embedding and head; the hub's checkpoints store copies.
    for layer in range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers):
        head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
        tensors[f"model.layers.{layer}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors[f"model.layers.{layer}.shared_head.head.weight"] = tensors[head].copy()
    return tensors


def write_random_checkpoint(directory: str | Path, config: ModelConfig, seed: int) -> None:
    """Write config.json, model.safetensors, tokenizer.json and its companions; equal arguments give equal
    bytes.

    Raises ValueError if the byte-level tokenizer does not fit the model's vocabulary or its bos and eos ids.
    """
    directory = Path(directory)
    write_byte_tokenizer(directory, config, vocab_size=config.vocab_size)
    save_file(random_tensors(config, seed), directory / "model.safetensors", metadata={"format": "pt"})
    write_json(directory / "config.json", config.to_dict())
    write_json(
        directory / "generation_config.json",
        {
            "bos_token_id": config.bos_token_id,
            "eos_token_id": config.eos_token_id,
            "do_sample": True,
            "temperature": 0.6,  # generation_config.json of deepseek-ai/DeepSeek-R1
            "top_p": 0.95,
        },
    )
    write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": PAD,
            "model_max_length": config.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
        },
    )


def write_byte_tokenizer(directory: str | Path, config: ModelConfig, *, vocab_size: int | None = None) -> None:
    """Write tokenizer.json alone, which is enough where nothing is computed.

    `vocab_size` None: control tokens and bytes, without the placeholders that nothing generates; those of R1's
    vocabulary take ten seconds. Raises ValueError as above.
    """
    tokenizer = Tokenizer.byte_level(min(config.vocab_size, MIN_VOCAB_SIZE) if vocab_size is None else vocab_size)
    for name in ("bos_token_id", "eos_token_id"):
        if getattr(config, name) != getattr(tokenizer, name):
            raise ValueError(f"{name}: {getattr(config, name)} differs from the tokenizer's {getattr(tokenizer, name)}")
    Path(directory).mkdir(parents=True, exist_ok=True)
    tokenizer.save(Path(directory) / "tokenizer.json")


def _block_specs(config: ModelConfig, layer: int, *, is_moe: bool) -> Iterator[TensorSpec]:
    c, prefix = config, f"model.layers.{layer}."
    heads, attention = c.num_attention_heads, f"model.layers.{layer}.self_attn."
    yield _norm(f"{prefix}input_layernorm.weight", c.hidden_size)
    if c.q_lora_rank is None:
        yield _matrix(f"{attention}q_proj.weight", heads * c.qk_head_dim, c.hidden_size, gain=_QUERY_GAIN)
    else:
        yield _matrix(f"{attention}q_a_proj.weight", c.q_lora_rank, c.hidden_size)
        yield _norm(f"{attention}q_a_layernorm.weight", c.q_lora_rank)
        yield _matrix(f"{attention}q_b_proj.weight", heads * c.qk_head_dim, c.q_lora_rank, gain=_QUERY_GAIN)
    yield _matrix(f"{attention}kv_a_proj_with_mqa.weight", c.latent_dim, c.hidden_size)
    yield _norm(f"{attention}kv_a_layernorm.weight", c.kv_lora_rank)
    yield _matrix(f"{attention}kv_b_proj.weight", heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank)
    yield _matrix(f"{attention}o_proj.weight", c.hidden_size, heads * c.v_head_dim)
    yield _norm(f"{prefix}post_attention_layernorm.weight", c.hidden_size)
    if not is_moe:
        yield from _mlp_specs(f"{prefix}mlp.", c.hidden_size, c.intermediate_size)
        return
    yield _matrix(f"{prefix}mlp.gate.weight", c.n_routed_experts, c.hidden_size, gain=_GATE_GAIN)
    yield TensorSpec(name=f"{prefix}mlp.gate.e_score_correction_bias", shape=(c.n_routed_experts,), std=_BIAS_STD)
    for expert in range(c.n_routed_experts):
        yield from _mlp_specs(f"{prefix}mlp.experts.{expert}.", c.hidden_size, c.moe_intermediate_size)
    shared_size = c.moe_intermediate_size * c.n_shared_experts
    yield from _mlp_specs(f"{prefix}mlp.shared_experts.", c.hidden_size, shared_size)


def _mlp_specs(prefix: str, hidden: int, intermediate: int) -> Iterator[TensorSpec]:
    yield _matrix(f"{prefix}gate_proj.weight", intermediate, hidden)
    yield _matrix(f"{prefix}up_proj.weight", intermediate, hidden)
    yield _matrix(f"{prefix}down_proj.weight", hidden, intermediate)


def _matrix(name: str, rows: int, columns: int, *, gain: float = 1.0) -> TensorSpec:
    return TensorSpec(name=name, shape=(rows, columns), std=gain / columns**0.5)


def _norm(name: str, size: int) -> TensorSpec:
    return TensorSpec(name=name, shape=(size,), std=_NORM_STD, mean=1.0)


def write_json(path: Path, content: dict[str, object]) -> None:
    """Write one of a checkpoint's JSON files, readable for people."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
