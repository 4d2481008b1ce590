"""An interrupt that something swallowed: remembered, and not printed."""

import signal
import sys

import pytest

from serving.interrupts import Interrupts


class Swallows:
    """Its destructor is where the signal arrives; Python ignores what a destructor raises."""

    def __init__(self, during):
        self._during = during

    def __del__(self):
        self._during()


def raise_interrupt():
    signal.raise_signal(signal.SIGINT)


def raise_error():
    raise RuntimeError("a defect of ours")


def test_a_swallowed_interrupt_is_remembered_and_not_printed(monkeypatch):
    printed = []
    monkeypatch.setattr(sys, "unraisablehook", printed.append)
    with Interrupts() as interrupts:
        with pytest.raises(KeyboardInterrupt), interrupts.raised():
            Swallows(raise_interrupt)
        assert interrupts.was_interrupted
    assert printed == []


def test_other_swallowed_errors_are_still_told(monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: told.append(unraisable.exc_type))
    before = sys.unraisablehook
    with Interrupts():
        Swallows(raise_error)
    assert told == [RuntimeError]
    assert sys.unraisablehook is before
