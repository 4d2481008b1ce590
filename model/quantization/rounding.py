"""From a float matrix to INT8 with one scale per output channel: plain rounding, block clipping, compensation.

Owns: the scale of every channel and the integer of every weight.
Must not know: names, layers, where inputs come from.
Source: block clipping and error compensation of arXiv 2506.12708 section 4.5; GPTQ (arXiv 2210.17323) for the
compensation.

clipping      a block's range is cut to a fraction c of its largest weight, c by search, least output error first.
              A block is one output channel: a finer one would need a scale inside the sum over the inputs, which
              an integer product with per-channel scales cannot have.
compensation  weights are rounded one input channel after the other, and each one's error is taken up by the
              channels that are still to come, as far as the inputs' second moments say that they can.
"""

# Shapes: O output channels, I input channels

import torch
from torch import Tensor

_LEVELS = 127
_CLIPS = tuple(1 - step / 40 for step in range(21))  # 1, 0.975 .. 0.5
_DAMPING = 0.01  # of the mean second moment, as in GPTQ


def round_matrix(weight: Tensor, gram: Tensor, *, clipping: bool, compensation: bool) -> tuple[Tensor, Tensor]:
    """int8 (O, I) and float32 scales (O, 1) of a weight (O, I) whose inputs have second moments gram (I, I)."""
    scale = weight.abs().amax(dim=1, keepdim=True) / _LEVELS
    scale = torch.where(scale > 0, scale, torch.ones_like(scale)).to(torch.float32)
    has_inputs = bool(gram.diagonal().sum() > 0)
    if clipping and has_inputs:
        scale = _clipped_scale(weight, scale, gram)
    if compensation and has_inputs:
        return _rounded_in_order(weight, scale, gram), scale
    return _rounded(weight, scale).to(torch.int8), scale


def output_error(weight: Tensor, values: Tensor, scale: Tensor, gram: Tensor) -> tuple[float, float]:
    """Sums of squares over the calibration rows: of the error that rounding makes in the output, and of the output."""
    wide = weight.to(torch.float64)
    error = wide - values.to(torch.float64) * scale.to(torch.float64)
    return float(((error @ gram) * error).sum()), float(((wide @ gram) * wide).sum())


def _rounded(weight: Tensor, scale: Tensor) -> Tensor:
    return torch.round(weight / scale).clamp_(-_LEVELS, _LEVELS)


def _clipped_scale(weight: Tensor, scale: Tensor, gram: Tensor) -> Tensor:
    moments = gram.to(torch.float32)
    best, least = scale, torch.full_like(scale, torch.inf)
    for clip in _CLIPS:
        candidate = scale * clip
        error = weight - _rounded(weight, candidate) * candidate
        cost = ((error @ moments) * error).sum(dim=1, keepdim=True)
        best = torch.where(cost < least, candidate, best)
        least = torch.minimum(cost, least)
    return best


def _rounded_in_order(weight: Tensor, scale: Tensor, gram: Tensor) -> Tensor:
    """GPTQ: channels with large inputs first, each error spread over the rest by the inverse Hessian's Cholesky factor.

    With U^T U = H^-1 and U upper triangular, rounding channel i by e changes channel j > i by -e U[i, j] / U[i, i].
    """
    size = gram.shape[0]
    order = torch.argsort(gram.diagonal(), descending=True, stable=True)
    hessian = gram[order][:, order].clone()
    hessian.diagonal().add_(_DAMPING * gram.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True)
    rest, wide_scale = weight[:, order].to(torch.float64), scale.to(torch.float64)[:, 0]
    values = torch.empty(weight.shape, dtype=torch.int8)
    for i in range(size):
        column = rest[:, i]
        rounded = torch.round(column / wide_scale).clamp_(-_LEVELS, _LEVELS)
        values[:, order[i]] = rounded.to(torch.int8)
        error = (column - rounded * wide_scale) / factor[i, i]
        rest[:, i + 1 :].addr_(error, factor[i, i + 1 :], alpha=-1)
    return values
