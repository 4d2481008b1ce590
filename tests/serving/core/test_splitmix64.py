"""Mixed words are those of the published generator."""

import numpy as np

from serving.core.splitmix64 import finalize, mix64

GAMMA = 0x9E3779B97F4A7C15
FIRST_OF_SEED_ZERO = [
    0xE220A8397B1DCDAF,
    0x6E789E6AA1B965F4,
    0x06C45D188009454F,
]  # of splitmix64.c


def test_states_in_steps_give_the_generators_numbers():
    states = np.array([0, GAMMA, 2 * GAMMA % 2**64], np.uint64)
    assert mix64(states).tolist() == FIRST_OF_SEED_ZERO
    assert states.tolist() == [0, GAMMA, 2 * GAMMA % 2**64]


def test_the_finalizer_works_in_place_and_without_the_step():
    words = np.array([[GAMMA, 0]], np.uint64)
    assert finalize(words) is words
    assert words.tolist() == [[FIRST_OF_SEED_ZERO[0], 0]]
