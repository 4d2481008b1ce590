"""Batch scheduler: literal steps of small instances."""

import numpy as np
import pytest

from serving.core.batch_scheduler import BatchScheduler
from serving.core.block_hash import hash_prompt
from serving.core.errors import IllegalCall, NoSlot, OutOfBlocks, UnfitRequest


def make_scheduler(**changes):
    limits = {
        "num_ranks": 1,
        "num_blocks": 10,
        "block_size": 4,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 16,
        "max_model_len": 64,
    }
    return BatchScheduler(**{**limits, **changes})


def add(scheduler, request_id, num_tokens, max_tokens=4, *, rank=0, priority=0, order=None, **more):
    order = int(request_id[1:]) if order is None else order
    scheduler.add(
        request_id=request_id,
        rank=rank,
        num_tokens=num_tokens,
        total_limit=num_tokens + max_tokens,
        priority=priority,
        order=order,
        **more,
    )


def reserve(scheduler, request_id, num_tokens, max_tokens=4, *, rank=0, order=0):
    return scheduler.reserve(
        request_id=request_id,
        rank=rank,
        num_tokens=num_tokens,
        total_limit=num_tokens + max_tokens,
        priority=0,
        order=order,
    ).tolist()


def rows(batch):
    """(request, computed before, computed in this step, samples) of every row."""
    return [
        (request_id, computed, scheduled, samples)
        for request_id, computed, scheduled, samples in zip(
            batch.request_ids.tolist(),
            batch.num_computed_tokens.tolist(),
            batch.num_scheduled_tokens.tolist(),
            batch.samples.tolist(),
            strict=True,
        )
    ]


def step(scheduler, stop=()):
    """One whole step: its rows and who finished."""
    batch = scheduler.schedule()
    if batch is None:
        return None
    mask = np.isin(batch.request_ids.astype(str), list(stop))
    finished = scheduler.update(batch, mask).finished if batch.num_rows else ()
    scheduler.check_invariants()
    return rows(batch), finished


def run_until_idle(scheduler, max_steps=200):
    finished = []
    for _ in range(max_steps):
        result = step(scheduler)
        if result is None:
            return finished
        for request_id in result[1]:
            scheduler.release(request_id)
            finished.append(request_id)
    raise AssertionError(f"not idle after {max_steps} steps")


def test_a_request_is_prefilled_then_decoded_then_finished_by_length():
    scheduler = make_scheduler()
    add(scheduler, "r0", 5, max_tokens=3)
    assert step(scheduler) == ([("r0", 0, 5, True)], ())
    assert scheduler.block_table("r0").tolist() == [0, 1]
    assert step(scheduler) == ([("r0", 5, 1, True)], ())
    assert step(scheduler) == ([("r0", 6, 1, True)], ("r0",))  # the third token is sampled, never computed
    assert step(scheduler) is None
    assert scheduler.block_table("r0").tolist() == [0, 1]  # held for whoever reads the cache
    scheduler.release("r0")
    assert scheduler.request_ids == ()
    assert scheduler.free_blocks.tolist() == [10]


def test_a_long_prompt_is_cut_in_chunks_and_decode_rows_go_first():
    scheduler = make_scheduler(max_num_batched_tokens=8)
    add(scheduler, "r0", 3)
    add(scheduler, "r1", 14)
    add(scheduler, "r2", 2)
    assert step(scheduler)[0] == [("r0", 0, 3, True), ("r1", 0, 5, False)]
    assert step(scheduler)[0] == [("r0", 3, 1, True), ("r1", 5, 7, False)]
    assert step(scheduler)[0] == [("r0", 4, 1, True), ("r1", 12, 2, True), ("r2", 0, 2, True)]


def test_a_stop_token_ends_a_request_before_its_limit():
    scheduler = make_scheduler()
    add(scheduler, "r0", 5, max_tokens=9)
    add(scheduler, "r1", 3, max_tokens=9)
    batch = scheduler.schedule()
    result = scheduler.update(batch, np.array([True, False]))
    assert (result.finished, result.finished_rows.tolist(), result.stopped.tolist()) == (("r0",), [0], [True])
    assert result.sampled_rows.tolist() == [0, 1]
    assert step(scheduler)[0] == [("r1", 3, 1, True)]


