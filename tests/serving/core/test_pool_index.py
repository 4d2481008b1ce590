"""Pool index: literal evictions, the phases of a put, leases and their ends."""

from collections import Counter

import pytest

from serving.core.block_hash import hash_prompt
from serving.core.errors import IllegalCall, LeaseLost
from serving.core.pool_index import PoolIndex

A = hash_prompt(range(8), 2)  # four blocks
B = hash_prompt(range(100, 106), 2)  # three
LEASE_NS = 50


def make_index(capacity=4, num_hosts=1):
    return PoolIndex(hosts=dict.fromkeys(range(num_hosts), capacity), lease_ns=LEASE_NS)


def put(index, block_hash, num_bytes=1):
    started = index.put_start(block_hash, num_bytes)
    index.put_commit(started.block)
    index.check_invariants()
    return started


def test_a_block_is_found_only_after_its_commit():
    index = make_index()
    started = index.put_start(A[0], 1)
    assert (index.find_prefix(A), index.num_pending_puts, index.used_bytes) == (0, 1, 1)
    assert index.put_start(A[0], 1) is None  # somebody is writing it
    index.put_commit(started.block)
    assert (index.find_prefix(A), index.num_pending_puts, index.num_blocks) == (1, 0, 1)
    assert index.put_start(A[0], 1) is None  # it is there
    index.check_invariants()


def test_a_revoked_put_leaves_nothing_behind():
    index = make_index()
    index.put_revoke(index.put_start(A[0], 3).block)
    assert (index.num_blocks, index.num_pending_puts, index.used_bytes) == (0, 0, 0)
    assert put(index, A[0]).block.handle == 1  # handles are never used again


def test_the_least_recently_used_block_makes_room():
    index = make_index(capacity=4)
    for block_hash in [*A[:2], *B[:2]]:
        put(index, block_hash)
    index.touch(A[:2])
    assert [block.block_hash for block in put(index, B[2], num_bytes=3).evicted] == [B[0], B[1], A[1]]
    assert (index.find_prefix(A), index.num_evicted, index.used_bytes) == (1, 3, 4)


def test_the_end_of_a_prefix_goes_before_its_beginning():
    index = make_index(capacity=4)
    for block_hash in A:
        put(index, block_hash)
    index.release(index.lease(A, now_ns=0).lease_id)
    assert [block.block_hash for block in put(index, B[0], num_bytes=2).evicted] == [A[3], A[2]]


def test_blocks_that_are_read_or_written_are_not_evicted():
    index = make_index(capacity=4)
    put(index, A[0])
    put(index, A[1])
    put(index, A[2])
    lease = index.lease(A[:2], now_ns=0)
    writing = index.put_start(B[0], 1)
    assert index.put_start(B[1], 2) is None  # only A[2] could go
    assert index.find_prefix(A) == 3  # and it stays, since it would not be enough
    assert [block.block_hash for block in index.put_start(B[1], 1).evicted] == [A[2]]
    index.put_commit(writing.block)
    assert index.release(lease.lease_id) == 2
    index.check_invariants()


def test_two_readers_hold_a_block_until_both_are_done():
    index = make_index(capacity=1)
    put(index, A[0])
    first, second = index.lease(A, now_ns=0), index.lease(A, now_ns=1)
    index.release(first.lease_id)
    assert index.put_start(B[0], 1) is None
    index.release(second.lease_id)
    assert index.put_start(B[0], 1) is not None


def test_a_lease_pins_the_prefix_that_is_there_and_counts_hits_and_misses():
    index = make_index()
    put(index, A[0])
    put(index, A[2])
    lease = index.lease(A, now_ns=7)
    assert [block.block_hash for block in lease.blocks] == [A[0]]
    assert lease.expires_ns == 7 + LEASE_NS
    assert index.lease(B, now_ns=8).blocks == ()
    assert (index.num_hits, index.num_misses, index.num_leases) == (1, 3 + 3, 2)


