"""Plans against brute force: over a model of our own that can be enumerated, and over real simulations of a tiny one."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.config_file import load_config
from serving.errors import ConfigError
from serving.simulation import planner as planner_module
from serving.simulation.plan_trials import Caps, Split
from serving.simulation.planner import DECODE_CAPS, PREFILL_CAPS, RATE_STEP, Planner, simulate_and_judge
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


def model_of(prefill_rate, decode_s):
    """A judge without a simulation: prefill is a queue of its own, decode slows down with its batch."""

    def judge(config, source, slo):
        prefill, decode = config.instances["prefill"], config.instances["decode"]
        share = prefill.max_num_batched_tokens / 1024
        load = source.rate / (prefill.count * prefill_rate * share**0.25)
        per_rank = source.rate * decode_s / (decode.count * config.world_size("decode"))
        is_full, is_late = per_rank > decode.max_num_seqs, load >= 1
        seqs = min(per_rank, decode.max_num_seqs)
        prefill_ms = 1e5 if is_late else 40 * share**0.5 / (1 - load)
        wait_ms = 1e6 if is_full else 0.0
        return Attained(
            slo=slo,
            ttft_ms=wait_ms + prefill_ms,
            tpot_ms=10 + seqs,
            place_wait_ms=wait_ms,
            prefill_hold_share=0.9 if is_late else 0.1,
            num_measured=100,
            num_lost=0,
            queue_growth=100.0 if is_full or is_late else 0.0,
            max_growth=10.0,
            prefill_busy=min(load, 1.0),
            decode_busy=1.0,
            mean_decode_seqs=seqs,
            peak_rank_seqs=math.ceil(seqs),
            output_tokens_per_s=0.0,
        )

    return judge


def caps_of(config):
    decode, prefill = config.instances["decode"].max_num_seqs, config.instances["prefill"]
    decodes = {max(1, int(decode * share)) for share in DECODE_CAPS}
    prefills = {int(prefill.max_num_batched_tokens * share) for share in PREFILL_CAPS}
    return [
        Caps(decode=d, prefill=p)
        for d, p in itertools.product(decodes, (p for p in prefills if p >= prefill.max_num_seqs))
    ]


def holds(judge, split, rate, slo):
    """By any caps."""
    for caps in caps_of(load_config("laptop", TINY)):
        config = load_config(
            "laptop",
            (
                *TINY,
                f"instances.prefill.count={split[0]}",
                f"instances.decode.count={split[1]}",
                f"instances.decode.max_num_seqs={caps.decode}",
                f"instances.prefill.max_num_batched_tokens={caps.prefill}",
            ),
        )
        if judge(config, WorkloadSource(rate=rate, num_requests=400), slo).holds:
            return True
    return False


@pytest.fixture(autouse=True)
def no_estimate(request, monkeypatch):
    """The models here are not the estimate's, so it does not say where to begin."""
    if "estimate" not in request.keywords:
        monkeypatch.setattr(planner_module, "decode_tokens_per_s", lambda *args, **kwargs: 0.0)


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([20.0, 45.0]), st.sampled_from([0.3, 0.6]), st.sampled_from([18.0, 60.0, 130.0]), st.data())
def test_the_cheapest_split_is_that_of_brute_force(prefill_rate, decode_s, rate, data):
    slo = Slo(ttft_ms=data.draw(st.sampled_from([60.0, 120.0, 400.0])), tpot_ms=data.draw(st.sampled_from([13.0, 20.0])))
    judge = model_of(prefill_rate, decode_s)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner_module, "decode_tokens_per_s", lambda *args, **kwargs: 0.0)
        planner = Planner("laptop", overrides=TINY, source=WorkloadSource(), slo=slo, judge=judge, max_simulations=1000)
    plan = planner.cheapest(rate)
    # The planner is to look at up to 4 decode instances; by cost, so that the first that holds is the cheapest.
    splits = sorted(itertools.product(range(1, 30), range(1, 5)), key=sum)
    best = next((split for split in splits if holds(judge, split, rate, slo)), None)
    if best is None:
        assert plan.chosen is None
    else:
        assert plan.chosen is not None
        assert plan.chosen.split.num_npus == sum(best)
        assert holds(judge, (plan.chosen.split.prefill, plan.chosen.split.decode), rate, slo)
