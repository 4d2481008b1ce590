"""Event log: one digest for one history."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.core.errors import IllegalCall
from serving.core.event_log import Event, EventLog, NullLog


def filled(*events):
    log = EventLog(keep=True)
    for now_ns, kind, subject, details in events:
        log.append(now_ns, kind, subject, **details)
    log.check_invariants()
    return log


def test_the_digest_is_the_sum_of_the_hashes_of_the_events_written_out():
    log = filled((5, "place", "r0", {"rank": 3, "decode": "decode-0"}), (5, "step", "prefill-0", {}))
    texts = ["(5, 'place', 'r0', (('decode', 'decode-0'), ('rank', 3)))", "(5, 'step', 'prefill-0', ())"]
    hashes = [int.from_bytes(hashlib.sha256(text.encode()).digest(), "little") for text in texts]
    assert log.digest() == f"{sum(hashes) % 2**256:064x}"
    assert log.events == [
        Event(5, "place", "r0", (("decode", "decode-0"), ("rank", 3))),
        Event(5, "step", "prefill-0", ()),
    ]


def test_keeping_events_does_not_change_the_digest():
    kept, lean = EventLog(keep=True), EventLog()
    for log in (kept, lean):
        log.append(1, "a", "x", n=1)
    assert kept.digest() == lean.digest()
    assert (lean.events, lean.num_events) == ([], 1)
    lean.check_invariants()


def test_numpy_integers_count_as_integers_and_the_order_of_details_does_not_matter():
    plain = filled((1, "a", "x", {"n": 7, "m": "s"}))
    numpy = filled((np.int64(1), "a", "x", {"m": "s", "n": np.int32(7)}))
    assert plain.digest() == numpy.digest()


@pytest.mark.parametrize(
    "other",
    [
        [(2, "a", "x", {}), (2, "b", "y", {})],
        [(1, "b", "x", {}), (1, "a", "y", {})],
        [(1, "a", "x", {}), (1, "a", "x", {}), (1, "b", "y", {})],
        [(1, "a", "x", {})],
        [(1, "a", "x", {}), (1, "b", "z", {})],
        [(1, "a", "x", {"n": 1}), (1, "b", "y", {})],
        [(1, "a", "x', ())\n(1, 'b', 'y", {})],
    ],
)
def test_another_history_has_another_digest(other):
    assert filled(*other).digest() != filled((1, "a", "x", {}), (1, "b", "y", {})).digest()


def test_an_integer_is_not_the_string_that_prints_like_it():
    assert filled((1, "a", "x", {"n": 1})).digest() != filled((1, "a", "x", {"n": "1"})).digest()


def test_no_events_have_a_digest_too():
    assert EventLog().digest() == "0" * 64


@given(
    order=st.permutations(range(6)), instants=st.lists(st.integers(0, 2), min_size=6, max_size=6), again=st.booleans()
)
def test_the_order_of_the_calls_does_not_matter_but_their_number_does(order, instants, again):
    events = [(instants[i], "step", f"r{i % 4}", {"n": i // 2}) for i in range(6)]
    shuffled = [events[i] for i in order]
    assert filled(*events).digest() == filled(*shuffled).digest()
    assert filled(*events).digest() != filled(*shuffled[1:], *shuffled[:again] * 2).digest()
    assert [event.subject for event in filled(*shuffled).events] == [subject for _, _, subject, _ in shuffled]


def test_a_null_log_notes_nothing_and_has_no_digest():
    log = NullLog()
    log.append(1, "a", "x", n=1)
    log.append(1, "a", "x", n=1.5)
    assert (log.events, log.num_events) == ([], 0)
    log.check_invariants()
    with pytest.raises(IllegalCall, match="no event was noted"):
        log.digest()


@pytest.mark.parametrize("value", [1.5, None, (1,), np.float64(2)])
def test_details_of_other_types_are_refused_and_nothing_is_noted(value):
    log = filled((1, "a", "x", {}))
    before = log.digest()
    with pytest.raises(IllegalCall):
        log.append(2, "b", "y", n=value)
    assert (log.digest(), log.num_events) == (before, 1)
    log.check_invariants()
