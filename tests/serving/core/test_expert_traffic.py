"""Token copies between ranks, and what each link carries of them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.core.errors import UnfitRequest
from serving.core.expert_placement import balanced_placement, static_placement
from serving.core.expert_traffic import (
    DieGroups,
    between_nodes,
    between_ranks,
    copies_to_slots,
    link_traffic,
    with_shared,
)

PROFILE = settings(derandomize=True, database=None, deadline=None, max_examples=60)


@st.composite
def cases(draw):
    """Counts (R, E) of one layer, a placement of two layers, and how dies sit in nodes."""
    num_ranks = draw(st.integers(1, 9))
    num_physical = num_ranks * draw(st.integers(1, 3))
    num_shared = draw(st.integers(0, min(num_ranks, num_physical - 1)))
    num_experts = draw(st.integers(1, num_physical - num_shared))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    placement = balanced_placement(
        rng.random((2, num_experts)),
        num_physical=num_physical,
        num_ranks=num_ranks,
        num_shared_copies=num_shared,
    )
    counts = rng.integers(0, 20, (num_ranks, num_experts))
    per_package = draw(st.integers(1, 3))
    groups = DieGroups(dies_per_package=per_package, dies_per_node=per_package * draw(st.integers(1, 3)))
    return (with_shared(counts, 7) if num_shared else counts), placement, groups


@PROFILE
@given(case=cases(), layer=st.sampled_from([0, 1]), is_near=st.booleans())
def test_every_copy_goes_to_a_slot_of_its_expert(case, layer, is_near):
    counts, placement, groups = case
    copies = copies_to_slots(counts, placement, layer=layer, near=groups if is_near else None)
    assert copies.min() >= 0
    for expert in range(counts.shape[1]):
        slots = placement.physical_to_logical[layer] == expert
        assert copies[:, slots].sum(axis=1) == pytest.approx(counts[:, expert])


@PROFILE
@given(case=cases(), is_near=st.booleans())
def test_copies_are_those_of_plain_loops(case, is_near):
    counts, placement, groups = case
    num_ranks, num_experts = counts.shape
    physical = placement.physical_to_logical[0]
    per_rank = len(physical) // num_ranks
    expected = np.zeros((num_ranks, num_ranks))
    for sender in range(num_ranks):
        for expert in range(num_experts):
            holders = [slot // per_rank for slot in np.flatnonzero(physical == expert)]
            beside = [r for r in holders if r // groups.dies_per_node == sender // groups.dies_per_node]
            chosen = beside if is_near and beside else holders
            for rank in chosen:
                expected[sender, rank] += counts[sender, expert] / len(chosen)
    found = between_ranks(copies_to_slots(counts, placement, layer=0, near=groups if is_near else None))
    assert found == pytest.approx(expected)


@PROFILE
@given(case=cases())
def test_links_carry_what_leaves_a_die_a_package_a_node_and_no_more(case):
    counts, placement, groups = case
    matrix = between_ranks(copies_to_slots(counts, placement, layer=0))
    there, back = link_traffic(matrix, groups), link_traffic(matrix.T, groups)
    assert matrix.sum() == pytest.approx(counts.sum())
    off_die = matrix.sum() - np.trace(matrix)
    assert there.die_out.sum() + there.package.sum() == pytest.approx(off_die)
    assert there.die_in.sum() == pytest.approx(there.die_out.sum())
    assert there.node_in.sum() == pytest.approx(there.node_out.sum())
    assert there.node_out.sum() <= there.die_out.sum() + 1e-9
    assert between_nodes(matrix, groups).sum() == pytest.approx(matrix.sum())
    for one, other in (("die_out", "die_in"), ("node_out", "node_in")):
        assert getattr(there, one) == pytest.approx(getattr(back, other))
        assert getattr(there, other) == pytest.approx(getattr(back, one))
    assert there.package.sum() == pytest.approx(back.package.sum())


def test_links_of_six_dies_in_two_nodes():
    """Packages are 0 1 | 2 3 || 4 5: the second node has one package only."""
    matrix = np.arange(36.0).reshape(6, 6)
    links = link_traffic(matrix, DieGroups(dies_per_package=2, dies_per_node=4))
    assert links.package.tolist() == [1, 6, 15, 20, 29, 34]
    assert links.die_out.tolist() == [14, 38, 58, 82, 102, 126]  # row sums without the package's two columns
    assert links.die_in.tolist() == [84, 88, 68, 72, 52, 56]
    assert links.node_out.tolist() == [4 + 5 + 10 + 11 + 16 + 17 + 22 + 23, 24 + 25 + 26 + 27 + 30 + 31 + 32 + 33]
    assert links.node_in.tolist() == links.node_out.tolist()[::-1]


def test_a_copy_for_the_own_rank_crosses_no_link():
    links = link_traffic(np.diag([5.0, 7.0, 9.0, 11.0]), DieGroups(dies_per_package=2, dies_per_node=2))
    assert not any(getattr(links, name).any() for name in ("die_out", "die_in", "package", "node_out", "node_in"))


def test_a_near_copy_comes_first_and_only_if_there_is_one():
    placement = balanced_placement(np.array([[9.0, 1, 1, 1, 1, 1]]), num_physical=8, num_ranks=4)
    assert placement.physical_to_logical.tolist() == [[0, 3, 0, 4, 0, 5, 1, 2]]  # expert 0 on ranks 0, 1 and 2
    counts = np.zeros((4, 6), np.int64)
    counts[:, 0] = 6
    counts[:, 4] = 1
    one_node, two_nodes = DieGroups(dies_per_package=1, dies_per_node=4), DieGroups(dies_per_package=1, dies_per_node=2)
    anywhere = between_ranks(copies_to_slots(counts, placement, layer=0))
    assert anywhere.tolist() == [[2, 3, 2, 0]] * 4
    assert between_ranks(copies_to_slots(counts, placement, layer=0, near=one_node)).tolist() == anywhere.tolist()
    near = between_ranks(copies_to_slots(counts, placement, layer=0, near=two_nodes))
    assert near.tolist() == [[3, 4, 0, 0]] * 2 + [[0, 1, 6, 0]] * 2


def test_the_shared_expert_is_chosen_by_every_token():
    assert with_shared(np.array([[[1, 2], [3, 4]]]), 5).tolist() == [[[1, 2, 5], [3, 4, 5]]]


def test_shapes_that_do_not_agree_are_named():
    placement = static_placement(num_layers=1, num_experts=4, num_physical=4, num_ranks=2)
    with pytest.raises(UnfitRequest, match=r"counts: shape \(2, 5\) must be \(2, 4\)"):
        copies_to_slots(np.ones((2, 5)), placement, layer=0)
    with pytest.raises(UnfitRequest, match="dies_per_node: 3 must be a multiple of 2"):
        DieGroups(dies_per_package=2, dies_per_node=3)
