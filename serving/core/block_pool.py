"""Prefix-cached pool of the KV blocks of one rank.

Owns: which blocks are free, in which order they are reused, how many reference each, which prefix each holds.
Must not know: requests, tokens, time, tensors.
Source: vLLM v1/core/block_pool.py for the free list that is also the LRU order; blocks without a prefix
are kept apart, so that a cached one is evicted only when nothing else is free.
"""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from serving.core.errors import IllegalCall, OutOfBlocks
from serving.core.ids import BlockHash, BlockIds, Mask

NO_BLOCKS: BlockIds = np.empty(0, dtype=np.int32)
NO_BLOCKS.flags.writeable = False


class BlockPool:
    """A block is in one of three places:

        used     referenced by one or more requests
        blank    free, and nothing of value in it: a stack, reused first
        cached   free, and a prefix can still be found in it: an LRU order, reused last

    Blocks are freed tail first, so the LRU order gives up the end of an old prefix before its beginning.
    Nothing here costs more than the number of blocks that the call names.
    """

    def __init__(self, *, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        if num_blocks < 1 or block_size < 1:
            raise IllegalCall(f"num_blocks {num_blocks} and block_size {block_size} must be at least 1")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._ref_count = np.zeros(num_blocks, dtype=np.int32)
        self._has_hash = np.zeros(num_blocks, dtype=np.bool_)
        self._blank = np.arange(num_blocks - 1, -1, -1, dtype=np.int32)  # the stack is [0, _num_blank)
        self._num_blank = num_blocks
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._block_by_hash: dict[BlockHash, int] = {}
        self._hash_by_block: dict[int, BlockHash] = {}
        self._num_evictions = 0

    @property
    def num_free(self) -> int:
        return self._num_blank + len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    @property
    def usage(self) -> float:
        return self.num_used / self.num_blocks

    @property
    def num_cached(self) -> int:
        """Blocks in which a prefix can be found, used or free."""
        return len(self._block_by_hash)

    @property
    def num_evictions(self) -> int:
        """Prefix blocks given up for reuse so far."""
        return self._num_evictions

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that it takes to hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def find_prefix(self, hashes: Sequence[BlockHash]) -> BlockIds:
        """Blocks of the longest cached prefix of the chain, in order. Changes nothing, not even the LRU order.

        The result is valid until the next allocate.
        """
        found: list[int] = []
        for block_hash in hashes:
            block_id = self._block_by_hash.get(block_hash)
            if block_id is None:
                break
            found.append(block_id)
        return np.array(found, dtype=np.int32) if found else NO_BLOCKS

    def num_free_beside(self, prefix: BlockIds) -> int:
        """Blocks that could be allocated after `prefix` has been touched."""
        return self.num_free - int(np.count_nonzero(self._ref_count[prefix] == 0))

    def allocate(self, num_blocks: int, *, prefix: BlockIds = NO_BLOCKS) -> BlockIds:
        """Take a reference to each block of `prefix` and to `num_blocks` new ones; returns both in order.

        Raises OutOfBlocks, and takes nothing, if fewer are free once the prefix is taken.
        """
        if num_blocks < 0:
            raise IllegalCall(f"cannot allocate {num_blocks} blocks")
        if len(prefix):
            self._check_touch(prefix)
            num_free = self.num_free_beside(prefix)
        else:
            num_free = self.num_free
        if num_blocks > num_free:
            raise OutOfBlocks(num_needed=num_blocks, num_free=num_free)
        if len(prefix):
            self._touch(prefix)
        taken = self._pop_free(num_blocks)
        self._ref_count[taken] = 1
        return np.concatenate([prefix, taken]) if len(prefix) else taken

    def touch(self, block_ids: BlockIds) -> None:
        """Take one more reference to each block, all used or cached, so that none is reused."""
        self._check_touch(block_ids)
        self._touch(block_ids)

    def free(self, block_ids: BlockIds) -> None:
        """Drop one reference to each block. They are given in order of the tokens, and freed in reverse."""
        self._check_distinct(block_ids)
        remaining = self._ref_count[block_ids] - 1
        if len(remaining) and int(remaining.min()) < 0:
            unused = int(block_ids[int(remaining.argmin())])
            raise IllegalCall(f"block {unused} is freed, but it is not in use")
        self._ref_count[block_ids] = remaining
        freed = block_ids[remaining == 0][::-1]
        if self._hash_by_block:
            has_hash = self._has_hash[freed]
            for block_id in freed[has_hash].tolist():
                self._cached[block_id] = None
            freed = freed[~has_hash]
        self._blank[self._num_blank : self._num_blank + len(freed)] = freed
        self._num_blank += len(freed)

    def cache_full_blocks(self, block_ids: BlockIds, hashes: Sequence[BlockHash]) -> None:
        """Let the prefix be found in these used blocks, block i under hash i.

        Where another block has the hash already, that one stays the one that is found. Does nothing if prefix
        caching is off.
        """
        if len(block_ids) != len(hashes):
            raise IllegalCall(f"{len(block_ids)} blocks, but {len(hashes)} hashes")
        self._check_distinct(block_ids)
        pairs = list(zip(block_ids.tolist(), hashes, strict=True))
        for block_id, block_hash in pairs:
            if self._ref_count[block_id] == 0:
                raise IllegalCall(f"block {block_id} is not in use, it cannot be cached")
            if self._hash_by_block.get(block_id, block_hash) != block_hash:
                raise IllegalCall(f"block {block_id} is cached under another hash")
        if not self.enable_prefix_caching:
            return
        for block_id, block_hash in pairs:
            if self._block_by_hash.setdefault(block_hash, block_id) == block_id:
                self._hash_by_block[block_id] = block_hash
                self._has_hash[block_id] = True

    def check_invariants(self) -> None:
        """Raise AssertionError unless every block is in exactly one place and the two maps agree."""
        blank = self._blank[: self._num_blank].tolist()
        cached = list(self._cached)
        used = np.flatnonzero(self._ref_count > 0).tolist()
        assert int(self._ref_count.min()) >= 0
        assert sorted(blank + cached + used) == list(range(self.num_blocks))
        assert len(used) == self.num_used
        assert {b: h for h, b in self._block_by_hash.items()} == self._hash_by_block
        assert len(self._block_by_hash) == len(self._hash_by_block)
        assert np.flatnonzero(self._has_hash).tolist() == sorted(self._hash_by_block)
        assert all(b in self._hash_by_block for b in cached)
        assert not any(b in self._hash_by_block for b in blank)
        assert self.enable_prefix_caching or not self._block_by_hash

    def reference_counts(self) -> BlockIds:
        """A copy of every block's number of references, for checks from outside."""
        return self._ref_count.copy()

    def _pop_free(self, num_blocks: int) -> BlockIds:
        num_blank = min(num_blocks, self._num_blank)
        self._num_blank -= num_blank
        taken = self._blank[self._num_blank : self._num_blank + num_blank][::-1].copy()
        if num_blank == num_blocks:
            return taken
        evicted = [self._cached.popitem(last=False)[0] for _ in range(num_blocks - num_blank)]
        for block_id in evicted:
            del self._block_by_hash[self._hash_by_block.pop(block_id)]
        self._num_evictions += len(evicted)
        evicted_ids = np.array(evicted, dtype=np.int32)
        self._has_hash[evicted_ids] = False
        return np.concatenate([taken, evicted_ids])

    def _touch(self, block_ids: BlockIds) -> None:
        counts = self._ref_count[block_ids]
        for block_id in block_ids[counts == 0].tolist():
            del self._cached[block_id]
        self._ref_count[block_ids] = counts + 1

    def _check_touch(self, block_ids: BlockIds) -> None:
        self._check_distinct(block_ids)
        is_lost: Mask = (self._ref_count[block_ids] == 0) & ~self._has_hash[block_ids]
        if is_lost.any():
            raise IllegalCall(f"block {int(block_ids[is_lost][0])} is free and holds no prefix")

    def _check_distinct(self, block_ids: BlockIds) -> None:
        ids = block_ids.tolist()
        if len(ids) > 1 and len(set(ids)) != len(ids):
            raise IllegalCall(f"blocks {ids} are not distinct")
        if ids and not (min(ids) >= 0 and max(ids) < self.num_blocks):
            raise IllegalCall(f"blocks {ids} are not all in [0, {self.num_blocks})")
