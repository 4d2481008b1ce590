"""One mocked NPU: the ranks on its dies, their memory ledgers, the time it was charged.

Owns: which rank is on which die, how much of each die's HBM is reserved, whether the NPU is idle, ready or lost.
Must not know: what a rank computes, how ranks of other NPUs are reached, clocks.

    idle --load on every die that is used--> ready --unload--> idle
    any --fail--> lost, for good: every call raises NpuLost
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from devices.faults import NpuLost
from devices.memory import MemoryLedger
from devices.spec import NpuSpec

InT = TypeVar("InT")
OutT = TypeVar("OutT")
InT_contra = TypeVar("InT_contra", contravariant=True)
OutT_co = TypeVar("OutT_co", covariant=True)

BlockIds = Sequence[int] | npt.NDArray[np.integer[Any]]
Blocks = npt.NDArray[Any]


class Rank(Protocol[InT_contra, OutT_co]):
    """What runs on a die: a forward that yields collectives, and a paged cache."""

    def step(self, step: InT_contra, /) -> Generator[Any, Any, OutT_co]: ...
    def read_blocks(self, block_ids: Any, /) -> Blocks: ...
    def write_blocks(self, block_ids: Any, blocks: Any, /) -> None: ...


# Advances one generator per rank to its end, serving their collectives (model.collectives.run_lockstep).
Drive = Callable[[Sequence[Generator[Any, Any, OutT]]], list[OutT]]


@dataclass(frozen=True, slots=True, kw_only=True)
class NpuStats:
    """State and totals of one NPU. Block bytes are those of the arrays, memory bytes those of the ledgers."""

    npu_id: int
    state: Literal["idle", "ready", "lost"]
    busy_ns: int  # charged, not measured
    num_steps: int
    num_read_bytes: int
    num_written_bytes: int
    hbm_used_bytes: tuple[int, ...]  # per die
    hbm_capacity_bytes: int  # of one die


class Npu(Generic[InT, OutT]):
    """Up to one rank per die. Die ids count from 0."""

    def __init__(self, npu_id: int, spec: NpuSpec, *, num_dies: int | None = None) -> None:
        """`num_dies`: how many dies are in use, the spec's number by default."""
        num_dies = spec.num_dies if num_dies is None else num_dies
        if not 1 <= num_dies <= spec.num_dies:
            raise ValueError(f"npu {npu_id}: {num_dies} dies in use, it has {spec.num_dies}")
        self._npu_id = npu_id
        self._spec = spec
        self._ledgers = [
            MemoryLedger(f"npu {npu_id} die {die} HBM", capacity_bytes=spec.die.hbm_bytes) for die in range(num_dies)
        ]
        self._ranks: list[Rank[InT, OutT] | None] = [None] * num_dies
        self._loss: str | None = None
        self._busy_ns = 0
        self._num_steps = 0
        self._num_read_bytes = 0
        self._num_written_bytes = 0

    @property
    def npu_id(self) -> int:
        return self._npu_id

    @property
    def num_dies(self) -> int:
        """Dies in use."""
        return len(self._ranks)

    @property
    def state(self) -> Literal["idle", "ready", "lost"]:
        if self._loss is not None:
            return "lost"
        return "idle" if None in self._ranks else "ready"

    def hbm(self, die: int) -> MemoryLedger:
        """Memory ledger of one die, also of a lost NPU."""
        return self._ledgers[self._checked(die)]

    def load(self, die: int, make_rank: Callable[[], Rank[InT, OutT]], *, reserved_bytes: Mapping[str, int]) -> None:
        """Reserve memory on a die and put a rank there.

        `make_rank` is called once the memory is reserved. Raises OutOfDeviceMemory, NpuLost or what `make_rank` raises,
        and then the die is as it was.
        """
        self._check_alive()
        if self._ranks[self._checked(die)] is not None:
            raise ValueError(f"npu {self._npu_id} die {die} has a rank already")
        ledger = self._ledgers[die]
        done: list[str] = []
        try:
            for name, num_bytes in reserved_bytes.items():
                ledger.reserve(name, num_bytes)
                done.append(name)
            self._ranks[die] = make_rank()
        except BaseException:
            for name in done:
                ledger.release(name)
            raise

    def unload(self) -> None:
        """Remove all ranks and give their memory back. Raises NpuLost."""
        self._check_alive()
        self._ranks = [None] * len(self._ranks)
        for ledger in self._ledgers:
            for name in list(ledger.reservations):
                ledger.release(name)

    def forward(self, steps: Sequence[InT], *, charged_ns: int) -> list[Generator[Any, Any, OutT]]:
        """Begin one step: one generator per die, to be driven together with those of the instance's other NPUs.

        `charged_ns` is what the step costs in simulated time. Raises NpuLost, or ValueError if a die has no rank.
        """
        self._check_alive()
        if len(steps) != len(self._ranks):
            raise ValueError(f"npu {self._npu_id}: {len(steps)} inputs for {len(self._ranks)} dies")
        generators = [self._rank(die).step(step) for die, step in enumerate(steps)]
        self.charge(charged_ns)
        return generators

    def charge(self, charged_ns: int) -> None:
        """Count one step of so much simulated time. Raises NpuLost."""
        self._check_alive()
        if charged_ns < 0:
            raise ValueError(f"npu {self._npu_id}: a step of {charged_ns} ns")
        self._busy_ns += charged_ns
        self._num_steps += 1

    def step(self, steps: Sequence[InT], *, drive: Drive[OutT], charged_ns: int) -> list[OutT]:
        """One step of an instance that has all its ranks here; entry d of `steps` and of the result is die d's."""
        return drive(self.forward(steps, charged_ns=charged_ns))

    def read_blocks(self, die: int, block_ids: BlockIds) -> Blocks:
        """Contents of cache blocks of the rank on `die`. Raises NpuLost, or ValueError if there is no rank."""
        self._check_alive()
        blocks = self._rank(die).read_blocks(block_ids)
        self._num_read_bytes += blocks.nbytes
        return blocks

    def write_blocks(self, die: int, block_ids: BlockIds, blocks: Blocks) -> None:
        """Overwrite cache blocks of the rank on `die`. Raises NpuLost, or ValueError if there is no rank."""
        self._check_alive()
        self._rank(die).write_blocks(block_ids, blocks)
        self._num_written_bytes += blocks.nbytes

    def fail(self, reason: str = "failed") -> None:
        """Lose the NPU: its ranks are gone, and every call but `stats` and `hbm` raises NpuLost from now on."""
        if self._loss is None:
            self._loss = reason
            self._ranks = [None] * len(self._ranks)
            for ledger in self._ledgers:
                for name in list(ledger.reservations):
                    ledger.release(name)

    def stats(self) -> NpuStats:
        return NpuStats(
            npu_id=self._npu_id,
            state=self.state,
            busy_ns=self._busy_ns,
            num_steps=self._num_steps,
            num_read_bytes=self._num_read_bytes,
            num_written_bytes=self._num_written_bytes,
            hbm_used_bytes=tuple(ledger.used_bytes for ledger in self._ledgers),
            hbm_capacity_bytes=self._spec.die.hbm_bytes,
        )

    def _check_alive(self) -> None:
        if self._loss is not None:
            raise NpuLost(f"npu {self._npu_id}", self._loss)

    def _checked(self, die: int) -> int:
        if not 0 <= die < len(self._ranks):
            raise ValueError(f"npu {self._npu_id}: no die {die}, {len(self._ranks)} are in use")
        return die

    def _rank(self, die: int) -> Rank[InT, OutT]:
        rank = self._ranks[self._checked(die)]
        if rank is None:
            raise ValueError(f"npu {self._npu_id} die {die} has no rank")
        return rank
