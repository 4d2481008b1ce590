"""Block hashes: equal everywhere, chained, salted."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from serving.core.block_hash import HASH_NUM_BYTES, hash_block, hash_prompt
from serving.core.errors import IllegalCall


def test_hashes_are_the_same_in_every_process():
    expected = list(hash_prompt([1, 2, 3, 4, 5], block_size=2, salt="tenant"))
    code = (
        "from serving.core.block_hash import hash_prompt;"
        "print(list(hash_prompt([1, 2, 3, 4, 5], block_size=2, salt='tenant')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == str(expected)
    assert all(2**64 < block_hash < 256**HASH_NUM_BYTES for block_hash in expected)


def test_only_full_blocks_have_a_hash():
    assert [len(hash_prompt(range(n), block_size=4)) for n in (0, 3, 4, 7, 8)] == [0, 0, 1, 1, 2]


def test_a_hash_names_all_the_tokens_up_to_its_block():
    first, second = hash_prompt([1, 2, 3, 4], 2), hash_prompt([9, 2, 3, 4], 2)
    assert first[1] != second[1]
    assert hash_prompt([1, 2, 3, 4, 5, 6], 2)[:2] == first
    assert first == (hash_block(None, [1, 2]), hash_block(hash_block(None, [1, 2]), [3, 4]))


def test_lists_and_arrays_hash_alike():
    for dtype in (np.int32, np.int64, np.uint16):
        assert hash_prompt(np.array([1, 2, 3, 4], dtype=dtype), 2) == hash_prompt([1, 2, 3, 4], 2)
    assert hash_prompt(np.arange(8)[::2], 2) == hash_prompt([0, 2, 4, 6], 2)


def test_a_salt_separates_prompts_from_the_first_block_on():
    plain, salted, other = (hash_prompt(range(6), 2, salt) for salt in (None, "a", "b"))
    assert not set(plain) & set(salted)
    assert not set(salted) & set(other)


def test_parts_cannot_be_confused_with_each_other():
    parent = hash_block(None, [1])
    as_bytes = parent.to_bytes(HASH_NUM_BYTES, "little")
    hashes = [
        hash_block(parent, [2]),
        hash_block(None, [2], extra=as_bytes),
        hash_block(None, [*np.frombuffer(as_bytes, "<i8").tolist(), 2]),
        hash_block(None, [2]),
    ]
    assert len(set(hashes)) == 4


def test_the_hash_is_blake2b_of_lengths_and_parts_as_a_little_endian_integer():
    tokens = (5).to_bytes(8, "little") + (6).to_bytes(8, "little")
    first = hashlib.blake2b(bytes(4) + (1).to_bytes(4, "little") + b"x" + tokens, digest_size=16, person=b"kv-block")
    assert hash_prompt([5, 6, 5, 6], 2, salt="x")[0] == int.from_bytes(first.digest(), "little")
    head = (16).to_bytes(4, "little") + first.digest() + bytes(4)
    second = hashlib.blake2b(head + tokens, digest_size=16, person=b"kv-block")
    assert hash_prompt([5, 6, 5, 6], 2, salt="x")[1] == int.from_bytes(second.digest(), "little")


def test_a_block_has_a_token_at_least():
    with pytest.raises(IllegalCall, match="block_size 0"):
        hash_prompt([1], 0)
