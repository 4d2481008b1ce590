"""Drafts in the scheduler, written out: rows, lookahead blocks, what acceptance and rejection leave behind."""

import numpy as np
import pytest

from serving.core.errors import IllegalCall, UnfitRequest


@pytest.fixture
def make_drafting(make_scheduler):
    """A function that makes a scheduler with one draft per step."""
    return lambda **changes: make_scheduler(num_speculative_tokens=1, **changes)


def run_step(scheduler, accepted=(), stop=()):
    """One step: (request, computed, scheduled, drafts, makes the next, behind) per row; drafts of `accepted` count."""
    batch = scheduler.schedule()
    if batch is None:
        return None
    drafts = batch.drafts
    columns = (
        batch.request_ids,
        batch.num_computed_tokens,
        batch.num_scheduled_tokens,
        drafts.num_drafts,
        drafts.makes_draft,
        drafts.is_behind,
    )
    rows = list(zip(*(column.tolist() for column in columns), strict=True))
    names = batch.request_ids.astype(str)
    result = scheduler.update(batch, np.isin(names, stop), np.isin(names, accepted) * drafts.num_drafts)
    scheduler.check_invariants()
    for request_id in result.finished:
        scheduler.release(request_id)
    return rows


def blocks(scheduler, request_id):
    return len(scheduler.block_table(request_id))


def test_a_life_with_an_accepted_and_a_rejected_draft(make_drafting):
    scheduler = make_drafting()  # blocks of 4
    scheduler.enter("r0", 6, max_tokens=7)
    # The prompt; its blocks have room for the newest token, so the first draft is made at once.
    assert run_step(scheduler) == [("r0", 0, 6, 0, True, True)]
    # Token 6 and a draft for 7; token 8 could come out, and its row of the module needs a third block.
    assert run_step(scheduler, accepted=["r0"]) == [("r0", 6, 2, 1, True, False)]
    assert blocks(scheduler, "r0") == 3
    # Tokens 7 and 8 are known now. The draft for 9 is wrong: 8 is computed, slot 9 will be written again.
    assert run_step(scheduler) == [("r0", 8, 2, 1, True, False)]
    assert run_step(scheduler, accepted=["r0"]) == [("r0", 9, 2, 1, True, False)]
    # 12 tokens of 13: no draft, since only one more comes, and none after it.
    assert run_step(scheduler) == [("r0", 11, 1, 0, False, False)]
    assert run_step(scheduler) is None
    assert scheduler.free_blocks.tolist() == [10]


def test_the_last_draft_may_fill_the_limit_and_no_block_lies_beyond_it(make_drafting):
    scheduler = make_drafting(num_blocks=2)
    scheduler.enter("r0", 3, max_tokens=6)  # 8 slots are all that it ever computes
    assert run_step(scheduler) == [("r0", 0, 3, 0, True, True)]
    assert run_step(scheduler, accepted=["r0"]) == [("r0", 3, 2, 1, True, False)]
    assert run_step(scheduler) == [("r0", 5, 2, 1, True, False)]
    assert run_step(scheduler, accepted=["r0"]) == [("r0", 6, 2, 1, False, False)]  # tokens 7 and 8, the last two
    assert scheduler.request_ids == ()


@pytest.mark.parametrize(("max_tokens", "steps"), [(1, [0]), (2, [0, 0]), (3, [0, 1]), (4, [0, 1, 0])])
def test_few_tokens(make_drafting, max_tokens, steps):
    scheduler = make_drafting()
    scheduler.enter("r0", 2, max_tokens=max_tokens)
    drafts = []
    while rows := run_step(scheduler, accepted=["r0"]):
        drafts.append(rows[0][3])
    assert drafts == steps


