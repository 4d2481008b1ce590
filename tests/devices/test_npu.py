"""An NPU with small fake ranks, and a host's pool segment."""

from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from devices.faults import BlockNotStored, NpuLost, OutOfDeviceMemory
from devices.host import Host
from devices.npu import Npu
from devices.spec import SupernodeSpec


class AddingRank:
    """Yields its input and returns the sum of what all ranks yielded."""

    def __init__(self, num_blocks: int = 4) -> None:
        self.cache = np.zeros((2, num_blocks, 3))

    def step(self, step: int, /) -> Generator[int, list[int], int]:
        everybody = yield step
        return sum(everybody)

    def read_blocks(self, block_ids: Any, /) -> np.ndarray[Any, Any]:
        blocks: np.ndarray[Any, Any] = self.cache[:, block_ids]
        return blocks

    def write_blocks(self, block_ids: Any, blocks: Any, /) -> None:
        self.cache[:, block_ids] = blocks


def drive(generators: Sequence[Generator[Any, Any, int]]) -> list[int]:
    calls = [next(generator) for generator in generators]
    results = []
    for generator in generators:
        with pytest.raises(StopIteration) as stop:
            generator.send(calls)
        results.append(stop.value.value)
    return results


@pytest.fixture
def npu(supernode: SupernodeSpec) -> Npu[int, int]:
    npu: Npu[int, int] = Npu(5, supernode.npu)
    for die in range(2):
        npu.load(die, AddingRank, reserved_bytes={"weights": 40_000_000_000, "cache": 10_000_000_000})
    return npu


def test_steps_run_all_dies_and_are_charged(npu: Npu[int, int]) -> None:
    assert npu.step([3, 4], drive=drive, charged_ns=100) == [7, 7]
    assert drive(npu.forward([1, 1], charged_ns=50)) == [2, 2]
    stats = npu.stats()
    assert (stats.state, stats.busy_ns, stats.num_steps) == ("ready", 150, 2)
    assert stats.hbm_used_bytes == (50_000_000_000, 50_000_000_000)
    assert (npu.npu_id, npu.num_dies) == (5, 2)


def test_blocks_go_in_and_out(npu: Npu[int, int]) -> None:
    blocks = np.arange(12.0).reshape(2, 2, 3)
    npu.write_blocks(1, [3, 0], blocks)
    assert np.array_equal(npu.read_blocks(1, np.array([3, 0])), blocks)
    assert not npu.read_blocks(0, [3, 0]).any()
    assert (npu.stats().num_written_bytes, npu.stats().num_read_bytes) == (96, 192)


def test_memory_is_reserved_before_the_rank_is_made(supernode: SupernodeSpec) -> None:
    npu: Npu[int, int] = Npu(0, supernode.npu)

    def never() -> AddingRank:
        raise AssertionError("made without memory")

    with pytest.raises(
        OutOfDeviceMemory, match="npu 0 die 1 HBM: wanted 30000000000 bytes, 24000000000 bytes are free"
    ):
        npu.load(1, never, reserved_bytes={"weights": 40_000_000_000, "cache": 30_000_000_000})
    assert npu.hbm(1).used_bytes == 0

    def broken() -> AddingRank:
        raise OSError("no checkpoint")

    with pytest.raises(OSError, match="no checkpoint"):
        npu.load(1, broken, reserved_bytes={"weights": 1})
    assert (npu.hbm(1).used_bytes, npu.state) == (0, "idle")


def test_an_idle_npu_makes_no_step(supernode: SupernodeSpec) -> None:
    npu: Npu[int, int] = Npu(0, supernode.npu, num_dies=1)
    with pytest.raises(ValueError, match="npu 0 die 0 has no rank"):
        npu.forward([1], charged_ns=1)
    with pytest.raises(ValueError, match="no die 1, 1 are in use"):
        npu.read_blocks(1, [0])
    npu.load(0, AddingRank, reserved_bytes={})
    with pytest.raises(ValueError, match="has a rank already"):
        npu.load(0, AddingRank, reserved_bytes={})
    with pytest.raises(ValueError, match="2 inputs for 1 dies"):
        npu.forward([1, 2], charged_ns=1)
    with pytest.raises(ValueError, match="a step of -1 ns"):
        npu.forward([1], charged_ns=-1)
    assert (npu.stats().num_steps, npu.stats().busy_ns) == (0, 0)
    with pytest.raises(ValueError, match="3 dies in use, it has 2"):
        Npu(0, supernode.npu, num_dies=3)


