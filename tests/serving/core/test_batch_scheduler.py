"""Batch scheduler: literal steps of small instances, aborts and refusals."""

import numpy as np
import pytest

from serving.core.errors import IllegalCall, UnfitRequest


def test_a_request_is_prefilled_then_decoded_then_finished_by_length(make_scheduler):
    scheduler = make_scheduler()
    scheduler.enter("r0", 5, max_tokens=3)
    assert scheduler.step() == ([("r0", 0, 5, True)], ())
    assert scheduler.block_table("r0").tolist() == [0, 1]
    assert scheduler.step() == ([("r0", 5, 1, True)], ())
    assert scheduler.step() == ([("r0", 6, 1, True)], ("r0",))  # the third token is sampled, never computed
    assert scheduler.step() is None
    assert scheduler.block_table("r0").tolist() == [0, 1]  # held for whoever reads the cache
    scheduler.release("r0")
    assert scheduler.request_ids == ()
    assert scheduler.free_blocks.tolist() == [10]


def test_a_long_prompt_is_cut_in_chunks_and_decode_rows_go_first(make_scheduler):
    scheduler = make_scheduler(max_num_batched_tokens=8)
    scheduler.enter("r0", 3)
    scheduler.enter("r1", 14)
    scheduler.enter("r2", 2)
    assert scheduler.step()[0] == [("r0", 0, 3, True), ("r1", 0, 5, False)]
    assert scheduler.step()[0] == [("r0", 3, 1, True), ("r1", 5, 7, False)]
    assert scheduler.step()[0] == [("r0", 4, 1, True), ("r1", 12, 2, True), ("r2", 0, 2, True)]


def test_a_stop_token_ends_a_request_before_its_limit(make_scheduler):
    scheduler = make_scheduler()
    scheduler.enter("r0", 5, max_tokens=9)
    scheduler.enter("r1", 3, max_tokens=9)
    batch = scheduler.schedule()
    result = scheduler.update(batch, np.array([True, False]))
    assert (result.finished, result.finished_rows.tolist(), result.stopped.tolist()) == (("r0",), [0], [True])
    assert result.sampled_rows.tolist() == [0, 1]
    assert scheduler.step()[0] == [("r1", 3, 1, True)]


def test_a_stop_flag_on_a_row_that_does_not_sample_is_ignored(make_scheduler):
    scheduler = make_scheduler(max_num_batched_tokens=4)
    scheduler.enter("r0", 6)
    assert scheduler.step(stop=["r0"]) == ([("r0", 0, 4, False)], ())
    assert scheduler.step(stop=["r0"]) == ([("r0", 4, 2, True)], ("r0",))


def test_ranks_have_their_own_budget_slots_blocks_and_rows(make_scheduler):
    scheduler = make_scheduler(num_ranks=3, max_num_seqs=2, max_num_batched_tokens=4)
    scheduler.enter("r0", 3, rank=2)
    scheduler.enter("r1", 6, rank=0)
    scheduler.enter("r2", 1, rank=2)
    batch = scheduler.schedule()
    assert scheduler.rows(batch) == [("r1", 0, 4, False), ("r0", 0, 3, True), ("r2", 0, 1, True)]
    assert batch.ranks.tolist() == [0, 2, 2]
    assert batch.rank_starts.tolist() == [0, 1, 1, 3]  # rank 1 is idle
    assert batch.sums_by_rank(batch.num_scheduled_tokens)[0].tolist() == [4, 0, 4]
    assert scheduler.num_pending_tokens.tolist() == [6, 0, 4]
    scheduler.update(batch)
    assert scheduler.free_blocks.tolist() == [8, 10, 8]
    assert scheduler.num_seqs.tolist() == [1, 0, 2]
    assert scheduler.num_tokens.tolist() == [6, 0, 6]
    assert scheduler.num_pending_tokens.tolist() == [2, 0, 2]
    assert scheduler.block_tables(batch.slots).tolist() == [[0, 1], [0, 0], [1, 0]]


