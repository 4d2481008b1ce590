"""Which link carries how much of dispatch and combine, given which experts the tokens of each rank chose.

Owns: the matrix of token copies between ranks under a placement, and its sums per link of the machine.
Must not know: bandwidths, what an expert's load should be, how placements are made.
Source: the links are those of arXiv 2506.12708v2, sections 3.3.1 to 3.3.3: a UB port pair per die, a die-to-die link in
each package, uplinks of a node's L1 switches.

    copies(l, s, r) = sum over e of counts(l, s, e) share(l, n(s), e, r)

where share is the part of expert e's tokens that a sender in node n(s) gives to the copies on rank r: alike for every
copy; or, with `near`, alike for the copies in its own node if there are any. These are means over the tokens of a
sender, so copies are fractions. A copy for the sender's own rank crosses no link. Dispatch carries `copies` from s to r,
combine as many from r to s: its matrix is the transpose, with another message size.

Shapes: L layers, S = R ranks (senders), E experts (and the shared one, as in ExpertPlacement), N nodes. Rank r is a die;
dies fill packages and nodes in order.
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
    """What each link carries in one layer, in the unit of the matrix that it was summed from.

    A die's UB port carries what leaves its package, to the same node or another one.
    """

    die_out: Loads  # (L, R)
    die_in: Loads  # (L, R)
    package: Loads  # (L, R) from this die to the other dies of its package
    node_out: Loads  # (L, N)
    node_in: Loads  # (L, N)


def with_shared(counts: Ids, tokens: Ids) -> Ids:
    """`counts` (L, S, E) with a last column for the shared expert, which gets each of a sender's `tokens` (S,)."""
    shared = np.broadcast_to(tokens, counts.shape[:2])[..., None]
    joined: Ids = np.concatenate([counts, shared], axis=2)
    return joined


def copies_between_ranks(counts: Loads | Ids, placement: ExpertPlacement, *, near: DieGroups | None = None) -> Loads:
    """Token copies that sender s has for rank r, shape (L, R, R), if its tokens chose the experts `counts` (L, R, E) times.

    With `near`, a copy in the sender's own node comes before the others. Raises UnfitRequest if shapes do not agree.
    """
    num_ranks = placement.num_ranks
    expected = (len(placement.num_copies), num_ranks, placement.num_copies.shape[1])
    if counts.shape != expected:
        raise UnfitRequest(f"counts: shape {counts.shape} must be {expected} (layers, ranks, experts)")
    matrix = np.empty((expected[0], num_ranks, num_ranks))
    for layer, layer_counts in enumerate(np.asarray(counts, np.float64)):
        held = _copies_on_ranks(placement, layer)
        anywhere = held / held.sum(axis=1, keepdims=True)
        if near is None:
            matrix[layer] = layer_counts @ anywhere
            continue
        for first in range(0, num_ranks, near.dies_per_node):
            node = slice(first, first + near.dies_per_node)
            in_node = np.zeros_like(held)
            in_node[:, node] = held[:, node]
            number = in_node.sum(axis=1, keepdims=True)
            share = np.where(number > 0, in_node / np.where(number > 0, number, 1.0), anywhere)
            matrix[layer, node] = layer_counts[node] @ share
    return matrix


def link_traffic(matrix: Loads, groups: DieGroups) -> LinkTraffic:
    """Sum `matrix` (L, R, R), of copies or bytes from row to column, over what each link carries."""
    num_ranks = matrix.shape[-1]
    ranks = np.arange(num_ranks)
    package = ranks // groups.dies_per_package
    leaves_package = package[:, None] != package
    leaves_die = ~np.eye(num_ranks, dtype=bool) & ~leaves_package
    on_ub = np.where(leaves_package, matrix, 0.0)
    nodes = between_nodes(matrix, groups)
    own = np.diagonal(nodes, axis1=1, axis2=2)
    return LinkTraffic(
        die_out=on_ub.sum(axis=2),
        die_in=on_ub.sum(axis=1),
        package=np.where(leaves_die, matrix, 0.0).sum(axis=2),
        node_out=nodes.sum(axis=2) - own,
        node_in=nodes.sum(axis=1) - own,
    )


def between_nodes(matrix: Loads, groups: DieGroups) -> Loads:
    """`matrix` (L, R, R) summed to nodes, (L, N, N); the last node may have fewer dies."""
    first = np.arange(0, matrix.shape[-1], groups.dies_per_node)
    summed: Loads = np.add.reduceat(np.add.reduceat(matrix, first, axis=1), first, axis=2)
    return summed


def _copies_on_ranks(placement: ExpertPlacement, layer: int) -> Loads:
    """Copies of each expert on each rank, shape (E, R)."""
    physical = placement.physical_to_logical[layer]
    held = np.zeros((placement.num_copies.shape[1], placement.num_ranks))
    np.add.at(held, (physical, np.arange(len(physical)) // (len(physical) // placement.num_ranks)), 1.0)
    return held
