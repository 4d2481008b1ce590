"""Which drafts are right where no model says: drawn once, looked up ever after.

Owns: the table of draws, and where in it a request begins.
Must not know: requests, batches, time.

Every request reads the table from an offset of its own, one draw per draft that is verified. So what a step accepts
does not depend on its batch, and how many steps a request will take is a search in the running sum of the table, not a
loop over its tokens.
"""

from array import array
from functools import lru_cache
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

TABLE_SIZE = 2**18  # draws before they repeat: more than any context has tokens


class AcceptanceTable:
    """Draws with exactly the share of right ones that is asked for (to 1 / TABLE_SIZE), in random order."""

    def __init__(self, probability: float) -> None:
        """Raises ValueError unless `probability` is in [0, 1]."""
        if not 0 <= probability <= 1:
            raise ValueError(f"acceptance: {probability} is not in [0, 1]")
        once = np.zeros(TABLE_SIZE, np.uint8)
        once[: round(probability * TABLE_SIZE)] = 1
        np.random.default_rng(TABLE_SIZE).shuffle(once)
        self.is_accepted: NDArray[np.uint8] = np.tile(once, 2)
        """Draw i, of 2 * TABLE_SIZE: from any offset below TABLE_SIZE a whole table can be read."""
        self.num_tokens = array("q", bytes(8))
        """Tokens that the first i drafts bring in all: each one, and one more where it is right."""
        self.num_tokens.frombytes(np.cumsum(self.is_accepted.astype(np.int64) + 1).tobytes())


@lru_cache(maxsize=8)
def acceptance_table(probability: float) -> AcceptanceTable:
    """The table of that probability, made once per process."""
    return AcceptanceTable(probability)


def first_draw(request_id: str, seed: int | None) -> int:
    """Where a request begins in the table, and begins again after a preemption.

    The key is its id with its seed: many requests of a workload have the same seed.
    """
    name = f"acceptance/{request_id}/{seed}"
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little") % TABLE_SIZE