def test_admission_is_first_come_first_served_and_nobody_passes_the_head(make_scheduler):
    scheduler = make_scheduler(num_blocks=4)
    scheduler.enter("r0", 9, max_tokens=1)  # 3 blocks
    scheduler.enter("r1", 8, max_tokens=1)  # 2 blocks: must wait
    scheduler.enter("r2", 2, max_tokens=1)  # would fit
    assert scheduler.step() == ([("r0", 0, 9, True)], ("r0",))
    assert scheduler.step() is None  # the blocks of r0 are held
    scheduler.release("r0")
    assert scheduler.step() == ([("r1", 0, 8, True), ("r2", 0, 2, True)], ("r1", "r2"))


def test_priority_decides_under_the_priority_policy_only(make_scheduler):
    for policy, expected in (("fcfs", ["r0", "r1", "r2"]), ("priority", ["r2", "r0", "r1"])):
        scheduler = make_scheduler(max_num_seqs=1, policy=policy)
        scheduler.enter("r0", 3, priority=1)
        scheduler.enter("r1", 3, priority=1)
        scheduler.enter("r2", 3, priority=0)
        assert scheduler.run_until_idle() == expected


def test_the_latest_request_is_preempted_and_recomputes_its_own_tokens(make_scheduler):
    scheduler = make_scheduler(num_blocks=4, enable_prefix_caching=False)
    scheduler.enter("r0", 7, max_tokens=9)  # 2 blocks, in the end 4
    scheduler.enter("r1", 7, max_tokens=9)
    assert scheduler.step()[0] == [("r0", 0, 7, True), ("r1", 0, 7, True)]
    assert scheduler.step()[0] == [("r0", 7, 1, True), ("r1", 7, 1, True)]
    batch = scheduler.schedule()  # both need a third block, none is free
    assert scheduler.rows(batch) == [("r0", 8, 1, True)]
    assert [(p.request_id, p.rank, p.num_tokens) for p in batch.preempted] == [("r1", 0, 9)]
    assert scheduler.num_waiting == 1
    scheduler.update(batch)
    assert scheduler.block_table("r0").tolist() == [0, 1, 2]
    for computed in range(9, 15):  # the two blocks of r1 are given back one by one
        assert scheduler.step() == ([("r0", computed, 1, True)], ("r0",) if computed == 14 else ())
    scheduler.release("r0")
    assert scheduler.step()[0] == [("r1", 0, 9, True)]  # its two generated tokens are part of its prompt
    assert scheduler.run_until_idle() == ["r1"]


def test_the_lowest_priority_is_preempted_before_the_latest(make_scheduler):
    scheduler = make_scheduler(num_blocks=2, policy="priority", enable_prefix_caching=False)
    scheduler.enter("r0", 4, priority=5)
    scheduler.enter("r1", 4, priority=1)
    scheduler.step()
    batch = scheduler.schedule()
    assert [p.request_id for p in batch.preempted] == ["r0"]
    assert scheduler.rows(batch) == [("r1", 4, 1, True)]


def test_a_rank_that_was_short_of_a_block_admits_nobody_in_that_step(make_scheduler):
    scheduler = make_scheduler(num_blocks=4, policy="priority", enable_prefix_caching=False)
    scheduler.enter("r0", 8, priority=1)
    scheduler.enter("r1", 8, priority=2)
    scheduler.step()
    scheduler.enter("r2", 1, priority=0)
    batch = scheduler.schedule()  # r1 gives up two blocks, r0 takes one; r2 would fit into the other
    assert [p.request_id for p in batch.preempted] == ["r1"]
    assert scheduler.rows(batch) == [("r0", 8, 1, True)]
    scheduler.update(batch)
    assert scheduler.step()[0] == [("r0", 9, 1, True), ("r2", 0, 1, True)]


