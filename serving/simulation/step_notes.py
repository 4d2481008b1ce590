"""What is written down of an instance's steps.

Owns: the columns of one instance while they grow.
Must not know: how steps are decided.
"""

from collections.abc import Sequence

from devices.step_work import BreakdownSum, StepTime
from serving.build import InstancePlace
from serving.config import RunConfig
from serving.core.event_log import EventLog
from serving.simulation.columns import InstanceColumns
from serving.simulation.growing_columns import as_int32, as_int64, int_column


class StepNotes:
    """Of one instance. `log` notes every step, if there is one."""

    def __init__(self, config: RunConfig, place: InstancePlace, log: EventLog | None) -> None:
        self.instance_id = place.instance_id
        self._config = config
        self._place = place
        self._log = log
        self._start_ns, self._charged_ns = int_column(), int_column()
        self._num_seqs, self._num_tokens, self._num_sampled = int_column(), int_column(), int_column()
        self._num_joined, self._num_waiting = int_column(), int_column()
        self._num_used_blocks, self._max_kv_tokens = int_column(), int_column()
        self._breakdown = BreakdownSum()
        self.first_gaps_ns = int_column()

    def add(
        self,
        start_ns: Sequence[int],
        times: Sequence[StepTime],
        *,
        num_seqs: Sequence[int],
        num_tokens: Sequence[int],
        num_sampled: Sequence[int],
        num_joined: Sequence[int],
        num_waiting: Sequence[int],
        num_used_blocks: Sequence[int],
        max_kv_tokens: Sequence[int],
    ) -> None:
        """Steps in a row, one entry of each for every step; `times` may have more."""
        self._start_ns.extend(start_ns)
        self._num_seqs.extend(num_seqs)
        self._num_tokens.extend(num_tokens)
        self._num_sampled.extend(num_sampled)
        self._num_joined.extend(num_joined)
        self._num_waiting.extend(num_waiting)
        self._num_used_blocks.extend(num_used_blocks)
        self._max_kv_tokens.extend(max_kv_tokens)
        for time, _ in zip(times, num_seqs, strict=False):
            self._charged_ns.append(time.ns)
            self._breakdown.add(time)
        if self._log is not None:
            for when_ns, time, rows, tokens in zip(start_ns, times, num_seqs, num_tokens, strict=False):
                self._log.append(when_ns, "step", self.instance_id, rows=rows, tokens=tokens, charged_ns=time.ns)

    def columns(self) -> InstanceColumns:
        """All of it."""
        place, config = self._place, self._config
        section, num_ranks = config.instances[place.role], config.num_scheduling_ranks(place.role)
        return InstanceColumns(
            instance_id=place.instance_id,
            role=place.role,
            num_npus=section.npus,
            num_ranks=num_ranks,
            max_num_seqs=section.max_num_seqs,
            num_blocks=section.num_blocks * num_ranks,
            start_ns=as_int64(self._start_ns),
            charged_ns=as_int64(self._charged_ns),
            num_seqs=as_int32(self._num_seqs),
            num_tokens=as_int32(self._num_tokens),
            num_sampled=as_int32(self._num_sampled),
            num_joined=as_int32(self._num_joined),
            num_waiting=as_int32(self._num_waiting),
            num_used_blocks=as_int32(self._num_used_blocks),
            max_kv_tokens=as_int32(self._max_kv_tokens),
            breakdown_ns=self._breakdown.total,
            first_gaps_ns=as_int64(self.first_gaps_ns),
        )
