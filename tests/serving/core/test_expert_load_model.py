"""The generator of expert load, and the imbalance of a deployment under it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.core.errors import UnfitRequest
from serving.core.expert_load_model import (
    ExpertSlots,
    LoadModel,
    draw_counts,
    draw_weights,
    drifted,
    hottest_rank_load,
    load_imbalance,
    place,
    shares,
    slot_loads,
)
from serving.core.expert_placement import balanced_placement

PROFILE = settings(derandomize=True, database=None, deadline=None, max_examples=60)
MODEL = LoadModel(sigma_low=0.4, sigma_high=1.6, drift=0.1)
EP32 = {"num_layers": 58, "num_experts": 256, "top_k": 8, "num_ranks": 32}
DECODE = ExpertSlots(num_layers=58, num_experts=256, top_k=8, num_ranks=320, num_router_slots=288, num_shared_copies=32)


def mean_rank_load(slots, balance, **more):
    arguments = {"num_tokens": 4096, "seed": 0, **more}
    return hottest_rank_load(MODEL, slots, balance=balance, **arguments).rank.mean()


def test_layers_have_the_spreads_of_the_generator():
    weights = draw_weights(MODEL, num_layers=400, num_experts=4096, rng=np.random.default_rng(0))
    assert weights.sum(axis=1) == pytest.approx(np.ones(400))
    spreads = np.log(weights).std(axis=1)
    assert spreads.mean() == pytest.approx(1.0, abs=0.05)  # of Uniform(0.4, 1.6)
    assert spreads.std() == pytest.approx(1.2 / 12**0.5, abs=0.03)
    assert 0.35 < spreads.min() < 0.45
    assert 1.55 < spreads.max() < 1.7


def test_drift_scatters_around_the_statistics_and_does_not_accumulate():
    weights = draw_weights(MODEL, num_layers=1, num_experts=20_000, rng=np.random.default_rng(0))
    iterations = np.log(drifted(np.repeat(weights, 3, axis=0), 0.3, rng=np.random.default_rng(1)) / weights)
    assert iterations.std(axis=1) == pytest.approx([0.3, 0.3, 0.3], abs=0.01)
    assert np.corrcoef(iterations) == pytest.approx(np.eye(3), abs=0.03)
    assert drifted(weights, 0.0, rng=np.random.default_rng(1)) == pytest.approx(weights)


@PROFILE
@given(
    load=st.lists(st.sampled_from([0.0, 1e-9, 0.1, 1.0, 50.0]), min_size=2, max_size=12),
    top_k=st.integers(1, 12),
    num_tokens=st.integers(1, 40),
    seed=st.integers(0, 9),
)
def test_every_token_has_top_k_distinct_experts(load, top_k, num_tokens, seed):
    weights = shares(np.array([load, load[::-1]]))
    rng = np.random.default_rng(seed)
    if top_k > len(load):
        with pytest.raises(UnfitRequest, match=f"top_k: {top_k} exceeds {len(load)} experts"):
            draw_counts(weights, num_tokens=num_tokens, top_k=top_k, rng=rng)
        return
    counts = draw_counts(weights, num_tokens=num_tokens, top_k=top_k, rng=rng)
    assert counts.sum(axis=1).tolist() == [num_tokens * top_k] * 2
    assert counts.min() >= 0
    assert counts.max() <= num_tokens


def test_counts_follow_the_weights():
    weights = shares(np.array([1.0, 2.0, 3.0, 4.0]))
    counts = draw_counts(weights, num_tokens=100_000, top_k=1, rng=np.random.default_rng(0))
    assert counts / 100_000 == pytest.approx(weights, abs=0.005)


def test_a_layer_without_load_is_taken_as_uniform():
    assert shares(np.array([[0.0, 0.0], [1.0, 3.0]])).tolist() == [[0.5, 0.5], [0.25, 0.75]]


@pytest.mark.parametrize("num_shared", [0, 4])
def test_imbalance_is_that_of_plain_loops(num_shared):
    rng = np.random.default_rng(3)
    counts = rng.integers(0, 100, (2, 3, 10))
    placement = balanced_placement(
        rng.random((3, 10)), num_physical=16 + num_shared, num_ranks=4, num_shared_copies=num_shared
    )
    found = load_imbalance(slot_loads(counts, placement), placement, num_experts=10)
    for iteration in range(2):
        for layer in range(3):
            slots = [
                counts[iteration, layer, e] / placement.num_copies[layer, e] if e < 10 else None
                for e in placement.physical_to_logical[layer]
            ]
            per_rank = len(slots) // 4
            ranks = [sum(v for v in slots[r * per_rank : (r + 1) * per_rank] if v is not None) for r in range(4)]
            routed = [v for v in slots if v is not None]
            at = (iteration, layer)
            assert found.rank[at] == pytest.approx(max(ranks) / np.mean(ranks))
            assert found.slot[at] == pytest.approx(max(routed) / np.mean(routed))
            assert found.rank_std_tokens[at] == pytest.approx(np.std(ranks))
            assert found.slot_std_tokens[at] == pytest.approx(np.std(routed))


def test_a_die_with_a_shared_copy_alone_has_no_router_load():
    slots = ExpertSlots(num_layers=1, num_experts=3, top_k=1, num_ranks=4, num_router_slots=3, num_shared_copies=1)
    placement = place(np.ones((1, 3)), slots, "none")
    assert placement.physical_to_logical.tolist() == [[0, 1, 2, 3]]
    found = load_imbalance(slot_loads(np.array([[[6, 3, 3]]]), placement), placement, num_experts=3)
    assert found.rank.tolist() == [[1.5]]  # over the mean 4 of three ranks, not 3 of four


def test_static_experts_stand_in_order():
    placement = place(np.array([[9.0, 1, 1, 1]]), ExpertSlots(num_layers=1, num_experts=4, top_k=1, num_ranks=2,
                      num_router_slots=4), "none")  # fmt: skip
    assert placement.physical_to_logical.tolist() == [[0, 1, 2, 3]]


def test_a_static_placement_gives_spare_slots_to_experts_without_knowing_the_load():
    slots = ExpertSlots(num_layers=2, num_experts=4, top_k=1, num_ranks=3, num_router_slots=6)
    placement = place(np.array([[1.0, 1, 1, 90], [1.0, 1, 90, 1]]), slots, "none")
    assert placement.num_copies.tolist() == [[2, 2, 1, 1]] * 2


def test_perfect_balance_is_one_whatever_the_load():
    found = hottest_rank_load(MODEL, DECODE, num_tokens=30_720, balance="balanced", seed=0, num_iterations=2)
    assert found.rank.tolist() == [[1.0] * 58] * 2
    assert not found.slot_std_tokens.any()


def test_eplb_is_between_static_and_perfect_and_stale_statistics_cost():
    static = mean_rank_load(ExpertSlots(**EP32, num_router_slots=256), "none")
    by_drift = [mean_rank_load(ExpertSlots(**EP32, num_router_slots=288), "eplb", drift=d) for d in (0, 0.1, 0.3, 0.6)]
    assert 1 < by_drift[0] < by_drift[1] < by_drift[2] < by_drift[3] < static


def test_more_redundant_slots_balance_better():
    loads = [mean_rank_load(ExpertSlots(**EP32, num_router_slots=n), "eplb") for n in (256, 288, 320)]
    assert loads[0] > loads[1] > loads[2] > 1


def test_a_whole_decode_instance_has_a_figure_per_layer_and_follows_from_the_seed():
    arguments = {"num_tokens": 320 * 96, "balance": "eplb", "num_iterations": 3}
    first = hottest_rank_load(MODEL, DECODE, **arguments, seed=1)
    assert first.rank.shape == (3, 58)
    assert (first.rank == first.slot).all()  # one routed expert per die
    assert first.rank.tolist() == hottest_rank_load(MODEL, DECODE, **arguments, seed=1).rank.tolist()
    assert first.rank.tolist() != hottest_rank_load(MODEL, DECODE, **arguments, seed=2).rank.tolist()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sigma_low": -0.1}, "sigma_low: -0.1 must be in"),
        ({"sigma_low": 2.0}, "sigma_low: 2.0 must be in .* sigma_high 1.6"),
        ({"sigma_high": float("inf")}, "both finite"),
        ({"drift": -1.0}, "drift: -1.0 must be in"),
        ({"drift": float("nan")}, "drift: nan must be in"),
    ],
)
def test_parameters_out_of_range_are_named(values, message):
    with pytest.raises(UnfitRequest, match=message):
        LoadModel(**{"sigma_low": 0.4, "sigma_high": 1.6, "drift": 0.1, **values})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_tokens": 0}, "num_tokens: 0"),
        ({"num_iterations": 0}, "num_iterations: 0"),
        ({"drift": 11.0}, "drift: 11.0 must be in"),
    ],
)
def test_a_deployment_out_of_range_is_named(values, message):
    with pytest.raises(UnfitRequest, match=message):
        mean_rank_load(ExpertSlots(**EP32, num_router_slots=256), "none", **values)


def test_slots_that_do_not_divide_are_named():
    with pytest.raises(UnfitRequest, match="num_physical: 257 slots do not divide over 32 ranks"):
        mean_rank_load(ExpertSlots(**EP32, num_router_slots=257), "eplb")