def test_abort_at_every_stage(make_scheduler):
    scheduler = make_scheduler(max_num_seqs=2)
    for i in range(4):
        scheduler.enter(f"r{i}", 4, max_tokens=2)
    assert scheduler.abort("r3") is True  # waiting
    batch = scheduler.schedule()
    assert scheduler.abort("r0") is False  # in flight
    with pytest.raises(IllegalCall, match="aborted already"):
        scheduler.abort("r0")
    scheduler.check_invariants()
    result = scheduler.update(batch)
    assert (result.aborted, result.sampled_rows.tolist()) == (("r0",), [1])
    scheduler.step()  # r1 finishes, r2 is admitted
    assert scheduler.num_held == 1
    assert scheduler.abort("r1") is True  # finished, held
    assert scheduler.abort("r2") is True  # running, between two steps
    with pytest.raises(IllegalCall):
        scheduler.abort("r2")
    assert scheduler.request_ids == ()
    assert scheduler.free_blocks.tolist() == [10]
    scheduler.check_invariants()


def test_an_id_may_be_used_again_after_an_abort_in_the_queue(make_scheduler):
    scheduler = make_scheduler()
    scheduler.enter("r0", 4)
    scheduler.enter("r1", 4)
    scheduler.enter("r2", 4)
    scheduler.abort("r1")  # behind the head
    scheduler.abort("r0")
    scheduler.enter("r1", 6, order=3)
    assert scheduler.step()[0] == [("r2", 0, 4, True), ("r1", 0, 6, True)]
    assert scheduler.num_waiting == 0


@pytest.mark.parametrize(
    ("num_tokens", "total_limit", "error", "message"),
    [
        (41, 42, UnfitRequest, "request r9: total_limit 42 needs 11 blocks, num_blocks is 10"),
        (64, 65, UnfitRequest, "request r9: total_limit 65 exceeds max_model_len 64"),
        (0, 4, IllegalCall, "num_tokens 0 is not in"),
        (4, 4, IllegalCall, "num_tokens 4 is not in"),
    ],
)
def test_a_request_that_cannot_run_alone_is_refused_by_name(make_scheduler, num_tokens, total_limit, error, message):
    scheduler = make_scheduler()
    for enter in (scheduler.add, scheduler.reserve):
        with pytest.raises(error, match=message):
            enter(request_id="r9", rank=0, num_tokens=num_tokens, total_limit=total_limit, priority=0, order=0)
    assert scheduler.request_ids == ()
    scheduler.enter("r8", 40, max_tokens=1)  # the last token is never computed: exactly fits


@pytest.mark.parametrize(
    "call",
    [
        lambda s, batch: s.enter("r0", 4),
        lambda s, batch: s.enter("r1", 4),
        lambda s, batch: s.enter("r2", 4),
        lambda s, batch: s.enter("r7", 4, rank=1),
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
def test_an_illegal_call_raises_and_changes_nothing(make_scheduler, call):
    scheduler = make_scheduler(max_num_seqs=3)
    scheduler.enter("r2", 3, max_tokens=1)
    scheduler.step()  # r2 is finished and held
    scheduler.enter("r0", 4)
    scheduler.hold("r3", 4)
    scheduler.enter("r4", 4)
    batch = scheduler.schedule()
    scheduler.enter("r1", 4)  # waits
    before = (scheduler.request_ids, scheduler.free_blocks.tolist(), scheduler.num_pending_tokens.tolist())
    with pytest.raises(IllegalCall):
        call(scheduler, batch)
    after = (scheduler.request_ids, scheduler.free_blocks.tolist(), scheduler.num_pending_tokens.tolist())
    assert after == before
    scheduler.check_invariants()
    scheduler.update(batch)
    with pytest.raises(IllegalCall, match="not in flight"):
        scheduler.update(batch)


def test_a_batch_cannot_be_changed(make_scheduler):
    scheduler = make_scheduler()
    scheduler.enter("r0", 4)
    batch = scheduler.schedule()
    with pytest.raises(ValueError, match="read-only"):
        batch.num_scheduled_tokens[0] = 9


def test_limits_that_contradict_each_other_are_refused(make_scheduler):
    with pytest.raises(UnfitRequest, match="max_num_seqs 4 exceeds max_num_batched_tokens 3"):
        make_scheduler(max_num_batched_tokens=3)
    with pytest.raises(UnfitRequest, match="num_ranks 0"):
        make_scheduler(num_ranks=0)
