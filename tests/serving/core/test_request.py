"""The life of a request: every transition that exists, and every one that does not."""

import itertools

import pytest

from serving.core.errors import IllegalCall
from serving.core.request import STATE_OF_REASON, TRANSITIONS, OutcomeReason, Request, RequestState


def make_request(**changes):
    fields = {"request_id": "r0", "arrival_ns": 10, "num_prompt_tokens": 4, "max_tokens": 5, **changes}
    return Request(**fields)


def move(request, state, now_ns=None):
    """Bring the request to a state, with the call that leads there."""
    now_ns = request.updated_ns if now_ns is None else now_ns
    match state:
        case RequestState.WAITING:
            request.preempt(now_ns)
        case RequestState.PREFILLING:
            request.start_prefill(now_ns)
        case RequestState.TRANSFERRING:
            request.start_transfer(now_ns)
        case RequestState.DECODING:
            request.start_decode(now_ns)
        case RequestState.FINISHED:
            request.close(OutcomeReason.STOP, now_ns)
        case RequestState.REJECTED:
            request.close(OutcomeReason.QUEUE_FULL, now_ns)
        case RequestState.ABORTED:
            request.close(OutcomeReason.ABORT, now_ns)
        case RequestState.FAILED:
            request.close(OutcomeReason.ERROR, now_ns)


PATHS = {
    RequestState.WAITING: [],
    RequestState.PREFILLING: [RequestState.PREFILLING],
    RequestState.TRANSFERRING: [RequestState.PREFILLING, RequestState.TRANSFERRING],
    RequestState.DECODING: [RequestState.PREFILLING, RequestState.DECODING],
    **{
        state: [RequestState.PREFILLING, state]
        for state in (RequestState.FINISHED, RequestState.ABORTED, RequestState.FAILED)
    },
    RequestState.REJECTED: [RequestState.REJECTED],
}


def in_state(state):
    request = make_request()
    for step in PATHS[state]:
        move(request, step)
        if step is RequestState.PREFILLING:
            request.record_tokens(1, request.updated_ns)
    assert request.state is state
    return request


def fields_of(request):
    return {name: getattr(request, name) for name in Request.__slots__}


@pytest.mark.parametrize(("start", "end"), list(itertools.product(RequestState, RequestState)))
def test_the_table_has_every_transition_and_no_other_is_possible(start, end):
    request = in_state(start)
    before = fields_of(request)
    if end in TRANSITIONS[start] and not (end is RequestState.FINISHED and start is RequestState.WAITING):
        move(request, end)
        assert request.state is end
    else:
        with pytest.raises(IllegalCall):
            move(request, end)
        assert fields_of(request) == before
    request.check_invariants()


@pytest.mark.parametrize("reason", list(OutcomeReason))
def test_every_reason_leads_to_one_terminal_state_and_a_second_outcome_is_refused(reason):
    is_rejection = STATE_OF_REASON[reason] is RequestState.REJECTED
    request = in_state(RequestState.WAITING if is_rejection else RequestState.DECODING)
    outcome = request.close(reason, 99, "why")
    assert outcome is request.outcome
    assert (outcome.state, outcome.reason, outcome.message) == (STATE_OF_REASON[reason], reason, "why")
    assert (outcome.finished_ns, outcome.num_output_tokens) == (99, 0 if is_rejection else 1)
    assert request.is_over
    for again in OutcomeReason:
        with pytest.raises(IllegalCall):
            request.close(again, 100)
    assert request.outcome is outcome
    request.check_invariants()


def test_the_instants_of_a_disaggregated_life():
    request = make_request()
    request.mark_scheduled(12)
    request.start_prefill(15, num_cached_tokens=3, num_pool_tokens=2)
    request.record_tokens(1, 20, token_ids=(7,))
    request.start_transfer(20)
    request.start_decode(26)
    request.record_tokens(1, 30, token_ids=(8,))
    request.record_tokens(2, 33, token_ids=(9, 10))
    request.close(OutcomeReason.LENGTH, 33)
    assert (request.scheduled_ns, request.prefill_start_ns, request.first_token_ns) == (12, 15, 20)
    assert (request.last_token_ns, request.max_itl_ns) == (33, 10)
    assert (request.num_output_tokens, request.output_token_ids) == (4, [7, 8, 9, 10])
    assert (request.num_cached_tokens, request.num_pool_tokens) == (3, 2)
    request.check_invariants()


