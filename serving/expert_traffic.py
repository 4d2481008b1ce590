"""What a balanced placement of experts changes on the links of a machine: dispatch and combine with EPLB off and on.

Owns: the comparison of two placements under the same routed tokens, per layer, and its figures per link.
Must not know: options, files, pictures.
Source: bandwidths from the hardware file. A die writes into remote memory over UB (arXiv 2506.12708v2, section 4.2.1),
so a port has the bandwidth of a write; a node's uplinks are as fast as its dies' ports together (section 3.3.3).
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np

from devices.deployment import ExpertDeployment
from devices.spec import SupernodeSpec
from model.config import ModelConfig
from model.work import combine_message_bytes, dispatch_message_bytes
from serving.core.expert_load_model import ExpertSlots, draw_counts, drifted, load_imbalance, place
from serving.core.expert_placement import ExpertPlacement, Ids, Loads
from serving.core.expert_traffic import (
    DieGroups,
    LinkTraffic,
    between_ranks,
    copies_to_slots,
    link_traffic,
    with_shared,
)

Operator = Literal["dispatch", "combine"]
OPERATORS: tuple[Operator, ...] = ("dispatch", "combine")
LINKS = tuple(field.name for field in fields(LinkTraffic))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LinkUse:
    """Bytes on the links of one class in each layer, shapes (L,); seconds are the busiest link's."""

    busiest_bytes: Loads
    mean_bytes: Loads
    p99_bytes: Loads
    busiest_s: Loads


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlacedTraffic:
    """One placement under the routed tokens."""

    num_router_slots: int
    placement: ExpertPlacement
    rank_imbalance: Loads  # (L,) hottest rank over the mean
    slot_imbalance: Loads  # (L,)
    uses: Mapping[tuple[Operator, str], LinkUse]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrafficComparison:
    """EPLB off and on. Bytes are of one layer of one step."""

    off: PlacedTraffic
    on: PlacedTraffic
    counts: Ids  # (L, R, E or E + 1) routed tokens per sender and expert, the same for both
    groups: DieGroups
    near: bool
    message_bytes: Mapping[Operator, int]
    bytes_per_s: Mapping[str, float]  # of one link of each class

    @property
    def hottest_layer(self) -> int:
        """Where the hottest rank stands out most with EPLB off, counted from the first mixture layer."""
        return int(np.argmax(self.off.rank_imbalance))

    def matrix(self, side: PlacedTraffic, layer: int, operator: Operator) -> Loads:
        """Bytes from each rank (row) to each rank (column), (R, R), what a rank keeps for itself included."""
        near = self.groups if self.near else None
        copies = between_ranks(copies_to_slots(self.counts[layer], side.placement, layer=layer, near=near))
        return self.message_bytes[operator] * (copies if operator == "dispatch" else copies.T)


def default_slots(model: ModelConfig, *, num_experts: int, num_ranks: int) -> tuple[int, int]:
    """Router slots with EPLB on, and copies of the shared expert that have dies of their own, as estimates place them.

    `num_experts` are those of the load, which need not be the model's. Raises ValueError for fewer than two.
    """
    # The layout asks for the number of experts only; groups and choices are those of the load's own model.
    shape = dataclasses.replace(model, n_routed_experts=num_experts, n_group=1, topk_group=1, num_experts_per_tok=1)
    layout = ExpertDeployment.published(shape, ep=num_ranks)
    return layout.num_router_slots, layout.num_shared_slots


