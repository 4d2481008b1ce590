"""Outlier suppression: orthogonal transforms that are absorbed in the weights.

Owns: where transforms may stand without changing the model, and the matrices themselves.
Must not know: INT8, calibration.
Source: QuaRot (arXiv 2404.00456) and SpinQuant (arXiv 2405.16406): gains of RMSNorm move into the matrices behind
it, then norms commute with any rotation. arXiv 2506.12708 section 4.5 asks for structural transforms of this kind.

Three rotations, each exact up to float rounding and each without a product at run time:

    R  the residual stream      embedding, every matrix that reads or writes the stream, gate, lm_head
    Q  the query latent         q_a_proj writes it, q_b_proj reads it
    P  the values of a head     value rows of kv_b_proj write them, o_proj reads them

The input of down_proj is not rotated: SwiGLU lies before it, so a rotation would be a product at run time.

An MTP module reads the final norm's output through a norm of its own. The gains between two norms cannot be
absorbed, so the module gets one more matrix, h_proj = R^T diag(gains) R, and a head of its own. The main model,
and so every token that is served, has neither.
"""

# Row vectors: x' = x R. A writer W (O, I) becomes R^T W, a reader W diag(gains) R.

import dataclasses

import torch
from torch import Tensor

from model.checkpoint_check import h_proj_name
from model.config import ModelConfig
from model.quantization import names

Tensors = dict[str, Tensor]


def random_orthogonal(size: int, seed: int) -> Tensor:
    """(size, size) float64: a Hadamard matrix with random signs, times a random rotation of size's odd factor."""
    generator = torch.Generator().manual_seed(seed)
    odd = size
    while odd % 2 == 0:
        odd //= 2
    matrix = torch.linalg.qr(torch.randn(odd, odd, dtype=torch.float64, generator=generator)).Q.contiguous()
    while len(matrix) < size:
        matrix = torch.kron(torch.tensor([[1, 1], [1, -1]], dtype=torch.float64) / 2**0.5, matrix)
    signs = torch.randint(0, 2, (size, 1), generator=generator) * 2 - 1
    signed: Tensor = matrix * signs
    return signed


def rotate(config: ModelConfig, tensors: Tensors, *, seed: int) -> tuple[ModelConfig, Tensors]:
    """The same model in another basis, all gains that can be moved in the matrices. Float32 tensors by hub name.

    A tied head becomes a tensor of its own, since the final gains move into it.
    """
    rotated = _Rotation(config, tensors, seed)
    for layer in range(names.num_blocks(config)):
        rotated.block(layer)
    for layer in names.mtp_layers(config):
        rotated.mtp(layer)
    rotated.ends()
    return dataclasses.replace(config, tie_word_embeddings=False), rotated.tensors


class _Rotation:
    """Tensors on their way into the new basis; a tensor is replaced, never written to."""

    def __init__(self, config: ModelConfig, tensors: Tensors, seed: int) -> None:
        self.tensors = dict(tensors)
        self._before = tensors
        self._config = config
        self._seed = seed
        self._stream = random_orthogonal(config.hidden_size, seed)

    def block(self, layer: int) -> None:
        config, prefix = self._config, names.block_prefix(layer)
        attention = f"{prefix}self_attn."
        gains = self._take_gains(f"{prefix}input_layernorm")
        for module in names.attention_readers(config, layer):
            self._read(module, gains, self._stream)
        if config.q_lora_rank is not None:
            latent = random_orthogonal(config.q_lora_rank, self._seed + 2 * layer + 1)
            self._write(f"{attention}q_a_proj", latent)
            self._read(f"{attention}q_b_proj", self._take_gains(f"{attention}q_a_layernorm"), latent)
        self._values(attention, random_orthogonal(config.v_head_dim, self._seed + 2 * layer + 2))
        self._write(f"{attention}o_proj", self._stream)
        gains = self._take_gains(f"{prefix}post_attention_layernorm")
        gate = [f"{prefix}mlp.gate"] if names.is_moe(config, layer) else []
        for module in gate + names.mlp_readers(config, layer):
            self._read(module, gains, self._stream)
        for mlp in names.mlp_modules(config, layer):
            self._write(f"{mlp}.down_proj", self._stream)

    def mtp(self, layer: int) -> None:
        """The module reads the stream behind the previous final norm, whose gains h_proj applies."""
        prefix, stream = names.block_prefix(layer), self._stream
        is_first = layer == self._config.num_hidden_layers
        previous = "model.norm" if is_first else f"{names.block_prefix(layer - 1)}shared_head.norm"
        gains = self._before[f"{previous}.weight"].to(torch.float64)
        self.tensors[h_proj_name(layer)] = (stream.T @ (gains[:, None] * stream)).to(torch.float32)
        embedding, hidden = self._get(f"{prefix}eh_proj").chunk(2, dim=1)
        embedding = embedding * self._take_gains(f"{prefix}enorm") @ stream
        hidden = hidden * self._take_gains(f"{prefix}hnorm") @ stream
        self._set(f"{prefix}eh_proj", stream.T @ torch.cat([embedding, hidden], dim=1))
        head = self._before.get(f"{prefix}shared_head.head.weight", self._head())
        gains = self._take_gains(f"{prefix}shared_head.norm")
        self._set(f"{prefix}shared_head.head", head.to(torch.float64) * gains @ stream)

    def ends(self) -> None:
        """Embedding, final norm and head."""
        head = self._head().to(torch.float64)
        self._set("lm_head", head * self._take_gains("model.norm") @ self._stream)
        self._set("model.embed_tokens", self._get("model.embed_tokens") @ self._stream)
        for layer in names.mtp_layers(self._config):
            name = f"{names.block_prefix(layer)}embed_tokens.weight"
            self.tensors[name] = self.tensors["model.embed_tokens.weight"].clone()

    def _values(self, attention: str, rotation: Tensor) -> None:
        c = self._config
        stored = self._get(f"{attention}kv_b_proj")
        heads = stored.view(c.num_attention_heads, -1, stored.shape[1])
        keys, values = heads.split_with_sizes([c.qk_nope_head_dim, c.v_head_dim], dim=1)
        self._set(f"{attention}kv_b_proj", torch.cat([keys, rotation.T @ values], dim=1).flatten(0, 1))
        output = self._get(f"{attention}o_proj").view(c.hidden_size, c.num_attention_heads, c.v_head_dim)
        self._set(f"{attention}o_proj", (output @ rotation).flatten(1))

    def _read(self, module: str, gains: Tensor, rotation: Tensor) -> None:
        self._set(module, self._get(module) * gains @ rotation)

    def _write(self, module: str, rotation: Tensor) -> None:
        self._set(module, rotation.T @ self._get(module))

    def _take_gains(self, norm: str) -> Tensor:
        gains = self._get(norm)
        self._set(norm, torch.ones_like(gains))
        return gains

    def _head(self) -> Tensor:
        return self._before["model.embed_tokens.weight" if self._config.tie_word_embeddings else "lm_head.weight"]

    def _get(self, module: str) -> Tensor:
        return self.tensors[f"{module}.weight"].to(torch.float64)

    def _set(self, module: str, value: Tensor) -> None:
        self.tensors[f"{module}.weight"] = value.to(torch.float32).contiguous()
