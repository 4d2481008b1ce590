"""Decode ranks by calendars decide as BatchScheduler does, row by row, drafts and scarce blocks included."""

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.core.acceptance import acceptance_table
from serving.core.batch_scheduler import BatchScheduler
from serving.core.decode_ranks import DecodeRanks, DecodeRow, fronts
from serving.core.decode_run import DecodePlanner
from serving.core.ids import RequestId

NUM_RANKS, NUM_SLOTS, MAX_LEN = 2, 3, 64


def schedulers(*, num_blocks, block_size, acceptance):
    """BatchScheduler of a decode instance, and the calendars with their planner."""
    old = BatchScheduler(
        num_ranks=NUM_RANKS,
        num_blocks=num_blocks,
        block_size=block_size,
        max_num_seqs=NUM_SLOTS,
        max_num_batched_tokens=2 * NUM_SLOTS,
        max_model_len=MAX_LEN,
        enable_prefix_caching=False,
        preempt_to="caller",
        num_speculative_tokens=0 if acceptance is None else 1,
    )
    ranks = DecodeRanks(
        num_ranks=NUM_RANKS,
        num_blocks=num_blocks,
        block_size=block_size,
        max_num_seqs=NUM_SLOTS,
        acceptance=None if acceptance is None else acceptance_table(acceptance),
        free_blocks=np.zeros(NUM_RANKS, np.int64),
    )
    return old, ranks


def compare_step(batch, step):
    """Work of one step: rows, tokens, and the pairs that decide attention."""
    scheduled = batch.num_scheduled_tokens.astype(np.int64)
    end = batch.num_computed_tokens + scheduled
    pairs = scheduled * batch.num_computed_tokens + scheduled * (scheduled + 1) // 2
    tokens, context, kv, seqs = batch.sums_by_rank(scheduled, pairs, end, np.ones(batch.num_rows, np.int64))
    assert (step.num_seqs, step.max_seqs) == (batch.num_rows, int(seqs.max()))
    assert (step.num_tokens, step.max_tokens) == (batch.num_tokens, int(tokens.max()))
    assert set(zip(step.context, step.kv, strict=True)) >= {
        pair for pair in zip(context.tolist(), kv.tolist(), strict=True) if not dominated(pair, context, kv)
    }


def dominated(pair, context, kv):
    at_least = (context >= pair[0]) & (kv >= pair[1])
    return bool((at_least & ((context > pair[0]) | (kv > pair[1]))).any())


