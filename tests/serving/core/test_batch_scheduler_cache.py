"""Batch scheduler: caches that come from elsewhere: reserved, loaded, found."""

import pytest

from serving.core.block_hash import hash_prompt
from serving.core.errors import NoSlot, OutOfBlocks


def test_a_decode_instance_gives_a_preempted_request_back_to_its_caller(make_scheduler):
    scheduler = make_scheduler(num_blocks=2, preempt_to="caller", enable_prefix_caching=False)
    for order, request_id in enumerate(("r0", "r1")):
        assert scheduler.hold(request_id, 4, max_tokens=4, order=order) == [order]
        scheduler.activate(request_id=request_id, num_computed_tokens=4, num_tokens=5)
    batch = scheduler.schedule()
    assert scheduler.rows(batch) == [("r0", 4, 1, True)]
    assert [(p.request_id, p.num_tokens) for p in batch.preempted] == [("r1", 5)]
    assert (scheduler.num_waiting, scheduler.request_ids) == (0, ("r0",))
    scheduler.update(batch)
    scheduler.check_invariants()


def test_a_lone_row_waits_in_place_for_blocks_that_cannot_be_taken(make_scheduler):
    scheduler = make_scheduler(num_blocks=2, preempt_to="caller")
    scheduler.hold("r0", 4)
    scheduler.activate(request_id="r0", num_computed_tokens=4, num_tokens=5)
    scheduler.hold("r1", 4, order=1)  # its cache is being written: not to be touched
    assert scheduler.schedule() is None
    scheduler.abort("r1")
    assert scheduler.step()[0] == [("r0", 4, 1, True)]


def test_reserving_takes_slot_and_blocks_and_activating_makes_it_run(make_scheduler):
    scheduler = make_scheduler(num_blocks=3, max_num_seqs=2, preempt_to="caller")
    assert scheduler.hold("r0", 8) == [0, 1]
    assert scheduler.schedule() is None
    with pytest.raises(OutOfBlocks, match="rank 0: 2 blocks needed, 1 free"):
        scheduler.hold("r1", 5)
    assert scheduler.hold("r2", 1, order=1) == [2]
    with pytest.raises(NoSlot, match="all 2 slots"):
        scheduler.hold("r1", 1)
    scheduler.abort("r2")
    scheduler.activate(request_id="r0", num_computed_tokens=8, num_tokens=9)
    assert scheduler.step()[0] == [("r0", 8, 1, True)]
    assert scheduler.block_table("r0").tolist() == [0, 1, 2]


def test_a_transfer_that_fell_short_is_completed_by_computing(make_scheduler):
    scheduler = make_scheduler(preempt_to="caller")
    scheduler.hold("r0", 8)
    scheduler.activate(request_id="r0", num_computed_tokens=3, num_tokens=9)
    assert scheduler.step()[0] == [("r0", 3, 6, True)]


def test_a_second_request_finds_the_blocks_of_the_first(make_scheduler):
    scheduler = make_scheduler()
    prompt = list(range(10))
    scheduler.enter("r0", 10, max_tokens=1, block_hashes=hash_prompt(prompt, 4))
    scheduler.step()
    scheduler.enter("r1", 10, max_tokens=1, block_hashes=hash_prompt([*prompt[:8], 77, 78], 4))
    assert scheduler.num_prefix_tokens(0, hash_prompt(prompt, 4)) == 8
    batch = scheduler.schedule()
    assert scheduler.rows(batch) == [("r1", 8, 2, True)]
    assert [(a.request_id, a.num_cached_tokens) for a in batch.admitted] == [("r1", 8)]
    assert scheduler.block_table("r1").tolist() == [0, 1, 3]


def test_a_prompt_that_is_cached_whole_recomputes_its_last_block(make_scheduler):
    scheduler = make_scheduler()
    hashes = hash_prompt(range(8), 4)
    scheduler.enter("r0", 8, max_tokens=1, block_hashes=hashes)
    scheduler.step()
    scheduler.enter("r1", 8, max_tokens=1, block_hashes=hashes)
    assert scheduler.step()[0] == [("r1", 4, 4, True)]


