"""The Pareto front against its definition, and the pictures of it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.errors import ConfigError
from serving.simulation.pareto import THROUGHPUT, TPOT, draw_pareto, format_front, front_of, pareto_front

FIGURES = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=30)


def row(throughput, tpot, **varied):
    return {"status": "ok", THROUGHPUT: throughput, TPOT: tpot, **varied}


ROWS = [row(10.0, 5.0, n=1), row(20.0, 9.0, n=2), row(15.0, 9.0, n=2), row(30.0, 12.0, n=1), row(12.0, 30.0, n=1)]


@given(FIGURES)
def test_the_front_is_what_nothing_beats(figures):
    throughput, tpot = [f for f, _ in figures], [t for _, t in figures]

    def is_beaten(i):
        return any(
            (throughput[j] >= throughput[i] and tpot[j] <= tpot[i])
            and (throughput[j] > throughput[i] or tpot[j] < tpot[i])
            for j in range(len(figures))
        )

    front = pareto_front(throughput, tpot).tolist()
    unbeaten = {figures[i] for i in range(len(figures)) if not is_beaten(i)}
    assert {figures[i] for i in front} == unbeaten
    assert len(front) == len(unbeaten)
    assert [tpot[i] for i in front] == sorted(tpot[i] for i in front)
    assert all(figures.index(figures[i]) == i for i in front)


def test_rows_without_figures_are_left_out():
    rows = [*ROWS, {"status": "invalid", "error": "x"}, row(99.0, None), row(99.0, 0.0)]
    assert front_of(rows) == [ROWS[0], ROWS[1], ROWS[3]]
    assert format_front(rows, ["n"]).splitlines() == [
        "Pareto front: 3 of 5 points",
        "n  TPOT ms  tok/s/NPU",
        "-  -------  ---------",
        "1     5.00       10.0",
        "2     9.00       20.0",
        "1    12.00       30.0",
    ]
    assert format_front([], ["n"]) == "Pareto front: no point with a TPOT"


def test_a_page_needs_no_network_and_has_every_point(tmp_path):
    path = tmp_path / "a.html"
    draw_pareto(ROWS, path, varied=["n"], title="five points")
    text = path.read_text()
    assert "five points" in text
    assert "n = 2" in text
    assert "<script src=" not in text
    draw_pareto(ROWS, tmp_path / "b.html", varied=["n"], title="five points")
    assert (tmp_path / "b.html").read_text() == text


def test_a_png_is_drawn(tmp_path):
    draw_pareto(ROWS, tmp_path / "a.png", varied=["n"], title="five points", color="n")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "rows", "color", "words"),
    [
        ("a.svg", ROWS, None, "must end in .html or .png"),
        ("a.png", ROWS, "m", "--color: 'm' is not varied; there are n"),
        ("a.png", [], None, "no point has both"),
    ],
)
def test_what_cannot_be_drawn_is_named(tmp_path, name, rows, color, words):
    with pytest.raises(ConfigError, match=words):
        draw_pareto(rows, tmp_path / name, varied=["n"], title="", color=color)
    assert list(tmp_path.iterdir()) == []
