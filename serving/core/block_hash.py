"""Chained hashes of full blocks of tokens: the names under which cached blocks are found.

Owns: how a block is hashed. Equal on every machine and in every process.
Must not know: pools, requests.
Source: vLLM v1 (hash of parent hash, token ids and extra keys; cache_salt on the first block only), with
BLAKE2b in place of a process-seeded hash. A hash is an integer of 128 bits: a dictionary of a million of them hashes
and compares integers faster than bytes.
"""

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from serving.core.errors import IllegalCall
from serving.core.ids import BlockHash

HASH_NUM_BYTES = 16

TokenIds = Sequence[int] | NDArray[np.integer]


def hash_block(parent: BlockHash | None, token_ids: TokenIds, extra: bytes = b"") -> BlockHash:
    """Hash of one block, given the hash of the block before it (None for the first).

    `extra` is whatever else the cached values depend on: a tenant's salt, an adapter's name.
    Every part is preceded by its length, so no two different inputs give the same bytes to the hash.
    """
    head = b"" if parent is None else parent.to_bytes(HASH_NUM_BYTES, "little")
    digest = blake2b(digest_size=HASH_NUM_BYTES, person=b"kv-block")
    digest.update(len(head).to_bytes(4, "little") + head + len(extra).to_bytes(4, "little") + extra)
    digest.update(np.ascontiguousarray(token_ids, dtype="<i8").tobytes())
    return BlockHash(int.from_bytes(digest.digest(), "little"))


def hash_prompt(token_ids: TokenIds, block_size: int, salt: str | None = None) -> tuple[BlockHash, ...]:
    """Hashes of the full blocks of a prompt, in order; a last block that is not full has none.

    Prompts with different salts share no hash, because the salt is part of the first block's.
    Raises IllegalCall if block_size is not positive.
    """
    if block_size < 1:
        raise IllegalCall(f"block_size {block_size} is below 1")
    tokens = np.ascontiguousarray(token_ids, dtype="<i8")
    hashes: list[BlockHash] = []
    parent: BlockHash | None = None
    extra = salt.encode() if salt else b""
    for end in range(block_size, len(tokens) + 1, block_size):
        parent = hash_block(parent, tokens[end - block_size : end], extra)
        extra = b""
        hashes.append(parent)
    return tuple(hashes)
