"""Every workload drains, whatever the memory: no livelock, no leak, no step without progress."""

from hypothesis import given, settings
from hypothesis import strategies as st

from serving.core.batch_scheduler import BatchScheduler
from serving.core.block_hash import hash_prompt
from serving.core.errors import NoSlot, OutOfBlocks

BLOCK_SIZE = 2
NUM_BLOCKS = 8
MAX_TOTAL = NUM_BLOCKS * BLOCK_SIZE + 1

PROFILE = settings(derandomize=True, database=None, deadline=None, max_examples=120)

request_shapes = st.tuples(
    st.integers(1, MAX_TOTAL - 1),  # prompt
    st.integers(1, MAX_TOTAL - 1),  # output, cut to what fits
    st.integers(0, 2),  # priority
    st.integers(0, 1),  # rank
    st.sampled_from([0, 0, 4, 10]),  # prefix in the shared pool
)


def make_scheduler(**changes):
    limits = {
        "num_ranks": 2,
        "num_blocks": NUM_BLOCKS,
        "block_size": BLOCK_SIZE,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 5,
        "max_model_len": MAX_TOTAL,
    }
    return BatchScheduler(**{**limits, **changes})


def assert_at_rest(scheduler):
    assert scheduler.request_ids == ()
    assert scheduler.free_blocks.tolist() == [NUM_BLOCKS] * scheduler.num_ranks
    assert scheduler.num_pending_tokens.tolist() == [0] * scheduler.num_ranks
    scheduler.check_invariants()


@PROFILE
@given(
    shapes=st.lists(request_shapes, min_size=1, max_size=14),
    policy=st.sampled_from(["fcfs", "priority"]),
    is_caching=st.booleans(),
    num_at_once=st.integers(1, 14),
    load_steps=st.integers(0, 3),
)
def test_a_colocated_instance_finishes_everything(shapes, policy, is_caching, num_at_once, load_steps):
    scheduler = make_scheduler(policy=policy, enable_prefix_caching=is_caching)
    total_by_id = {}
    pending = []
    for i, (num_prompt, num_output, priority, rank, num_external) in enumerate(shapes):
        total_by_id[f"r{i}"] = min(num_prompt + num_output, MAX_TOTAL)
        pending.append((f"r{i}", num_prompt, priority, rank, num_external, i))
    finished, loading, num_tokens_of = [], [], {}
    # With n requests, each of which can be set back by each of the others that come before it.
    max_steps = len(shapes) * sum(total_by_id.values()) + 10 * len(shapes) * (load_steps + 1)
    for _ in range(max_steps):
        for request_id, num_prompt, priority, rank, num_external, i in pending[:num_at_once]:
            scheduler.add(
                request_id=request_id,
                rank=rank,
                num_tokens=num_prompt,
                total_limit=total_by_id[request_id],
                priority=priority,
                order=i,
                block_hashes=hash_prompt(range(num_prompt), BLOCK_SIZE),
                num_external_tokens=num_external,
            )
            num_tokens_of[request_id] = num_prompt
        del pending[:num_at_once]
        for load in [load for load, left in loading if left == 0]:
            num_computed = load.num_cached_tokens + load.num_external_tokens
            scheduler.activate(request_id=load.request_id, num_computed_tokens=num_computed)
        loading = [(load, left - 1) for load, left in loading if left]
        batch = scheduler.schedule()
        if batch is None:
            if not (pending or loading):
                break
            continue
        loading += [(load, load_steps) for load in batch.loads]
        if not batch.num_rows:
            continue
        result = scheduler.update(batch)
        for row in result.sampled_rows.tolist():
            num_tokens_of[batch.request_ids[row]] += 1
        for request_id in result.finished:
            assert num_tokens_of[request_id] == total_by_id[request_id]  # no token lost, none twice
            scheduler.release(request_id)
        finished += result.finished
        scheduler.check_invariants()
    assert sorted(finished) == sorted(total_by_id)
    assert_at_rest(scheduler)


