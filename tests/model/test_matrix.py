"""INT8 matrices: exact sums, scales on the right axes, float and INT8 behind one function."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model import matrix
from model.matrix import QuantizedMatrix, QuantizedRows, grouped_product, join, linear
from model.quant import quantize_rows


def test_a_product_in_small_numbers():
    # Rows are rounded with scales 2 / 127 and 1 / 127; the second output channel counts in halves.
    weight = QuantizedMatrix(torch.tensor([[3, -4], [127, 1]], dtype=torch.int8), torch.tensor([[1.0], [0.5]]))
    x = torch.tensor([[2.0, -2.0], [0.0, 1.0]])
    expected = [[2 * 3 + 2 * 4, (2 * 127 - 2) / 2], [-4, 0.5]]
    torch.testing.assert_close(linear(x, weight), torch.tensor(expected), rtol=1e-6, atol=0)


def test_a_row_of_zeros_gives_zeros():
    weight = QuantizedMatrix(torch.full((3, 4), 127, dtype=torch.int8), torch.ones(3, 1))
    assert linear(torch.zeros(2, 4), weight).abs().max() == 0


@given(
    rows=st.integers(0, 40),
    inputs=st.integers(1, 300),
    outputs=st.integers(1, 50),
    seed=st.integers(0, 2**31),
    extreme=st.booleans(),
)
def test_sums_are_those_of_int64(rows, inputs, outputs, seed, extreme):
    generator = np.random.default_rng(seed)
    choices = [-128, -127, 127] if extreme else range(-128, 128)
    a = generator.choice(choices, (rows, inputs)).astype(np.int8)
    b = generator.choice(choices, (outputs, inputs)).astype(np.int8)
    wanted = a.astype(np.int64) @ b.T.astype(np.int64)
    for product in (matrix.integer_product, matrix.emulated_integer_product):
        np.testing.assert_array_equal(product(torch.from_numpy(a), torch.from_numpy(b).t()).numpy(), wanted)


def test_a_kernel_that_saturates_is_replaced(monkeypatch):
    def saturating(a, b):
        return (a.long() @ b.long()).clamp(-(2**15), 2**15 - 1).int()

    a, b = torch.full((2, 64), 127, dtype=torch.int8), torch.full((64, 3), 127, dtype=torch.int8)
    matrix._int_mm_is_exact.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "_int_mm", saturating)
        assert matrix.integer_product(a, b).unique().tolist() == [64 * 127 * 127]
    matrix._int_mm_is_exact.cache_clear()


@given(rows=st.integers(1, 20), seed=st.integers(0, 2**31))
def test_the_product_is_within_the_roundings_bound(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(rows, 48, generator=generator), torch.randn(32, 48, generator=generator)
    w8 = QuantizedMatrix(*quantize_rows(weight))
    _, x_scale = quantize_rows(x)
    # |x w - x' w'| <= sum |x| dw + |w'| dx, with dw and dx half a step
    bound = x.abs().sum(1, keepdim=True) * w8.scale.T / 2 + w8.dequantized().abs().sum(1) * x_scale / 2
    assert ((linear(x, w8) - x @ weight.T).abs() <= bound * 1.001 + 1e-5).all()


@pytest.mark.parametrize("counts", [[3, 0, 2], [0, 0, 5], [5, 0, 0]])
def test_grouped_rows_go_through_their_own_matrix(counts):
    generator = torch.Generator().manual_seed(4)
    weights, x = torch.randn(3, 6, 8, generator=generator), torch.randn(5, 8, generator=generator)
    stacked = join([QuantizedMatrix(*quantize_rows(weight)) for weight in weights], stack=True)
    assert len(stacked) == 3
    owners = np.repeat(np.arange(3), counts)
    for matrices in (weights, stacked):
        found = grouped_product(matrices)(x, counts)
        each = [weights[o] if matrices is weights else QuantizedMatrix(*quantize_rows(weights[o])) for o in owners]
        wanted = torch.cat([linear(x[i : i + 1], weight) for i, weight in enumerate(each)])
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_rows_that_come_quantized_are_not_quantized_again():
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    weights = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(2))
    stacked = join([QuantizedMatrix(*quantize_rows(weight)) for weight in weights], stack=True)
    rows = QuantizedRows(*quantize_rows(x))
    product = grouped_product(stacked)
    torch.testing.assert_close(product(rows, [1, 3]), product(x, [1, 3]), rtol=0, atol=0)
    doubled = product(QuantizedRows(rows.values, rows.scale * 2), [1, 3])
    torch.testing.assert_close(doubled, product(x, [1, 3]) * 2, rtol=0, atol=0)
    # A float matrix reads what the row stands for.
    torch.testing.assert_close(grouped_product(weights)(rows, [4, 0]), rows.dequantized() @ weights[0].T)


def test_matrices_one_below_the_other_keep_their_scales():
    parts = [QuantizedMatrix(*quantize_rows(torch.randn(rows, 8))) for rows in (2, 5)]
    whole, x = join(parts), torch.randn(3, 8)
    assert len(whole) == 7
    torch.testing.assert_close(linear(x, whole), torch.cat([linear(x, part) for part in parts], 1), rtol=0, atol=0)
    with pytest.raises(AssertionError, match="different kinds"):
        join([parts[0], torch.zeros(2, 8)])
