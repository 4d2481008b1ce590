"""Block pool against a model that keeps its free order as a plain list."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serving.core.block_hash import hash_prompt
from serving.core.block_pool import BlockPool
from serving.core.errors import OutOfBlocks

NUM_BLOCKS = 7
CHAINS = [hash_prompt(tokens, block_size=1) for tokens in ([0, 1, 2, 3], [0, 1, 7], [9, 9, 9, 9, 9])]


class BlockPoolMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.pool = BlockPool(num_blocks=NUM_BLOCKS, block_size=1)
        self.holders: list[list[int]] = []  # each holds one reference to each of its blocks
        self.block_by_hash: dict[bytes, int] = {}
        self.cached_order: list[int] = []  # free and cached, oldest first

    def num_references(self, block_id):
        return sum(block_id in blocks for blocks in self.holders)

    def num_free(self):
        return sum(not self.num_references(b) for b in range(NUM_BLOCKS))

    @rule(chain=st.sampled_from(CHAINS), num_more=st.integers(0, 4))
    def allocate(self, chain, num_more):
        expected_prefix = []
        for block_hash in chain:
            if block_hash not in self.block_by_hash:
                break
            expected_prefix.append(self.block_by_hash[block_hash])
        prefix = self.pool.find_prefix(chain)
        assert prefix.tolist() == expected_prefix
        num_beside = self.num_free() - sum(not self.num_references(b) for b in expected_prefix)
        if num_more > num_beside:
            with pytest.raises(OutOfBlocks):
                self.pool.allocate(num_more, prefix=prefix)
            return
        self.cached_order = [b for b in self.cached_order if b not in expected_prefix]
        num_blank = num_beside - len(self.cached_order)
        evicted = self.cached_order[: max(0, num_more - num_blank)]
        block_ids = self.pool.allocate(num_more, prefix=prefix).tolist()
        assert block_ids[: len(prefix)] == expected_prefix
        new = block_ids[len(prefix) :]
        assert new[num_more - len(evicted) :] == evicted
        assert not any(self.num_references(b) for b in new)
        self.cached_order = self.cached_order[len(evicted) :]
        self.block_by_hash = {h: b for h, b in self.block_by_hash.items() if b not in evicted}
        self.holders.append(block_ids)
        new_hashes = chain[len(prefix) : len(prefix) + len(new)]
        self.pool.cache_full_blocks(np.array(new[: len(new_hashes)], np.int32), new_hashes)
        for block_hash, block_id in zip(new_hashes, new, strict=False):
            self.block_by_hash.setdefault(block_hash, block_id)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def free(self, data):
        blocks = self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1)))
        self.pool.free(np.array(blocks, np.int32))
        cached = set(self.block_by_hash.values())
        self.cached_order += [b for b in reversed(blocks) if b in cached and not self.num_references(b)]

    @invariant()
    def agrees_with_the_model(self):
        self.pool.check_invariants()
        assert self.pool.num_free == self.num_free()
        assert self.pool.num_cached == len(self.block_by_hash)
        assert list(self.pool._cached) == self.cached_order
        assert self.pool.reference_counts().tolist() == [self.num_references(b) for b in range(NUM_BLOCKS)]


TestBlockPool = BlockPoolMachine.TestCase
TestBlockPool.settings = settings(
    derandomize=True, database=None, deadline=None, max_examples=60, stateful_step_count=30
)
