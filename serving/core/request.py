"""The life of one request: its states, its one outcome, and the instants that the metrics are made from.

Owns: the transition table, the counts of tokens and the timestamps of one request.
Must not know: instances, blocks, what the sampling parameters mean, any clock (every instant is given).
Source: states of vLLM v1's RequestStatus, with one for the hand-over from prefill to decode.
"""

from dataclasses import dataclass, field
from enum import Enum, StrEnum

from serving.core.errors import IllegalCall
from serving.core.ids import BlockHash, RequestId


class RequestState(Enum):
    WAITING = "waiting"
    PREFILLING = "prefilling"
    TRANSFERRING = "transferring"
    DECODING = "decoding"
    FINISHED = "finished"
    REJECTED = "rejected"
    ABORTED = "aborted"
    FAILED = "failed"

    @property
    def is_terminal(self) -> bool:
        return not TRANSITIONS[self]


_W, _P, _T, _D = (
    RequestState.WAITING,
    RequestState.PREFILLING,
    RequestState.TRANSFERRING,
    RequestState.DECODING,
)
_LOST = {RequestState.ABORTED, RequestState.FAILED}

# Back to WAITING: preempted, or its instance was lost. PREFILLING -> DECODING: colocated, no hand-over.
# TRANSFERRING or WAITING -> FINISHED: the text layer found a stop string in tokens that it read late.
TRANSITIONS: dict[RequestState, frozenset[RequestState]] = {
    _W: frozenset({_P, RequestState.FINISHED, RequestState.REJECTED, *_LOST}),
    _P: frozenset({_W, _T, _D, RequestState.FINISHED, *_LOST}),
    _T: frozenset({_W, _D, RequestState.FINISHED, *_LOST}),
    _D: frozenset({_W, RequestState.FINISHED, *_LOST}),
    RequestState.FINISHED: frozenset(),
    RequestState.REJECTED: frozenset(),
    RequestState.ABORTED: frozenset(),
    RequestState.FAILED: frozenset(),
}