def test_a_stop_flag_on_a_row_that_does_not_sample_is_ignored():
    scheduler = make_scheduler(max_num_batched_tokens=4)
    add(scheduler, "r0", 6)
    assert step(scheduler, stop=["r0"]) == ([("r0", 0, 4, False)], ())
    assert step(scheduler, stop=["r0"]) == ([("r0", 4, 2, True)], ("r0",))


def test_ranks_have_their_own_budget_slots_blocks_and_rows():
    scheduler = make_scheduler(num_ranks=3, max_num_seqs=2, max_num_batched_tokens=4)
    add(scheduler, "r0", 3, rank=2)
    add(scheduler, "r1", 6, rank=0)
    add(scheduler, "r2", 1, rank=2)
    batch = scheduler.schedule()
    assert rows(batch) == [("r1", 0, 4, False), ("r0", 0, 3, True), ("r2", 0, 1, True)]
    assert batch.ranks.tolist() == [0, 2, 2]
    assert batch.rank_starts.tolist() == [0, 1, 1, 3]  # rank 1 is idle
    assert batch.sum_by_rank(batch.num_scheduled_tokens).tolist() == [4, 0, 4]
    assert scheduler.num_pending_tokens.tolist() == [6, 0, 4]
    scheduler.update(batch)
    assert scheduler.free_blocks.tolist() == [8, 10, 8]
    assert scheduler.num_seqs.tolist() == [1, 0, 2]
    assert scheduler.num_tokens.tolist() == [6, 0, 6]
    assert scheduler.num_pending_tokens.tolist() == [2, 0, 2]
    assert scheduler.block_tables(batch.slots).tolist() == [[0, 1], [0, 0], [1, 0]]


def test_admission_is_first_come_first_served_and_nobody_passes_the_head():
    scheduler = make_scheduler(num_blocks=4)
    add(scheduler, "r0", 9, max_tokens=1)  # 3 blocks
    add(scheduler, "r1", 8, max_tokens=1)  # 2 blocks: must wait
    add(scheduler, "r2", 2, max_tokens=1)  # would fit
    assert step(scheduler) == ([("r0", 0, 9, True)], ("r0",))
    assert step(scheduler) is None  # the blocks of r0 are held
    scheduler.release("r0")
    assert step(scheduler) == ([("r1", 0, 8, True), ("r2", 0, 2, True)], ("r1", "r2"))


def test_priority_decides_under_the_priority_policy_only():
    for policy, expected in (("fcfs", ["r0", "r1", "r2"]), ("priority", ["r2", "r0", "r1"])):
        scheduler = make_scheduler(max_num_seqs=1, policy=policy)
        add(scheduler, "r0", 3, priority=1)
        add(scheduler, "r1", 3, priority=1)
        add(scheduler, "r2", 3, priority=0)
        assert run_until_idle(scheduler) == expected


def test_the_latest_request_is_preempted_and_recomputes_its_own_tokens():
    scheduler = make_scheduler(num_blocks=4, enable_prefix_caching=False)
    add(scheduler, "r0", 7, max_tokens=9)  # 2 blocks, in the end 4
    add(scheduler, "r1", 7, max_tokens=9)
    assert step(scheduler)[0] == [("r0", 0, 7, True), ("r1", 0, 7, True)]
    assert step(scheduler)[0] == [("r0", 7, 1, True), ("r1", 7, 1, True)]
    batch = scheduler.schedule()  # both need a third block, none is free
    assert rows(batch) == [("r0", 8, 1, True)]
    assert [(p.request_id, p.rank, p.num_tokens) for p in batch.preempted] == [("r1", 0, 9)]
    assert scheduler.num_waiting == 1
    scheduler.update(batch)
    assert scheduler.block_table("r0").tolist() == [0, 1, 2]
    for computed in range(9, 15):  # the two blocks of r1 are given back one by one
        assert step(scheduler) == ([("r0", computed, 1, True)], ("r0",) if computed == 14 else ())
    scheduler.release("r0")
    assert step(scheduler)[0] == [("r1", 0, 9, True)]  # its two generated tokens are part of its prompt
    assert run_until_idle(scheduler) == ["r1"]


