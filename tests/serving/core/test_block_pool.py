"""Block pool: literal block ids, and what is refused."""

import numpy as np
import pytest

from serving.core.block_hash import hash_prompt
from serving.core.block_pool import BlockPool
from serving.core.errors import IllegalCall, OutOfBlocks

PROMPT_A = hash_prompt([1, 2, 3, 4], block_size=2)
PROMPT_B = hash_prompt([5, 6, 7, 8], block_size=2)


def make_pool(num_blocks: int = 4, *, enable_prefix_caching: bool = True) -> BlockPool:
    return BlockPool(num_blocks=num_blocks, block_size=2, enable_prefix_caching=enable_prefix_caching)


def allocate_cached(pool, hashes):
    block_ids = pool.allocate(len(hashes))
    pool.cache_full_blocks(block_ids, hashes)
    return block_ids


def snapshot(pool):
    return (
        pool.num_free,
        pool.reference_counts().tolist(),
        pool.num_cached,
        pool._blank.tolist(),
        pool._num_blank,
        list(pool._cached),
    )


def test_lru_evicts_the_tail_of_the_oldest_prefix_first():
    pool = make_pool()
    pool.free(allocate_cached(pool, PROMPT_A))  # blocks 0, 1
    assert pool.allocate(3).tolist() == [2, 3, 1]  # unused first, then the tail of A
    assert pool.find_prefix(PROMPT_A).tolist() == [0]
    assert pool.num_evictions == 1
    pool.check_invariants()


def test_a_touched_prefix_becomes_the_newest():
    pool = make_pool()
    pool.free(allocate_cached(pool, PROMPT_A))
    pool.free(allocate_cached(pool, PROMPT_B))
    prefix = pool.find_prefix(PROMPT_A)
    pool.touch(prefix)
    pool.free(prefix)
    assert pool.allocate(4).tolist() == [3, 2, 1, 0]  # B is older now; each from its tail


def test_blocks_without_a_prefix_are_reused_before_any_prefix_is_evicted():
    pool = make_pool()
    pool.free(allocate_cached(pool, PROMPT_A))
    pool.free(pool.allocate(2))  # 2 and 3, never cached, freed last
    assert pool.allocate(2).tolist() == [2, 3]
    assert len(pool.find_prefix(PROMPT_A)) == 2


def test_a_shared_prefix_is_counted_once_per_reader():
    pool = make_pool()
    first = allocate_cached(pool, PROMPT_A)
    second = pool.allocate(1, prefix=pool.find_prefix(PROMPT_A))
    assert second.tolist() == [0, 1, 2]
    assert pool.reference_counts().tolist() == [2, 2, 1, 0]
    pool.free(first)
    assert (pool.num_free, pool.num_used, pool.usage) == (1, 3, 0.75)
    pool.free(second)
    assert pool.num_free == 4
    pool.check_invariants()


def test_a_prefix_is_not_evicted_to_make_room_for_its_own_request():
    pool = make_pool()
    pool.free(allocate_cached(pool, PROMPT_A))
    prefix = pool.find_prefix(PROMPT_A)
    assert pool.num_free_beside(prefix) == 2
    before = snapshot(pool)
    with pytest.raises(OutOfBlocks, match="3 blocks needed, 2 free"):
        pool.allocate(3, prefix=prefix)
    assert snapshot(pool) == before
    assert pool.allocate(2, prefix=prefix).tolist() == [0, 1, 2, 3]


def test_the_first_block_with_a_hash_stays_the_one_that_is_found():
    pool = make_pool()
    first = allocate_cached(pool, PROMPT_A)
    second = allocate_cached(pool, PROMPT_A)
    assert pool.find_prefix(PROMPT_A).tolist() == first.tolist()
    pool.free(second)
    pool.free(first)
    assert pool.allocate(4).tolist() == [2, 3, 1, 0]  # the duplicates hold nothing that could be found


def test_a_hole_in_the_chain_ends_the_prefix():
    pool = make_pool()
    blocks = pool.allocate(2)
    pool.cache_full_blocks(blocks[1:], PROMPT_A[1:])
    assert pool.find_prefix(PROMPT_A).tolist() == []


def test_without_prefix_caching_nothing_is_found():
    pool = make_pool(enable_prefix_caching=False)
    pool.free(allocate_cached(pool, PROMPT_A))
    assert pool.find_prefix(PROMPT_A).tolist() == []
    assert pool.allocate(4).tolist() == [0, 1, 2, 3]
    pool.check_invariants()


@pytest.mark.parametrize(
    "call",
    [
        lambda pool: pool.allocate(-1),
        lambda pool: pool.free(np.array([3], np.int32)),
        lambda pool: pool.free(np.array([0, 0], np.int32)),
        lambda pool: pool.free(np.array([0, 3], np.int32)),
        lambda pool: pool.free(np.array([-1], np.int32)),
        lambda pool: pool.touch(np.array([4], np.int32)),
        lambda pool: pool.touch(np.array([0, 3], np.int32)),
        lambda pool: pool.cache_full_blocks(np.array([3], np.int32), PROMPT_B[:1]),
        lambda pool: pool.cache_full_blocks(np.array([0], np.int32), PROMPT_B),
        lambda pool: pool.cache_full_blocks(np.array([2, 0], np.int32), PROMPT_B),
    ],
)
def test_an_illegal_call_raises_and_changes_nothing(call):
    pool = make_pool()
    allocate_cached(pool, PROMPT_A)
    pool.allocate(1)
    before = snapshot(pool)
    with pytest.raises(IllegalCall):
        call(pool)
    assert snapshot(pool) == before
    pool.check_invariants()


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 2), (2, 0)])
def test_sizes_are_positive(num_blocks, block_size):
    with pytest.raises(IllegalCall, match="at least 1"):
        BlockPool(num_blocks=num_blocks, block_size=block_size)
