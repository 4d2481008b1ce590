"""Two formulas against published numbers and against brute force."""

import math

import pytest

from serving.evaluation.statistics import mcnemar_p, wilson_interval


@pytest.mark.parametrize(
    ("num_correct", "num_asked", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe (1998), Statistics in Medicine 17, table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 0.8389, 1.0),
    ],
)
def test_the_interval_is_wilsons(num_correct, num_asked, low, high):
    assert wilson_interval(num_correct, num_asked) == pytest.approx((low, high), abs=5e-5)


def test_without_problems_anything_is_possible():
    assert wilson_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (1, 0), (0, 5), (0, 6), (3, 9), (7, 7), (12, 2)])
def test_p_counts_the_coin_tosses_that_are_at_least_as_lopsided(lost, won):
    tosses = lost + won
    extreme = [k for k in range(tosses + 1) if abs(k - tosses / 2) >= abs(lost - tosses / 2)]
    assert mcnemar_p(lost, won) == pytest.approx(sum(math.comb(tosses, k) for k in extreme) / 2**tosses)
    assert mcnemar_p(lost, won) == mcnemar_p(won, lost)


def test_six_to_nothing_is_significant_and_five_to_nothing_is_not():
    assert mcnemar_p(0, 6) == 0.03125
    assert mcnemar_p(0, 5) == 0.0625


def test_many_problems_do_not_overflow():
    assert mcnemar_p(900, 1100) == pytest.approx(8.6e-6, rel=0.02)
