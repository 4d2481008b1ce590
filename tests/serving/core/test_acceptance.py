"""The table of draws: exact shares, sums that are searched, and places that spread."""

import numpy as np
import pytest

from serving.core.acceptance import TABLE_SIZE, acceptance_table, first_draw


@pytest.mark.parametrize("probability", [0.0, 0.3, 0.7, 1.0])
def test_the_share_of_right_drafts_is_exact(probability):
    table = acceptance_table(probability)
    assert int(table.is_accepted[:TABLE_SIZE].sum()) == round(probability * TABLE_SIZE)
    assert len(table.num_tokens) == 2 * TABLE_SIZE + 1


def test_running_sums_count_each_draft_and_the_right_ones_twice():
    table = acceptance_table(0.7)
    for end in (0, 1, 17, TABLE_SIZE, 2 * TABLE_SIZE):
        assert table.num_tokens[end] == end + int(table.is_accepted[:end].sum())


@pytest.mark.parametrize("lag", [1, 2, 7, 1000])
def test_neighboring_draws_are_not_correlated(lag):
    draws = acceptance_table(0.5).is_accepted[:TABLE_SIZE].astype(float)
    assert abs(np.corrcoef(draws[:-lag], draws[lag:])[0, 1]) < 5 / np.sqrt(TABLE_SIZE)


def test_requests_begin_everywhere_and_always_at_the_same_place():
    places = [first_draw(f"r-{i}", 0) for i in range(4000)]
    assert places == [first_draw(f"r-{i}", 0) for i in range(4000)]
    assert np.histogram(places, bins=8, range=(0, TABLE_SIZE))[0].min() > 400
    assert first_draw("r", 1) != first_draw("r", 2)


@pytest.mark.parametrize("probability", [-0.1, 1.1, float("nan")])
def test_probabilities_outside_the_range_are_refused(probability):
    with pytest.raises(ValueError, match="acceptance"):
        acceptance_table(probability)
