"""The search for a deployment: the cheapest split that holds an SLO at a rate, or the highest rate of so many NPUs.

Owns: which splits and batch caps are tried, in which order, and which are taken to lose without being tried.
Must not know: how a run is judged (serving/simulation/slo.py), how a plan is printed.

A split is a number of prefill and of decode instances, each of the shape that a preset gives them; its caps are shares
of the preset's. What is simulated decides; steady-state estimates say only where to begin, and that fewer decode
instances than carry the mean load, 10 % left out of account, cannot do. The search takes for granted, and so may miss
what contradicts it, that

- more prefill instances never harm, and do not help where a TTFT is mostly the wait for a decode rank;
- a lower cap of decode lowers TPOT and lengthens the queue; one that grows without bound does so with lower caps too;
- what holds at a rate holds at lower ones.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

from serving.config import RunConfig
from serving.config_file import load_config
from serving.errors import ConfigError
from serving.simulation.capacity import decode_tokens_per_s, prefill_tokens_per_s
from serving.simulation.plan_trials import Caps, Plan, Split, Trial
from serving.simulation.run_source import WorkloadSource, mean_lengths, run_source
from serving.simulation.slo import Attained, Slo, attain

DECODE_CAPS = (1.0, 0.75, 0.5, 0.375, 0.25, 0.125)  # shares of the preset's max_num_seqs, falling
PREFILL_CAPS = (1.0, 0.5, 0.25)  # shares of the preset's max_num_batched_tokens
ESTIMATE_SLACK = 1.1  # a split that lacks more than this by the estimate is not tried
LIFETIMES = 4.0  # arrivals last so many times a mean request within the SLO: each quarter of them fills the system
MIN_REQUESTS = 400  # so that 200 are measured, two of which are beyond the 99th percentile
RATE_STEP = 1.02  # between neighboring rates: how exactly the highest is found
LOWEST_STEP = -300  # below 1/380 of the first guess nothing is looked for
SPARE_DECODE = 2  # decode instances are tried up to twice what the estimate wants, and so many more


Judge = Callable[[RunConfig, WorkloadSource, Slo], Attained]


def simulate_and_judge(config: RunConfig, source: WorkloadSource, slo: Slo) -> Attained:
    """What one simulation attained."""
    return attain(run_source(config, source), slo)


class _Exhausted(Exception):
    """No simulations are left."""


class Planner:
    """One search over the splits of a preset's instances. `trials` has every simulation so far, in order."""

    def __init__(
        self,
        preset: str,
        *,
        overrides: Sequence[str] = (),
        source: WorkloadSource,
        slo: Slo,
        max_simulations: int = 100,
        on_trial: Callable[[Split, float], object] = lambda split, rate: None,
        judge: Judge = simulate_and_judge,
    ) -> None:
        """Raises ConfigError if the preset is not disaggregated, or its workload cannot be read."""
        self._preset, self._overrides, self._source, self._slo = preset, tuple(overrides), source, slo
        self._max_simulations, self._on_trial, self._judge = max_simulations, on_trial, judge
        self.base: RunConfig = load_config(preset, self._overrides)
        if not self.base.disaggregated:
            raise ConfigError(f"{preset}: has no prefill and decode instances, whose numbers a plan chooses")
        self.mean_input, self.mean_output = mean_lengths(self.base, source)
        prefill, decode = self.base.instances["prefill"], self.base.instances["decode"]
        self._npus = prefill.npus, decode.npus
        self._decode_caps = _shares(decode.max_num_seqs, DECODE_CAPS, least=1)
        self._prefill_caps = _shares(prefill.max_num_batched_tokens, PREFILL_CAPS, least=prefill.max_num_seqs)
        self._prefill_rate = prefill_tokens_per_s(self.base, prompt_len=round(self.mean_input)) / self.mean_input
        kv_len = max(1, round(self.mean_input + self.mean_output / 2))
        self._decode_rate = (
            decode_tokens_per_s(self.base, kv_len=kv_len, tpot_ms=slo.tpot_ms) / self.mean_output
        )  # requests per second that an instance holds at most, by the estimate; 0: it does not say
        self.trials: dict[tuple[Split, Caps, float], Trial] = {}

    def cheapest(self, rate: float) -> Plan:
        """The fewest NPUs that hold the SLO at `rate`; of equally many, the fewest decode instances.

        Ctrl-C ends the search: the plan is what was found so far, and `is_interrupted`.
        """
        plan = Plan()
        wanted = rate / self._decode_rate if self._decode_rate else 1.0
        least = max(1, math.ceil(wanted / ESTIMATE_SLACK))
        if least > 1:
            plan.notes.append(
                f"{least - 1} decode or fewer: not tried; by the estimate one holds at most {self._decode_rate:,.2f} "
                f"req/s within this TPOT, {rate:,.4g} arrive"
            )
        guess = math.ceil(rate / self._prefill_rate) if self._prefill_rate else 1
        limit = self.base.hardware.num_npus
        try:
            for decode in range(least, 2 * least + SPARE_DECODE + 1):
                budget = limit if plan.chosen is None else plan.chosen.split.num_npus - 1
                most = (budget - decode * self._npus[1]) // self._npus[0]
                if most < 1:
                    break
                self._fewest_prefill(plan, decode, rate, guess=guess, most=most)
                plan.chosen = min(plan.held, key=lambda trial: trial.split, default=None)
        except (_Exhausted, KeyboardInterrupt) as end:
            self._end_early(plan, end)
            plan.chosen = min(plan.held, key=lambda trial: trial.split, default=None)
        return plan

    def highest_rate(self, num_npus: int) -> Plan:
        """The highest rate, to 2 %, that any split of at most `num_npus` holds.

        Ctrl-C as for `cheapest`. Raises ConfigError if not even one instance of each role fits.
        """
        splits = self._maximal_splits(num_npus)
        guesses = {split: self._guess(split) for split in splits}
        splits.sort(key=lambda split: (-guesses[split], split))
        reference = guesses[splits[0]]
        plan = Plan()
        try:
            best: int | None = None
            for split in splits:
                found = self._highest_step(plan, split, reference, above=best)
                best = best if found is None else found
        except (_Exhausted, KeyboardInterrupt) as end:
            self._end_early(plan, end)
        plan.chosen = max(plan.held, key=lambda trial: trial.rate, default=None)
        return plan

    def split(self, prefill: int, decode: int) -> Split:
        """So many instances of each role."""
        return Split(prefill=prefill, decode=decode, num_npus=prefill * self._npus[0] + decode * self._npus[1])

    def _end_early(self, plan: Plan, end: BaseException) -> None:
        """Bring what was tried of the split at which the search stopped into the plan."""
        plan.is_complete, plan.is_interrupted = False, isinstance(end, KeyboardInterrupt)
        for trial in self.trials.values():
            known = plan.outcomes.setdefault(trial.split, trial)
            if not known.holds and (trial.holds or trial.excess < known.excess):
                plan.outcomes[trial.split] = trial

    def _maximal_splits(self, num_npus: int) -> list[Split]:
        """Splits to which no instance can be added."""
        limit = min(num_npus, self.base.hardware.num_npus)
        smallest = self.split(1, 1)
        if smallest.num_npus > limit:
            raise ConfigError(
                f"--npus: {num_npus}, but one prefill and one decode instance of {self._preset} take "
                f"{smallest.num_npus}, and {self.base.hardware.name} has {self.base.hardware.num_npus}"
            )
        rows = [
            self.split((limit - decode * self._npus[1]) // self._npus[0], decode)
            for decode in range(1, (limit - self._npus[0]) // self._npus[1] + 1)
        ]
        return [one for one, after in pairwise(rows) if one.prefill > after.prefill] + rows[-1:]

    def _guess(self, split: Split) -> float:
        """Requests per second that a split holds, by the estimate."""
        rates = [split.prefill * self._prefill_rate, split.decode * self._decode_rate]
        return min((rate for rate in rates if rate), default=1.0)

    def _fewest_prefill(self, plan: Plan, decode: int, rate: float, *, guess: int, most: int) -> None:
        """Bring the split with the fewest prefill instances in [1, most] that holds into the plan, if there is one."""
        low, high, found = 0, most + 1, False  # low fails, high holds or is too many
        number = min(guess, most)
        while high - low > 1:
            trial, more_may_help = self._holds(plan, self.split(number, decode), rate)
            if trial.holds:
                high, found = number, True
            elif not more_may_help:
                return
            else:
                low = number
            number = (low + high) // 2 if found else min(most, 2 * low)

    def _highest_step(self, plan: Plan, split: Split, reference: float, *, above: int | None) -> int | None:
        """The highest step k, above `above`, at which `split` holds reference * RATE_STEP^k; None if there is none."""

        def holds(step: int) -> bool:
            rate = float(f"{reference * RATE_STEP**step:.4g}")
            trial, _ = self._holds(plan, split, rate)
            if not trial.holds:
                plan.first_misses[split] = trial
            return trial.holds

        low = above if above is not None else LOWEST_STEP  # holds elsewhere, or is not looked below
        high: int | None = None  # fails
        step, stride = (0, 4) if above is None else (above + 1, 4)
        found: int | None = None
        while high is None or high - low > 1:
            if holds(step):
                low = found = step
            else:
                high = step
            if high is None:
                step, stride = step + stride, 2 * stride
            elif found is None and above is None:
                step, stride = max(low + 1, high - stride), 2 * stride
            else:
                step = (low + high) // 2
        return found

    def _holds(self, plan: Plan, split: Split, rate: float) -> tuple[Trial, bool]:
        """The first caps that hold, else the closest; and, if none does, whether more prefill instances may help."""
        tried: list[Trial] = []
        decode_caps, prefill_caps = list(self._decode_caps), list(self._prefill_caps)
        while decode_caps and prefill_caps:
            tried.append(self.trial(split, Caps(decode=decode_caps[0], prefill=prefill_caps[0]), rate))
            last = tried[-1].attained
            if last is None or last.holds or not last.is_stable or last.num_lost:
                break
            if last.holds_ttft:
                # A cap that no rank came to changes nothing.
                decode_caps = [cap for cap in decode_caps if cap < min(decode_caps[0], last.peak_rank_seqs)]
            elif last.is_decode_bound:
                break
            else:
                prefill_caps = prefill_caps[1:]
        best = min(tried, key=lambda trial: trial.excess)
        # Of a search for a rate, the outcome of a split is the highest rate that it held.
        if best.holds or split not in plan.outcomes or not plan.outcomes[split].holds:
            plan.outcomes[split] = best
        runs = [trial.attained for trial in tried if trial.attained is not None]
        return best, any(not run.keeps_up and not run.is_decode_bound for run in runs)

    def trial(self, split: Split, caps: Caps, rate: float) -> Trial:
        """Simulate, unless it was done before."""
        known = self.trials.get((split, caps, rate))
        if known is not None:
            return known
        if len(self.trials) >= self._max_simulations:
            raise _Exhausted
        self._on_trial(split, rate)
        source = replace(self._source, rate=rate, num_requests=self._num_requests(rate))
        settings = (
            *self._overrides,
            f"instances.prefill.count={split.prefill}",
            f"instances.decode.count={split.decode}",
            f"instances.decode.max_num_seqs={caps.decode}",
            f"instances.prefill.max_num_batched_tokens={caps.prefill}",
        )
        attained, error = None, None
        try:
            config = load_config(self._preset, settings)
        except ConfigError as mistake:  # too many for the machine, say
            error = str(mistake)
        else:
            attained = self._judge(config, source, self._slo)
        trial = Trial(split=split, caps=caps, rate=rate, attained=attained, error=error)
        self.trials[split, caps, rate] = trial
        return trial

    def _num_requests(self, rate: float) -> int:
        """How many requests a run at `rate` has, unless the trace has fewer."""
        if self._source.duration_s is not None:
            return max(1, math.ceil(rate * self._source.duration_s))
        lifetime_s = (self._slo.ttft_ms + self.mean_output * self._slo.tpot_ms) / 1e3
        return max(MIN_REQUESTS, math.ceil(rate * LIFETIMES * lifetime_s))


def _shares(whole: int, shares: Sequence[float], *, least: int) -> list[int]:
    """The shares of `whole` that are not below `least`, falling, each once."""
    return list(dict.fromkeys(value for share in shares if (value := int(whole * share)) >= least)) or [whole]
