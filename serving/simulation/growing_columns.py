"""Columns that grow by one entry at a time and end as arrays.

Owns: cheap appending.
Must not know: what the columns mean.
"""

from array import array

import numpy as np
from numpy.typing import NDArray


def int_column() -> "array[int]":
    """An empty column of 64-bit integers: eight bytes an entry, where a list would take forty."""
    return array("q")


def filled_column(value: int, length: int) -> "array[int]":
    """A column of `length` equal entries."""
    return array("q", [value]) * length


def as_int64(column: "array[int]") -> NDArray[np.int64]:
    """A copy as an array."""
    return np.array(column, dtype=np.int64)


def as_int32(column: "array[int]") -> NDArray[np.int32]:
    """A copy as an array of 32 bits."""
    return np.array(column, dtype=np.int64).astype(np.int32)


def as_int16(column: "array[int]") -> NDArray[np.int16]:
    """A copy as an array of 16 bits."""
    return np.array(column, dtype=np.int64).astype(np.int16)