def test_unloading_gives_the_memory_back(npu: Npu[int, int]) -> None:
    npu.unload()
    assert (npu.state, npu.stats().hbm_used_bytes) == ("idle", (0, 0))
    npu.load(0, AddingRank, reserved_bytes={"weights": 1})


def test_a_lost_npu_stays_lost(npu: Npu[int, int]) -> None:
    npu.step([1, 1], drive=drive, charged_ns=9)
    npu.fail("power")
    npu.fail("again")
    for call in (
        lambda: npu.forward([1, 1], charged_ns=1),
        lambda: npu.step([1, 1], drive=drive, charged_ns=1),
        lambda: npu.read_blocks(0, [0]),
        lambda: npu.write_blocks(0, [0], np.zeros((2, 1, 3))),
        lambda: npu.load(0, AddingRank, reserved_bytes={}),
        npu.unload,
    ):
        with pytest.raises(NpuLost, match="npu 5 is lost: power"):
            call()
    stats = npu.stats()
    assert (stats.state, stats.busy_ns, stats.num_steps, stats.hbm_used_bytes) == ("lost", 9, 1, (0, 0))


def test_a_host_stores_bytes_by_handle() -> None:
    host = Host(7, dram_bytes=100, block_bytes=40)
    block = np.arange(6, dtype=np.float32)
    host.write(3, block)
    block[:] = -1  # the host keeps a copy
    assert host.read([3])[0].tolist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="read-only"):
        host.read([3])[0][0] = 9
    host.write(9, block)
    assert [b[0] for b in host.read([9, 3, 9])] == [-1, 0, -1]
    with pytest.raises(OutOfDeviceMemory, match="host 7 DRAM: wanted 40 bytes, 20 bytes are free"):
        host.write(4, block)
    stats = host.stats()
    assert (stats.num_blocks, stats.dram_used_bytes, stats.num_written_bytes) == (2, 80, 48)
    assert stats.num_read_bytes == 24 * 5
    host.free([3, 9])
    assert (host.stats().dram_used_bytes, host.stats().num_blocks) == (0, 0)
    host.check_invariants()


def test_a_refused_call_leaves_the_host_as_it_was() -> None:
    host = Host(7, dram_bytes=100)
    host.write(3, np.zeros(5))
    with pytest.raises(BlockNotStored, match="host 7: handle 4 holds no bytes"):
        host.read([3, 4])
    with pytest.raises(BlockNotStored, match="handle 4"):
        host.free([3, 4])
    with pytest.raises(ValueError, match="freed twice"):
        host.free([3, 3])
    with pytest.raises(ValueError, match="handle 3 holds a block already"):
        host.write(3, np.zeros(1))
    assert (host.stats().num_blocks, host.stats().num_read_bytes, host.dram.used_bytes) == (1, 0, 40)
    with pytest.raises(ValueError, match="blocks of -1 bytes"):
        Host(0, dram_bytes=1, block_bytes=-1)


class HostMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.host = Host(0, dram_bytes=64)
        self.expected: dict[int, list[int]] = {}

    @rule(handle=st.integers(0, 5), size=st.integers(0, 30))
    def write(self, handle: int, size: int) -> None:
        block = np.arange(size, dtype=np.uint8)
        if handle in self.expected:
            with pytest.raises(ValueError, match="already"):
                self.host.write(handle, block)
        elif sum(map(len, self.expected.values())) + size > 64:
            with pytest.raises(OutOfDeviceMemory):
                self.host.write(handle, block)
        else:
            self.host.write(handle, block)
            self.expected[handle] = block.tolist()

    @rule(handles=st.lists(st.integers(0, 5), max_size=4, unique=True))
    def free(self, handles: list[int]) -> None:
        if self.expected.keys() >= set(handles):
            self.host.free(handles)
            for handle in handles:
                del self.expected[handle]
        else:
            with pytest.raises(BlockNotStored):
                self.host.free(handles)

    @invariant()
    def agrees(self) -> None:
        self.host.check_invariants()
        handles = sorted(self.expected)
        assert [block.tolist() for block in self.host.read(handles)] == [self.expected[h] for h in handles]
        assert self.host.dram.used_bytes == sum(map(len, self.expected.values()))


TestHost = HostMachine.TestCase
TestHost.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
