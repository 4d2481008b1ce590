"""The ledger against a dictionary."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from devices.faults import OutOfDeviceMemory
from devices.memory import MemoryLedger

CAPACITY = 100


def test_reserve_and_release() -> None:
    ledger = MemoryLedger("npu 3 die 1 HBM", capacity_bytes=CAPACITY)
    ledger.reserve("weights", 60)
    ledger.reserve("cache", 30)
    assert (ledger.used_bytes, ledger.free_bytes, dict(ledger.reservations)) == (90, 10, {"weights": 60, "cache": 30})
    assert ledger.release("weights") == 60
    assert (ledger.used_bytes, ledger.peak_bytes) == (30, 90)


def test_a_refused_call_names_the_reason_and_changes_nothing() -> None:
    ledger = MemoryLedger("npu 3 die 1 HBM", capacity_bytes=CAPACITY)
    ledger.reserve("weights", 60)
    with pytest.raises(OutOfDeviceMemory, match="npu 3 die 1 HBM: wanted 41 bytes, 40 bytes are free"):
        ledger.reserve("cache", 41)
    with pytest.raises(OutOfDeviceMemory):
        ledger.check(41)
    with pytest.raises(ValueError, match="'weights' is reserved already"):
        ledger.reserve("weights", 1)
    with pytest.raises(ValueError, match="'cache' is not reserved"):
        ledger.release("cache")
    with pytest.raises(ValueError, match="negative"):
        ledger.reserve("debt", -1)
    assert dict(ledger.reservations) == {"weights": 60}
    ledger.check(40)
    with pytest.raises(ValueError, match="capacity"):
        MemoryLedger("nothing", capacity_bytes=-1)


class LedgerMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.ledger = MemoryLedger("die", capacity_bytes=CAPACITY)
        self.expected: dict[str, int] = {}

    @rule(name=st.sampled_from("abcde"), num_bytes=st.integers(-2, 60))
    def reserve(self, name: str, num_bytes: int) -> None:
        fits = 0 <= num_bytes <= CAPACITY - sum(self.expected.values())
        if name not in self.expected and fits:
            self.ledger.reserve(name, num_bytes)
            self.expected[name] = num_bytes
        else:
            with pytest.raises((ValueError, OutOfDeviceMemory)):
                self.ledger.reserve(name, num_bytes)

    @rule(name=st.sampled_from("abcde"))
    def release(self, name: str) -> None:
        if name in self.expected:
            assert self.ledger.release(name) == self.expected.pop(name)
        else:
            with pytest.raises(ValueError, match="not reserved"):
                self.ledger.release(name)

    @invariant()
    def agrees(self) -> None:
        self.ledger.check_invariants()
        assert dict(self.ledger.reservations) == self.expected


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
