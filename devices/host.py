"""One mocked CPU host: a segment of the shared KV pool in its DRAM.

Owns: the bytes behind each handle, and the DRAM that they are charged.
Must not know: keys, prefixes, leases, which handle to use or to evict: the index decides, the host stores.
Source: the split of Mooncake Store and of the paper's EMS (arXiv 2506.12708, section 4.4): metadata apart from bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from devices.faults import BlockNotStored
from devices.memory import MemoryLedger

Block = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class HostStats:
    """State and totals of one host. Block bytes are those of the arrays, DRAM bytes those of the ledger."""

    host_id: int
    num_blocks: int
    num_read_bytes: int
    num_written_bytes: int
    dram_used_bytes: int
    dram_capacity_bytes: int


class Host:
    """Blocks by handle. A refused call changes nothing."""

    def __init__(self, host_id: int, *, dram_bytes: int, block_bytes: int | None = None) -> None:
        """`block_bytes`: what one block is charged; None charges the bytes of its array."""
        if block_bytes is not None and block_bytes < 0:
            raise ValueError(f"host {host_id}: blocks of {block_bytes} bytes")
        self._host_id = host_id
        self._block_bytes = block_bytes
        self._dram = MemoryLedger(f"host {host_id} DRAM", capacity_bytes=dram_bytes)
        self._blocks: dict[int, Block] = {}
        self._num_read_bytes = 0
        self._num_written_bytes = 0

    @property
    def host_id(self) -> int:
        return self._host_id

    @property
    def dram(self) -> MemoryLedger:
        return self._dram

    def write(self, handle: int, block: Block) -> None:
        """Store a copy of `block`. Raises OutOfDeviceMemory, or ValueError if the handle holds a block already."""
        if handle in self._blocks:
            raise ValueError(f"host {self._host_id}: handle {handle} holds a block already")
        self._dram.reserve(handle, block.nbytes if self._block_bytes is None else self._block_bytes)
        stored = np.array(block)
        stored.flags.writeable = False
        self._blocks[handle] = stored
        self._num_written_bytes += stored.nbytes

    def read(self, handles: Sequence[int]) -> list[Block]:
        """The blocks of `handles`, read-only, in that order. Raises BlockNotStored for the first one that has none."""
        self._check_stored(handles)
        blocks = [self._blocks[handle] for handle in handles]
        self._num_read_bytes += sum(block.nbytes for block in blocks)
        return blocks

    def free(self, handles: Sequence[int]) -> None:
        """Forget the blocks of `handles`. Raises BlockNotStored if one has none, ValueError if one is named twice."""
        if len(set(handles)) != len(handles):
            raise ValueError(f"host {self._host_id}: a handle is freed twice in one call")
        self._check_stored(handles)
        for handle in handles:
            del self._blocks[handle]
            self._dram.release(handle)

    def stats(self) -> HostStats:
        return HostStats(
            host_id=self._host_id,
            num_blocks=len(self._blocks),
            num_read_bytes=self._num_read_bytes,
            num_written_bytes=self._num_written_bytes,
            dram_used_bytes=self._dram.used_bytes,
            dram_capacity_bytes=self._dram.capacity_bytes,
        )

    def check_invariants(self) -> None:
        self._dram.check_invariants()
        assert self._dram.reservations.keys() == self._blocks.keys()
        for handle, block in self._blocks.items():
            charged_bytes = block.nbytes if self._block_bytes is None else self._block_bytes
            assert self._dram.reservations[handle] == charged_bytes

    def _check_stored(self, handles: Sequence[int]) -> None:
        for handle in handles:
            if handle not in self._blocks:
                raise BlockNotStored(f"host {self._host_id}", handle)
