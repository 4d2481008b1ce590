"""What is written down of an instance's steps.

Owns: the columns of one instance while they grow.
Must not know: how steps are decided.
"""

from devices.step_work import StepTime
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
        self._breakdown_ns: dict[str, int] = {}
        self.first_gaps_ns = int_column()

    def begin(
        self,
        start_ns: int,
        time: StepTime,
        *,
        num_seqs: int,
        num_tokens: int,
        num_sampled: int,
        num_waiting: int,
        num_used_blocks: int,
        max_kv_tokens: int,
        num_joined: int | None = None,
    ) -> None:
        """One step. `num_joined` None: every row is new, as on prefill instances."""
        self._start_ns.append(start_ns)
        self._charged_ns.append(time.ns)
        self._num_seqs.append(num_seqs)
        self._num_tokens.append(num_tokens)
        self._num_sampled.append(num_sampled)
        self._num_joined.append(num_seqs if num_joined is None else num_joined)
        self._num_waiting.append(num_waiting)
        self._num_used_blocks.append(num_used_blocks)
        self._max_kv_tokens.append(max_kv_tokens)
        breakdown = self._breakdown_ns
        for name, part_ns in time.breakdown.items():
            breakdown[name] = breakdown.get(name, 0) + part_ns
        if self._log is not None:
            self._log.append(start_ns, "step", self.instance_id, rows=num_seqs, tokens=num_tokens, charged_ns=time.ns)

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
            breakdown_ns=self._breakdown_ns,
            first_gaps_ns=as_int64(self.first_gaps_ns),
        )
