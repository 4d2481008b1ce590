"""Windows of time against sums written out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.simulation.windows import Windows

FOUR = Windows(width_ns=10, count=4, end_ns=35)


def test_windows_are_round_and_hold_the_end() -> None:
    windows = Windows.over(7_632_005_244, most=300)
    assert (windows.width_ns, windows.count) == (50_000_000, 153)
    assert Windows.over(0, most=5).count == 1
    with pytest.raises(ValueError, match="most 0 is below the limit 1"):
        Windows.over(10, most=0)


@given(st.integers(0, 10**13), st.integers(1, 500))
def test_there_are_never_more_windows_than_wanted(end_ns: int, most: int) -> None:
    windows = Windows.over(end_ns, most=most)
    assert windows.count <= most
    assert windows.count * windows.width_ns > end_ns


def test_intervals_are_cut_at_the_edges() -> None:
    starts, lengths = [5, 20, 31], [10, 5, 2]
    assert FOUR.shares(starts, lengths).tolist() == pytest.approx([0.5, 0.5, 0.5, 0.2])
    means = FOUR.means(starts, lengths, [2, 4, 6])
    assert means.tolist() == pytest.approx([2, 2, 4, 6])
    assert np.isnan(FOUR.means([0], [10], [1])[1:]).all()


def test_levels_are_means_over_time() -> None:
    assert FOUR.levels([0, 5, 12], [40, 15, 12]).tolist() == pytest.approx([1.5, 1.5, 1, 1])
    assert FOUR.held([5, 30], [8, 2]).tolist() == pytest.approx([4, 8, 8, 2])
    assert FOUR.held([], []).tolist() == [0, 0, 0, 0]


@given(st.lists(st.tuples(st.integers(0, 35), st.integers(0, 100)), max_size=30))
def test_totals_add_up_and_percentiles_are_numpys(rows: list[tuple[int, int]]) -> None:
    times, values = [when for when, _ in rows], [value for _, value in rows]
    assert FOUR.totals(times, values).sum() == sum(values)
    found = FOUR.percentiles(times, values, (50, 99))
    for window in range(4):
        inside = [value for when, value in rows if when // 10 == window]
        expected = np.percentile(inside, [50, 99]) if inside else [np.nan, np.nan]
        np.testing.assert_allclose(found[:, window], expected)
