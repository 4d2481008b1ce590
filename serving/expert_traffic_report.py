"""How a comparison of expert placements is told: as text, and as JSON.

Owns: tables and keys.
Must not know: how the figures were found.
"""

from collections.abc import Mapping
from typing import Any

from serving.expert_traffic import LINKS, OPERATORS, TrafficComparison

_LABELS = {
    "die_out": "die out",
    "die_in": "die in",
    "package": "package",
    "node_out": "node out",
    "node_in": "node in",
}


def heading(told: Mapping[str, Any], comparison: TrafficComparison) -> str:
    """What is compared, on what."""
    shared = f" + {told['num_shared_copies']} of the shared expert" if told["num_shared_copies"] else ""
    num_nodes = -(-told["ep"] // comparison.groups.dies_per_node)
    rates = comparison.bytes_per_s
    chosen = "in the own node first" if told["near"] else "evenly"
    return (
        f"EP{told['ep']} of {told['model']} on {_nodes(num_nodes)} of {told['hardware']}, {told['tokens_per_rank']} "
        f"tokens per rank and step, top {told['top_k']} of {told['num_experts']}\n"
        f"load: {told['load']}; drift {told['drift']:g}\n"
        f"slots of routed experts: EPLB off {comparison.off.num_router_slots}, on "
        f"{comparison.on.num_router_slots}{shared}; copies chosen {chosen}\n"
        f"a token copy: dispatch {comparison.message_bytes['dispatch']:,} B, combine "
        f"{comparison.message_bytes['combine']:,} B\none way: a die's port {rates['die_out'] / 1e9:.0f} GB/s, "
        f"die to die {rates['package'] / 1e9:.0f} GB/s, node {rates['node_out'] / 1e9:,.0f} GB/s"
    )


def table(comparison: TrafficComparison, layers: slice, name: str) -> str:
    """Means over `layers`: of a layer's busiest link, mean link, 99th percentile and time of the busiest."""
    sides = (comparison.off, comparison.on)
    head = f"{'busiest':>9}{'mean':>9}{'p99':>9}{'us':>9}"
    lines = [f"\n{name}", f"{'MB per link and layer':<28}{'EPLB off':^36} |{'EPLB on':^36}", f"{'':<28}{head} |{head}"]
    for operator in OPERATORS:
        for link in LINKS:
            uses = [side.uses[operator, link] for side in sides]
            if not any(use.busiest_bytes.any() for use in uses):
                continue  # all in one node, or dies without a neighbor
            cells = [
                "".join(f"{float(v[layers].mean()) / 1e6:>9.3f}" for v in (u.busiest_bytes, u.mean_bytes, u.p99_bytes))
                + f"{float(u.busiest_s[layers].mean()) * 1e6:>9.1f}"
                for u in uses
            ]
            lines.append(f"{operator + ', ' + _LABELS[link]:<28}{cells[0]} |{cells[1]}")
    for label, values in (
        ("hottest rank / mean", [side.rank_imbalance for side in sides]),
        ("hottest slot / mean", [side.slot_imbalance for side in sides]),
    ):
        lines.append(f"{label:<28}{values[0][layers].mean():>9.3f}{'':>27} |{values[1][layers].mean():>9.3f}")
    return "\n".join(lines)


def as_json(comparison: TrafficComparison) -> dict[str, Any]:
    """Figures per mixture layer, in the order of the layers."""
    return {
        "message_bytes": dict(comparison.message_bytes),
        "bytes_per_s": dict(comparison.bytes_per_s),
        "hottest_layer": comparison.hottest_layer,
    } | {
        name: {
            "num_router_slots": side.num_router_slots,
            "rank_imbalance": side.rank_imbalance.tolist(),
            "slot_imbalance": side.slot_imbalance.tolist(),
            "links": [
                {
                    "operator": operator,
                    "link": link,
                    "busiest_bytes": use.busiest_bytes.tolist(),
                    "mean_bytes": use.mean_bytes.tolist(),
                    "p99_bytes": use.p99_bytes.tolist(),
                    "busiest_us": (use.busiest_s * 1e6).tolist(),
                }
                for (operator, link), use in side.uses.items()
            ],
        }
        for name, side in (("eplb_off", comparison.off), ("eplb_on", comparison.on))
    }


def _nodes(number: int) -> str:
    return "1 node" if number == 1 else f"{number} nodes"