@given(
    requests=st.lists(
        st.tuples(
            st.integers(1, 30),  # known tokens when it is placed
            st.integers(2, 30),  # and how many come after the first
            st.integers(0, NUM_RANKS - 1),
            st.integers(0, 4),  # steps before it comes
            st.integers(0, 5000),  # its first draw
        ),
        min_size=1,
        max_size=10,
    ),
    block_size=st.sampled_from([1, 2, 4, 16]),
    spare_blocks=st.integers(0, 20),
    acceptance=st.sampled_from([None, 0.0, 0.6, 1.0]),
    max_steps=st.sampled_from([1, 4, 16]),
    release_at_once=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_steps_preemptions_and_ends_are_the_same(
    requests, block_size, spare_blocks, acceptance, max_steps, release_at_once
):
    old, ranks = schedulers(
        num_blocks=-(-MAX_LEN // block_size) + spare_blocks, block_size=block_size, acceptance=acceptance
    )
    planner = DecodePlanner(ranks, max_steps=max_steps)
    rows: dict[str, DecodeRow] = {}
    draws: dict[str, int] = {}
    seen: Counter[str] = Counter()

    def arrive(name, num_tokens, more, rank, draw):
        needed = num_tokens // block_size + 1
        free = int(old.free_blocks[rank])
        assert free == int(ranks.free_blocks[rank])
        if free < needed or int(old.num_seqs[rank]) == NUM_SLOTS:
            return
        seen["arrived"] += 1
        limit, order = num_tokens + 1 + more, len(rows)
        old.reserve(
            request_id=RequestId(name), rank=rank, num_tokens=num_tokens, total_limit=limit, priority=0, order=order
        )
        rows[name] = ranks.reserve(name, rank=rank, num_tokens=num_tokens, total_limit=limit, key=(0, order), draw=draw)
        draws[name] = draw
        old.activate(request_id=RequestId(name), num_computed_tokens=num_tokens, num_tokens=num_tokens + 1)
        ranks.activate(rows[name], num_tokens + 1)

    def advance():
        """One run of the calendars, and as many steps of the scheduler; whether there was anything to do."""
        run = planner.plan()
        if run is None:
            assert old.schedule() is None
            return False
        for i in range(max(1, len(run.steps))):
            batch = old.schedule()
            assert batch is not None
            preempted = [] if run.pressed is None or i else [row.owner for row in run.pressed.preempted]
            assert [lost.request_id for lost in batch.preempted] == preempted
            seen["preempted"] += len(preempted)
            if not run.steps:
                assert batch.num_rows == 0
                return True
            run.begin(i + 1)
            assert ranks.free_blocks.tolist() == old.free_blocks.tolist()
            compare_step(batch, run.steps[i])
            accepted = None
            if acceptance is not None:
                accepted = np.zeros(batch.num_rows, np.int64)
                table = acceptance_table(acceptance)
                for row in np.flatnonzero(batch.drafts.num_drafts).tolist():
                    name = batch.request_ids[row]
                    accepted[row] = table.is_accepted[draws[name]]
                    draws[name] += 1
                assert run.steps[i].num_drafts == int(batch.drafts.num_drafts.sum())
                assert run.steps[i].num_accepted == int(accepted.sum())
            finished = old.update(batch, None, accepted).finished
            assert i == len(run.steps) - 1 or not finished
        ended = run.finish(len(run.steps))
        assert [row.owner for row in ended] == list(finished)
        seen["ended"] += len(ended)
        for row in ended:
            held.append(row)
        if release_at_once:
            release()
        old.check_invariants()
        ranks.check_invariants()
        return True

    held: list[DecodeRow] = []

    def release():
        for row in held:
            old.release(RequestId(str(row.owner)))
            ranks.release(row)
        held.clear()

    for i, (num_tokens, more, rank, pause, draw) in enumerate(requests):
        arrive(f"r{i}", num_tokens, more, rank, draw)
        for _ in range(pause):
            advance()
    for _ in range(400):
        if not advance():
            if not held:
                break
            release()
    release()
    assert seen["ended"] + seen["preempted"] == seen["arrived"]
    assert ranks.num_used_blocks == 0
    ranks.check_invariants()


def test_a_cut_run_leaves_what_one_step_leaves():
    """Of a run of many steps only the first is made: the rest is decided again, with the same result."""
    whole, cut = (schedulers(num_blocks=64, block_size=4, acceptance=0.6)[1] for _ in range(2))
    rows = []
    for ranks in (whole, cut):
        row = ranks.reserve("r", rank=1, num_tokens=9, total_limit=50, key=(0, 1), draw=77)
        ranks.activate(row, 10)
        rows.append(row)
    long, short = DecodePlanner(whole, max_steps=16), DecodePlanner(cut, max_steps=16)
    run = long.plan()
    assert run is not None
    assert len(run.steps) == 16
    for i in range(16):
        part = short.plan()
        assert part is not None
        assert work_of(part.steps[0]) == work_of(run.steps[i])
        part.begin(1)
        assert part.finish(1) == []
    run.begin(16)
    assert run.finish(16) == []
    assert cut.num_tokens.tolist() == whole.num_tokens.tolist()
    assert cut.free_blocks.tolist() == whole.free_blocks.tolist()


def work_of(step):
    return {name: getattr(step, name) for name in step.__slots__}


@given(pairs=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=20))
def test_the_front_keeps_every_pair_that_none_exceeds(pairs):
    context, kv = np.array(pairs, np.int64).T
    found = set(zip(*fronts(context, kv), strict=True))
    assert found >= {pair for pair in pairs if not dominated(pair, context, kv)}
    assert found <= set(pairs)
