"""Rounding of one matrix: plain, clipped, compensated."""

import pytest
import torch

from model.quantization.rounding import output_error, round_matrix


@pytest.fixture
def inputs():
    """Correlated inputs (rows, 24), some channels much larger."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(24, 24, generator=generator)
    return torch.randn(400, 24, generator=generator) @ mix * torch.linspace(0.1, 4, 24)


@pytest.fixture
def weight():
    return torch.randn(16, 24, generator=torch.Generator().manual_seed(1))


def error(weight, inputs, **techniques):
    gram = inputs.double().T @ inputs.double()
    values, scale = round_matrix(weight, gram, **{"clipping": False, "compensation": False} | techniques)
    assert values.dtype == torch.int8
    assert scale.shape == (len(weight), 1)
    assert values.abs().max() <= 127
    found = (inputs @ weight.T - inputs @ (values * scale).T).pow(2).sum().item()
    assert output_error(weight, values, scale, gram)[0] == pytest.approx(found, rel=1e-2)
    assert output_error(weight, values, scale, gram)[1] == pytest.approx(
        (inputs @ weight.T).pow(2).sum().item(), rel=1e-3
    )
    return found


def test_plain_rounding_in_small_numbers():
    weight = torch.tensor([[127.0, -63.4, 0.6], [0.0, 0.0, 0.0]])
    values, scale = round_matrix(weight, torch.eye(3, dtype=torch.float64), clipping=False, compensation=False)
    assert values.tolist() == [[127, -63, 1], [0, 0, 0]]
    assert scale.tolist() == [[1.0], [1.0]]


def test_an_error_is_taken_up_by_an_input_that_always_comes_along():
    # Both inputs are equal, so only the sum of the weights matters: 0.4 rounded away from one is given to the other.
    gram = torch.tensor([[2.0, 2.0, 0.0], [2.0, 2.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    weight = torch.tensor([[10.4, 20.4, 127.0]])
    plain, _ = round_matrix(weight, gram, clipping=False, compensation=False)
    compensated, _ = round_matrix(weight, gram, clipping=False, compensation=True)
    assert plain.tolist() == [[10, 20, 127]]
    assert compensated.tolist() == [[10, 21, 127]]


def test_compensation_reduces_the_error_of_the_output(weight, inputs):
    assert error(weight, inputs, compensation=True) < 0.5 * error(weight, inputs)


def test_clipping_never_adds_error_and_cuts_an_outlier_on_a_silent_input(weight, inputs):
    assert error(weight, inputs, clipping=True) <= error(weight, inputs)
    weight[:, 0] *= 8
    inputs[:, 0] = 0.001 * inputs[:, 0]
    assert error(weight, inputs, clipping=True) < 0.5 * error(weight, inputs)


def test_an_expert_without_calibration_rows_is_rounded_plainly(weight):
    gram = torch.zeros(24, 24, dtype=torch.float64)
    plain = round_matrix(weight, gram, clipping=False, compensation=False)
    every = round_matrix(weight, gram, clipping=True, compensation=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, every, strict=True))


def test_few_calibration_rows_are_enough_for_the_damped_hessian(weight, inputs):
    assert error(weight, inputs[:5], compensation=True) < error(weight, inputs[:5])
