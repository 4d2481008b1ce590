"""Errors of rows, the summary and the bars, by estimates made by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.errors import ConfigError
from serving.estimation.evaluation import EvaluatedRow, evaluate_rows, relative_error, summarize


class Line:
    """The estimate y = slope * x; remembers its calls."""

    def __init__(self, slope=2.0):
        self.slope, self.calls = slope, []

    def __call__(self, *, x, hardware, shift=0.0):
        self.calls.append((x, hardware, shift))
        return {"x": x, "y": self.slope * x + shift}


def evaluate(rows, line, **options):
    return evaluate_rows(rows, {"line": line}, hardware="ruler", **options)


def test_ours_is_factor_times_estimate_minus_over(published_row):
    row = published_row(ours={"factor": 100.0, "minus": {"x": 3}, "over": {"x": 5}}, arguments={"x": 4}, published=25)
    (evaluated,) = evaluate([row], Line())
    assert evaluated.ours == 100 * (8 - 6) / 10
    assert evaluated.error == pytest.approx(-0.2)
    assert evaluated.as_json() == {
        "group": "lines",
        "row": "one",
        "quantity": "height",
        "unit": "m",
        "published": 25.0,
        "ours": 20.0,
        "error": evaluated.error,
        "role": "calibration",
    }


def test_changed_arguments_leave_the_others(published_row):
    line = Line()
    evaluate([published_row(arguments={"x": 4, "shift": 1.0}, ours={"minus": {"x": 3}})], line)
    assert line.calls == [(4, "ruler", 1.0), (3, "ruler", 1.0)]


def test_the_error_keeps_the_sign_of_the_difference():
    assert relative_error(110, 100) == pytest.approx(0.1)
    assert relative_error(-11, -10) == pytest.approx(0.1)
    assert relative_error(10, -10) == -2
    assert relative_error(0, 0) == 0
    assert relative_error(-0.25, 0) == -0.25


def test_equal_estimates_are_made_once(published_row):
    line = Line()
    rows = [published_row(arguments={"x": x}, ours={"over": {"x": 1}, "key": key}) for x in (1, 2) for key in "xy"]
    evaluate([*rows, published_row(hardware="tape")], line)
    assert line.calls == [(1, "ruler", 0.0), (2, "ruler", 0.0), (1, "tape", 0.0)]


def test_a_description_stands_for_the_named_device_alone(published_row):
    line, description = Line(), {"name": "ruler", "length": 1}
    rows = [published_row(), published_row(hardware="tape"), published_row(hardware="ruler")]
    evaluate(rows, line, description=description)
    assert line.calls == [(1, description, 0.0), (1, "tape", 0.0)]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"ours": {"estimate": "curve"}}, "ours.estimate: 'curve', there are line"),
        ({"ours": {"key": "z"}}, "ours.key: 'z' is not among x, y"),
        ({"arguments": {"z": 1}}, "ours.estimate: line: "),
        ({"arguments": {"x": "a"}}, "ours.estimate: line: "),
        ({"arguments": {"x": math.nan}}, "ours.key: y: nan is not a finite number"),
        ({"ours": {"key": "x"}, "arguments": {"x": "a", "shift": 0.0}}, "ours.estimate: line: "),
        ({"ours": {"over": {"x": 0}}}, "ours.over: is 0"),
    ],
)
def test_a_failure_names_the_row(published_row, changes, told):
    rows = [published_row(), published_row(row="two", **changes)]
    with pytest.raises(ConfigError) as error:
        evaluate(rows, Line())
    assert str(error.value).startswith(f"lines / two / height: {told}")


def test_an_error_of_ours_is_not_taken_for_the_users(published_row):
    def broken(**_):
        raise AssertionError("a mistake of ours")

    with pytest.raises(AssertionError, match="of ours"):
        evaluate_rows([published_row()], {"line": broken}, hardware="ruler")


def test_the_summary_by_group_and_role(published_row):
    def row(group, role, error):
        return EvaluatedRow(row=published_row(group=group, role=role, row=f"{error}"), ours=2.0 * (1 + error))

    rows = [
        row("a", "calibration", 0.01),
        row("a", "calibration", -0.03),
        row("a", "calibration", 0.02),
        row("b", "calibration", -0.07),
        row("b", "validation", 0.05),
        row("b", "comparison", 9.0),
    ]
    summary = summarize(rows)
    errors = summary.by_group["a"]["calibration"]
    assert (errors.count, errors.median, errors.worst) == (3, pytest.approx(0.02), pytest.approx(0.03))
    assert errors.worst_row.row == "-0.03"
    assert list(summary.by_group["b"]) == ["calibration", "validation", "comparison"]
    assert {role: found.count for role, found in summary.by_role.items()} == {
        "calibration": 4,
        "validation": 1,
        "comparison": 1,
    }
    assert [(bar.role, bar.statistic, bar.limit, bar.passed) for bar in summary.bars] == [
        ("calibration", "median", 0.02, False),  # 2.5 %
        ("calibration", "worst", 0.06, False),  # 7 %
        ("validation", "median", 0.04, False),  # 5 %
        ("validation", "worst", 0.1, True),
    ]
    assert summary.as_json()["bars"][3] == {
        "role": "validation",
        "statistic": "worst",
        "limit": 0.1,
        "value": pytest.approx(0.05),
        "passed": True,
    }
    assert summary.as_json()["groups"]["b"]["validation"]["count"] == 1


@given(st.lists(st.floats(-0.5, 0.5), min_size=1), st.sampled_from(["calibration", "validation"]))
def test_a_bar_passes_as_its_value_says(published_row, errors, role):
    rows = [EvaluatedRow(row=published_row(role=role), ours=2.0 + 2.0 * error) for error in errors]
    median, worst = summarize(rows).bars
    assert median.value <= worst.value == max(abs(row.error) for row in rows)
    assert (worst.passed, median.passed) == (worst.value <= worst.limit, median.value <= median.limit)