def test_an_expired_lease_is_taken_back_and_its_reader_is_told():
    index = make_index(capacity=1)
    put(index, A[0])
    early, late = index.lease(A, now_ns=0), index.lease(A, now_ns=10)
    assert index.expire(LEASE_NS - 1) == 0
    assert index.expire(LEASE_NS) == 1
    with pytest.raises(LeaseLost, match=f"lease {early.lease_id}"):
        index.release(early.lease_id)
    assert index.put_start(B[0], 1) is None  # the later lease holds it
    assert index.expire(LEASE_NS + 10) == 1
    assert index.put_start(B[0], 1) is not None
    with pytest.raises(LeaseLost):
        index.release(late.lease_id)
    index.check_invariants()


def test_a_full_host_passes_a_block_on_to_the_next():
    index = make_index(capacity=1, num_hosts=2)
    first = index.put_start(A[0], 1).block
    other = next(h for h in hash_prompt(range(200, 300), 2) if index.put_start(h, 1).block.host_id != first.host_id)
    assert index.put_start(B[0], 1) is None  # both hosts are being written
    index.put_commit(first)
    started = index.put_start(B[1], 1)
    assert (started.block.host_id, started.evicted) == (first.host_id, (first,))
    assert other not in A


def test_blocks_are_dealt_evenly_and_stay_where_they_are_when_a_host_goes():
    hashes = hash_prompt(range(4000), 2)
    whole, smaller = make_index(10**6, num_hosts=8), make_index(10**6, num_hosts=8)
    smaller.remove_host(3)
    home = {h: whole.put_start(h, 1).block.host_id for h in hashes}
    again = {h: smaller.put_start(h, 1).block.host_id for h in hashes}
    counts = Counter(home.values())
    assert sorted(counts) == list(range(8))
    assert min(counts.values()) > 0.75 * len(hashes) / 8
    assert all(again[h] == home[h] for h in hashes if home[h] != 3)
    assert len({again[h] for h in hashes if home[h] == 3}) == 7


def test_what_a_removed_host_held_is_gone():
    index = make_index(capacity=100, num_hosts=3)
    for block_hash in A:
        put(index, block_hash)
    writing = index.put_start(B[0], 1).block
    lease = index.lease(A, now_ns=0)
    host_id = lease.blocks[1].host_id
    num_lost = index.remove_host(host_id)
    assert num_lost == sum(block.host_id == host_id for block in lease.blocks)
    index.check_invariants()
    first_lost = [block.host_id for block in lease.blocks].index(host_id)
    assert index.find_prefix(A) == first_lost
    assert put(index, A[1]).block.host_id != host_id  # written again elsewhere, while the old lease is held
    assert index.release(lease.lease_id) == first_lost
    index.check_invariants()
    if writing.host_id == host_id:
        with pytest.raises(IllegalCall):
            index.put_commit(writing)
    with pytest.raises(IllegalCall, match="is not in the pool"):
        index.remove_host(host_id)


def test_a_pool_that_lost_all_hosts_takes_nothing():
    index = make_index()
    index.remove_host(0)
    assert index.put_start(A[0], 1) is None
    assert index.capacity_bytes == 0


@pytest.mark.parametrize(
    "call",
    [
        lambda index, written, writing: index.put_commit(written),
        lambda index, written, writing: index.put_revoke(written),
        lambda index, written, writing: index.put_start(B[1], 0),
        lambda index, written, writing: index.lease(A, now_ns=4),
        lambda index, written, writing: index.remove_host(9),
    ],
)
def test_an_illegal_call_raises_and_changes_nothing(call):
    index = make_index()
    written = put(index, A[0]).block
    writing = index.put_start(B[0], 1).block
    index.lease(A, now_ns=5)
    with pytest.raises(IllegalCall):
        call(index, written, writing)
    assert (index.num_blocks, index.num_pending_puts, index.num_leases, index.used_bytes) == (1, 1, 1, 2)
    index.check_invariants()


def test_a_late_writer_cannot_commit_over_a_newer_put():
    index = make_index()
    late = index.put_start(A[0], 1).block
    index.put_revoke(late)
    index.put_start(A[0], 1)
    with pytest.raises(IllegalCall, match="not in progress"):
        index.put_commit(late)
    assert index.num_pending_puts == 1


@pytest.mark.parametrize("arguments", [{"hosts": {0: -1}, "lease_ns": 1}, {"hosts": {0: 1}, "lease_ns": 0}])
def test_sizes_are_checked(arguments):
    with pytest.raises(IllegalCall):
        PoolIndex(**arguments)
