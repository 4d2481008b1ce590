"""A weight matrix and its product with token rows: float32, or INT8 with scales.

Owns: the integer product, and the one place that chooses between float and INT8.
Must not know: layers, names, ranks, how scales were found.
Source: per-token dynamic activations and per-channel static weights of arXiv 2506.12708 section 4.5.

    y[t, o] = x_scale[t] * w_scale[o] * sum over i of x[t, i] * w[o, i]

The sum is one of integers and exact, so it does not depend on the batch or on the order of the addends. It is
torch._int_mm; where that saturates (some CPUs without VNNI), a float64 product of the same integers, which is
exact below 2^53.
"""

# Shapes: T rows, I inputs, O outputs, P stacked matrices

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from model.quant import dequantize_rows, quantize_rows


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedRows:
    """Token rows in INT8, each with its own scale."""

    values: Tensor  # (T, I) int8
    scale: Tensor  # (T, 1) float32

    def __len__(self) -> int:
        return len(self.values)

    def index_select(self, rows: Tensor) -> "QuantizedRows":
        """The rows `rows`, in that order."""
        return QuantizedRows(self.values.index_select(0, rows), self.scale.index_select(0, rows))

    def dequantized(self) -> Tensor:
        """(T, I) float32."""
        return dequantize_rows(self.values, self.scale)


Rows = Tensor | QuantizedRows
GroupedProduct = Callable[[Rows, list[int]], Tensor]


class Matrix(ABC):
    """A weight that is not a plain float32 tensor (O, I), or several stacked (P, O, I)."""

    @abstractmethod
    def __len__(self) -> int:
        """O, or P when stacked."""

    @abstractmethod
    def product(self, x: Tensor) -> Tensor:
        """(T, O) of float32 rows x (T, I)."""

    @abstractmethod
    def grouped(self) -> GroupedProduct:
        """Of stacked matrices; see `grouped_product`."""

    @abstractmethod
    def joined(self, others: Sequence["Matrix"], *, stack: bool) -> "Matrix":
        """This matrix and `others` one below the other, or stacked."""


Weight = Tensor | Matrix


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedMatrix(Matrix):
    """INT8 values with one scale per output channel."""

    values: Tensor  # (O, I) int8, or (P, O, I)
    scale: Tensor  # (O, 1) float32, or (P, O, 1)

    def __len__(self) -> int:
        return len(self.values)

    def product(self, x: Tensor) -> Tensor:
        rows = _quantized(x)
        sums = integer_product(rows.values, self.values.t())
        return (sums * self.scale.t()).mul_(rows.scale)

    def grouped(self) -> GroupedProduct:
        each, scales = [values.t() for values in self.values], self.scale.squeeze(-1)

        def product(x: Rows, counts: list[int]) -> Tensor:
            rows = _quantized(x)
            pieces = zip(rows.values.split_with_sizes(counts), counts, each, strict=True)
            sums = torch.cat([integer_product(piece, weight) for piece, count, weight in pieces if count])
            return (sums * torch.repeat_interleave(scales, torch.tensor(counts), dim=0)).mul_(rows.scale)

        return product

    def joined(self, others: Sequence[Matrix], *, stack: bool) -> "QuantizedMatrix":
        parts = [self, *others]
        join = torch.stack if stack else torch.cat
        assert all(isinstance(part, QuantizedMatrix) for part in parts), "matrices of different kinds"
        return QuantizedMatrix(join([p.values for p in parts]), join([p.scale for p in parts]))  # type: ignore[attr-defined]

    def dequantized(self) -> Tensor:
        """The float32 matrix that it stands for."""
        return self.values.to(torch.float32) * self.scale


def linear(x: Tensor, weight: Weight) -> Tensor:
    """(T, O) of token rows x (T, I) and a weight (O, I), float or INT8."""
    return F.linear(x, weight) if isinstance(weight, Tensor) else weight.product(x)


def grouped_product(weights: Weight) -> GroupedProduct:
    """A function of rows (T, I) and counts: the first counts[0] rows times weights[0], and so on: (T, O)."""
    if not isinstance(weights, Tensor):
        return weights.grouped()
    # Views, made once: indexing a stacked tensor at every call costs as much as a small product.
    each = [weight.t() for weight in weights]

    def product(x: Rows, counts: list[int]) -> Tensor:
        values = x.dequantized() if isinstance(x, QuantizedRows) else x
        pieces = zip(values.split_with_sizes(counts), counts, each, strict=True)
        return torch.cat([torch.mm(piece, weight) for piece, count, weight in pieces if count])

    return product


def join(parts: Sequence[Weight], *, stack: bool = False) -> Weight:
    """Matrices of one kind, one below the other, or stacked."""
    tensors = [part for part in parts if isinstance(part, Tensor)]
    if len(tensors) == len(parts):
        return torch.stack(tensors) if stack else torch.cat(tensors)
    first, *others = [part for part in parts if isinstance(part, Matrix)]
    assert len(others) + 1 == len(parts), "matrices of different kinds"
    return first.joined(others, stack=stack)


def integer_product(a: Tensor, b: Tensor) -> Tensor:
    """a (T, I) times b (I, O), both int8: exact sums (T, O), int32."""
    # With a single input torch 2.13's CPU kernel leaves its result unwritten.
    if a.shape[1] > 1 and _int_mm_is_exact():
        return torch._int_mm(a, b)
    return emulated_integer_product(a, b)


def emulated_integer_product(a: Tensor, b: Tensor) -> Tensor:
    """integer_product by way of float64, in which these sums are exact."""
    return (a.to(torch.float64) @ b.to(torch.float64)).to(torch.int32)


@cache
def _int_mm_is_exact() -> bool:
    """Whether this CPU's kernel keeps the largest sums, for one row and for many."""
    signs = torch.tensor([1, 1, -1, -1, 1, -1, 1, 1], dtype=torch.int8)
    b = (127 * signs).repeat(24)[:, None] * signs
    return all(
        torch.equal(torch._int_mm(a, b), emulated_integer_product(a, b))
        for a in (torch.full((1, 192), 127, dtype=torch.int8), (127 * signs).repeat(24).expand(40, -1).contiguous())
    )


def _quantized(x: Rows) -> QuantizedRows:
    return x if isinstance(x, QuantizedRows) else QuantizedRows(*quantize_rows(x))