def test_the_lowest_priority_is_preempted_before_the_latest():
    scheduler = make_scheduler(num_blocks=2, policy="priority", enable_prefix_caching=False)
    add(scheduler, "r0", 4, priority=5)
    add(scheduler, "r1", 4, priority=1)
    step(scheduler)
    batch = scheduler.schedule()
    assert [p.request_id for p in batch.preempted] == ["r0"]
    assert rows(batch) == [("r1", 4, 1, True)]


def test_a_decode_instance_gives_a_preempted_request_back_to_its_caller():
    scheduler = make_scheduler(num_blocks=2, preempt_to="caller", enable_prefix_caching=False)
    for order, request_id in enumerate(("r0", "r1")):
        assert reserve(scheduler, request_id, 4, max_tokens=4, order=order) == [order]
        scheduler.activate(request_id=request_id, num_computed_tokens=4, num_tokens=5)
    batch = scheduler.schedule()
    assert rows(batch) == [("r0", 4, 1, True)]
    assert [(p.request_id, p.num_tokens) for p in batch.preempted] == [("r1", 5)]
    assert (scheduler.num_waiting, scheduler.request_ids) == (0, ("r0",))
    scheduler.update(batch)
    scheduler.check_invariants()


def test_a_lone_row_waits_in_place_for_blocks_that_cannot_be_taken():
    scheduler = make_scheduler(num_blocks=2, preempt_to="caller")
    reserve(scheduler, "r0", 4)
    scheduler.activate(request_id="r0", num_computed_tokens=4, num_tokens=5)
    reserve(scheduler, "r1", 4, order=1)  # its cache is being written: not to be touched
    assert scheduler.schedule() is None
    scheduler.abort("r1")
    assert step(scheduler)[0] == [("r0", 4, 1, True)]


def test_reserving_takes_slot_and_blocks_and_activating_makes_it_run():
    scheduler = make_scheduler(num_blocks=3, max_num_seqs=2, preempt_to="caller")
    assert reserve(scheduler, "r0", 8) == [0, 1]
    assert scheduler.schedule() is None
    with pytest.raises(OutOfBlocks, match="rank 0: 2 blocks needed, 1 free"):
        reserve(scheduler, "r1", 5)
    assert reserve(scheduler, "r2", 1, order=1) == [2]
    with pytest.raises(NoSlot, match="all 2 slots"):
        reserve(scheduler, "r1", 1)
    scheduler.abort("r2")
    scheduler.activate(request_id="r0", num_computed_tokens=8, num_tokens=9)
    assert step(scheduler)[0] == [("r0", 8, 1, True)]
    assert scheduler.block_table("r0").tolist() == [0, 1, 2]


def test_a_transfer_that_fell_short_is_completed_by_computing():
    scheduler = make_scheduler(preempt_to="caller")
    reserve(scheduler, "r0", 8)
    scheduler.activate(request_id="r0", num_computed_tokens=3, num_tokens=9)
    assert step(scheduler)[0] == [("r0", 3, 6, True)]


def test_a_second_request_finds_the_blocks_of_the_first():
    scheduler = make_scheduler()
    prompt = list(range(10))
    add(scheduler, "r0", 10, max_tokens=1, block_hashes=hash_prompt(prompt, 4))
    step(scheduler)
    add(scheduler, "r1", 10, max_tokens=1, block_hashes=hash_prompt([*prompt[:8], 77, 78], 4))
    assert scheduler.num_prefix_tokens(0, hash_prompt(prompt, 4)) == 8
    batch = scheduler.schedule()
    assert rows(batch) == [("r1", 8, 2, True)]
    assert [(a.request_id, a.num_cached_tokens) for a in batch.admitted] == [("r1", 8)]
    assert scheduler.block_table("r1").tolist() == [0, 1, 3]


