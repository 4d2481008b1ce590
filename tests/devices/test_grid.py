"""Interpolation: exact on the points, between neighbors elsewhere, refused outside, for ragged grids too."""

import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices.grid import Grid, OutOfGrid, TableError, TablesUnavailable, UnknownEntry

RAGGED = {
    (8.0, 16.0): 10.0,
    (8.0, 64.0): 40.0,
    (32.0, 16.0): 20.0,
    (32.0, 64.0): 80.0,
    (32.0, 256.0): 320.0,
}


def ragged():
    return Grid("moe", ("ep", "tokens"), RAGGED)


def test_the_middle_of_two_sizes_is_their_geometric_mean_and_so_is_the_value():
    grid = Grid("op", ("n",), {(4.0,): 3.0, (16.0,): 27.0})
    assert grid([8]) == pytest.approx(9.0, rel=1e-14)
    assert ragged()([16, 32]) == pytest.approx(math.sqrt(math.sqrt(10 * 40) * math.sqrt(20 * 80)), rel=1e-14)


def test_powers_of_the_sizes_are_reproduced_everywhere():
    def law(x, y):
        return 3e-6 * x**0.5 * y**1.25

    points = {(x, y): law(x, y) for x in (1.0, 3.0, 64.0) for y in (2.0, 100.0)}
    grid = Grid("op", ("x", "y"), points)
    assert grid([2, 7]) == pytest.approx(law(2, 7), rel=1e-12)
    assert grid([10.5, 99]) == pytest.approx(law(10.5, 99), rel=1e-12)


@pytest.mark.parametrize("point", RAGGED)
def test_measured_points_come_back_unchanged(point):
    assert ragged()(point) == RAGGED[point]


def test_a_missing_inner_point_is_bridged_along_its_own_line():
    grid = Grid("op", ("x", "y"), {(1.0, 1.0): 1.0, (1.0, 4.0): 4.0, (2.0, 1.0): 2.0, (2.0, 2.0): 4.0, (2.0, 4.0): 8.0})
    assert grid([1, 2]) == pytest.approx(2.0, rel=1e-14)


def test_ragged_grids_end_where_either_neighbor_ends():
    assert ragged()([32, 256]) == 320.0
    with pytest.raises(OutOfGrid) as caught:
        ragged()([16, 256])
    assert str(caught.value) == (
        "moe: tokens 256 is outside the measured 16 to 64 at ep 16; measured tables are not extrapolated"
    )
    assert (caught.value.field, caught.value.value, caught.value.low, caught.value.high) == ("tokens", 256, 16, 64)


@pytest.mark.parametrize(
    ("point", "field"), [([7.99, 16], "ep"), ([33, 16], "ep"), ([8, 15], "tokens"), ([math.nan, 16], "ep")]
)
def test_outside_is_an_error_that_names_the_size(point, field):
    with pytest.raises(OutOfGrid, match=f"moe: {field} ") as caught:
        ragged()(point)
    assert isinstance(caught.value, ValueError)


def test_errors_survive_pickling():
    for error in (
        OutOfGrid("op", "n", 3, 1, 2, "m 4"),
        UnknownEntry("op", "dtype", "x", ("a", "b")),
        TablesUnavailable("t"),
    ):
        copy = pickle.loads(pickle.dumps(error))
        assert isinstance(copy, TableError)
        assert (type(copy), str(copy)) == (type(error), str(error))


@pytest.mark.parametrize("points", [{}, {(0.0,): 1.0}, {(1.0,): 0.0}, {(1.0, 2.0): 1.0}, {(1.0,): math.inf}])
def test_points_that_cannot_be_interpolated_are_refused(points):
    with pytest.raises(ValueError, match="op: "):
        Grid("op", ("n",), points)


def test_limits_are_those_of_the_whole_grid():
    assert dict(ragged().limits) == {"ep": (8.0, 32.0), "tokens": (16.0, 256.0)}


def test_leaving_out_inner_points_measures_both_interpolations():
    grid = Grid("op", ("n", "k"), {(1.0, 1.0): 1.0, (2.0, 1.0): 2.0, (4.0, 1.0): 4.0, (4.0, 2.0): 9.0})
    assert grid.leave_one_out("n") == pytest.approx([0.0], abs=1e-12)
    assert grid.leave_one_out("n", log_value=False) == pytest.approx([0.25])  # (1 + 4) / 2 for 2
    assert grid.leave_one_out("k") == []


sizes = st.lists(st.integers(1, 5000), min_size=2, max_size=5, unique=True).map(sorted)


@st.composite
def monotone_grids(draw):
    """Two sizes, values that grow with both, and two queries of which the second is nowhere smaller."""
    xs, ys = draw(sizes), draw(sizes)
    rates = draw(st.tuples(st.floats(0, 2), st.floats(0, 2), st.floats(1e-3, 10)))
    points = {(float(x), float(y)): x ** rates[0] + rates[2] * y ** rates[1] for x in xs for y in ys}
    low = [draw(st.floats(axis[0], axis[-1])) for axis in (xs, ys)]
    high = [draw(st.floats(at, axis[-1])) for at, axis in zip(low, (xs, ys), strict=True)]
    return Grid("op", ("x", "y"), points), xs, ys, low, high


@given(monotone_grids())
def test_values_lie_between_their_neighbors_and_grow_where_the_data_grow(case):
    grid, xs, ys, low, high = case
    corners = [
        grid.points[float(x), float(y)]
        for x in (max(v for v in xs if v <= low[0]), min(v for v in xs if v >= low[0]))
        for y in (max(v for v in ys if v <= low[1]), min(v for v in ys if v >= low[1]))
    ]
    assert min(corners) * (1 - 1e-12) <= grid(low) <= max(corners) * (1 + 1e-12)
    assert grid(low) <= grid(high) * (1 + 1e-12)
