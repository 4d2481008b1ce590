"""Expert placement: EPLB's published example, and what holds of every placement."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.core.errors import UnfitRequest
from serving.core.expert_placement import balanced_placement, static_placement, uniform_load

PROFILE = settings(derandomize=True, database=None, deadline=None, max_examples=80)

README_LOAD = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
)


def test_the_example_of_the_published_readme():
    placement = balanced_placement(README_LOAD, num_physical=16, num_groups=4, num_nodes=2, num_ranks=8)
    assert placement.physical_to_logical.tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    assert placement.num_copies[0].tolist() == [1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1]
    assert placement.logical_to_physical[0, :6].tolist() == [[12, 12], [13, 15], [11, 11], [6, 6], [5, 7], [0, 2]]


def test_the_decode_layout_of_the_paper_has_one_expert_on_each_of_320_ranks():
    placement = balanced_placement(uniform_load(2, 256), num_physical=320, num_ranks=320, num_shared_copies=32)
    row = placement.physical_to_logical[0]
    assert np.flatnonzero(row == 256).tolist() == list(range(9, 320, 10))  # one shared copy in every ten dies
    assert placement.num_copies[0].tolist() == [2] * 32 + [1] * 224 + [32]


def test_the_prefill_layout_of_the_paper_has_nine_routed_experts_and_a_shared_one_on_each_of_32_ranks():
    placement = balanced_placement(uniform_load(1, 256), num_physical=320, num_ranks=32, num_shared_copies=32)
    by_rank = placement.physical_to_logical.reshape(32, 10)
    assert by_rank[:, 9].tolist() == [256] * 32
    assert (by_rank[:, :9] < 256).all()
    assert placement.num_copies[0, :256].sum() == 288


def test_a_copy_of_the_hot_expert_is_made_and_balance_improves():
    load = np.array([[9.0, 1, 1, 1]])
    without = balanced_placement(load, num_physical=4, num_ranks=2)
    with_copies = balanced_placement(load, num_physical=6, num_ranks=2)
    assert with_copies.num_copies.tolist() == [[3, 1, 1, 1]]
    assert without.balancedness(load).tolist() == [0.6]  # 9 + 1 against 1 + 1
    assert with_copies.rank_loads(load).tolist() == [[7.0, 5.0]]


def test_a_shared_copy_weighs_on_its_rank():
    placement = balanced_placement(np.full((1, 5), 3.0), num_physical=6, num_ranks=2, num_shared_copies=1)
    assert placement.physical_to_logical.tolist() == [[0, 1, 3, 2, 4, 5]]
    assert placement.rank_loads(np.full((1, 6), 3.0)).tolist() == [[9.0, 9.0]]


def test_a_layer_without_load_counts_as_uniformly_loaded():
    idle = balanced_placement(np.zeros((1, 4)), num_physical=8, num_ranks=2)
    assert idle.num_copies.tolist() == [[2, 2, 2, 2]]
    assert idle.balancedness(np.zeros((1, 4))).tolist() == [1.0]


def test_without_redundancy_experts_stay_with_their_group_on_one_node():
    load = np.array([[8.0, 8, 1, 1, 5, 5, 4, 4]])  # groups of 16, 2, 10 and 8
    placement = balanced_placement(load, num_physical=8, num_groups=4, num_nodes=2, num_ranks=4)
    node_of = placement.logical_to_physical[0, :, 0] // 4
    assert node_of.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def test_a_static_placement_has_experts_in_order_and_spare_slots_as_for_a_uniform_load():
    in_order = static_placement(num_layers=2, num_experts=4, num_physical=4, num_ranks=2)
    assert in_order.physical_to_logical.tolist() == [[0, 1, 2, 3]] * 2
    spare = static_placement(num_layers=1, num_experts=4, num_physical=6, num_ranks=2)
    by_uniform = balanced_placement(uniform_load(1, 4), num_physical=6, num_ranks=2)
    assert spare.physical_to_logical.tolist() == by_uniform.physical_to_logical.tolist()
    with pytest.raises(UnfitRequest, match="num_physical: 4 slots do not divide over 3 ranks"):
        static_placement(num_layers=1, num_experts=4, num_physical=4, num_ranks=3)


@st.composite
def cases(draw):
    slots_per_rank = draw(st.integers(1, 4))
    num_nodes = draw(st.sampled_from([1, 2, 3]))
    num_ranks = num_nodes * draw(st.integers(1, 4))
    num_physical = num_ranks * slots_per_rank
    num_shared = draw(st.integers(0, max(0, num_physical - 1)))
    num_experts = draw(st.integers(1, num_physical - num_shared))
    divisors = [n for n in range(1, num_experts + 1) if num_experts % n == 0]
    num_groups = draw(st.sampled_from(divisors))
    values = st.integers(0, 50)
    load = draw(st.lists(st.lists(values, min_size=num_experts, max_size=num_experts), min_size=1, max_size=3))
    sizes = {
        "num_physical": num_physical,
        "num_groups": num_groups,
        "num_nodes": num_nodes,
        "num_ranks": num_ranks,
        "num_shared_copies": num_shared,
    }
    return np.array(load, np.float64), sizes


@PROFILE
@given(case=cases())
def test_every_expert_has_a_slot_and_the_tables_agree(case):
    load, sizes = case
    placement = balanced_placement(load, **sizes)
    num_layers, num_experts = load.shape
    num_logical = num_experts + (sizes["num_shared_copies"] > 0)
    physical = placement.physical_to_logical
    assert physical.shape == (num_layers, sizes["num_physical"])
    for layer in range(num_layers):
        copies = np.bincount(physical[layer], minlength=num_logical)
        assert copies.tolist() == placement.num_copies[layer].tolist()
        assert copies.min() >= 1
        if sizes["num_shared_copies"]:
            assert copies[num_experts] == sizes["num_shared_copies"]
            shared = (physical[layer] == num_experts).reshape(sizes["num_ranks"], -1).sum(axis=1)
            assert shared.max() - shared.min() <= 1
        for expert in range(num_logical):
            slots = np.flatnonzero(physical[layer] == expert)
            width = placement.logical_to_physical.shape[2]
            assert placement.logical_to_physical[layer, expert].tolist() == np.resize(slots, width).tolist()
        if load[layer].sum():  # a copy is never made of an expert while one with more load per copy has fewer
            per_copy = load[layer] / copies[:num_experts]
            before_last = load[layer] / np.maximum(copies[:num_experts] - 1, 1)
            is_copied = copies[:num_experts] > 1
            is_global = sizes["num_shared_copies"] or sizes["num_groups"] % sizes["num_nodes"]
            if is_copied.any() and (is_global or sizes["num_nodes"] == 1):
                assert before_last[is_copied].min() >= per_copy.max() - 1e-9


@PROFILE
@given(case=cases())
def test_a_uniform_load_over_equal_slots_is_balanced_and_the_result_is_deterministic(case):
    load, sizes = case
    first, second = balanced_placement(load, **sizes), balanced_placement(load.astype(np.int64), **sizes)
    assert first.physical_to_logical.tolist() == second.physical_to_logical.tolist()
    if sizes["num_physical"] == load.shape[1]:
        uniform = uniform_load(*load.shape)
        assert balanced_placement(uniform, **sizes).balancedness(uniform).tolist() == [1.0] * len(load)
    with pytest.raises(ValueError, match="read-only"):
        first.physical_to_logical[0, 0] = 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_physical": 15}, "num_physical: 15 slots do not divide over 8 ranks"),
        ({"num_physical": 8}, "num_physical: 8 slots less 0 shared copies cannot hold 12 experts"),
        ({"num_shared_copies": 5}, "num_physical: 16 slots less 5 shared copies cannot hold 12 experts"),
        ({"num_groups": 5}, "num_groups: 5 groups do not divide 12 experts"),
        ({"num_nodes": 3}, "num_nodes: 3 nodes do not divide 8 ranks"),
        ({"num_ranks": 0}, "must be at least 1"),
        ({"num_shared_copies": -1}, "must be at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_named(changes, message):
    sizes = {"num_physical": 16, "num_groups": 4, "num_nodes": 2, "num_ranks": 8, **changes}
    with pytest.raises(UnfitRequest, match=message):
        balanced_placement(README_LOAD, **sizes)


@pytest.mark.parametrize("load", [np.ones(3), np.ones((0, 3)), np.array([[1.0, -1]]), np.array([[np.nan, 1]])])
def test_a_load_that_is_no_load_is_refused(load):
    with pytest.raises(UnfitRequest, match="load: shape"):
        balanced_placement(load, num_physical=2, num_ranks=1)
