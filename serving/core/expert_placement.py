"""Where the copies of each expert live, given how much each is used.

Owns: the balancing of one instance's experts, as a pure function of measured loads.
Must not know: weights, when to rebalance, how a token chooses among copies.
Source: DeepSeek's EPLB (github.com/deepseek-ai/EPLB), hierarchical and global. With shared copies, the decode layout of
arXiv 2506.12708 section 4.1, in which copies of the shared expert occupy slots like any other expert.

Shapes: L layers, E logical experts (routed), P physical slots, R ranks; slot p is on rank p // (P / R).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serving.core.errors import UnfitRequest

Loads = NDArray[np.float64]
Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertPlacement:
    """Slots of all experts. Arrays are read-only.

    Logical id E is the shared expert, present only if it has copies of its own. An expert's slots in
    `logical_to_physical` ascend, and go round again behind the last, so every entry is a slot of that expert.
    """

    physical_to_logical: Ids  # (L, P)
    logical_to_physical: Ids  # (L, E or E + 1, most copies)
    num_copies: Ids  # (L, E or E + 1)
    num_ranks: int

    def rank_loads(self, load: Loads) -> Loads:
        """Load of every rank, shape (L, R), if each expert's `load` (L, E or E + 1) divides evenly over its copies."""
        per_copy = np.asarray(load, np.float64) / self.num_copies
        per_slot = np.take_along_axis(per_copy, self.physical_to_logical, axis=1)
        by_rank: Loads = per_slot.reshape(len(per_slot), self.num_ranks, -1).sum(axis=2)
        return by_rank

    def balancedness(self, load: Loads) -> Loads:
        """Mean rank load over the highest, per layer, in (0, 1]: 1 is perfect balance. Layers without load have 1."""
        by_rank = self.rank_loads(load)
        highest = by_rank.max(axis=1)
        balance: Loads = np.where(highest > 0, by_rank.mean(axis=1) / np.where(highest > 0, highest, 1), 1.0)
        return balance


def uniform_load(num_layers: int, num_experts: int) -> Loads:
    """The load to assume before any is measured, shape (L, E)."""
    return np.ones((num_layers, num_experts))


def balanced_placement(
    load: Loads | Ids,
    *,
    num_physical: int,
    num_groups: int = 1,
    num_nodes: int = 1,
    num_ranks: int,
    num_shared_copies: int = 0,
) -> ExpertPlacement:
    """Replicate busy experts and spread all copies so that ranks carry like loads.

    load: (L, E) tokens per logical expert, in any unit. num_physical: slots P, shared copies among them.
    If nodes divide the groups, each group of experts stays on one node, because a token's experts are chosen from few
    groups: 1. groups to nodes, 2. redundant copies inside each node, 3. copies to ranks. If they do not, steps 2 and 3
    are done over all nodes at once.

    With shared copies the policy is the global one. They are dealt evenly over the ranks, take the last slots there,
    and each weighs as much as the average copy of a routed expert. A layer without any load is taken as uniformly
    loaded. Raises UnfitRequest if sizes do not divide.
    """
    loads = np.asarray(load, np.float64)
    if loads.ndim != 2 or not loads.size or not np.isfinite(loads).all() or (loads < 0).any():
        raise UnfitRequest(f"load: shape {loads.shape} must be (layers, experts), values finite and not negative")
    num_experts = loads.shape[1]
    loads = np.where(loads.sum(axis=1, keepdims=True) > 0, loads, 1.0)
    _check_sizes(num_experts, num_physical, num_groups, num_nodes, num_ranks, num_shared_copies)
    if num_shared_copies:
        physical = _place_beside_shared(loads, num_physical, num_ranks, num_shared_copies)
    elif num_groups % num_nodes == 0:
        physical = _place_hierarchically(loads, num_physical, num_groups, num_nodes, num_ranks)
    else:
        physical = _place_hierarchically(loads, num_physical, 1, 1, num_ranks)
    return _with_tables(physical, num_experts + (num_shared_copies > 0), num_ranks)


def static_placement(
    *, num_layers: int, num_experts: int, num_physical: int, num_ranks: int, num_shared_copies: int = 0
) -> ExpertPlacement:
    """A placement that knows no load, the same in every layer: what there is without a balancer.

    Experts stand in order, as many on each rank. If there are more slots than that takes, or shared copies, they are
    given out as if all experts were used alike. Raises UnfitRequest if sizes do not divide.
    """
    if num_shared_copies or num_physical != num_experts:
        return balanced_placement(
            uniform_load(num_layers, num_experts),
            num_physical=num_physical,
            num_ranks=num_ranks,
            num_shared_copies=num_shared_copies,
        )
    _check_sizes(num_experts, num_physical, 1, 1, num_ranks, 0)
    return _with_tables(np.tile(np.arange(num_experts, dtype=np.int64), (num_layers, 1)), num_experts, num_ranks)


def _check_sizes(
    num_experts: int, num_physical: int, num_groups: int, num_nodes: int, num_ranks: int, num_shared_copies: int
) -> None:
    if min(num_groups, num_nodes, num_ranks) < 1 or num_shared_copies < 0:
        raise UnfitRequest(f"num_groups {num_groups}, num_nodes {num_nodes}, num_ranks {num_ranks} must be at least 1")
    if num_physical % num_ranks:
        raise UnfitRequest(f"num_physical: {num_physical} slots do not divide over {num_ranks} ranks")
    if num_physical - num_shared_copies < num_experts:
        raise UnfitRequest(
            f"num_physical: {num_physical} slots less {num_shared_copies} shared copies cannot hold "
            f"{num_experts} experts"
        )
    if num_experts % num_groups:
        raise UnfitRequest(f"num_groups: {num_groups} groups do not divide {num_experts} experts")
    if num_ranks % num_nodes:
        raise UnfitRequest(f"num_nodes: {num_nodes} nodes do not divide {num_ranks} ranks")


