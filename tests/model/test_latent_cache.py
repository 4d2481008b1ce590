"""The paged cache of latents."""

import numpy as np
import pytest

from model.latent_cache import LatentCache


@pytest.fixture
def cache(base_config):
    return LatentCache(base_config, num_blocks=5, block_size=4)


def test_shapes_and_bytes(cache, base_config):
    assert cache.block_shape == (3, 4, 40)
    assert cache.num_bytes == 3 * 5 * 4 * 40 * 4
    assert LatentCache(base_config, 1, 4, with_mtp=True).num_layers == 4


def test_a_slot_is_block_times_block_size_plus_offset(cache):
    cache.layer(1)[2 * 4 + 3] = 7.0
    blocks = cache.read_blocks([2])
    assert blocks.shape == (3, 1, 4, 40)
    assert (blocks[1, 0, 3] == 7).all()
    assert blocks.sum() == 7 * 40


def test_blocks_move_between_caches_in_the_order_asked_for(cache, base_config):
    generator = np.random.default_rng(0)
    data = generator.standard_normal((3, 3, 4, 40), np.float32)
    data.flags.writeable = False  # as arrays out of shared memory are
    cache.write_blocks([4, 0, 2], data)
    other = LatentCache(base_config, num_blocks=3, block_size=4)
    other.write_blocks([1], cache.read_blocks([0]))
    np.testing.assert_array_equal(other.read_blocks([1]), data[:, 1:2])
    np.testing.assert_array_equal(cache.read_blocks([2, 4]), data[:, [2, 0]])
    assert not cache.read_blocks([1, 3]).any()


def test_what_was_read_is_a_copy(cache):
    blocks = cache.read_blocks([0])
    blocks += 1
    assert not cache.read_blocks([0]).any()
    assert cache.read_blocks([]).shape == (3, 0, 4, 40)


def test_blocks_that_do_not_exist_or_fit_are_a_defect(cache):
    with pytest.raises(AssertionError, match="no such block"):
        cache.read_blocks([5])
    with pytest.raises(AssertionError, match="no such block"):
        cache.read_blocks([-1])
    with pytest.raises(AssertionError, match="blocks of shape"):
        cache.write_blocks([0, 1], np.zeros((3, 1, 4, 40), np.float32))
