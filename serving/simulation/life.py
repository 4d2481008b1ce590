"""What a run in virtual time knows of a request that is under way, and what it writes down when that is over.

Owns: one object per request in flight; columns for all that have arrived.
Must not know: who decides.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter

from serving.core.decode_ranks import DecodeRow
from serving.core.ids import BlockHash, RequestId
from serving.core.prompt_batcher import Prompt
from serving.core.request import STATE_OF_REASON, OutcomeReason
from serving.records import OUTCOMES
from serving.simulation.columns import NEVER, RequestColumns
from serving.simulation.decode_instance import DecodeInstance
from serving.simulation.growing_columns import as_int16, as_int32, as_int64, filled_column
from serving.simulation.prefill_instance import PrefillInstance
from serving.workloads.workload import Workload

REASONS = tuple(str(reason) for reason in OutcomeReason)
OUTCOME_OF_REASON = {reason: OUTCOMES.index(state.value) for reason, state in STATE_OF_REASON.items()}
CODE_OF_REASON = {reason: code for code, reason in enumerate(OutcomeReason)}


@dataclass(slots=True, eq=False)
class Life:
    """A request from its arrival to its outcome."""

    index: int  # in the workload
    request_id: RequestId
    key: tuple[int, int]  # priority, and order of arrival from 1: the smaller, the sooner served
    num_prompt_tokens: int
    max_tokens: int
    arrival_ns: int
    draw: int  # its first place in the table of draws
    block_hashes: Sequence[BlockHash] = ()
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    num_pool_tokens: int = 0
    num_preemptions: int = 0
    scheduled_ns: int = NEVER
    prefill_start_ns: int = NEVER
    first_token_ns: int = NEVER
    decode_start_ns: int = NEVER
    last_token_ns: int = NEVER
    is_fresh: bool = True  # its admission is tried for the first time
    prefill: PrefillInstance | None = None
    prompt: Prompt | None = None
    decode: DecodeInstance | None = None
    row: DecodeRow | None = None
    needs_prefill: bool = False  # its blocks at the prefill instance, for itself
    prefill_holds: int = 0  # who needs its blocks there: itself, and movements
    decode_holds: int = 0
    waits_for_release: bool = field(default=False)  # preempted, while a movement still holds its blocks

    @property
    def num_tokens(self) -> int:
        """Tokens known."""
        return self.num_prompt_tokens + self.num_output_tokens

    @property
    def num_tokens_limit(self) -> int:
        """Tokens known when it ends."""
        return self.num_prompt_tokens + self.max_tokens


class LifeNotes:
    """The requests' columns while they are filled. Requests that never arrive are left out in the end."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        size = len(workload)
        self._columns = {name: filled_column(NEVER, size) for name in _INSTANTS}
        self._columns |= {name: filled_column(0, size) for name in _COUNTS}
        self._in_order = [self._columns[name] for name in _INSTANTS + _COUNTS]
        self._codes = {name: filled_column(NEVER, size) for name in _CODES}
        self.num_arrived = 0

    def write(self, life: Life, reason: OutcomeReason) -> None:
        """It is over."""
        index, codes = life.index, self._codes
        for column, value in zip(self._in_order, _OF_LIFE(life), strict=True):
            column[index] = value
        codes["outcome"][index] = OUTCOME_OF_REASON[reason]
        codes["reason"][index] = CODE_OF_REASON[reason]
        if life.prefill is not None:
            codes["prefill_instance"][index] = life.prefill.index
        if life.decode is not None and life.row is not None:
            codes["decode_instance"][index] = life.decode.index
            codes["decode_rank"][index] = life.row.rank

    def columns(self) -> RequestColumns:
        """Of all that have arrived: the first ones."""
        arrived = slice(self.num_arrived)
        instants = {name: as_int64(self._columns[name])[arrived] for name in _INSTANTS}
        counts = {name: as_int32(self._columns[name])[arrived] for name in _COUNTS}
        codes = {name: as_int16(self._codes[name])[arrived] for name in _CODES}
        lost = codes["outcome"] == NEVER  # an interrupt came in the middle of an arrival or of an end
        codes["outcome"][lost] = OUTCOME_OF_REASON[OutcomeReason.ABORT]
        codes["reason"][lost] = CODE_OF_REASON[OutcomeReason.ABORT]
        return RequestColumns(
            request_ids=self._workload.request_ids[arrived],
            reasons=REASONS,
            **instants,  # type: ignore[arg-type]
            **counts,  # type: ignore[arg-type]
            **codes,  # type: ignore[arg-type]
        )


_INSTANTS = ("arrival_ns", "scheduled_ns", "prefill_start_ns", "first_token_ns", "decode_start_ns", "last_token_ns")
_COUNTS = (
    "num_prompt_tokens", "max_tokens", "num_output_tokens", "num_cached_tokens", "num_pool_tokens", "num_preemptions",
)  # fmt: skip
_CODES = ("outcome", "reason", "prefill_instance", "decode_instance", "decode_rank")
_OF_LIFE = attrgetter(*_INSTANTS, *_COUNTS)
