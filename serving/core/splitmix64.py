"""Mixing of 64-bit words: close inputs give outputs that look independent of each other.

Owns: the output function of splitmix64 and its finalizer, element by element, modulo 2**64.
Must not know: what the words stand for.
Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014; constants of the public
splitmix64.c.
"""

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]

_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)  # 2**64 over the golden ratio, made odd: splitmix64's step


def mix64(values: Words) -> Words:
    """What splitmix64 puts out in each of these states, of any shape."""
    return finalize(values + _GOLDEN_GAMMA)


def finalize(words: Words) -> Words:
    """In place, and returned: every input bit changes about half of the output bits. 0 stays 0."""
    words ^= words >> np.uint64(30)
    words *= np.uint64(0xBF58476D1CE4E5B9)
    words ^= words >> np.uint64(27)
    words *= np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    return words
