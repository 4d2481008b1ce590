"""Batch scheduler against a model that also keeps what is written in every block.

A row that reads its context finds exactly its own tokens there, whatever was cached, shared, preempted or evicted.
"""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from serving.core.batch_scheduler import BatchScheduler
from serving.core.block_hash import hash_prompt
from serving.core.errors import IllegalCall, NoSlot, OutOfBlocks, UnfitRequest

BLOCK_SIZE = 2
NUM_RANKS = 2
NUM_BLOCKS = 8
MAX_NUM_SEQS = 3
BUDGET = 4  # with drafts, 2 * MAX_NUM_SEQS
MAX_MODEL_LEN = 18

WAITING, NOT_READY, RUNNING, HELD, ABORTING = "waiting", "not ready", "running", "held", "aborting"


class Model:
    """What the test knows of one request."""

    def __init__(self, request_id, rank, tokens, limit, priority, order):
        self.request_id = request_id
        self.rank = rank
        self.tokens = tokens
        self.limit = limit
        self.key = (priority, order)
        self.computed = 0
        self.has_draft = False
        self.state = WAITING


class BatchSchedulerMachine(RuleBasedStateMachine):
    @initialize(
        preempt_to=st.sampled_from(["self", "caller"]),
        policy=st.sampled_from(["fcfs", "priority"]),
        num_speculative_tokens=st.sampled_from([0, 1]),
    )
    def start(self, preempt_to, policy, num_speculative_tokens):
        self.preempt_to = preempt_to
        self.is_speculating = num_speculative_tokens > 0
        self.budget = max(BUDGET, 2 * MAX_NUM_SEQS * num_speculative_tokens)
        self.policy = policy
        self.scheduler = BatchScheduler(
            num_ranks=NUM_RANKS,
            num_blocks=NUM_BLOCKS,
            block_size=BLOCK_SIZE,
            max_num_seqs=MAX_NUM_SEQS,
            max_num_batched_tokens=self.budget,
            max_model_len=MAX_MODEL_LEN,
            num_speculative_tokens=num_speculative_tokens,
            policy=policy,
            preempt_to=preempt_to,
        )
        self.requests = {}
        self.batch = None
        self.num_created = 0
        self.cache = {}  # (rank, block, offset) -> all the tokens up to there

    def with_state(self, *states):
        return sorted(r.request_id for r in self.requests.values() if r.state in states)

    def draw_one(self, data, *states):
        return self.requests[data.draw(st.sampled_from(self.with_state(*states)))]

    def new_model(self, rank, num_tokens, num_more, priority, family):
        """Prompts of a family begin alike and end differently."""
        order = self.num_created
        self.num_created += 1
        tokens = [family * 100 + i for i in range(num_tokens)]
        if num_tokens % 3 == 0:
            tokens[-1] = 1000 + order
        priority = priority if self.policy == "priority" else 0
        return Model(f"r{order:03d}", rank, tokens, num_tokens + num_more, priority, order)

    def write(self, request, start, end):
        table = self.scheduler.block_table(request.request_id).tolist()
        for i in range(start, end):
            place = (request.rank, table[i // BLOCK_SIZE], i % BLOCK_SIZE)
            self.cache[place] = tuple(request.tokens[: i + 1])

    def write_held(self, request, position):
        """The accepted draft's slot, also of a request that has just ended."""
        table = self.scheduler.block_table(request.request_id).tolist()
        place = (request.rank, table[position // BLOCK_SIZE], position % BLOCK_SIZE)
        assert self.cache[place] == "draft"
        self.cache[place] = tuple(request.tokens[: position + 1])

    def check_context(self, request):
        table = self.scheduler.block_table(request.request_id).tolist()
        for i in range(request.computed):
            place = (request.rank, table[i // BLOCK_SIZE], i % BLOCK_SIZE)
            assert self.cache[place] == tuple(request.tokens[: i + 1])

    sizes = {  # noqa: RUF012
        "rank": st.integers(0, NUM_RANKS - 1),
        "num_tokens": st.integers(1, 11),
        "num_more": st.integers(1, 10),
        "priority": st.integers(0, 2),
        "family": st.integers(0, 1),
    }

    @rule(num_external=st.sampled_from([0, 0, 3, 8]), **sizes)
    def add(self, rank, num_tokens, num_more, priority, family, num_external):
        request = self.new_model(rank, num_tokens, num_more, priority, family)

        def enter():
            self.scheduler.add(
                request_id=request.request_id,
                rank=rank,
                num_tokens=num_tokens,
                total_limit=request.limit,
                priority=priority,
                order=request.key[1],
                block_hashes=hash_prompt(request.tokens, BLOCK_SIZE),
                num_external_tokens=num_external,
            )

        if request.limit > MAX_MODEL_LEN or -(-(request.limit - 1) // BLOCK_SIZE) > NUM_BLOCKS:
            with pytest.raises(UnfitRequest):
                enter()
            return
        enter()
        self.requests[request.request_id] = request

    @rule(**sizes)
    def reserve(self, rank, num_tokens, num_more, priority, family):
        request = self.new_model(rank, num_tokens, num_more, priority, family)
        num_free = int(self.scheduler.free_blocks[rank])
        num_needed = -(-num_tokens // BLOCK_SIZE)
        is_full = self.scheduler.num_seqs[rank] == MAX_NUM_SEQS
        try:
            block_ids = self.scheduler.reserve(
                request_id=request.request_id,
                rank=rank,
                num_tokens=num_tokens,
                total_limit=request.limit,
                priority=priority,
                order=request.key[1],
            )
        except UnfitRequest:
            assert request.limit > MAX_MODEL_LEN or -(-(request.limit - 1) // BLOCK_SIZE) > NUM_BLOCKS
        except NoSlot:
            assert is_full
        except OutOfBlocks:
            assert num_needed > num_free
        else:
            assert not is_full
            assert len(block_ids) == num_needed
            request.state = NOT_READY
            self.requests[request.request_id] = request

    @precondition(lambda self: self.with_state(NOT_READY))
    @rule(data=st.data(), has_first_token=st.booleans())
    def activate(self, data, has_first_token):
        request = self.draw_one(data, NOT_READY)
        if has_first_token and len(request.tokens) + 1 < request.limit:
            request.tokens.append(5000 + len(request.tokens))
        num_room = len(self.scheduler.block_table(request.request_id)) * BLOCK_SIZE
        computed = data.draw(st.integers(request.computed, min(len(request.tokens) - 1, num_room)))
        self.write(request, request.computed, computed)
        request.computed = computed
        self.scheduler.activate(
            request_id=request.request_id, num_computed_tokens=computed, num_tokens=len(request.tokens)
        )
        request.state = RUNNING

    @precondition(lambda self: self.batch is None)
    @rule()
    def start_step(self):
        self.schedule()

    def schedule(self):
        batch = self.scheduler.schedule()
        if batch is None:
            return
        for preempted in batch.preempted:
            request = self.requests[preempted.request_id]
            assert request.state == RUNNING
            assert preempted.num_tokens == len(request.tokens)
            ready_keys = [r.key for r in self.requests.values() if r.state == RUNNING and r.rank == request.rank]
            assert request.key == max(ready_keys)
            assert len(ready_keys) > 1
            request.computed = 0
            request.has_draft = False
            request.state = WAITING
            if self.preempt_to == "caller":
                del self.requests[preempted.request_id]
        loads = {load.request_id: load for load in batch.loads}
        for admitted in batch.admitted:
            request = self.requests[admitted.request_id]
            assert request.state == WAITING
            waiting = [r.key for r in self.requests.values() if (r.state, r.rank) == (WAITING, request.rank)]
            assert request.key == min(waiting)
            request.computed = admitted.num_cached_tokens
            request.state = RUNNING
            load = loads.get(admitted.request_id)
            if load is not None:
                request.state = NOT_READY
                table = self.scheduler.block_table(request.request_id)
                start = load.num_cached_tokens // BLOCK_SIZE
                assert load.num_cached_tokens == request.computed
                assert load.num_external_tokens == len(load.block_ids) * BLOCK_SIZE > 0
                assert request.computed + load.num_external_tokens < len(request.tokens)
                assert load.block_ids.tolist() == table[start : start + len(load.block_ids)].tolist()
        self.check_rows(batch)
        if batch.num_rows:
            self.batch = batch

    def check_rows(self, batch):
        assert batch.ranks.tolist() == sorted(batch.ranks.tolist())
        assert (batch.sums_by_rank(batch.num_scheduled_tokens)[0] <= self.budget).all()
        assert len(set(batch.request_ids.tolist())) == batch.num_rows
        rows = zip(
            batch.request_ids.tolist(),
            batch.ranks.tolist(),
            batch.num_computed_tokens.tolist(),
            batch.num_scheduled_tokens.tolist(),
            batch.samples.tolist(),
            strict=True,
        )
        assert (batch.drafts is not None) == self.is_speculating
        for row, (request_id, rank, computed, scheduled, samples) in enumerate(rows):
            request = self.requests[request_id]
            if self.is_speculating:
                scheduled -= self.check_drafts(batch, row, request)
            assert (request.state, request.rank, request.computed) == (RUNNING, rank, computed)
            assert 1 <= scheduled <= len(request.tokens) - computed
            assert samples == (computed + scheduled == len(request.tokens))
            self.check_context(request)
        for rank in range(NUM_RANKS):  # a rank with ready requests never idles, unless one waits for a block
            ready = [r for r in self.requests.values() if (r.state, r.rank) == (RUNNING, rank)]
            if len(ready) > 1:
                assert rank in batch.ranks

    def check_drafts(self, batch, row, request):
        """Drafts and lookahead stay within the request's blocks and its limit; the number of drafts."""
        num_drafts = int(batch.drafts.num_drafts[row])
        num_slots = len(self.scheduler.block_table(request.request_id)) * BLOCK_SIZE
        num_tokens = len(request.tokens)
        assert batch.drafts.is_behind[row] != request.has_draft
        if num_drafts:
            assert request.has_draft
            assert num_drafts == 1
            assert num_tokens < num_slots
            assert num_tokens + 2 <= request.limit
        if batch.drafts.makes_draft[row]:
            assert batch.samples[row]
            assert num_tokens + num_drafts < num_slots
            assert num_tokens + 3 <= request.limit
        assert num_slots < request.limit + BLOCK_SIZE
        return num_drafts

    @precondition(lambda self: self.batch is not None)
    @rule(data=st.data())
    def update(self, data):
        num_rows = self.batch.num_rows
        flags = st.lists(st.sampled_from([False] * 4 + [True]), min_size=num_rows, max_size=num_rows)
        accepted = st.lists(st.booleans(), min_size=num_rows, max_size=num_rows)
        self.finish_step(np.array(data.draw(flags)), data.draw(accepted))

    @rule(num_steps=st.integers(2, 6), accepted=st.booleans())
    def run(self, num_steps, accepted):
        """Several steps on end, so that requests grow old enough to be short of blocks."""
        for _ in range(num_steps):
            if self.batch is None:
                self.schedule()
            if self.batch is not None:
                self.finish_step(np.zeros(self.batch.num_rows, dtype=bool), [accepted] * self.batch.num_rows)
            self.agrees_with_the_model()

    def finish_step(self, stop_mask, accepted):
        batch, self.batch = self.batch, None
        num_drafts = np.zeros(batch.num_rows, np.int64) if batch.drafts is None else batch.drafts.num_drafts
        num_accepted = num_drafts * np.array(accepted)
        for row, request_id in enumerate(batch.request_ids.tolist()):
            request = self.requests[request_id]
            end = request.computed + int(batch.num_scheduled_tokens[row] - num_drafts[row])
            if num_drafts[row]:  # what is written may be wrong, and is not to be read then
                table = self.scheduler.block_table(request_id).tolist()
                self.cache[request.rank, table[end // BLOCK_SIZE], end % BLOCK_SIZE] = "draft"
            self.write(request, request.computed, end)
            request.computed = end
        result = self.scheduler.update(batch, stop_mask, num_accepted if self.is_speculating else None)
        assert sorted(result.aborted) == self.with_state(ABORTING)
        for request_id in result.aborted:
            del self.requests[request_id]
        expected_rows, expected_finished = [], []
        for row, request_id in enumerate(batch.request_ids.tolist()):
            request = self.requests.get(request_id)
            if request is None or not batch.samples[row]:
                continue
            expected_rows.append(row)
            for _ in range(1 + num_accepted[row]):
                request.tokens.append(9000 + request.key[1] * 50 + len(request.tokens))
            if num_accepted[row]:
                self.write_held(request, request.computed)
                request.computed += 1
            request.has_draft = self.is_speculating and bool(batch.drafts.makes_draft[row])
            if stop_mask[row] or len(request.tokens) == request.limit:
                expected_finished.append(request_id)
                request.state = HELD
        assert result.sampled_rows.tolist() == expected_rows
        assert list(result.finished) == expected_finished
        assert result.stopped.tolist() == stop_mask[result.finished_rows].tolist()

    @precondition(lambda self: self.with_state(HELD))
    @rule(data=st.data())
    def release(self, data):
        request = self.draw_one(data, HELD)
        self.check_context(request)
        self.scheduler.release(request.request_id)
        del self.requests[request.request_id]

    @precondition(lambda self: self.with_state(WAITING, NOT_READY, RUNNING, HELD))
    @rule(data=st.data())
    def abort(self, data):
        request = self.draw_one(data, WAITING, NOT_READY, RUNNING, HELD)
        is_in_flight = self.batch is not None and request.request_id in self.batch.request_ids.tolist()
        assert self.scheduler.abort(request.request_id) is not is_in_flight
        if is_in_flight:
            request.state = ABORTING
        else:
            del self.requests[request.request_id]

    @precondition(lambda self: self.batch is not None)
    @rule()
    def a_second_schedule_is_refused(self):
        with pytest.raises(IllegalCall):
            self.scheduler.schedule()

    @invariant()
    def agrees_with_the_model(self):
        self.scheduler.check_invariants()
        assert sorted(self.scheduler.request_ids) == sorted(self.requests)
        assert self.scheduler.num_waiting == len(self.with_state(WAITING))
        assert self.scheduler.num_held == len(self.with_state(HELD))
        if not self.requests:
            assert self.scheduler.free_blocks.tolist() == [NUM_BLOCKS] * NUM_RANKS


TestBatchScheduler = BatchSchedulerMachine.TestCase
TestBatchScheduler.settings = settings(
    derandomize=True, database=None, deadline=None, max_examples=500, stateful_step_count=50
)