def test_without_a_free_block_a_step_goes_without_a_draft_and_nobody_is_preempted(make_drafting):
    scheduler = make_drafting(num_blocks=4)
    scheduler.enter("r0", 8, max_tokens=9)
    scheduler.enter("r1", 8, max_tokens=2)
    # Both prompts fill their two blocks: no slot for a newest token, so no draft.
    assert run_step(scheduler) == [("r0", 0, 8, 0, False, True), ("r1", 0, 8, 0, False, True)]
    batch = scheduler.schedule()  # both outgrow their blocks: r1 gives way, as it would without drafts
    assert [p.request_id for p in batch.preempted] == ["r1"]
    assert scheduler.update(batch).sampled_rows.tolist() == [0]
    assert blocks(scheduler, "r0") == 3
    # Behind no longer: the row of the token before was made up for in the step before.
    assert run_step(scheduler, accepted=["r0"]) == [("r0", 9, 2, 1, True, False)]


def test_lookahead_takes_what_is_free_in_order_and_is_given_up_for_growth(make_drafting):
    scheduler = make_drafting(num_blocks=5, max_num_seqs=2)
    scheduler.enter("r0", 7, max_tokens=9)
    scheduler.enter("r1", 7, max_tokens=9)
    assert run_step(scheduler) == [("r0", 0, 7, 0, True, True), ("r1", 0, 7, 0, True, True)]
    # One block is free: r0 looks ahead. r1 fills its 8 slots: none is left for its draft, nor for its newest token.
    assert run_step(scheduler) == [("r0", 7, 2, 1, True, False), ("r1", 7, 1, 0, False, False)]
    assert [blocks(scheduler, name) for name in ("r0", "r1")] == [3, 2]
    batch = scheduler.schedule()  # r1 has 9 tokens and no block: the youngest, itself, is preempted
    assert [p.request_id for p in batch.preempted] == ["r1"]
    assert batch.drafts.num_drafts.tolist() == [1]


def test_the_budget_counts_drafts(make_drafting):
    scheduler = make_drafting(max_num_batched_tokens=8, num_blocks=20)
    for i in range(2):
        scheduler.enter(f"r{i}", 2, max_tokens=8)
    run_step(scheduler)
    scheduler.enter("r2", 9)
    assert [row[:4] for row in run_step(scheduler)] == [("r0", 2, 2, 1), ("r1", 2, 2, 1), ("r2", 0, 4, 0)]


def test_a_stop_ends_a_request_with_or_without_its_draft(make_drafting):
    for num_accepted in (0, 1):
        scheduler = make_drafting()
        scheduler.enter("r0", 2, max_tokens=8)
        run_step(scheduler)
        batch = scheduler.schedule()
        result = scheduler.update(batch, np.array([True]), np.array([num_accepted]))
        assert (result.finished, result.stopped.tolist()) == (("r0",), [True])
        assert blocks(scheduler, "r0") == 2  # the one that it looked ahead into is held with the others
        scheduler.release("r0")
        assert scheduler.free_blocks.tolist() == [10]


def test_drafts_come_back_after_a_preemption_only_with_a_new_prefill(make_drafting):
    scheduler = make_drafting(num_blocks=4, max_num_seqs=2)
    scheduler.enter("r0", 3, max_tokens=12)
    scheduler.enter("r1", 3, max_tokens=12)
    preempted = []
    for _ in range(12):
        batch = scheduler.schedule()
        preempted += [p.request_id for p in batch.preempted]
        if preempted:
            break
        scheduler.update(batch)
    assert preempted == ["r1"]
    scheduler.update(batch)
    scheduler.abort("r0")
    rows = run_step(scheduler)
    assert (rows[0][0], rows[0][1], rows[0][3], rows[0][5]) == ("r1", 0, 0, True)


def test_acceptance_without_drafts_is_refused_and_so_are_batches_too_small_for_them(make_scheduler, make_drafting):
    scheduler = make_scheduler()
    scheduler.enter("r0", 2)
    batch = scheduler.schedule()
    assert batch.drafts is None
    with pytest.raises(IllegalCall, match="no drafts were scheduled"):
        scheduler.update(batch, None, np.zeros(1, np.int64))
    scheduler.update(batch)
    with pytest.raises(UnfitRequest, match="max_num_seqs 9 with a draft each exceeds max_num_batched_tokens 16"):
        make_drafting(max_num_seqs=9)
