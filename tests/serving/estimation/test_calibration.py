"""The fit: known constants come back, what is not determined is said, the unseen stays unseen."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.errors import ConfigError
from serving.estimation.calibration import Bounds, fit
from serving.estimation.calibration_run import calibrate_constants, format_calibration

WIDE = {"latency": Bounds(start=0.0, low=0.0, high=1e-3), "rate": Bounds(start=5e10, low=1e9, high=4e11)}
SIZES = (512, 4096, 65_536, 1_000_000, 16_000_000, 64_000_000)


def seconds(size, values):
    """Latency and rate of a transfer: sizes of constants that differ by sixteen orders of magnitude."""
    return values["latency"] + size / values["rate"]


@pytest.fixture
def transfers(published_row):
    """A function: rows that a transfer with these constants publishes, each off by its part of `noise`."""

    def make(values, noise=(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)):
        return [
            published_row(row=str(size), arguments={"x": size}, published=seconds(size, values) * (1 + off))
            for size, off in zip(SIZES, noise, strict=True)
        ]

    return make


def fit_transfers(rows, constants=WIDE):
    return fit(rows, constants, lambda values: [seconds(row.ours.arguments["x"], values) for row in rows])


@settings(deadline=None, max_examples=20)
@given(latency=st.floats(1e-7, 5e-4), rate=st.floats(5e9, 3e11))
def test_known_constants_come_back(published_row, latency, rate):
    known = {"latency": latency, "rate": rate}
    rows = [published_row(row=str(s), arguments={"x": s}, published=seconds(s, known)) for s in SIZES]
    found = fit_transfers(rows)
    assert found.values == pytest.approx(known, rel=2e-4)
    errors = [seconds(s, found.values) / seconds(s, known) - 1 for s in SIZES]
    assert max(map(abs, errors)) < 2e-5
    assert found.singular_directions == ()


def test_the_result_of_a_linear_model_is_that_of_the_normal_equations(published_row):
    """y = a + b x with relative residuals, by hand: values and standard errors."""
    xs, ys = np.array([1.0, 2.0, 3.0, 5.0, 8.0]), np.array([3.1, 4.9, 7.2, 10.8, 17.3])
    rows = [published_row(row=f"{x}", arguments={"x": x}, published=y) for x, y in zip(xs, ys, strict=True)]
    constants = {"a": Bounds(start=0.5, low=-10.0, high=10.0), "b": Bounds(start=0.5, low=-10.0, high=10.0)}
    found = fit(rows, constants, lambda values: (values["a"] + values["b"] * xs).tolist())
    slopes = np.stack([1 / ys, xs / ys], axis=1)
    inverse = np.linalg.inv(slopes.T @ slopes)
    expected = inverse @ slopes.T @ np.ones(5)
    errors = slopes @ expected - 1
    deviations = np.sqrt(np.diag(inverse) * (errors @ errors) / 3)
    assert list(found.values.values()) == pytest.approx(expected.tolist(), rel=1e-5)
    assert [constant.standard_error for constant in found.constants] == pytest.approx(deviations.tolist(), rel=1e-3)
    assert found.constants[1].relative_uncertainty == pytest.approx(deviations[1] / expected[1], rel=1e-3)


def test_noise_gives_uncertainty_and_a_value_within_it(transfers):
    known = {"latency": 2e-6, "rate": 1e11}
    found = fit_transfers(transfers(known, noise=(0.02, -0.01, 0.015, -0.02, 0.01, -0.005)))
    for constant in found.constants:
        assert 0 < constant.relative_uncertainty < 0.03
        assert abs(constant.value - known[constant.name]) < 3 * constant.standard_error


def test_constants_that_only_act_together_are_reported(published_row):
    rows = [published_row(row=str(x), arguments={"x": x}, published=3.0 * x) for x in (1, 2, 4, 7)]
    bounds = Bounds(start=1.0, low=0.0, high=10.0)
    found = fit(
        rows,
        {"first": bounds, "second": bounds, "unused": bounds},
        lambda v: [(v["first"] + v["second"]) * row.ours.arguments["x"] for row in rows],
    )
    assert sum(list(found.values.values())[:2]) == pytest.approx(3.0, rel=1e-4)
    assert found.values["unused"] == 1.0  # where it started
    assert found.converged
    assert found.num_evaluations < 150  # of which each Jacobian takes six; a singular problem would take thousands
    assert [constant.standard_error for constant in found.constants] == [None, None, None]
    assert [constant.groups for constant in found.constants] == [("lines",), ("lines",), ()]
    assert sorted(sorted(direction) for direction in found.singular_directions) == [["first", "second"], ["unused"]]
    (pair,) = (direction for direction in found.singular_directions if len(direction) == 2)
    assert pair["first"] == pytest.approx(-pair["second"], rel=1e-6)
    assert abs(pair["first"]) == pytest.approx(math.sqrt(0.5), rel=1e-6)


def test_a_fit_that_is_cut_short_says_so(ruled, monkeypatch):
    monkeypatch.setattr("serving.estimation.calibration._MAX_STEPS", 1)
    told = calibrate_constants(ruled(32.0, 62.0), DESCRIPTION, BOUNDS, {"line": line})
    assert not told.fit.converged
    assert "NOT CONVERGED" in format_calibration(told)


def test_as_many_rows_as_constants_leave_the_uncertainty_open(transfers):
    found = fit_transfers(transfers({"latency": 2e-6, "rate": 1e11})[:4:3])
    assert [constant.standard_error for constant in found.constants] == [None, None]
    assert found.singular_directions == ()


def test_a_constant_that_its_range_holds_back_is_at_its_bound(transfers):
    narrow = WIDE | {"rate": Bounds(start=2e10, low=1e10, high=5e10)}
    latency, rate = fit_transfers(transfers({"latency": 2e-6, "rate": 1e11}), narrow).constants
    assert (latency.at_bound, rate.at_bound) == (False, True)
    assert rate.value == pytest.approx(5e10, rel=1e-3)
    assert rate.value <= 5e10


def test_groups_are_those_that_a_constant_has_an_effect_on(published_row):
    rows = [published_row(group=group, row=str(x), arguments={"x": x}) for group in ("a", "b") for x in (1, 2)]
    bounds = Bounds(start=1.0, low=0.1, high=10.0)
    found = fit(
        rows,
        {"left": bounds, "right": bounds, "both": bounds},
        lambda v: [
            v["both"] ** row.ours.arguments["x"] * (v["left"] if row.group == "a" else v["right"]) for row in rows
        ],
    )
    assert {constant.name: constant.groups for constant in found.constants} == {
        "left": ("a",),
        "right": ("b",),
        "both": ("a", "b"),
    }


@pytest.mark.parametrize(
    ("start", "low", "high", "told"),
    [(1.0, 2.0, 3.0, "value: 1.0"), (1.0, 1.0, 1.0, "low: 1.0"), (math.nan, 0.0, 1.0, "finite")],
)
def test_bounds_that_contradict_themselves_are_refused(start, low, high, told):
    with pytest.raises(ConfigError, match=told):
        Bounds(start=start, low=low, high=high)


def test_what_cannot_be_fitted_is_refused(published_row):
    bounds = Bounds(start=1.0, low=0.0, high=2.0)
    rows = [published_row(row=str(index)) for index in range(12)]
    with pytest.raises(ConfigError, match=r"fitted: 11 constants, must be 1 to 10"):
        fit(rows, {f"c{index}": bounds for index in range(11)}, lambda values: [2.0] * 12)
    with pytest.raises(ConfigError, match=r"fitted: 0 constants"):
        fit(rows, {}, lambda values: [2.0] * 12)
    with pytest.raises(ConfigError, match=r"fitted: 2 constants exceed 1 calibration rows"):
        fit(rows[:1], {"a": bounds, "b": bounds}, lambda values: [2.0])
    with pytest.raises(ConfigError, match=r"lines / unseen / height: role validation"):
        fit([*rows, published_row(row="unseen", role="validation")], {"a": bounds}, lambda values: [2.0] * 13)
    with pytest.raises(ConfigError, match=r"lines / none / height: published 0"):
        fit([published_row(row="none", published=0.0)], {"a": bounds}, lambda values: [2.0])


def line(*, x, hardware):
    """The estimate: a description with two constants, or a device of its own."""
    fitted = hardware["fitted"] if isinstance(hardware, dict) else {"a": {"value": 0.0}, "b": {"value": 7.0}}
    return {"y": fitted["a"]["value"] + fitted["b"]["value"] * x}


DESCRIPTION = {
    "name": "ruler",
    "fitted": {name: {"value": 1.0, "low": 0.0, "high": 9.0, "rows": []} for name in ("a", "b")},
}
BOUNDS = {name: Bounds(start=1.0, low=0.0, high=9.0) for name in ("a", "b")}


@pytest.fixture
def ruled(published_row, published_rows):
    """A function: rows of 2 + 3 x to fit, two unseen ones with these heights, and one about another device."""

    def make(*unseen):
        fitted = [
            published_row(row=f"at {x}", arguments={"x": x}, published=round(2.0 + 3.0 * x * (1 + 0.01 * (-1) ** x), 3))
            for x in range(1, 6)
        ]
        validation = [
            published_row(row=f"at {x}", arguments={"x": x}, published=height, role="validation")
            for x, height in zip((10, 20), unseen, strict=True)
        ]
        return published_rows(*fitted, *validation, published_row(row="tape", hardware="tape", role="comparison"))

    return make


def test_unseen_rows_do_not_move_the_fit_by_a_bit(ruled):
    first, second = (
        calibrate_constants(told, DESCRIPTION, BOUNDS, {"line": line}) for told in (ruled(32.0, 62.0), ruled(1.0, 9e9))
    )
    assert first.fit == second.fit
    assert [row.ours for row in first.after] == [row.ours for row in second.after]
    assert first.after[-1].error != second.after[-1].error
    assert first.as_json()["constants"] == second.as_json()["constants"]


def test_errors_before_and_after(ruled):
    told = calibrate_constants(ruled(32.0, 62.0), DESCRIPTION, BOUNDS, {"line": line})
    assert [row.row.role for row in told.after] == ["calibration"] * 5 + ["validation"] * 2
    assert told.before[-1].error == pytest.approx((1 + 20) / 62 - 1)
    assert abs(told.after[-1].error) < 0.02
    a, b = told.fit.values.values()
    assert told.after[-1].ours == a + b * 20
    assert told.as_json()["rows"][-1]["error_before"] == told.before[-1].error
    text = format_calibration(told)
    lines = [line.split() for line in text.splitlines()]
    (last,) = (line for line in lines if line[:4] == ["lines", "/", "at", "20"])
    assert last[6:] == ["-66.13%", f"{told.after[-1].error:+.2%}", "validation"]
    assert "pass  validation: worst error" in text


def test_the_description_is_left_as_it_was(ruled):
    calibrate_constants(ruled(32.0, 62.0), DESCRIPTION, BOUNDS, {"line": line})
    assert DESCRIPTION["fitted"]["a"]["value"] == 1.0


def test_rows_about_another_device_are_refused(ruled, published_row, published_rows):
    with pytest.raises(ConfigError, match=r"the published rows are about ruler, the description is of tape"):
        calibrate_constants(ruled(32.0, 62.0), DESCRIPTION | {"name": "tape"}, BOUNDS, {"line": line})
    told = published_rows(published_row(), published_row(row="two", hardware="tape"))
    with pytest.raises(ConfigError, match=r"lines / two / height: a calibration row about tape"):
        calibrate_constants(told, DESCRIPTION, BOUNDS, {"line": line})
