"""`supernode reproduce`: table, JSON file, picture, mistakes."""

import json

import pytest

from serving.estimation.evaluation import EvaluatedRow
from serving.estimation.picture import draw_reproduction
from serving.estimation.published import load_published, published_of
from serving.estimation.reproduction import format_number

ESTIMATES = {"line": lambda *, x, hardware: {"y": 2.1 * x}}
PNG = b"\x89PNG"


@pytest.fixture
def rows(published_row):
    return (
        published_row(note="read by eye"),
        published_row(row="ten", arguments={"x": 10}, published=20.0, role="validation"),
        published_row(group="other", hardware="tape", published=3.0, role="comparison"),
    )


def test_the_tables(supernode, rows, rows_file):
    code, out, err = supernode(ESTIMATES, "reproduce", "--published", rows_file(*rows))
    assert (code, err) == (0, "")
    assert (
        out
        == """\
lines
  row  quantity  unit  published  ours   error  role
  one  height    m             2   2.1   +5.0%  calibration
  ten  height    m            20    21   +5.0%  validation
  (one, height: read by eye)

other
  row  quantity  unit  published  ours   error  role
  one  height    m             3   2.1  -30.0%  comparison

absolute error of                   rows    median     worst  worst row
lines, calibration                     1     5.00%     5.00%  one, height
lines, validation                      1     5.00%     5.00%  ten, height
other, comparison                      1    30.00%    30.00%  one, height
all calibration rows                   1     5.00%     5.00%  one, height
all validation rows                    1     5.00%     5.00%  ten, height
all comparison rows                    1    30.00%    30.00%  one, height

FAIL  calibration: median error 5.00%, at most 2%
pass  calibration: worst error 5.00%, at most 6%
FAIL  validation: median error 5.00%, at most 4%
pass  validation: worst error 5.00%, at most 10%
"""
    )


def test_the_json_file_and_the_picture(supernode, rows, rows_file, tmp_path):
    files = ("--json", tmp_path / "out.json", "--picture", tmp_path / "out.png")
    code, _, err = supernode(ESTIMATES, "reproduce", "--published", rows_file(*rows), *files)
    assert (code, err) == (0, "")
    written = json.loads((tmp_path / "out.json").read_text())
    assert list(written) == ["rows", "summary"]
    assert written["rows"][1] == {
        "group": "lines",
        "row": "ten",
        "quantity": "height",
        "unit": "m",
        "published": 20.0,
        "ours": 21.0,
        "error": pytest.approx(0.05),
        "role": "validation",
    }
    assert list(written["summary"]) == ["groups", "roles", "bars"]
    assert (tmp_path / "out.png").read_bytes().startswith(PNG)


def test_one_group_alone(supernode, rows, rows_file):
    code, out, _ = supernode(ESTIMATES, "reproduce", "--published", rows_file(*rows), "--group", "other")
    assert code == 0
    assert out.splitlines()[0] == "other"
    assert "lines" not in out


def test_the_device_option_takes_the_place_of_the_rows_own_device(supernode, rows, rows_file):
    def line(*, x, hardware):
        return {"y": {"mine.yaml": 5.0, "tape": 3.0}[hardware] * x}

    _, out, _ = supernode({"line": line}, "reproduce", "--published", rows_file(*rows), "--hardware", "mine.yaml")
    assert "one  height    m             2     5  +150.0%  calibration" in out
    assert "one  height    m             3     3    +0.0%  comparison" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--published", "nope.yaml"), ("nope.yaml",)),
        (("--hardware", "abacus"), ("--hardware", "abacus", "cloudmatrix384")),
        (("--group", "gem"), ("--group", "'gem'", "gemm")),
        (("--group", "switches"), ("switches / 384 NPUs / nodes", "'switches'", "line")),
    ],
)
def test_a_mistake_is_one_line(supernode, arguments, words):
    code, out, err = supernode(ESTIMATES, "reproduce", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert all(word in err for word in words)


def test_a_file_with_a_mistake_names_file_row_and_field(supernode, rows, rows_file):
    path = rows_file(*rows)
    path.write_text(path.read_text().replace("role: validation", "role: training"))
    code, out, err = supernode(ESTIMATES, "reproduce", "--published", path)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {path}: row 2 (lines / ten / height): role: ")


def test_a_file_that_cannot_be_written_is_told_before_the_work(supernode, rows, rows_file, tmp_path):
    for option in ("--json", "--picture"):
        path = tmp_path / "no" / "out.png"
        code, out, err = supernode({}, "reproduce", "--published", rows_file(*rows), option, path)
        assert (code, out) == (2, "")
        assert "cannot be written" in err
    code, out, err = supernode({}, "reproduce", "--published", rows_file(*rows), "--picture", tmp_path / "out.txt")
    assert (code, out) == (2, "")
    assert "must end in .png" in err


def test_all_shipped_rows_fit_in_a_picture(tmp_path):
    """Far off, negative and zero values among them."""
    shipped = load_published(published_of("cloudmatrix384")).rows
    drawn = [EvaluatedRow(row=row, ours=row.published * (i % 5 - 1)) for i, row in enumerate(shipped)]
    draw_reproduction(drawn, tmp_path / "all.png", title="all")
    draw_reproduction([EvaluatedRow(row=shipped[0], ours=0.0)], tmp_path / "one.png", title="one")
    assert (tmp_path / "all.png").read_bytes().startswith(PNG)
    assert (tmp_path / "one.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (57674, "57,674"), (1943.26, "1,943"), (49.4, "49.4"), (1.2899, "1.29"), (0.034567, "0.03457"),
     (-861.04, "-861"), (9.9996, "10"), (100, "100")],
)  # fmt: skip
def test_numbers_have_four_digits_and_no_exponent(value, text):
    assert format_number(value) == text
