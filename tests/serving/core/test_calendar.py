"""Counts per rank and future step, against a plain dictionary."""

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.core.calendar import Calendar

NUM_RANKS = 3


def test_a_run_is_read_column_by_column():
    calendar = Calendar(2)
    calendar.reach(5)
    calendar.add_run(1, 2, np.array([1, 0, 1], np.uint8))
    calendar.add(0, 4)
    calendar.add(0, 4)
    assert calendar.column(2).tolist() == [0, 1]
    assert calendar.column(4).tolist() == [2, 1]
    assert calendar.columns(2, 3, np.array([1])).tolist() == [[1, 0, 1]]
    calendar.clear(0)
    assert calendar.column(4).tolist() == [0, 1]
    calendar.forget(0, 5)
    assert calendar.is_empty


@given(
    actions=st.lists(
        st.tuples(
            st.integers(0, NUM_RANKS - 1),
            st.integers(0, 150),
            st.lists(st.integers(0, 1), max_size=90),
            st.integers(0, 40),
        ),
        max_size=25,
    )
)
@settings(max_examples=100, deadline=None)
def test_a_ring_that_grows_is_a_dictionary(actions):
    """Runs are written ahead of the present step, which moves on by the last number of every action."""
    calendar, expected, step = Calendar(NUM_RANKS), Counter(), 0
    for rank, ahead, run, passed in actions:
        start = step + ahead
        calendar.reach(start + len(run))
        calendar.add_run(rank, start, np.array(run, np.uint8))
        calendar.add(rank, start)
        expected[rank, start] += 1
        for i, count in enumerate(run):
            expected[rank, start + i] += count
        for later in range(step, step + 5):
            assert calendar.column(later).tolist() == [expected[r, later] for r in range(NUM_RANKS)]
        ranks = np.array([0, 2])
        found = calendar.columns(step, 30, ranks)
        assert found.tolist() == [[expected[r, step + i] for i in range(30)] for r in (0, 2)]
        calendar.forget(step, passed)
        step += passed
    last = max((later for _, later in expected), default=0)
    if last >= step:
        calendar.forget(step, last - step + 1)
    assert calendar.is_empty
