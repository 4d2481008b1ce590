"""Which link carries how much of dispatch and combine, given which experts the tokens of each rank chose.

Owns: the matrix of token copies between ranks under a placement, and its sums per link of the machine.
Must not know: bandwidths, what an expert's load should be, how placements are made.
Source: the links are those of arXiv 2506.12708v2, sections 3.3.1 to 3.3.3: a UB port pair per die, a die-to-die link in
each package, uplinks of a node's L1 switches.

    copies(s, p) = counts(s, e(p)) share(n(s), p)

where share is the part of the tokens for expert e(p) that a sender in node n(s) gives to its copy in slot p: alike for
every copy; or, with `near`, alike for the copies in the sender's node if there are any. These are means over the tokens
of a sender, so copies are fractions. A copy for the sender's own rank crosses no link. Dispatch carries what s has for
the slots of rank r from s to r, combine as many copies from r to s: its matrix is the transpose, with another message
size.

All of it is of one layer. Shapes: R ranks, P slots, E experts (and the shared one, as in ExpertPlacement), N nodes. A
rank is a die; dies fill packages and nodes in order.
"""

from dataclasses import dataclass

import numpy as np

from serving.core.errors import UnfitRequest
from serving.core.expert_placement import ExpertPlacement, Ids, Loads


@dataclass(frozen=True, slots=True, kw_only=True)
class DieGroups:
    """How many dies, one rank each, share a package and a node."""

    dies_per_package: int
    dies_per_node: int

    def __post_init__(self) -> None:
        if self.dies_per_package < 1 or self.dies_per_node < 1 or self.dies_per_node % self.dies_per_package:
            raise UnfitRequest(f"dies_per_node: {self.dies_per_node} must be a multiple of {self.dies_per_package}")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LinkTraffic:
    """What each link carries, in the unit of the matrix that it was summed from.

    A die's UB port carries what leaves its package, to the same node or another one.
    """

    die_out: Loads  # (R,)
    die_in: Loads  # (R,)
    package: Loads  # (R,) from this die to the other dies of its package
    node_out: Loads  # (N,)
    node_in: Loads  # (N,)


def with_shared(counts: Ids, tokens: int) -> Ids:
    """`counts` (..., E) with a last column for the shared expert, which each of a sender's `tokens` goes to."""
    joined: Ids = np.concatenate([counts, np.full((*counts.shape[:-1], 1), tokens)], axis=-1)
    return joined


def copies_to_slots(
    counts: Loads | Ids, placement: ExpertPlacement, *, layer: int, near: DieGroups | None = None
) -> Loads:
    """Token copies that each rank has for each slot, (R, P), if its tokens chose the experts `counts` (R, E) times.

    With `near`, a copy in the sender's own node comes before the others. Raises UnfitRequest if shapes do not agree.
    """
    physical, num_experts = placement.physical_to_logical[layer], placement.num_copies.shape[1]
    num_ranks, num_slots = placement.num_ranks, len(physical)
    if counts.shape != (num_ranks, num_experts):
        raise UnfitRequest(f"counts: shape {counts.shape} must be {(num_ranks, num_experts)} (ranks, experts)")
    anywhere = 1.0 / placement.num_copies[layer, physical]
    if near is None:
        evenly: Loads = counts[:, physical] * anywhere
        return evenly
    copies = np.empty((num_ranks, num_slots))
    node_of_slot = np.arange(num_slots) // (num_slots // num_ranks) // near.dies_per_node
    for node, first in enumerate(range(0, num_ranks, near.dies_per_node)):
        senders = slice(first, first + near.dies_per_node)
        is_in_node = node_of_slot == node
        num_in_node = np.bincount(physical[is_in_node], minlength=num_experts)[physical]
        share = np.where(num_in_node > 0, is_in_node / np.maximum(num_in_node, 1), anywhere)
        copies[senders] = counts[senders][:, physical] * share
    return copies


def between_ranks(copies: Loads) -> Loads:
    """What each rank (row) has for each rank (column), (R, R), from what it has for each slot, (R, P)."""
    by_rank: Loads = copies.reshape(len(copies), len(copies), -1).sum(axis=2)
    return by_rank


def link_traffic(matrix: Loads, groups: DieGroups) -> LinkTraffic:
    """Sum `matrix` (R, R), of copies or bytes from row to column, over what each link carries."""
    ranks = np.arange(len(matrix))
    package = ranks // groups.dies_per_package
    is_in_package = package[:, None] == package
    on_ub = np.where(is_in_package, 0.0, matrix)
    beside = np.where(is_in_package & ~np.eye(len(matrix), dtype=bool), matrix, 0.0)
    nodes = between_nodes(matrix, groups)
    inside = np.diagonal(nodes)
    return LinkTraffic(
        die_out=on_ub.sum(axis=1),
        die_in=on_ub.sum(axis=0),
        package=beside.sum(axis=1),
        node_out=nodes.sum(axis=1) - inside,
        node_in=nodes.sum(axis=0) - inside,
    )


def between_nodes(matrix: Loads, groups: DieGroups) -> Loads:
    """`matrix` (R, R) summed to nodes, (N, N); the last node may have fewer dies."""
    first = np.arange(0, len(matrix), groups.dies_per_node)
    summed: Loads = np.add.reduceat(np.add.reduceat(matrix, first, axis=0), first, axis=1)
    return summed