def test_a_preempted_request_keeps_its_tokens_and_its_first_instants():
    request = make_request(prompt_token_ids=(1, 2, 3, 4))
    request.start_prefill(15, num_cached_tokens=2)
    request.record_tokens(1, 20, token_ids=(5,))
    request.start_decode(20)
    request.preempt(25)
    assert (request.num_tokens, request.num_tokens_limit, request.num_preemptions) == (5, 9, 1)
    request.start_prefill(40, num_cached_tokens=4)
    request.restart(50)
    request.start_prefill(60)
    request.record_tokens(1, 70, token_ids=(6,))
    assert (request.scheduled_ns, request.prefill_start_ns, request.first_token_ns) == (15, 15, 20)
    assert (request.num_cached_tokens, request.num_restarts, request.max_itl_ns) == (2, 1, 50)
    assert request.token_ids(2, 6) == [3, 4, 5, 6]
    assert (request.token_ids(0, 2), request.token_ids(4, 5), request.token_ids(3, 3)) == ([1, 2], [5], [])
    request.check_invariants()


def test_a_run_of_tokens_counts_like_its_tokens_one_by_one():
    by_run, by_token = in_state(RequestState.DECODING), in_state(RequestState.DECODING)
    by_run.record_run(3, first_ns=14, last_ns=25, max_itl_ns=9)
    for now_ns in (14, 16, 25):
        by_token.record_tokens(1, now_ns)
    assert fields_of(by_run) == fields_of(by_token)


@pytest.mark.parametrize(
    "call",
    [
        lambda r: r.record_tokens(0, 20),
        lambda r: r.record_tokens(5, 20),  # one of five is there already
        lambda r: r.record_tokens(2, 20, token_ids=(1,)),
        lambda r: r.record_tokens(1, 9),
        lambda r: r.record_run(1, first_ns=20, last_ns=19, max_itl_ns=0),
        lambda r: r.record_run(2, first_ns=20, last_ns=22, max_itl_ns=3),
        lambda r: r.close(OutcomeReason.QUEUE_FULL, 20),
        lambda r: r.close(OutcomeReason.STOP, 9),
        lambda r: r.mark_scheduled(20),
        lambda r: r.start_prefill(20),
        lambda r: r.preempt(9),
    ],
)
def test_an_illegal_call_raises_and_changes_nothing(call):
    request = in_state(RequestState.DECODING)
    before = fields_of(request)
    with pytest.raises(IllegalCall):
        call(request)
    assert fields_of(request) == before
    request.check_invariants()


def test_a_request_cannot_be_rejected_after_a_token_nor_finish_without_one():
    preempted = in_state(RequestState.DECODING)
    preempted.preempt(20)
    with pytest.raises(IllegalCall, match="cannot be rejected"):
        preempted.close(OutcomeReason.QUEUE_TIMEOUT, 21)
    fresh = make_request()
    fresh.start_prefill(11)
    with pytest.raises(IllegalCall, match="without a token"):
        fresh.close(OutcomeReason.STOP, 12)


@pytest.mark.parametrize("cached", [{"num_cached_tokens": 4}, {"num_cached_tokens": -1}, {"num_pool_tokens": 1}])
def test_a_token_is_left_to_compute_and_the_pool_gave_no_more_than_was_cached(cached):
    request = make_request()
    with pytest.raises(IllegalCall, match="num_cached_tokens"):
        request.start_prefill(20, **cached)
    assert request.state is RequestState.WAITING


@pytest.mark.parametrize("changes", [{"num_prompt_tokens": 0}, {"max_tokens": 0}, {"prompt_token_ids": (1, 2)}])
def test_lengths_are_checked_at_the_door(changes):
    with pytest.raises(IllegalCall, match="request r0"):
        make_request(**changes)
