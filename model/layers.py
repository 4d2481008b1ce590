"""The small layers: RMSNorm, SwiGLU, and rotary positions with YaRN.

Owns: their mathematics, as functions of plain tensors.
Must not know: ranks, caches, weights' names.
Source: DeepSeek-V3 modeling code (arXiv 2412.19437); YaRN (arXiv 2309.00071).
"""

# Shapes: T tokens, N heads, R qk_rope_head_dim, I intermediate size, H hidden_size

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import ModelConfig, yarn_mscale

# The norms of the two latents keep DeepSeek-V3's default epsilon whatever rms_norm_eps says.
LATENT_NORM_EPS = 1e-6


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""
    return F.rms_norm(x, weight.shape, weight, eps)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of a (..., 2 I) projection whose first half is the gate: (..., I)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def rope_inverse_frequencies(config: ModelConfig) -> Tensor:
    """(R / 2,) radians per position of each pair, interpolated by YaRN where the configuration asks for it.

    Pairs that turn more than beta_fast times over the original context keep their frequency, pairs that
    turn less than beta_slow times are slowed by `factor`, and those between are blended linearly.
    """
    dim = config.qk_rope_head_dim
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies

    def pair_with_rotations(rotations: float) -> float:
        turns = scaling.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(config.rope_theta))

    low = max(math.floor(pair_with_rotations(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_with_rotations(scaling.beta_slow)), dim - 1)
    # An empty ramp would divide by zero; the width is the one DeepSeek's code uses.
    width = high - low if high != low else 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return frequencies / scaling.factor * ramp + frequencies * (1 - ramp)


def rope_magnitude(config: ModelConfig) -> float:
    """Factor on the rotated vectors: YaRN's mscale over mscale_all_dim (1.0 for R1)."""
    scaling = config.rope_scaling
    if scaling is None:
        return 1.0
    over = yarn_mscale(scaling.factor, scaling.mscale_all_dim)
    return yarn_mscale(scaling.factor, scaling.mscale) / over


def rope_turns(positions: Tensor, inverse_frequencies: Tensor, magnitude: float) -> Tensor:
    """(T, R / 2) complex numbers that turn each pair of a vector at the given positions (T,)."""
    angles = torch.outer(positions.to(torch.float32), inverse_frequencies)
    return torch.polar(torch.full_like(angles, magnitude), angles)


def apply_rope(x: Tensor, turns: Tensor) -> Tensor:
    """Rotate the pairs (x0, x1), (x2, x3), ... of x (T, R) or (T, N, R); turns is (T, R / 2).

    DeepSeek interleaves its pairs. The result keeps that order, so caches are comparable with DeepSeek's own.
    """
    if x.ndim == 3:
        turns = turns.unsqueeze(1)
    pairs = torch.view_as_complex(x.contiguous().view(*x.shape[:-1], x.shape[-1] // 2, 2))
    return torch.view_as_real(pairs * turns).flatten(-2)
