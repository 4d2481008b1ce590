"""The section `fitted` of a hardware file, and `supernode calibrate`."""

import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from serving.errors import ConfigError
from serving.estimation.calibration import Bounds, FittedConstant
from serving.estimation.fitted_section import read_fitted, rewrite_fitted, with_constants, yaml_float

ABOVE = "# A ruler.\r\nname: ruler  # caf\u00e9\n\nplanes: {ub:   {fitted: 3}}  \n"
SECTION = """fitted:
  # Of the line.
  a: {value: 1.0, low: 0.0, high: 9.0, rows: [lines]}  # height at 0

  b: {value: 1.0, low: 0.0, high: 9.0, rows: []}
"""


def estimates():
    def line(*, x, hardware):
        return {"y": hardware["fitted"]["a"]["value"] + hardware["fitted"]["b"]["value"] * x}

    return {"line": line}


def fitted(name, value, groups=("lines", "gemm")):
    bounds = Bounds(start=0.0, low=0.0, high=9.0 if value > 1e-7 else 9e-8)
    return FittedConstant(name=name, bounds=bounds, value=value, standard_error=None, groups=groups)


def test_the_section_is_read():
    assert read_fitted(yaml.safe_load(SECTION)) == dict.fromkeys("ab", Bounds(start=1.0, low=0.0, high=9.0))


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ("name: x", "fitted: must hold constants to fit, got None"),
        ("fitted: {}", "fitted: must hold constants"),
        ("fitted: {a: 3}", "fitted.a: must be a mapping of value, low, high, rows, got 3"),
        ("fitted: {a: {value: 1.0, low: 0.0, rows: []}}", "fitted.a.high: missing"),
        ("fitted: {a: {value: 1.0, low: 0.0, high: 2.0, rows: [], unit: s}}", "fitted.a.unit: unknown key"),
        ("fitted: {a: {value: 1e-8, low: 0.0, high: 2.0, rows: []}}", "fitted.a.value: must be a number, got '1e-8'"),
        ("fitted: {a: {value: 3.0, low: 0.0, high: 2.0, rows: []}}", "fitted.a.value: 3.0 is not within [0.0, 2.0]"),
    ],
)
def test_a_mistake_in_the_section_names_the_field(section, told):
    with pytest.raises(ConfigError) as error:
        read_fitted(yaml.safe_load(section))
    assert str(error.value).startswith(told)


def test_a_description_with_other_constants_is_a_copy():
    description = yaml.safe_load(SECTION)
    changed = with_constants(description, {"b": 2.5})
    assert (changed["fitted"]["b"]["value"], description["fitted"]["b"]["value"]) == (2.5, 1.0)
    assert changed["fitted"]["a"] == description["fitted"]["a"]
    with pytest.raises(ConfigError, match=r"fitted\.c: unknown constant"):
        with_constants(description, {"c": 1.0})


def test_only_values_and_groups_are_rewritten():
    text = rewrite_fitted(ABOVE + SECTION, [fitted("a", 2.25, ("lines",)), fitted("b", 1.5e-8)])
    assert text == ABOVE + (
        "fitted:\n"
        "  # Of the line.\n"
        "  a: {value: 2.25, low: 0.0, high: 9.0, rows: [lines]}  # height at 0\n"
        "\n"
        "  b: {value: 1.5e-08, low: 0.0, high: 9.0e-08, rows: [lines, gemm]}\n"
    )
    assert yaml.safe_load(text)["fitted"]["b"]["value"] == 1.5e-8


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (ABOVE, "0 such sections"),
        (SECTION + SECTION, "2 such sections"),
        (SECTION + "host: {}\n", "line 6: 'host: {}' is not the one line of a constant"),
        ("fitted:\n  a:\n    value: 1.0\n", "line 2: '  a:' is not the one line"),
        (SECTION.replace("  b: ", "  c: "), "line 5: "),
        ("fitted:\n  a: {value: 1.0, low: 0.0, high: 9.0, rows: []}\n", "the file holds a, the fit a, b"),
    ],
)
def test_a_section_of_another_form_is_not_rewritten(text, told):
    with pytest.raises(ConfigError) as error:
        rewrite_fitted(text, [fitted("a", 2.0), fitted("b", 2.0)])
    assert told in str(error.value)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_written_number_is_read_back_exactly(value):
    assert yaml.safe_load(yaml_float(value)) == value


@pytest.fixture
def ruler(tmp_path):
    path = tmp_path / "ruler.yaml"
    path.write_bytes((ABOVE + SECTION).encode())
    return path


@pytest.fixture
def rows(published_row):
    heights = [published_row(row=f"at {x}", arguments={"x": x}, published=2.0 + 3.0 * x) for x in range(1, 5)]
    return [*heights, published_row(row="unseen", arguments={"x": 9}, published=30.0, role="validation")]


def test_the_fit_is_printed_and_the_file_left_alone(supernode, ruler, rows, rows_file, tmp_path):
    before = ruler.read_bytes()
    options = ("--hardware", ruler, "--published", rows_file(*rows), "--json", tmp_path / "fit.json")
    code, out, err = supernode(estimates(), "calibrate", *options)
    assert (code, err) == (0, "")
    assert [line.split()[:3] for line in out.splitlines()[1:3]] == [["a", "1", "2"], ["b", "1", "3"]]
    assert "pass  calibration: worst error 0.00%, at most 6%" in out
    assert ruler.read_bytes() == before
    told = json.loads((tmp_path / "fit.json").read_text())
    assert [constant["value"] for constant in told["constants"]] == [2.0, 3.0]
    assert told["rows"][-1]["error"] == pytest.approx(-1 / 30)


def test_written_values_are_where_the_next_fit_starts(supernode, ruler, rows, rows_file):
    options = ("--hardware", ruler, "--published", rows_file(*rows), "--write")
    code, out, _ = supernode(estimates(), "calibrate", *options)
    assert code == 0
    assert out.endswith(f"wrote the section fitted of {ruler}\n")
    written = ruler.read_bytes()
    assert written == (
        ABOVE.encode() + b"fitted:\n  # Of the line.\n"
        b"  a: {value: 2.0, low: 0.0, high: 9.0, rows: [lines]}  # height at 0\n\n"
        b"  b: {value: 3.0, low: 0.0, high: 9.0, rows: [lines]}\n"
    )
    code, out, _ = supernode(estimates(), "calibrate", *options)
    assert [line.split()[:3] for line in out.splitlines()[1:3]] == [["a", "2", "2"], ["b", "3", "3"]]
    assert ruler.read_bytes() == written


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("low: 0.0", "low: 5.0"), "fitted.a.value: 1.0 is not within [5.0, 9.0]"),
        (("name: ruler", "name: tape"), "the published rows are about ruler, the description is of tape"),
        (("\nfitted:", "\nother:"), "fitted: must hold constants to fit"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(supernode, ruler, rows, rows_file, change, told):
    ruler.write_bytes(ruler.read_bytes().replace(*(part.encode() for part in change), 1))
    before = ruler.read_bytes()
    options = ("--hardware", ruler, "--published", rows_file(*rows), "--write")
    code, out, err = supernode(estimates(), "calibrate", *options)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert told in err
    assert ruler.read_bytes() == before


def test_a_device_that_is_not_there(supernode):
    code, _, err = supernode({}, "calibrate", "--hardware", "abacus")
    assert (code, err) == (2, "error: --hardware: 'abacus' is neither a YAML file nor a shipped device\n")
