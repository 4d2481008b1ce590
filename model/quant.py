"""INT8 quantization of token rows: copies before they are sent, and the inputs of INT8 products.

Owns: the per-token symmetric scheme and the layout of a quantized row.
Must not know: experts, ranks.
Source: early quantization of FusedDispatch, arXiv 2506.12708 section 4.2.1; per-token dynamic scales, section
4.5.

One value is off by at most half a step: |x - dequantize(quantize(x))| <= scale / 2 = absmax / 254.
"""

# Shapes: T rows, H values per row

import torch
from torch import Tensor

_LEVELS = 127


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(T, H) float32 to int8 of the same shape and (T, 1) float32 scales; a row of zeros gets scale 1."""
    scale = x.abs().amax(dim=-1, keepdim=True).div_(_LEVELS)
    scale.masked_fill_(scale == 0, 1.0)
    return (x / scale).round_().to(torch.int8), scale


def dequantize_rows(values: Tensor, scale: Tensor) -> Tensor:
    """The float32 rows that int8 `values` (T, H) and `scale` (T, 1) stand for."""
    return values.to(torch.float32) * scale