def test_blocks_are_found_only_after_the_step_that_computes_them(make_scheduler):
    scheduler = make_scheduler()
    hashes = hash_prompt(range(8), 4)
    scheduler.enter("r0", 8, block_hashes=hashes)
    scheduler.enter("r1", 8, block_hashes=hashes)
    assert scheduler.step()[0] == [("r0", 0, 8, True), ("r1", 0, 8, True)]


def test_an_external_prefix_is_loaded_before_the_rest_is_computed(make_scheduler):
    scheduler = make_scheduler()
    hashes = hash_prompt(range(14), 4)
    scheduler.enter("r0", 6, max_tokens=1, block_hashes=hashes[:1])
    scheduler.step()
    scheduler.enter("r1", 14, block_hashes=hashes, num_external_tokens=13)
    scheduler.enter("r2", 2)
    batch = scheduler.schedule()
    assert scheduler.rows(batch) == [("r2", 0, 2, True)]  # goes on while r1 loads
    (load,) = batch.loads
    assert (load.request_id, load.num_cached_tokens, load.num_external_tokens) == ("r1", 4, 8)
    assert load.block_ids.tolist() == [2, 3]
    assert [a.request_id for a in batch.admitted] == ["r1", "r2"]
    scheduler.activate(request_id="r1", num_computed_tokens=12)
    assert scheduler.num_prefix_tokens(0, hashes) == 12  # others find what was loaded
    scheduler.update(batch)
    assert scheduler.step()[0] == [("r2", 2, 1, True), ("r1", 12, 2, True)]


def test_the_shared_pool_is_asked_when_a_request_is_admitted(make_scheduler):
    scheduler = make_scheduler(max_num_seqs=1)
    held = 0
    scheduler.enter("r0", 4, max_tokens=1)
    scheduler.enter("r1", 8, num_external_tokens=lambda: held)
    scheduler.step()
    held = 8
    batch = scheduler.schedule()
    assert batch.num_rows == 0
    assert [(load.num_cached_tokens, load.num_external_tokens) for load in batch.loads] == [(0, 4)]
    assert scheduler.schedule() is None  # a batch without rows is not in flight
    scheduler.activate(request_id="r1", num_computed_tokens=0)  # the pool had lost it meanwhile
    assert scheduler.step()[0] == [("r1", 0, 8, True)]


def test_prefills_that_run_get_budget_by_key_not_by_slot(make_scheduler):
    scheduler = make_scheduler(max_num_batched_tokens=4)
    scheduler.enter("r0", 4, max_tokens=1)
    scheduler.enter("r1", 12, num_external_tokens=4)
    assert scheduler.step() == ([("r0", 0, 4, True)], ("r0",))
    scheduler.enter("r2", 12, num_external_tokens=4)  # gets the slot that r0 has left
    assert [load.request_id for load in scheduler.schedule().loads] == ["r2"]
    scheduler.activate(request_id="r2", num_computed_tokens=4)
    scheduler.activate(request_id="r1", num_computed_tokens=4)
    assert scheduler.step()[0] == [("r1", 4, 4, False)]
    assert scheduler.step()[0] == [("r1", 8, 4, True)]
    assert scheduler.step()[0] == [("r1", 12, 1, True), ("r2", 4, 3, False)]


def test_loading_needs_no_budget(make_scheduler):
    scheduler = make_scheduler(max_num_batched_tokens=4, num_blocks=16)
    scheduler.enter("r0", 20)
    scheduler.enter("r1", 9, num_external_tokens=8)
    scheduler.enter("r2", 9)
    batch = scheduler.schedule()
    assert scheduler.rows(batch) == [("r0", 0, 4, False)]
    assert [load.request_id for load in batch.loads] == ["r1"]
