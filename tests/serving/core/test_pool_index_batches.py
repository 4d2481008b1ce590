"""Pool index: many blocks at once are the same as one after the other, and LRU on a public trace."""

import gzip
import json
from hashlib import blake2b
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.core.block_hash import hash_prompt
from serving.core.ids import BlockHash
from serving.core.pool_index import PoolIndex

TRACE = Path(__file__).parents[3].parent / "shared" / "data" / "mooncake_conversation_trace.jsonl.gz"
CHAINS = [hash_prompt(tokens, 1) for tokens in ([1, 2, 3, 4, 5, 6], [1, 2, 8, 8, 8], [7] * 7)]
HOSTS = {0: 5, 1: 3, 4: 6}

steps = st.lists(
    st.tuples(
        st.sampled_from(["put", "put", "put", "commit", "revoke", "touch", "lease", "release", "remove"]),
        st.lists(st.sampled_from([h for chain in CHAINS for h in chain]), max_size=6)  # repetitions among them
        | st.sampled_from(CHAINS),
        st.integers(1, 3),
    ),
    max_size=25,
)


def put_one_by_one(index, hashes, num_bytes):
    started = [index.put_start(block_hash, num_bytes) for block_hash in hashes]
    put = [(i, one) for i, one in enumerate(started) if one is not None]
    evicted = [block for _, one in put for block in one.evicted]
    return [one.block for _, one in put], [i for i, _ in put], evicted


def put_together(index, hashes, num_bytes):
    started = index.put_start_all(hashes, num_bytes)
    return list(started.blocks), list(started.positions), list(started.evicted)


def commit_one_by_one(index, blocks):
    pending = [block for block in blocks if index.is_pending(block)]
    for block in reversed(pending):
        index.put_commit(block)
    return len(pending)


def play(program, put, commit):
    """All that an index answers, and in the end the order in which its hosts evict."""
    index = PoolIndex(hosts=HOSTS, lease_ns=10)
    answers, puts, leases, hosts = [], [], [], list(HOSTS)
    for now_ns, (call, hashes, number) in enumerate(program):
        if call == "put":
            blocks, positions, evicted = put(index, hashes, number)
            puts.append(blocks)
            answers.append((blocks, positions, evicted))
        elif call in ("commit", "revoke") and puts:
            blocks = puts.pop(number % len(puts))
            if call == "commit":
                answers.append(commit(index, blocks))
            else:
                for block in filter(index.is_pending, blocks):
                    index.put_revoke(block)
        elif call == "touch":
            index.touch(hashes)
        elif call == "lease":
            leases.append(index.lease(hashes, now_ns))
            answers.append(leases[-1].blocks)
        elif call == "release" and leases:
            answers.append(index.release(leases.pop(number % len(leases)).lease_id))
        elif call == "remove" and len(hosts) > 1 and number == 3:
            answers.append(index.remove_host(hosts.pop()))
        index.check_invariants()
    answers.append((index.num_blocks, index.used_bytes, index.num_evicted, index.host_used_bytes))
    for i in range(20):
        answers.append(put(index, [BlockHash(10**6 + i)], 2))
    return answers


@settings(max_examples=300, derandomize=True, deadline=None)
@given(program=steps)
def test_blocks_put_together_are_those_put_one_by_one(program):
    assert play(program, put_together, PoolIndex.put_commit_all) == play(program, put_one_by_one, commit_one_by_one)


def test_a_block_that_makes_room_for_another_of_its_batch_is_put_again_in_its_turn():
    index = PoolIndex(hosts={0: 3}, lease_ns=1)
    old, new = CHAINS[2][:3], CHAINS[0][:2]
    index.put_commit_all(index.put_start_all(old, 1).blocks)
    started = index.put_start_all([*new, *reversed(old)], 1)
    # The tail of the old prefix goes first: old[2], old[1]; then old[2] takes the place of old[0].
    assert [block.block_hash for block in started.blocks] == [*new, old[2]]
    assert started.positions == (0, 1, 2)
    assert [block.block_hash for block in started.evicted] == [old[2], old[1], old[0]]


def test_a_commit_of_a_batch_leaves_out_what_is_not_in_progress():
    index = PoolIndex(hosts={0: 9}, lease_ns=1)
    first, second, third = index.put_start_all(CHAINS[0][:3], 1).blocks
    index.put_revoke(second)
    assert index.put_commit_all((first, second, third)) == 2
    assert (index.find_prefix(CHAINS[0]), index.num_blocks) == (1, 2)
    assert index.put_commit_all((first, second, third)) == 0


def test_blocks_go_to_the_host_whose_hash_with_them_is_highest():
    """The rule written out: splitmix64's finalizer of the host's number and the low 64 bits of the block's hash."""

    def weight(host_id, block_hash):
        seed = int.from_bytes(blake2b(str(host_id).encode(), digest_size=8).digest(), "little")
        bits = seed ^ (block_hash % 2**64)
        bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB % 2**64
        return bits ^ (bits >> 31)

    hashes = [*hash_prompt(range(150), 1), BlockHash(0), BlockHash(2**64 - 1), BlockHash(2**64)]
    index = PoolIndex(hosts=dict.fromkeys(range(3, 40), 1000), lease_ns=1)
    expected = [max(range(3, 40), key=lambda host_id: weight(host_id, h)) for h in hashes]
    assert [block.host_id for block in index.put_start_all(hashes[:-1], 1).blocks] == expected[:-1]
    assert expected[-1] == expected[-3]  # 0 and 2**64: only the low bits count


@pytest.fixture(scope="module")
def trace():
    """Hashes of the blocks of every request of the Mooncake conversation trace, in order of arrival."""
    if not TRACE.exists():
        pytest.skip(f"{TRACE.name} is not here")
    with gzip.open(TRACE, "rt") as lines:
        return [tuple(map(BlockHash, json.loads(line)["hash_ids"])) for line in lines]


@pytest.mark.parametrize(
    ("num_blocks", "hit_rate"),
    # LRU hit rates of blocks of 512 tokens on this trace, from the notes that come with it.
    [(1_000, 0.044), (5_000, 0.110), (10_000, 0.211), (30_000, 0.326), (50_000, 0.355), (10**9, 0.366)],
)
def test_one_host_hits_as_often_as_lru_does_on_a_public_trace(trace, num_blocks, hit_rate):
    index = PoolIndex(hosts={0: num_blocks}, lease_ns=1)
    for now_ns, hashes in enumerate(trace):
        index.release(index.lease(hashes, now_ns).lease_id)  # counts the hits, and uses them
        index.put_commit_all(index.put_start_all(hashes, 1).blocks)
        index.touch(hashes)
    index.check_invariants()
    assert index.num_hits / (index.num_hits + index.num_misses) == pytest.approx(hit_rate, abs=0.01)
