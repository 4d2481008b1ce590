"""Plans against brute force: over a model of our own that can be enumerated, and over simulations of a tiny one."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.errors import ConfigError
from serving.simulation import planner as planner_module
from serving.simulation.plan_command import format_plan
from serving.simulation.plan_trials import Caps
from serving.simulation.planner import RATE_STEP, Planner, simulate_and_judge
from serving.simulation.run_source import WorkloadSource
from serving.simulation.slo import Attained, Slo

TINY = (
    "instances.decode.npus=1",
    "instances.decode.num_redundant_experts=0",
    "instances.prefill.npus=1",
    "instances.prefill.num_redundant_experts=0",
    "instances.decode.max_num_seqs=8",
    "workload={num_requests: 60, input_len: 96, output_len: 12, range_ratio: 0.0, num_prefixes: 0, prefix_len: 0}",
)

OWN = WorkloadSource()
DECODE, PREFILL = (8, 6, 4, 3, 2, 1), (1024, 512, 256)  # the caps that are shares of TINY's


class Model:
    """A judge without a simulation: prefill is a queue of its own, decode slows down with its batch."""

    def __init__(self, *, prefill_rate, decode_s):
        self.prefill_rate, self.decode_s = prefill_rate, decode_s

    def __call__(self, config, source, slo):
        prefill, decode = config.instances["prefill"], config.instances["decode"]
        split, caps = (prefill.count, decode.count), (decode.max_num_seqs, prefill.max_num_batched_tokens)
        return self.attained(split, caps, source.rate, slo)

    def attained(self, split, caps, rate, slo):
        share = caps[1] / 1024
        load = rate / (split[0] * self.prefill_rate * share**0.25)
        per_rank = rate * self.decode_s / split[1]  # one rank per instance
        is_full, is_late = per_rank > caps[0], load >= 1
        prefill_ms = 1e5 if is_late else 40 * share**0.5 / (1 - load)
        wait_ms = 1e6 if is_full else 0.0
        return Attained(
            slo=slo,
            ttft_ms=wait_ms + prefill_ms,
            tpot_ms=10 + min(per_rank, caps[0]),
            place_wait_ms=wait_ms,
            prefill_hold_share=0.9 if is_late else 0.1,
            num_measured=100,
            num_lost=0,
            queue_growth=100.0 if is_full or is_late else 0.0,
            max_growth=10.0,
            prefill_busy=min(load, 1.0),
            decode_busy=1.0,
            mean_decode_seqs=min(per_rank, caps[0]),
            peak_rank_seqs=math.ceil(min(per_rank, caps[0])),
            output_tokens_per_s=0.0,
        )

    def holds(self, split, rate, slo):
        """By any caps."""
        return any(self.attained(split, caps, rate, slo).holds for caps in itertools.product(DECODE, PREFILL))


def planner_of(slo, judge, *, estimate=False, source=OWN, **options):
    """Unless `estimate`, no decode instance is left out for what an estimate says, which knows no `Model`."""
    with pytest.MonkeyPatch.context() as patch:
        if not estimate:
            patch.setattr(planner_module, "decode_tokens_per_s", lambda *args, **kwargs: 0.0)
        return Planner("laptop", overrides=TINY, source=source, slo=slo, judge=judge, **options)


MODELS = st.builds(Model, prefill_rate=st.sampled_from([20.0, 45.0]), decode_s=st.sampled_from([0.05, 0.1, 0.2]))
SLOS = st.builds(Slo, ttft_ms=st.sampled_from([35.0, 60.0, 120.0, 400.0]), tpot_ms=st.sampled_from([11.5, 13.0, 20.0]))


@settings(max_examples=10, deadline=None)
@given(MODELS, SLOS, st.sampled_from([18.0, 60.0, 130.0]))
def test_the_cheapest_split_is_that_of_brute_force(model, slo, rate):
    plan = planner_of(slo, model, max_simulations=1000).cheapest(rate)
    # Without an estimate up to 4 decode instances are looked at; an instance of either role is one NPU.
    splits = sorted(itertools.product(range(1, 60), range(1, 5)), key=sum)
    best = next((split for split in splits if model.holds(split, rate, slo)), None)
    assert (plan.chosen is None) == (best is None)
    if plan.chosen is not None:
        assert plan.chosen.split.num_npus == sum(best)
        assert model.holds((plan.chosen.split.prefill, plan.chosen.split.decode), rate, slo)
    assert plan.is_complete


@settings(max_examples=5, deadline=None)
@given(MODELS, SLOS, st.integers(2, 12))
def test_the_highest_rate_is_that_of_brute_force(model, slo, npus):
    plan = planner_of(slo, model, max_simulations=1000).highest_rate(npus)
    rates = [0.5 * 1.01**i for i in range(800)]
    splits = [(prefill, npus - prefill) for prefill in range(1, npus)]
    highest = max((rate for split in splits for rate in rates if model.holds(split, rate, slo)), default=0.0)
    if plan.chosen is None:
        assert highest == 0.0
    else:
        chosen = plan.chosen
        assert model.holds((chosen.split.prefill, chosen.split.decode), chosen.rate, slo)
        assert highest <= chosen.rate * RATE_STEP * 1.001


def test_a_plan_of_real_simulations_is_that_of_brute_force():
    slo, rate, source = Slo(ttft_ms=150.0, tpot_ms=23.0, percentile=90.0), 40.0, WorkloadSource(duration_s=1.0)
    planner = planner_of(slo, simulate_and_judge, estimate=True, source=source)
    plan = planner.cheapest(rate)
    assert (plan.chosen.split.prefill, plan.chosen.split.decode) == (3, 2)
    every = planner_of(slo, simulate_and_judge, source=source, max_simulations=1000)
    for prefill, decode in ((1, 1), (1, 2), (2, 1), (1, 3), (2, 2), (3, 1)):
        for caps in ((8, 1024), (8, 256), (4, 1024)):
            trial = every.trial(every.split(prefill, decode), Caps(decode=caps[0], prefill=caps[1]), rate)
            assert not trial.holds, (trial.split, caps)
    assert every.trial(every.split(3, 2), plan.chosen.caps, rate) == plan.chosen
    assert planner_of(slo, simulate_and_judge, estimate=True, source=source).cheapest(rate) == plan


def test_the_search_stops_after_so_many_simulations_with_what_it_has():
    slo, model = Slo(ttft_ms=120.0, tpot_ms=20.0), Model(prefill_rate=20.0, decode_s=0.1)
    planner = planner_of(slo, model, max_simulations=2)
    plan = planner.cheapest(130.0)
    assert (len(planner.trials), plan.is_complete) == (2, False)


@pytest.mark.parametrize("by_rate", [True, False])
@pytest.mark.parametrize("num_judged", range(7))
def test_an_interrupted_search_says_what_it_found(by_rate, num_judged):
    slo, model = Slo(ttft_ms=120.0, tpot_ms=14.0), Model(prefill_rate=20.0, decode_s=0.1)
    judged = []

    def judge(config, source, slo):
        if len(judged) == num_judged:
            raise KeyboardInterrupt
        judged.append(model(config, source, slo))
        return judged[-1]

    planner = planner_of(slo, judge)
    plan = planner.cheapest(60.0) if by_rate else planner.highest_rate(6)
    assert (plan.is_complete, plan.is_interrupted, len(planner.trials)) == (False, True, num_judged)
    assert (plan.chosen is not None) == any(attained.holds for attained in judged)
    assert (plan.closest is not None) == bool(judged)
    text = format_plan(plan, planner, by_rate=by_rate)
    assert f"The search was interrupted after {num_judged} simulations" in text
    assert ("Nothing holds it." in text) == (plan.chosen is None)


def test_a_miss_says_by_how_much():
    slo, model = Slo(ttft_ms=120.0, tpot_ms=10.5), Model(prefill_rate=20.0, decode_s=0.2)
    plan = planner_of(slo, model).cheapest(60.0)
    assert plan.chosen is None
    assert plan.closest.split.decode == 4
    assert plan.closest.reasons() == ["P99 TPOT 13.00 ms > 10.5"]


@pytest.mark.parametrize(
    ("preset", "npus", "words"),
    [
        ("laptop", 5, ("--npus: 5", "take 6", "has 384")),
        ("colocated", 5, ("colocated", "no prefill and decode instances")),
    ],
)
def test_what_cannot_be_planned_is_named(preset, npus, words):
    with pytest.raises(ConfigError) as mistake:
        Planner(preset, source=WorkloadSource(), slo=Slo(ttft_ms=1.0, tpot_ms=1.0)).highest_rate(npus)
    assert all(word in str(mistake.value) for word in words)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"ttft_ms": 0.0, "tpot_ms": 1.0}, "slo_ttft_ms: 0 must be a number above 0"),
        ({"ttft_ms": 1.0, "tpot_ms": math.nan}, "slo_tpot_ms: nan"),
        ({"ttft_ms": 1.0, "tpot_ms": 1.0, "percentile": 101.0}, "percentile: 101 .* at most 100"),
    ],
)
def test_an_objective_out_of_range_is_named(values, words):
    with pytest.raises(ConfigError, match=words):
        Slo(**values)
