"""Table 11 of the paper, and its limits."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices.spec import SupernodeSpec
from devices.switches import SwitchPlan, plan_switches


@pytest.mark.parametrize(
    ("num_npus", "num_nodes", "num_logical_switches", "percent"),
    [(384, 48, 56, 100), (352, 44, 56, 92), (288, 36, 42, 100), (256, 32, 42, 89), (192, 24, 28, 100)],
)  # arXiv 2506.12708v2, table 11
def test_table_11(
    supernode: SupernodeSpec, num_npus: int, num_nodes: int, num_logical_switches: int, percent: int
) -> None:
    ours = plan_switches(supernode, num_npus=num_npus)
    assert (ours.num_nodes, ours.num_logical_switches) == (num_nodes, num_logical_switches)
    assert round(100 * ours.utilization) == percent


def test_the_full_machine_has_all_its_chips(supernode: SupernodeSpec) -> None:
    ub = supernode.ub_topology
    assert ub is not None
    chips = plan_switches(supernode, num_npus=384).num_logical_switches * ub.l2_chips_per_logical_switch
    assert chips == ub.l1_chips_per_node * ub.l2_chips_per_sub_plane == 112


def test_a_node_in_part_counts_as_one(supernode: SupernodeSpec) -> None:
    assert plan_switches(supernode, num_npus=1) == SwitchPlan(num_nodes=1, num_logical_switches=14, utilization=1 / 12)
    assert plan_switches(supernode, num_npus=97).num_nodes == 13


@given(num_npus=st.integers(1, 384))
def test_the_ports_suffice_and_one_step_less_would_not(supernode: SupernodeSpec, num_npus: int) -> None:
    ours = plan_switches(supernode, num_npus=num_npus)
    ports, uplinks = ours.num_logical_switches * 2 * 48, ours.num_nodes * 7 * 16
    assert ports - 14 * 2 * 48 < uplinks <= ports
    assert ours.utilization == pytest.approx(uplinks / ports)


def test_what_one_second_level_cannot_join_is_refused(supernode: SupernodeSpec) -> None:
    for num_npus in (0, 385):
        with pytest.raises(ValueError, match=rf"num_npus: {num_npus} must be in \[1, 384\]: 16 chips .* 48 nodes"):
            plan_switches(supernode, num_npus=num_npus)
    with pytest.raises(ValueError, match="ub_topology of cloudmatrix384: missing"):
        plan_switches(replace(supernode, ub_topology=None), num_npus=8)