@PROFILE
@given(shapes=st.lists(request_shapes, min_size=1, max_size=14), transfer_steps=st.integers(0, 3))
def test_a_decode_instance_finishes_everything_that_is_routed_back_to_it(shapes, transfer_steps):
    scheduler = make_scheduler(preempt_to="caller", enable_prefix_caching=False)
    total_by_id = {f"r{i}": max(p + 2, min(p + o, MAX_TOTAL)) for i, (p, o, *_) in enumerate(shapes)}
    total_by_id = {request_id: min(total, MAX_TOTAL) for request_id, total in total_by_id.items()}
    queue = [
        (i, f"r{i}", rank, num_prompt)
        for i, (num_prompt, _, _, rank, _) in enumerate(shapes)
        if num_prompt + 1 < total_by_id[f"r{i}"]
    ]
    num_expected = len(queue)
    arriving, finished = [], []
    for _ in range(num_expected * (sum(total_by_id.values()) + 10 * (transfer_steps + 1))):
        still_waiting = []
        for order, request_id, rank, num_tokens in sorted(queue):
            try:
                scheduler.reserve(
                    request_id=request_id,
                    rank=rank,
                    num_tokens=num_tokens,
                    total_limit=total_by_id[request_id],
                    priority=0,
                    order=order,
                )
            except (OutOfBlocks, NoSlot):
                still_waiting.append((order, request_id, rank, num_tokens))
                continue
            arriving.append([transfer_steps, request_id, num_tokens])
        queue = still_waiting
        for transfer in [t for t in arriving if t[0] == 0]:
            arriving.remove(transfer)
            _, request_id, num_tokens = transfer
            is_grown = num_tokens + 1 < total_by_id[request_id]  # the prefill sampled one more
            num_computed = num_tokens if is_grown else num_tokens - 1
            scheduler.activate(request_id=request_id, num_computed_tokens=num_computed, num_tokens=num_computed + 1)
        for transfer in arriving:
            transfer[0] -= 1
        batch = scheduler.schedule()
        if batch is None:
            if not (queue or arriving):
                break
            continue
        for preempted in batch.preempted:
            order = int(preempted.request_id[1:])
            queue.append((order, preempted.request_id, preempted.rank, preempted.num_tokens))
        if batch.num_rows:
            result = scheduler.update(batch)
            for request_id in result.finished:
                scheduler.release(request_id)
            finished += result.finished
        scheduler.check_invariants()
    assert len(finished) == num_expected == len(set(finished))
    assert_at_rest(scheduler)


@PROFILE
@given(prompts=st.lists(st.integers(1, MAX_TOTAL - 1), min_size=1, max_size=14), hold_steps=st.integers(0, 4))
def test_a_prefill_instance_never_preempts_and_drains_as_its_blocks_are_read(prompts, hold_steps):
    scheduler = make_scheduler(num_ranks=1, enable_prefix_caching=False)
    for i, num_prompt in enumerate(prompts):
        scheduler.add(
            request_id=f"r{i}",
            rank=0,
            num_tokens=num_prompt,
            total_limit=num_prompt + 1,
            priority=0,
            order=i,
        )
    being_read, finished = [], []
    for _ in range(sum(prompts) + (hold_steps + 2) * len(prompts)):
        being_read = [(request_id, left - 1) for request_id, left in being_read]
        for request_id in [request_id for request_id, left in being_read if left < 0]:
            scheduler.release(request_id)
        being_read = [(request_id, left) for request_id, left in being_read if left >= 0]
        batch = scheduler.schedule()
        if batch is not None:
            assert not batch.preempted
            result = scheduler.update(batch)
            being_read += [(request_id, hold_steps) for request_id in result.finished]
            finished += result.finished
        elif not being_read:
            break
    assert finished == [f"r{i}" for i in range(len(prompts))]  # first come, first served
    assert_at_rest(scheduler)