def _place_hierarchically(loads: Loads, num_physical: int, num_groups: int, num_nodes: int, num_ranks: int) -> Ids:
    """EPLB. With one group and one node it is the global policy. Returns physical_to_logical (L, P)."""
    num_layers, num_experts = loads.shape
    group_size = num_experts // num_groups
    # Groups to nodes; row (layer, node) of experts_NX lists the experts of that node, group by group.
    group_loads = loads.reshape(num_layers, num_groups, group_size).sum(axis=2)
    groups = _pack(group_loads, np.full(num_nodes, num_groups // num_nodes))
    experts_NX = (groups[..., None] * group_size + np.arange(group_size)).reshape(num_layers * num_nodes, -1)
    node_loads = np.take_along_axis(np.repeat(loads, num_nodes, axis=0), experts_NX, axis=1)
    # Copies inside each node, then copies to the node's ranks.
    copies, num_copies = _replicate(node_loads, num_physical // num_nodes)
    copy_loads = np.take_along_axis(node_loads / num_copies, copies, axis=1)
    order = _pack(copy_loads, np.full(num_ranks // num_nodes, num_physical // num_ranks))
    local_experts = np.take_along_axis(copies, order, axis=1)
    return np.take_along_axis(experts_NX, local_experts, axis=1).reshape(num_layers, num_physical)


def _place_beside_shared(loads: Loads, num_physical: int, num_ranks: int, num_shared: int) -> Ids:
    num_layers, num_experts = loads.shape
    num_routed = num_physical - num_shared
    shared_per_rank = np.diff(np.arange(num_ranks + 1) * num_shared // num_ranks)
    slots_per_rank = num_physical // num_ranks
    if int(shared_per_rank.max()) > slots_per_rank:
        raise UnfitRequest(f"num_shared_copies: {num_shared} exceed {num_ranks} ranks of {slots_per_rank} slots")
    copies, num_copies = _replicate(loads, num_routed)
    copy_loads = np.take_along_axis(loads / num_copies, copies, axis=1)
    shared_load = loads.sum(axis=1, keepdims=True) / num_routed
    routed_slots = slots_per_rank - shared_per_rank
    order = _pack(copy_loads, routed_slots, base=shared_load * shared_per_rank)
    physical = np.full((num_layers, num_ranks, slots_per_rank), num_experts, np.int64)
    is_routed = np.arange(slots_per_rank) < routed_slots[:, None]
    physical[:, is_routed] = np.take_along_axis(copies, order, axis=1)
    return physical.reshape(num_layers, num_physical)


def _replicate(loads: Loads, num_copies: int) -> tuple[Ids, Ids]:
    """Copies (X, num_copies) of the items of each row, and how many each item has, (X, num_items).

    Every item has one; each further copy goes to the item with the highest load per copy, the first of equals.
    """
    num_rows, num_items = loads.shape
    rows = np.arange(num_rows)
    counts = np.ones((num_rows, num_items), np.int64)
    copies = np.tile(np.arange(num_copies, dtype=np.int64), (num_rows, 1))
    for i in range(num_items, num_copies):
        busiest = np.argmax(loads / counts, axis=1)
        copies[:, i] = busiest
        counts[rows, busiest] += 1
    return copies, counts


def _pack(loads: Loads, capacities: Ids, *, base: Loads | float = 0.0) -> Ids:
    """Deal the items of each row to packs that take exactly `capacities` items: their indices (X, n), pack by pack.

    From the heaviest item down, each goes to the lightest pack with room (the first of equals). Packs start with the
    load `base` (X, M). Where no pack takes more than one item, the order does not matter and is kept.
    """
    num_rows, num_items = loads.shape
    if int(capacities.max()) <= 1:
        return np.tile(np.arange(num_items, dtype=np.int64), (num_rows, 1))
    rows = np.arange(num_rows)
    pack_loads = np.zeros((num_rows, len(capacities))) + base
    num_taken = np.zeros((num_rows, len(capacities)), np.int64)
    first = np.cumsum(capacities) - capacities
    order = np.empty((num_rows, num_items), np.int64)
    for items in np.argsort(-loads, axis=1, kind="stable").T:
        packs = np.argmin(np.where(num_taken < capacities, pack_loads, np.inf), axis=1)
        order[rows, first[packs] + num_taken[rows, packs]] = items
        num_taken[rows, packs] += 1
        pack_loads[rows, packs] += loads[rows, items]
    return order


def _with_tables(physical: Ids, num_logical: int, num_ranks: int) -> ExpertPlacement:
    num_layers = len(physical)
    num_copies = np.zeros((num_layers, num_logical), np.int64)
    np.add.at(num_copies, (np.arange(num_layers)[:, None], physical), 1)
    by_expert = np.argsort(physical, axis=1, kind="stable")  # the slots of expert 0, of expert 1, ...
    first = np.cumsum(num_copies, axis=1) - num_copies
    turns = np.arange(int(num_copies.max())) % num_copies[..., None]
    slots = np.take_along_axis(by_expert[:, None, :], first[..., None] + turns, axis=2)
    for array in (physical, slots, num_copies):
        array.flags.writeable = False
    return ExpertPlacement(
        physical_to_logical=physical, logical_to_physical=slots, num_copies=num_copies, num_ranks=num_ranks
    )
