"""Formulas of latencies against values written out."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from serving.timings import distribution, tpot_of, weighted_quantiles


def test_a_request_of_one_token_has_no_tpot() -> None:
    tpot_ns = tpot_of(num_tokens=np.array([3, 1]), first_ns=np.array([100, 7]), last_ns=np.array([140, 7]))
    assert tpot_ns[0] == 20.0
    assert np.isnan(tpot_ns[1])


def test_one_share_gives_one_quantile() -> None:
    """Level 1 for one second, 5 for three: half way through the four, and at the end."""
    assert float(weighted_quantiles([5, 1], [3, 1], 0.5)) == 5.0
    assert float(weighted_quantiles([5, 1], [3, 1], 0.25)) == 4.0  # rank 0.75 of 0 to 3


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 5)), min_size=1, max_size=20))
def test_weighted_quantiles_are_those_of_the_values_written_out(rows: list[tuple[int, int]]) -> None:
    values, counts = zip(*rows, strict=True)
    shares = [0, 0.3, 0.5, 0.99, 1]
    np.testing.assert_allclose(
        weighted_quantiles(values, counts, shares), np.quantile(np.repeat(values, counts), shares)
    )


@given(st.lists(st.integers(0, 50), min_size=1, max_size=20))
def test_a_distribution_has_numpys_percentiles(values: list[int]) -> None:
    found = distribution(np.array(values, np.float64), None, (0.0, 12.5, 99.0, 100.0))
    expected = np.percentile(values, [50, 0, 12.5, 99, 100])
    np.testing.assert_allclose([found.median_ms, *found.percentiles.values()], expected)