def test_a_prompt_that_is_cached_whole_recomputes_its_last_block():
    scheduler = make_scheduler()
    hashes = hash_prompt(range(8), 4)
    add(scheduler, "r0", 8, max_tokens=1, block_hashes=hashes)
    step(scheduler)
    add(scheduler, "r1", 8, max_tokens=1, block_hashes=hashes)
    assert step(scheduler)[0] == [("r1", 4, 4, True)]


def test_blocks_are_found_only_after_the_step_that_computes_them():
    scheduler = make_scheduler()
    hashes = hash_prompt(range(8), 4)
    add(scheduler, "r0", 8, block_hashes=hashes)
    add(scheduler, "r1", 8, block_hashes=hashes)
    assert step(scheduler)[0] == [("r0", 0, 8, True), ("r1", 0, 8, True)]


def test_an_external_prefix_is_loaded_before_the_rest_is_computed():
    scheduler = make_scheduler()
    hashes = hash_prompt(range(14), 4)
    add(scheduler, "r0", 6, max_tokens=1, block_hashes=hashes[:1])
    step(scheduler)
    add(scheduler, "r1", 14, block_hashes=hashes, num_external_tokens=13)
    add(scheduler, "r2", 2)
    batch = scheduler.schedule()
    assert rows(batch) == [("r2", 0, 2, True)]  # goes on while r1 loads
    (load,) = batch.loads
    assert (load.request_id, load.num_cached_tokens, load.num_external_tokens) == ("r1", 4, 8)
    assert load.block_ids.tolist() == [2, 3]
    assert [a.request_id for a in batch.admitted] == ["r1", "r2"]
    scheduler.activate(request_id="r1", num_computed_tokens=12)
    assert scheduler.num_prefix_tokens(0, hashes) == 12  # others find what was loaded
    scheduler.update(batch)
    assert step(scheduler)[0] == [("r2", 2, 1, True), ("r1", 12, 2, True)]


def test_the_shared_pool_is_asked_when_a_request_is_admitted():
    scheduler = make_scheduler(max_num_seqs=1)
    held = 0
    add(scheduler, "r0", 4, max_tokens=1)
    add(scheduler, "r1", 8, num_external_tokens=lambda: held)
    step(scheduler)
    held = 8
    batch = scheduler.schedule()
    assert batch.num_rows == 0
    assert [(load.num_cached_tokens, load.num_external_tokens) for load in batch.loads] == [(0, 4)]
    assert scheduler.schedule() is None  # a batch without rows is not in flight
    scheduler.activate(request_id="r1", num_computed_tokens=0)  # the pool had lost it meanwhile
    assert step(scheduler)[0] == [("r1", 0, 8, True)]


def test_loading_needs_no_budget():
    scheduler = make_scheduler(max_num_batched_tokens=4, num_blocks=16)
    add(scheduler, "r0", 20)
    add(scheduler, "r1", 9, num_external_tokens=8)
    add(scheduler, "r2", 9)
    batch = scheduler.schedule()
    assert rows(batch) == [("r0", 0, 4, False)]
    assert [load.request_id for load in batch.loads] == ["r1"]


def test_abort_at_every_stage():
    scheduler = make_scheduler(max_num_seqs=2)
    for i in range(4):
        add(scheduler, f"r{i}", 4, max_tokens=2)
    assert scheduler.abort("r3") is True  # waiting
    batch = scheduler.schedule()
    assert scheduler.abort("r0") is False  # in flight
    with pytest.raises(IllegalCall, match="aborted already"):
        scheduler.abort("r0")
    scheduler.check_invariants()
    result = scheduler.update(batch)
    assert (result.aborted, result.sampled_rows.tolist()) == (("r0",), [1])
    step(scheduler)  # r1 finishes, r2 is admitted
    assert scheduler.num_held == 1
    assert scheduler.abort("r1") is True  # finished, held
    assert scheduler.abort("r2") is True  # running, between two steps
    with pytest.raises(IllegalCall):
        scheduler.abort("r2")
    assert scheduler.request_ids == ()
    assert scheduler.free_blocks.tolist() == [10]
    scheduler.check_invariants()


