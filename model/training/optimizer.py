"""Muon for matrices, Adam for everything else.

Owns: the two update rules and their state.
Must not know: the network, schedules, files.
Source: Muon (Jordan et al. 2024), momentum orthogonalized by a Newton-Schulz iteration with the published
coefficients, scaled to Adam's update size as in Moonlight (arXiv 2502.16982); Adam (arXiv 1412.6980).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_NEWTON_SCHULZ_STEPS = 5
_MUON_MOMENTUM = 0.95
_ADAM_BETAS = (0.9, 0.95)
_ADAM_EPS = 1e-10


class Optimizer:
    """Updates named tensors in place from their gradients."""

    def __init__(self, tensors: Mapping[str, Tensor], *, matrices: set[str], weight_decay: float) -> None:
        """`matrices` names what Muon updates: (m, n) tensors, or stacks (..., m, n) of independent matrices."""
        self._tensors = dict(tensors)
        self._matrices = matrices
        self._weight_decay = weight_decay
        self._first = {name: torch.zeros_like(tensor) for name, tensor in self._tensors.items()}
        self._second = {name: torch.zeros_like(t) for name, t in self._tensors.items() if name not in matrices}
        self._num_steps = 0

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor], *, muon_rate: float, adam_rate: float) -> None:
        """One update. Rates are the size of an update relative to a unit-RMS matrix (Muon) and Adam's own."""
        self._num_steps += 1
        for name, tensor in self._tensors.items():
            if name in self._matrices:
                self._muon(name, tensor, gradients[name], muon_rate)
            else:
                self._adam(name, tensor, gradients[name], adam_rate)

    def _muon(self, name: str, tensor: Tensor, gradient: Tensor, rate: float) -> None:
        momentum = self._first[name].lerp_(gradient, 1 - _MUON_MOMENTUM)
        update = orthogonalize(gradient.lerp(momentum, _MUON_MOMENTUM))
        scale = max(1.0, tensor.shape[-2] / tensor.shape[-1]) ** 0.5
        tensor.mul_(1 - rate * self._weight_decay).add_(update, alpha=-rate * scale)

    def _adam(self, name: str, tensor: Tensor, gradient: Tensor, rate: float) -> None:
        beta1, beta2 = _ADAM_BETAS
        first = self._first[name].lerp_(gradient, 1 - beta1)
        second = self._second[name].lerp_(gradient.square(), 1 - beta2)
        corrected = (second / (1 - beta2**self._num_steps)).sqrt_().add_(_ADAM_EPS)
        tensor.addcdiv_(first, corrected, value=-rate / (1 - beta1**self._num_steps))

    def state(self) -> dict[str, Any]:
        """What `restore` needs to go on exactly here."""
        return {"first": self._first, "second": self._second, "num_steps": self._num_steps}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over the state of an optimizer of the same tensors."""
        self._first, self._second = dict(state["first"]), dict(state["second"])
        self._num_steps = state["num_steps"]


def orthogonalize(matrix: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix of (..., m, n), roughly: singular values end between 0.7 and 1.2."""
    a, b, c = _NEWTON_SCHULZ
    x = matrix.to(torch.bfloat16)
    if is_tall := x.shape[-2] > x.shape[-1]:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    result: Tensor = (x.mT if is_tall else x).to(matrix.dtype)
    return result
