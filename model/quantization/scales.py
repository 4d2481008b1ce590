"""Adaptive scale search: factors that move range between activations and weights, absorbed before the run.

Owns: which vectors can be scaled at no cost, the candidates, and the choice among them.
Must not know: rotations, how weights are rounded in the end.
Source: arXiv 2506.12708 section 4.5, argmin over s of |Q(W s) (s^-1 X) - W X|, read as one factor per input
channel; the family of candidates is SmoothQuant's (arXiv 2211.10438), the search AWQ's (arXiv 2306.00978).

    s = absmax(X)^a / absmax(W)^(1 - a) per input channel, a in 0, 0.1 .. 1, or no scaling: the best by output error

W s is quantized instead of W; s^-1 goes where X comes from: the gains of the norm before, the value rows of
kv_b_proj (o_proj's input), or the rows of up_proj (down_proj's input). Both sides are rounded as at run time.
"""

# Shapes: n sample rows, I input channels, O output channels

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import ModelConfig
from model.quant import dequantize_rows, quantize_rows
from model.quantization import names
from model.quantization.calibration import Statistics

_STRENGTHS = tuple(step / 10 for step in range(11))
_MAX_ROWS = 256
Tensors = dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """Matrices that read one vector, and how its inverse factors are absorbed."""

    readers: list[str]  # quantized
    also_scaled: list[str]  # readers in high precision
    absorb: Callable[[Tensors, Tensor], None]


def search_scales(config: ModelConfig, tensors: Tensors, statistics: Mapping[str, Statistics]) -> None:
    """Scale `tensors` and `statistics` in place, but for groups where no scaling is best."""
    for group in _groups(config):
        readers = [(tensors[f"{module}.weight"], statistics[module]) for module in group.readers]
        scale = _best(readers)
        if scale is None:
            continue
        for module in (*group.readers, *group.also_scaled):
            tensors[f"{module}.weight"] = tensors[f"{module}.weight"] * scale
        group.absorb(tensors, scale)
        for entry in {id(statistics[module]): statistics[module] for module in group.readers}.values():
            entry.divide(scale)


def _best(readers: list[tuple[Tensor, Statistics]]) -> Tensor | None:
    """The factors (I,) with the least output error over all readers' samples; None if that is without."""
    weight_max = torch.stack([weight.abs().amax(dim=0) for weight, _ in readers]).amax(dim=0)
    input_max = torch.stack([entry.absmax for _, entry in readers]).amax(dim=0)
    ones = torch.ones_like(weight_max)
    best: Tensor | None = None
    least = _error(readers, ones)
    is_used = (weight_max > 0) & (input_max > 0)
    for strength in _STRENGTHS:
        scale = input_max.clamp_min(1e-8) ** strength / weight_max.clamp_min(1e-8) ** (1 - strength)
        scale = torch.where(is_used, scale, ones)
        scale = (scale / torch.exp(torch.log(scale[is_used]).mean() if is_used.any() else ones[0] * 0)).clamp(1e-4, 1e4)
        scale = torch.where(is_used, scale, ones)
        error = _error(readers, scale)
        if error < least:
            least, best = error, scale
    return best


def _error(readers: list[tuple[Tensor, Statistics]], scale: Tensor) -> float:
    total = 0.0
    for weight, entry in readers:
        rows = entry.samples[:_MAX_ROWS]
        if len(rows):
            rounded = dequantize_rows(*quantize_rows(weight * scale))
            seen = dequantize_rows(*quantize_rows(rows / scale))
            error = (seen @ rounded.T - rows @ weight.T).pow(2).mean(dim=0).sum()
            total += float(error) * entry.num_rows
    return total


def _groups(config: ModelConfig) -> list[_Group]:
    groups = []
    for layer in range(names.num_blocks(config)):
        prefix = names.block_prefix(layer)
        attention = f"{prefix}self_attn."
        if layer in names.mtp_layers(config):
            norms = [f"{prefix}enorm", f"{prefix}hnorm"]
            groups.append(_Group(readers=[f"{prefix}eh_proj"], also_scaled=[], absorb=_into_rows(norms)))
        groups.append(
            _Group(
                readers=names.attention_readers(config, layer),
                also_scaled=[],
                absorb=_into_rows([f"{prefix}input_layernorm"]),
            )
        )
        if config.q_lora_rank is not None:
            norms = [f"{attention}q_a_layernorm"]
            groups.append(_Group(readers=[f"{attention}q_b_proj"], also_scaled=[], absorb=_into_rows(norms)))
        groups.append(
            _Group(readers=[f"{attention}o_proj"], also_scaled=[], absorb=_into_values(config, f"{attention}kv_b_proj"))
        )
        groups.append(
            _Group(
                readers=names.mlp_readers(config, layer),
                also_scaled=[f"{prefix}mlp.gate"] if names.is_moe(config, layer) else [],
                absorb=_into_rows([f"{prefix}post_attention_layernorm"]),
            )
        )
        for mlp in names.mlp_modules(config, layer):
            groups.append(_Group(readers=[f"{mlp}.down_proj"], also_scaled=[], absorb=_into_rows([f"{mlp}.up_proj"])))
    return groups


def _into_rows(modules: list[str]) -> Callable[[Tensors, Tensor], None]:
    """Into gains (I,), or the rows of a matrix (I, ...); several modules make the vector one after the other."""

    def absorb(tensors: Tensors, scale: Tensor) -> None:
        for module, part in zip(modules, scale.chunk(len(modules)), strict=True):
            weight = tensors[f"{module}.weight"]
            tensors[f"{module}.weight"] = weight / (part if weight.ndim == 1 else part[:, None])

    return absorb


def _into_values(config: ModelConfig, module: str) -> Callable[[Tensors, Tensor], None]:
    """Into the value rows of kv_b_proj; keys stay."""

    def absorb(tensors: Tensors, scale: Tensor) -> None:
        stored = tensors[f"{module}.weight"]
        heads = stored.view(config.num_attention_heads, -1, stored.shape[1])
        keys, values = heads.split_with_sizes([config.qk_nope_head_dim, config.v_head_dim], dim=1)
        values = values / scale.view(config.num_attention_heads, config.v_head_dim, 1)
        tensors[f"{module}.weight"] = torch.cat([keys, values], dim=1).flatten(0, 1)

    return absorb