class OutcomeReason(StrEnum):
    """Why a request ended. The first four are the finish reasons that a client sees."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"
    PROMPT_TOO_LONG = "prompt_too_long"
    QUEUE_FULL = "queue_full"
    QUEUE_TIMEOUT = "queue_timeout"
    NO_INSTANCE = "no_instance"
    DRAINING = "draining"


STATE_OF_REASON: dict[OutcomeReason, RequestState] = {
    OutcomeReason.STOP: RequestState.FINISHED,
    OutcomeReason.LENGTH: RequestState.FINISHED,
    OutcomeReason.ABORT: RequestState.ABORTED,
    OutcomeReason.ERROR: RequestState.FAILED,
    OutcomeReason.PROMPT_TOO_LONG: RequestState.REJECTED,
    OutcomeReason.QUEUE_FULL: RequestState.REJECTED,
    OutcomeReason.QUEUE_TIMEOUT: RequestState.REJECTED,
    OutcomeReason.NO_INSTANCE: RequestState.REJECTED,
    OutcomeReason.DRAINING: RequestState.REJECTED,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a request ended. There is exactly one per request."""

    request_id: RequestId
    state: RequestState
    reason: OutcomeReason
    message: str
    num_output_tokens: int
    finished_ns: int


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """One request. Fields are read by everybody and changed by the methods only.

    `prompt_token_ids` is None where only lengths are known (traces). `block_hashes` are those of the prompt's
    full blocks, in order. A lower `priority` is sooner. `sampling` is opaque here. No instant may be earlier
    than the one before. An illegal call raises IllegalCall and changes nothing.
    """

    request_id: RequestId
    arrival_ns: int
    num_prompt_tokens: int
    max_tokens: int
    prompt_token_ids: tuple[int, ...] | None = None
    block_hashes: tuple[BlockHash, ...] = ()
    priority: int = 0
    sampling: object = None

    state: RequestState = field(default=RequestState.WAITING, init=False)
    outcome: Outcome | None = field(default=None, init=False)
    output_token_ids: list[int] = field(default_factory=list, init=False)  # empty if only counts are known
    num_output_tokens: int = field(default=0, init=False)
    drafting: object = field(default=None, init=False)  # opaque here: what speculative decoding goes on from
    num_cached_tokens: int = field(default=0, init=False)  # of the prompt, at the first prefill
    num_pool_tokens: int = field(default=0, init=False)  # those of them that came from the shared pool
    num_preemptions: int = field(default=0, init=False)
    num_restarts: int = field(default=0, init=False)

    scheduled_ns: int | None = field(default=None, init=False)  # an instance was chosen, for the first time
    prefill_start_ns: int | None = field(default=None, init=False)  # first step that computes its prompt
    first_token_ns: int | None = field(default=None, init=False)
    decode_start_ns: int | None = field(default=None, init=False)  # its KV has come, the last time that it did
    last_token_ns: int | None = field(default=None, init=False)
    max_itl_ns: int = field(default=0, init=False)  # longest gap between tokens; the sum is last - first
    updated_ns: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.num_prompt_tokens < 1 or self.max_tokens < 1:
            raise IllegalCall(
                f"request {self.request_id}: num_prompt_tokens {self.num_prompt_tokens} and max_tokens "
                f"{self.max_tokens} must be at least 1"
            )
        if self.prompt_token_ids is not None and len(self.prompt_token_ids) != self.num_prompt_tokens:
            raise IllegalCall(
                f"request {self.request_id}: {len(self.prompt_token_ids)} prompt_token_ids, "
                f"but num_prompt_tokens {self.num_prompt_tokens}"
            )
        self.updated_ns = self.arrival_ns

    @property
    def num_tokens(self) -> int:
        """Tokens known: the prompt of the next prefill, should it be preempted now."""
        return self.num_prompt_tokens + self.num_output_tokens

    @property
    def num_tokens_limit(self) -> int:
        """Tokens known when it ends by length."""
        return self.num_prompt_tokens + self.max_tokens

    def token_ids(self, start: int, stop: int) -> list[int]:
        """Known token ids of positions [start, stop): of the prompt, then of the output."""
        assert self.prompt_token_ids is not None
        assert 0 <= start <= stop <= self.num_prompt_tokens + len(self.output_token_ids)
        num_prompt = self.num_prompt_tokens
        return [
            *self.prompt_token_ids[start:stop],
            *self.output_token_ids[max(0, start - num_prompt) : max(0, stop - num_prompt)],
        ]

    @property
    def is_over(self) -> bool:
        return self.outcome is not None

    def mark_scheduled(self, now_ns: int) -> None:
        """An instance was chosen for it; only the first instant is kept."""
        if self.state is not RequestState.WAITING:
            raise IllegalCall(f"request {self.request_id}: scheduled while {self.state.value}")
        self._advance(now_ns)
        if self.scheduled_ns is None:
            self.scheduled_ns = now_ns

    def start_prefill(self, now_ns: int, *, num_cached_tokens: int = 0, num_pool_tokens: int = 0) -> None:
        """The first step that computes its tokens begins; `num_cached_tokens` were found in a cache, of these
        `num_pool_tokens` in the shared pool.
        """
        if not 0 <= num_pool_tokens <= num_cached_tokens < self.num_tokens:
            raise IllegalCall(
                f"request {self.request_id}: num_cached_tokens {num_cached_tokens}, of these num_pool_tokens "
                f"{num_pool_tokens}, of {self.num_tokens} tokens"
            )
        self._move(RequestState.PREFILLING, now_ns)
        if self.scheduled_ns is None:
            self.scheduled_ns = now_ns
        if self.prefill_start_ns is None:
            self.prefill_start_ns = now_ns
            self.num_cached_tokens = num_cached_tokens
            self.num_pool_tokens = num_pool_tokens

    def start_transfer(self, now_ns: int) -> None:
        """Its prefill is done and its cache goes to the decode rank."""
        self._move(RequestState.TRANSFERRING, now_ns)

    def start_decode(self, now_ns: int) -> None:
        self._move(RequestState.DECODING, now_ns)
        self.decode_start_ns = now_ns

    def preempt(self, now_ns: int) -> None:
        """Its blocks were taken; all its known tokens are to be prefilled again."""
        self._move(RequestState.WAITING, now_ns)
        self.drafting = None
        self.num_preemptions += 1

    def restart(self, now_ns: int) -> None:
        """Its instance was lost; it goes on elsewhere from the tokens that are known."""
        self._move(RequestState.WAITING, now_ns)
        self.drafting = None
        self.num_restarts += 1

    def record_tokens(self, num_tokens: int, now_ns: int, *, token_ids: tuple[int, ...] = ()) -> None:
        """`num_tokens` new tokens came out of one step; `token_ids` are given where tokens are real."""
        self.record_run(num_tokens, first_ns=now_ns, last_ns=now_ns, max_itl_ns=0, token_ids=token_ids)

    def record_run(
        self,
        num_tokens: int,
        *,
        first_ns: int,
        last_ns: int,
        max_itl_ns: int,
        token_ids: tuple[int, ...] = (),
    ) -> None:
        """The tokens of several steps at once, for engines that account for whole batches in arrays.

        `max_itl_ns` is the longest gap inside the run; the gap before it is seen here.
        """
        if self.state not in (RequestState.PREFILLING, RequestState.DECODING):
            raise IllegalCall(f"request {self.request_id}: new tokens while {self.state.value}")
        if not 1 <= num_tokens <= self.max_tokens - self.num_output_tokens:
            raise IllegalCall(
                f"request {self.request_id}: {num_tokens} new tokens after {self.num_output_tokens}, "
                f"max_tokens is {self.max_tokens}"
            )
        if token_ids and len(token_ids) != num_tokens:
            raise IllegalCall(f"request {self.request_id}: {len(token_ids)} ids for {num_tokens} tokens")
        if not first_ns <= last_ns or not 0 <= max_itl_ns <= last_ns - first_ns:
            raise IllegalCall(f"request {self.request_id}: run from {first_ns} to {last_ns} ns, gap of {max_itl_ns} ns")
        self._advance(first_ns)
        self.updated_ns = last_ns
        if self.first_token_ns is None:
            self.first_token_ns = first_ns
        if self.last_token_ns is not None:
            max_itl_ns = max(max_itl_ns, first_ns - self.last_token_ns)
        self.max_itl_ns = max(self.max_itl_ns, max_itl_ns)
        self.last_token_ns = last_ns
        self.num_output_tokens += num_tokens
        self.output_token_ids.extend(token_ids)

    def close(self, reason: OutcomeReason, now_ns: int, message: str = "") -> Outcome:
        """End the request; the reason decides the terminal state. A second outcome is an IllegalCall."""
        state = STATE_OF_REASON[reason]
        if state is RequestState.REJECTED and self.num_output_tokens:
            raise IllegalCall(
                f"request {self.request_id}: cannot be rejected ({reason}), a client has had tokens of it"
            )
        if state is RequestState.FINISHED and not self.num_output_tokens:
            raise IllegalCall(f"request {self.request_id}: cannot finish ({reason}) without a token")
        self._move(state, now_ns)
        self.outcome = Outcome(
            request_id=self.request_id,
            state=state,
            reason=reason,
            message=message,
            num_output_tokens=self.num_output_tokens,
            finished_ns=now_ns,
        )
        return self.outcome

    def check_invariants(self) -> None:
        """Raise AssertionError if the fields contradict each other."""
        assert self.state.is_terminal == (self.outcome is not None)
        assert 0 <= self.num_output_tokens <= self.max_tokens
        assert len(self.output_token_ids) in (0, self.num_output_tokens)
        assert 0 <= self.num_pool_tokens <= self.num_cached_tokens
        assert (self.first_token_ns is None) == (self.num_output_tokens == 0)
        assert (self.last_token_ns is None) == (self.first_token_ns is None)
        known = (self.scheduled_ns, self.prefill_start_ns, self.first_token_ns, self.last_token_ns)
        instants = [self.arrival_ns, *(ns for ns in known if ns is not None), self.updated_ns]
        assert instants == sorted(instants)
        if self.first_token_ns is not None and self.last_token_ns is not None:
            assert 0 <= self.max_itl_ns <= self.last_token_ns - self.first_token_ns
        if self.outcome is not None:
            assert self.outcome.state is self.state is STATE_OF_REASON[self.outcome.reason]
            assert self.outcome.num_output_tokens == self.num_output_tokens
            assert self.outcome.finished_ns == self.updated_ns

    def _move(self, state: RequestState, now_ns: int) -> None:
        if state not in TRANSITIONS[self.state]:
            raise IllegalCall(f"request {self.request_id}: no transition {self.state.value} -> {state.value}")
        self._advance(now_ns)
        self.state = state

    def _advance(self, now_ns: int) -> None:
        if now_ns < self.updated_ns:
            raise IllegalCall(
                f"request {self.request_id}: instant {now_ns} ns is before the last one, {self.updated_ns} ns"
            )
        self.updated_ns = now_ns