def compare_traffic(
    weights: Loads,
    slots: ExpertSlots,
    *,
    tokens_per_rank: int,
    drift: float,
    model: ModelConfig,
    hardware: SupernodeSpec,
    near: bool,
    rng: np.random.Generator,
) -> TrafficComparison:
    """Place by `weights` (L, E), drift, draw the experts of every rank's tokens, and sum what crosses each link.

    EPLB on has the slots of `slots`; EPLB off only as many as experts, in order, where these divide over the ranks.
    """
    ranks = slots.num_ranks
    groups = DieGroups(
        dies_per_package=hardware.npu.num_dies, dies_per_node=hardware.npu.num_dies * hardware.npus_per_node
    )
    routed = drifted(weights, drift, rng=rng)
    senders = np.broadcast_to(routed[:, None], (slots.num_layers, ranks, slots.num_experts))
    counts = draw_counts(senders, num_tokens=tokens_per_rank, top_k=slots.top_k, rng=rng)
    if slots.num_shared_copies:
        counts = with_shared(counts, tokens_per_rank)
    message_bytes: dict[Operator, int] = {
        "dispatch": dispatch_message_bytes(model, scale_bytes=hardware.rates.ep_scale_bytes),
        "combine": combine_message_bytes(model),
    }
    rates = _link_rates(hardware, is_one_node=ranks <= groups.dies_per_node)
    is_lean = not slots.num_shared_copies and slots.num_experts % ranks == 0
    lean_slots = dataclasses.replace(slots, num_router_slots=slots.num_experts) if is_lean else slots

    def placed(balance: Literal["eplb", "none"], side_slots: ExpertSlots) -> PlacedTraffic:
        return _placed(
            place(weights, side_slots, balance),
            num_experts=slots.num_experts,
            counts=counts,
            groups=groups,
            near=near,
            num_router_slots=side_slots.num_router_slots,
            message_bytes=message_bytes,
            rates=rates,
        )

    return TrafficComparison(
        off=placed("none", lean_slots),
        on=placed("eplb", slots),
        counts=counts,
        groups=groups,
        near=near,
        message_bytes=message_bytes,
        bytes_per_s=rates,
    )


def _placed(
    placement: ExpertPlacement,
    *,
    num_experts: int,
    counts: Ids,
    groups: DieGroups,
    near: bool,
    num_router_slots: int,
    message_bytes: Mapping[Operator, int],
    rates: Mapping[str, float],
) -> PlacedTraffic:
    traffic: dict[Operator, list[LinkTraffic]] = {"dispatch": [], "combine": []}
    by_slot = []
    for layer in range(len(counts)):
        to_slots = copies_to_slots(counts[layer], placement, layer=layer, near=groups if near else None)
        by_slot.append(to_slots.sum(axis=0))
        copies = between_ranks(to_slots)
        traffic["dispatch"].append(link_traffic(copies, groups))
        traffic["combine"].append(link_traffic(copies.T, groups))
    imbalance = load_imbalance(np.stack(by_slot)[None], placement, num_experts=num_experts)
    return PlacedTraffic(
        num_router_slots=num_router_slots,
        placement=placement,
        rank_imbalance=imbalance.rank[0],
        slot_imbalance=imbalance.slot[0],
        uses={
            (operator, link): _use(traffic[operator], link, message_bytes[operator], rates[link])
            for operator in OPERATORS
            for link in LINKS
        },
    )


def _link_rates(hardware: SupernodeSpec, *, is_one_node: bool) -> dict[str, float]:
    plane = hardware.planes[hardware.rates.ep_plane]
    port = plane.paths["npu_npu", "write", "intra" if is_one_node else "inter"].bytes_per_s
    uplink = hardware.npus_per_node * hardware.npu.num_dies * plane.die_port_bytes_per_s
    return {
        "die_out": port,
        "die_in": port,
        "package": hardware.npu.die_to_die.bytes_per_s,
        "node_out": uplink,
        "node_in": uplink,
    }


def _use(traffic: list[LinkTraffic], link: str, message_bytes: int, bytes_per_s: float) -> LinkUse:
    loads = message_bytes * np.stack([getattr(layer, link) for layer in traffic])
    busiest = loads.max(axis=1)
    return LinkUse(
        busiest_bytes=busiest,
        mean_bytes=loads.mean(axis=1),
        p99_bytes=np.percentile(loads, 99, axis=1),
        busiest_s=busiest / bytes_per_s,
    )
