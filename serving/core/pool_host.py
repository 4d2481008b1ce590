"""One host of the shared pool, as the index sees it.

Owns: how much room it has, and the order in which its blocks that nobody reads are evicted.
Must not know: which blocks can be found, leases, puts.

A pool holds blocks by the million: of an idle one only its handle and size are kept, packed in one integer, which takes
half of what a tuple of two takes and gives the collector of garbage nothing to do.
"""

from collections import OrderedDict
from collections.abc import Iterator

from serving.core.ids import BlockHash
from serving.core.pool_block import PoolBlock

_HANDLE_BITS = 40  # a million new blocks per second for 12 days; the size stands above them
_HANDLE_MASK = (1 << _HANDLE_BITS) - 1


class PoolHost:
    """Its room, and its blocks that nobody reads, least recently used first."""

    __slots__ = ("capacity_bytes", "host_id", "idle", "used_bytes")

    def __init__(self, host_id: int, capacity_bytes: int) -> None:
        self.host_id = host_id
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0  # blocks that are read or written among them
        self.idle: OrderedDict[BlockHash, int] = OrderedDict()

    def keep(self, block: PoolBlock) -> None:
        """Let a block that nobody reads be the most recently used."""
        self.idle[block.block_hash] = block.handle | block.num_bytes << _HANDLE_BITS

    def take(self, block_hash: BlockHash) -> PoolBlock:
        """Take an idle block out, to be read."""
        return self._unpacked(block_hash, self.idle.pop(block_hash))

    def oldest_first(self) -> Iterator[PoolBlock]:
        """The idle blocks."""
        for block_hash, packed in self.idle.items():
            yield self._unpacked(block_hash, packed)

    def _unpacked(self, block_hash: BlockHash, packed: int) -> PoolBlock:
        return PoolBlock(block_hash, self.host_id, packed & _HANDLE_MASK, packed >> _HANDLE_BITS)