def test_an_id_may_be_used_again_after_an_abort_in_the_queue():
    scheduler = make_scheduler()
    add(scheduler, "r0", 4)
    scheduler.abort("r0")
    add(scheduler, "r1", 4)
    add(scheduler, "r0", 6, order=2)
    assert step(scheduler)[0] == [("r1", 0, 4, True), ("r0", 0, 6, True)]


@pytest.mark.parametrize(
    ("num_tokens", "total_limit", "error", "message"),
    [
        (41, 42, UnfitRequest, "request r9: total_limit 42 needs 11 blocks, num_blocks is 10"),
        (64, 65, UnfitRequest, "request r9: total_limit 65 exceeds max_model_len 64"),
        (0, 4, IllegalCall, "num_tokens 0 is not in"),
        (4, 4, IllegalCall, "num_tokens 4 is not in"),
    ],
)
def test_a_request_that_cannot_run_alone_is_refused_by_name(num_tokens, total_limit, error, message):
    scheduler = make_scheduler()
    for enter in (scheduler.add, scheduler.reserve):
        with pytest.raises(error, match=message):
            enter(request_id="r9", rank=0, num_tokens=num_tokens, total_limit=total_limit, priority=0, order=0)
    assert scheduler.request_ids == ()
    add(scheduler, "r8", 40, max_tokens=1)  # the last token is never computed: exactly fits


@pytest.mark.parametrize(
    "call",
    [
        lambda s, batch: add(s, "r0", 4),
        lambda s, batch: add(s, "r1", 4),
        lambda s, batch: add(s, "r2", 4),
        lambda s, batch: add(s, "r7", 4, rank=1),
        lambda s, batch: s.schedule(),
        lambda s, batch: s.update(batch, np.zeros(7, dtype=bool)),
        lambda s, batch: s.release("r0"),
        lambda s, batch: s.release("r9"),
        lambda s, batch: s.abort("r9"),
        lambda s, batch: s.block_table("r1"),
        lambda s, batch: s.activate(request_id="r0", num_computed_tokens=4),
        lambda s, batch: s.activate(request_id="r9", num_computed_tokens=4),
        lambda s, batch: s.activate(request_id="r3", num_computed_tokens=4),
        lambda s, batch: s.activate(request_id="r3", num_computed_tokens=4, num_tokens=3),
        lambda s, batch: s.activate(request_id="r3", num_computed_tokens=4, num_tokens=6),
        lambda s, batch: s.activate(request_id="r3", num_computed_tokens=5, num_tokens=5),
    ],
)
def test_an_illegal_call_raises_and_changes_nothing(call):
    scheduler = make_scheduler(max_num_seqs=3)
    add(scheduler, "r2", 3, max_tokens=1)
    step(scheduler)  # r2 is finished and held
    add(scheduler, "r0", 4)
    reserve(scheduler, "r3", 4)
    add(scheduler, "r4", 4)
    batch = scheduler.schedule()
    add(scheduler, "r1", 4)  # waits
    before = (scheduler.request_ids, scheduler.free_blocks.tolist(), scheduler.num_pending_tokens.tolist())
    with pytest.raises(IllegalCall):
        call(scheduler, batch)
    after = (scheduler.request_ids, scheduler.free_blocks.tolist(), scheduler.num_pending_tokens.tolist())
    assert after == before
    scheduler.check_invariants()
    scheduler.update(batch)
    with pytest.raises(IllegalCall, match="not in flight"):
        scheduler.update(batch)


def test_a_batch_cannot_be_changed():
    scheduler = make_scheduler()
    add(scheduler, "r0", 4)
    batch = scheduler.schedule()
    with pytest.raises(ValueError, match="read-only"):
        batch.num_scheduled_tokens[0] = 9


def test_limits_that_contradict_each_other_are_refused():
    with pytest.raises(UnfitRequest, match="max_num_seqs 4 exceeds max_num_batched_tokens 3"):
        make_scheduler(max_num_batched_tokens=3)
    with pytest.raises(UnfitRequest, match="num_ranks 0"):
        make_scheduler(num_ranks=0)
