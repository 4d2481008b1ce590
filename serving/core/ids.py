"""Names of the things that the core talks about, kept apart by the type checker.

Owns: the NewTypes of ids and the array types that the core's interfaces use.
Must not know: anything else.
Source: vLLM v1 (a block hash is its own type, so that it cannot be mistaken for another number).
"""

from typing import NewType

import numpy as np
from numpy.typing import NDArray

RequestId = NewType("RequestId", str)
InstanceId = NewType("InstanceId", str)
HostId = NewType("HostId", str)
BlockId = NewType("BlockId", int)
BlockHash = NewType("BlockHash", int)  # not negative; of at least 64 good bits

BlockIds = NDArray[np.int32]
"""Block ids in the order of the tokens that they hold, shape (num_blocks,)."""

Counts = NDArray[np.int64]
"""Numbers per rank or per row, or indices."""

Mask = NDArray[np.bool_]
