"""One decode instance of a run in virtual time: runs of steps, of which only the last is an event.

Owns: when steps begin and end, what they are charged, how a run is cut when somebody joins.
Must not know: the life of a request before and after its decoding, routing.

Whoever asks how much room the instance has calls `catch_up` first: blocks are taken when a step begins, and between
two events nobody has told the ranks that steps have begun.
"""

from bisect import bisect_left
from collections.abc import Callable

from devices.fabric import Endpoint
from devices.step_work import StepTime
from serving.core.decode_ranks import DecodeRanks, DecodeRow, Key
from serving.core.decode_run import DecodePlanner, DecodeRun, RunStep
from serving.simulation.columns import NEVER
from serving.simulation.event_loop import EventLoop
from serving.simulation.step_notes import StepNotes

ChargeDecode = Callable[[RunStep], StepTime]


class DecodeInstance:
    """Steps while there is something to compute. `index` is its place among all instances."""

    def __init__(
        self,
        *,
        index: int,
        ranks: DecodeRanks,
        planner: DecodePlanner,
        charge: ChargeDecode,
        dies: list[Endpoint],
        loop: EventLoop,
        notes: StepNotes,
        on_preempted: Callable[[DecodeRow, int], None],
        on_ended: Callable[[DecodeRow], None],
        last_token_ns: Callable[[DecodeRow], int],
    ) -> None:
        """`last_token_ns(row)`: when a row that joins had its last token, for the gap before its next one.

        `on_preempted(row, last_ns)` says when it had its last token here, NEVER if it had none.
        """
        self.index = index
        self.instance_id = notes.instance_id
        self.dies = dies
        self.ranks = ranks
        self.num_runs = 0  # requests that decode here
        self.num_drafts = 0
        self.num_accepted = 0
        self.end_ns = 0  # of the last step that is over
        self._planner = planner
        self._charge = charge
        self._loop = loop
        self._notes = notes
        self._on_preempted = on_preempted
        self._on_ended = on_ended
        self._last_token_ns = last_token_ns
        self._run: DecodeRun | None = None
        self._stalled_since: dict[int, tuple[DecodeRow, int]] = {}  # by id: when they had their last token
        self._times: list[StepTime] = []
        self._bounds_ns: list[int] = []  # of the run's steps: step i is from bound i to bound i + 1
        self._num_steps = 0  # of the run that will be made: fewer than were decided if it was cut
        self._is_woken = False

    def resume(self, row: DecodeRow, num_tokens: int) -> None:
        """Run a reserved request, whose cache has come; it joins when the step that is under way is over."""
        self.num_runs += 1
        self.ranks.activate(row, num_tokens)
        if self._run is None:
            self.wake()
        else:
            self._cut()

    def release(self, row: DecodeRow) -> None:
        """Free what a row that has ended, or never ran, still holds."""
        self.catch_up()
        self.ranks.release(row)
        if self.num_runs:
            self.wake()

    def catch_up(self) -> None:
        """Take the blocks of all steps that have begun before this instant."""
        if self._run is not None:
            self._run.begin(self._num_begun())

    def reserve(self, owner: object, *, rank: int, num_tokens: int, total_limit: int, key: Key, draw: int) -> DecodeRow:
        """Take a slot and blocks for a cache that will come; the caller has seen that there is room.

        A run of steps may have counted on these blocks: what has not begun of it is decided anew.
        """
        row = self.ranks.reserve(owner, rank=rank, num_tokens=num_tokens, total_limit=total_limit, key=key, draw=draw)
        if self._run is not None and self._num_steps > 1 and not self._run.has_room(rank, self._num_steps):
            self._cut()
        return row

    def check_invariants(self) -> None:
        """Raise AssertionError if its ranks contradict themselves. Between runs only."""
        if self._run is None:
            self.ranks.check_invariants()

    def wake(self) -> None:
        """Look for work at this instant, unless a step is under way."""
        if self._run is None and not self._is_woken:
            self._is_woken = True
            self._loop.call_soon(self._step, None)

    def _preempt(self, row: DecodeRow) -> None:
        self.num_runs -= 1
        _, last_ns = self._stalled_since.pop(id(row), (row, self.end_ns))
        self._on_preempted(row, last_ns if row.has_run else NEVER)

    def _num_begun(self) -> int:
        """Steps of the run that have begun: the first, and those whose bound is past."""
        return max(1, min(bisect_left(self._bounds_ns, self._loop.now_ns), self._num_steps))

    def _cut(self) -> None:
        begun = self._num_begun()
        if begun < self._num_steps:
            self._num_steps = begun
            self._schedule_end()

    def _schedule_end(self) -> None:
        bounds, last = self._bounds_ns, self._num_steps
        self._loop.call_at(bounds[last], self._end, (self._run, last), called_ns=bounds[last - 1])

    def _step(self, _: None) -> None:
        self._is_woken = False
        while True:
            run = self._planner.plan()
            if self._planner.stalled:
                self._mark_stalled()
            if run is None:
                return
            if run.pressed is not None:
                for row in run.pressed.preempted:
                    self._preempt(row)
            if run.steps:
                break
        self._run = run
        self._times = [self._charge(step) for step in run.steps]
        bounds = [self._loop.now_ns]
        for time in self._times:
            bounds.append(bounds[-1] + time.ns)
        self._bounds_ns, self._num_steps = bounds, len(run.steps)
        run.begin(1)
        self._schedule_end()

    def _end(self, which: tuple[DecodeRun, int]) -> None:
        run, num_steps = which
        if run is not self._run or num_steps != self._num_steps:
            return  # the run was cut: its last step is another
        self._run = None
        ended = run.finish(num_steps)
        self._note(run, num_steps)
        self.end_ns = self._bounds_ns[num_steps]
        for row in ended:
            self.num_runs -= 1
            self._on_ended(row)
        self._step(None)

    def _note(self, run: DecodeRun, num_steps: int) -> None:
        """Write the steps down. Rows that had no token of the step before have a gap of their own."""
        bounds, notes, stalled = self._bounds_ns, self._notes, self._planner.stalled
        idle = stalled if run.pressed is None else stalled + run.pressed.preempted
        since_ns = [self._last_token_ns(row) for row in run.joined if row not in idle]
        for row, last_ns in list(self._stalled_since.values()):
            if row not in stalled:
                since_ns.append(last_ns)
                del self._stalled_since[id(row)]
        notes.first_gaps_ns.extend([bounds[1] - last_ns for last_ns in since_ns])
        steps = run.steps[:num_steps]
        none = [0] * num_steps
        self.num_drafts += sum([step.num_drafts for step in steps])
        self.num_accepted += sum([step.num_accepted for step in steps])
        notes.add(
            bounds[:num_steps],
            self._times,
            num_seqs=[step.num_seqs for step in steps],
            num_tokens=[step.num_tokens for step in steps],
            num_sampled=[step.num_sampled for step in steps],
            num_joined=[len(since_ns), *none[1:]],
            num_waiting=none,
            num_used_blocks=run.used_blocks,
            max_kv_tokens=[max(step.kv) for step in steps],
        )

    def _mark_stalled(self) -> None:
        """Remember since when rows that wait in place have had no token."""
        for row in self._planner.stalled:
            if id(row) not in self._stalled_since:
                last_ns = self.end_ns if row.has_run else self._last_token_ns(row)
                self._stalled_since[id(row)] = (row, last_ns)
