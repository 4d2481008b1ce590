"""How many switches of the UB plane's second level a supernode of a given size needs.

Owns: nodes, logical switches and their utilization as a function of the number of NPUs.
Must not know: bandwidths, flows.
Source: arXiv 2506.12708v2, section 3.3.3 and table 11.

Per sub-plane, c chips of p ports join c * p / u nodes, each of which brings u uplinks. Table 11 counts logical
switches of two chips; they come in steps of two per sub-plane: 2 x 7 = 14 logical switches for 4 x 48 / 16 = 12 nodes.
"""

import math
from dataclasses import dataclass

from devices.spec import SupernodeSpec

# arXiv 2506.12708v2, table 11: its numbers (56, 42 and 28) are multiples of 2 x 7. Assumed that no others occur: steps
# of 1 x 7 would give its rows as well, and fewer switches in between, such as 35 for 30 nodes.
_STEP_PER_SUB_PLANE = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class SwitchPlan:
    """Switches of a supernode; utilization is the part of their ports, in [0, 1], that is in use."""

    num_nodes: int
    num_logical_switches: int
    utilization: float


def plan_switches(spec: SupernodeSpec, *, num_npus: int) -> SwitchPlan:
    """The second level for `num_npus` in nodes and chips like those of `spec`; a last node may be filled in part.

    Raises ValueError if the hardware file does not know the switches, for no NPUs, and for more nodes than one second
    level can join.
    """
    ub = spec.ub_topology
    if ub is None:
        raise ValueError(f"ub_topology of {spec.name}: missing; its switches are not known")
    max_npus = ub.max_nodes * spec.npus_per_node
    if not 0 < num_npus <= max_npus:
        raise ValueError(
            f"num_npus: {num_npus} must be in [1, {max_npus}]: {ub.l2_chips_per_sub_plane} chips of "
            f"{ub.l2_ports_per_chip} ports per sub-plane join {ub.max_nodes} nodes of {ub.l1_uplinks_per_chip} uplinks"
        )
    num_nodes = math.ceil(num_npus / spec.npus_per_node)
    nodes_per_step = (
        _STEP_PER_SUB_PLANE * ub.l2_chips_per_logical_switch * ub.l2_ports_per_chip / ub.l1_uplinks_per_chip
    )
    num_steps = math.ceil(num_nodes / nodes_per_step)
    return SwitchPlan(
        num_nodes=num_nodes,
        num_logical_switches=num_steps * _STEP_PER_SUB_PLANE * ub.l1_chips_per_node,
        utilization=num_nodes / (num_steps * nodes_per_step),
    )
