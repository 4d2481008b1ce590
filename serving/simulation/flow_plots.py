"""Plots of what flows through a run: prompt tokens from where their latents came, bytes over the planes.

Owns: the two Sankey diagrams.
Must not know: time, HTML.
"""

from collections import Counter
from collections.abc import Callable, Mapping

import numpy as np

from serving.pool_moves import MOVE_KINDS
from serving.simulation.columns import NEVER, RunColumns
from serving.simulation.plots import GRAY, PLANE_COLORS, ROLE_COLORS, Plot, Trace, scaled_bytes

Links = Mapping[tuple[str, str], tuple[float, str]]  # (from, to) to amount and color
MOST_INSTANCES = 24  # with nodes of their own; of more, roles are drawn


def flow_plots(run: RunColumns) -> list[Plot]:
    """Tokens, and bytes."""
    tokens = _token_links(run)
    moved, by_role = _byte_links(run)
    return [
        Plot(
            key="token-flow",
            title="Prompt tokens of requests that were computed, and output tokens",
            note="Cached tokens come from the shared pool or from blocks that the prefill instance still had.",
            traces=[_sankey(tokens, "tok", lambda value: f"{value:,.0f} tok")] if tokens else [],
            layout=_LAYOUT,
            empty="no prompt was computed",
        ),
        Plot(
            key="byte-flow",
            title="KV bytes over the planes" + (", by role" if by_role else ", by instance"),
            note="UB: loads from and stores to the pool. RDMA: the hand-over from prefill to decode.",
            traces=[_sankey(moved, "B", scaled_bytes)] if moved else [],
            layout=_LAYOUT,
            empty="no block was moved",
        ),
    ]


_LAYOUT = {"margin": {"l": 8, "r": 8, "t": 12, "b": 12}, "font": {"size": 12}}


def _token_links(run: RunColumns) -> Links:
    requests = run.requests
    computed = requests.first_token_ns != NEVER
    prompts, cached, pooled = (
        int(column[computed].sum(dtype=np.int64))
        for column in (requests.num_prompt_tokens, requests.num_cached_tokens, requests.num_pool_tokens)
    )
    outputs = int(requests.num_output_tokens.sum(dtype=np.int64))
    first = int(np.count_nonzero(requests.num_output_tokens[computed]))
    links = {
        ("prompt tokens", "from the pool"): (pooled, PLANE_COLORS["ub"]),
        ("prompt tokens", "from own blocks"): (cached - pooled, "#009e73"),
        ("prompt tokens", "computed"): (prompts - cached, ROLE_COLORS["prefill"]),
        ("output tokens", "with the prefill"): (first, ROLE_COLORS["prefill"]),
        ("output tokens", "decoded"): (outputs - first, ROLE_COLORS["decode"]),
    }
    return {ends: link for ends, link in links.items() if link[0] > 0}


def _byte_links(run: RunColumns) -> tuple[Links, bool]:
    """Bytes by link, and whether instances of a role are drawn as one."""
    by_role = run.moves is None or len(run.instances) > MOST_INSTANCES
    amounts: Counter[tuple[str, str, str]] = Counter()
    if run.moves is not None:
        moves = run.moves
        sources = run.requests.prefill_instance[moves.request]
        # One number for each (kind, prefill, other end), so that equal ones add up at once.
        num = len(run.instances) + 1
        codes = (moves.kind.astype(np.int64) * num + sources + 1) * num + moves.instance + 1
        found, places = np.unique(codes, return_inverse=True)
        for code, num_bytes in zip(found.tolist(), np.bincount(places, moves.num_bytes), strict=True):
            kind, source, target = code // num // num, code // num % num - 1, code % num - 1
            amounts[_ends_of(run, MOVE_KINDS[kind], source, target, by_role=by_role)] += int(num_bytes)
    else:
        pool, rdma = run.pool, run.planes.get("rdma")
        if pool is not None:
            amounts["pool", "prefill", "ub"] = pool.num_loaded_blocks * pool.block_bytes
            amounts["prefill", "pool, stored", "ub"] = pool.num_stored_blocks * pool.block_bytes
        if rdma is not None:
            amounts["prefill", "decode", "rdma"] = rdma.num_bytes
    links = {(a, b): (float(amount), PLANE_COLORS[plane]) for (a, b, plane), amount in amounts.items() if amount}
    return links, by_role


def _ends_of(run: RunColumns, kind: str, source: int, target: int, *, by_role: bool) -> tuple[str, str, str]:
    def name(index: int) -> str:
        instance = run.instances[index]
        return instance.role if by_role else instance.instance_id

    if kind == "pool_load":
        return "pool", name(target), "ub"
    if kind == "pool_store":
        return name(target), "pool, stored", "ub"
    return name(source), name(target), "rdma"


def _sankey(links: Links, unit: str, shown: Callable[[float], str]) -> Trace:
    nodes = list(dict.fromkeys(end for ends in links for end in ends))
    place = {node: i for i, node in enumerate(nodes)}
    through = dict.fromkeys(nodes, 0.0)
    into = dict.fromkeys(nodes, 0.0)
    for (a, b), (amount, _) in links.items():
        through[a] += amount
        into[b] += amount
    return {
        "type": "sankey",
        "arrangement": "snap",
        "valueformat": ".4s",
        "valuesuffix": unit,
        "node": {
            "label": [f"{node}: {shown(max(through[node], into[node]))}" for node in nodes],
            "color": [_node_color(node, links) for node in nodes],
            "pad": 14,
            "thickness": 14,
            "line": {"width": 0},
        },
        "link": {
            "source": [place[a] for a, _ in links],
            "target": [place[b] for _, b in links],
            "value": [amount for amount, _ in links.values()],
            "color": [f"{color}66" for _, color in links.values()],  # 40 % opaque
        },
    }


def _node_color(node: str, links: Links) -> str:
    if node.startswith("pool"):
        return PLANE_COLORS["ub"]
    role_color = next((color for role, color in ROLE_COLORS.items() if node.startswith(role)), None)
    return role_color or next((color for (_, end), (_, color) in links.items() if end == node), GRAY)
