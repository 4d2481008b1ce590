"""What the index of the shared pool hands out: places of blocks, leases, puts.

Owns: these values.
Must not know: the index.
Source: Mooncake Store (put start / commit / revoke, leases).
"""

from dataclasses import dataclass
from typing import NamedTuple

from serving.core.ids import BlockHash


class PoolBlock(NamedTuple):
    """Where one block is. A named tuple, since they are made by the million."""

    block_hash: BlockHash
    host_id: int
    handle: int  # unique over the life of the index
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """A pinned prefix. It protects its blocks until `release`, or until it expires."""

    lease_id: int
    blocks: tuple[PoolBlock, ...]
    expires_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PutStarted:
    """Room for one block, which nobody can find before `put_commit`. What was `evicted` for it must be freed first."""

    block: PoolBlock
    evicted: tuple[PoolBlock, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PutsStarted:
    """Room for some of the blocks that were asked for, as `PutStarted`."""

    blocks: tuple[PoolBlock, ...]
    positions: tuple[int, ...]  # of `blocks` among those that were asked for, ascending
    evicted: tuple[PoolBlock, ...]
