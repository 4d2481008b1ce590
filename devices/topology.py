"""The links of one supernode, and which of them a transfer crosses.

Owns: the ports and links of the UB, RDMA and VPC planes, their numbers, and routes as rows of links.
Must not know: how flows share links (devices/flows.py), time.
Source: arXiv 2506.12708v2, sections 3.2 and 3.3, through the hardware file.

On UB a transfer between nodes crosses four links, all of which are full duplex:

    port out of src -> node's links up to the second level -> node's links down from it -> port in of dst

Within a node it crosses the two ports alone, and within a package the link of its two dies alone. RDMA and VPC
have a port out and a port in at each end; on VPC those of the node.

What is not a link, because it never is the narrowest: a switch chip, which has no limit but its ports' (non-blocking,
section 3.3). Assumed: traffic is spread evenly over the seven sub-planes and the chips of each, so that all
links of a node to the second level are one; the network between RDMA ports, and between VPC ports, is not blocking.
"""

from typing import get_args

import numpy as np
import numpy.typing as npt

from devices.flows import Floats, Flows, Ints
from devices.spec import Op, Pair, PlaneName, SupernodeSpec
from devices.transfer import TransferScope, find_path, path_seconds

_PAIRS: tuple[Pair, Pair, Pair] = ("npu_npu", "npu_host", "host_host")  # by the number of hosts at the ends
_SCOPES: tuple[TransferScope, ...] = get_args(TransferScope)


class Topology:
    """Links of one supernode. Endpoints are numbered dies first, NPU by NPU, then hosts."""

    def __init__(self, spec: SupernodeSpec) -> None:
        """Raises ValueError if the hardware file does not know the switches."""
        if spec.ub_topology is None:
            raise ValueError(f"ub_topology of {spec.name}: missing; its links are not known")
        self._spec = spec
        nodes, pairs_of_dies = spec.num_nodes, spec.num_npus * spec.npu.num_dies**2
        self._blocks: dict[str, range] = {}  # the numbers of the links of one sort
        capacity: list[Floats] = []

        def add(name: str, capacities: npt.ArrayLike) -> None:
            first = sum(len(block) for block in self._blocks.values())
            capacity.append(np.asarray(capacities, dtype=np.float64))
            self._blocks[name] = range(first, first + len(capacity[-1]))

        for plane in get_args(PlaneName):
            port = spec.planes[plane].die_port_bytes_per_s
            host_port = spec.ub_topology.host_port_bytes_per_s if plane == "ub" else port
            by_node = spec.planes[plane].port_owner == "node"
            ports = [port] * nodes if by_node else [port] * spec.num_dies + [host_port] * spec.num_hosts
            add(f"{plane} out", ports)
            add(f"{plane} in", ports)
        add("uplink", [spec.ub_topology.node_uplink_bytes_per_s] * nodes)
        add("downlink", [spec.ub_topology.node_uplink_bytes_per_s] * nodes)
        add("package", [spec.npu.die_to_die.bytes_per_s] * pairs_of_dies)
        self.link_bytes_per_s = np.concatenate(capacity)
        endpoints = np.arange(spec.num_dies + spec.num_hosts)
        self._is_host = endpoints >= spec.num_dies
        self._npu = np.where(self._is_host, -1, endpoints // spec.npu.num_dies)  # -1 is compared with dies' only
        host_node = (endpoints - spec.num_dies) // spec.hosts_per_node
        self._node = np.where(self._is_host, host_node, self._npu // spec.npus_per_node)

    def die(self, npu_id: int, die_id: int = 0) -> int:
        """Number of a die. Raises ValueError if the supernode has no such die."""
        if not (0 <= npu_id < self._spec.num_npus and 0 <= die_id < self._spec.npu.num_dies):
            limits = f"{self._spec.num_npus} NPUs of {self._spec.npu.num_dies} dies"
            raise ValueError(f"npu {npu_id} die {die_id}: {self._spec.name} has {limits}")
        return npu_id * self._spec.npu.num_dies + die_id

    def host(self, host_id: int) -> int:
        """Number of a CPU socket. Raises ValueError if the supernode has no such host."""
        if not 0 <= host_id < self._spec.num_hosts:
            raise ValueError(f"host {host_id}: {self._spec.name} has {self._spec.num_hosts} hosts")
        return self._spec.num_dies + host_id

    def link_name(self, link: int) -> str:
        """What a number of a link means, such as "ub out 17" (an endpoint) or "uplink 3" (a node)."""
        for name, block in self._blocks.items():
            if link in block:
                return f"{name} {block.index(link)}"
        raise ValueError(f"link {link}: there are {len(self.link_bytes_per_s)}")

    def flows(
        self,
        plane: PlaneName,
        *,
        op: Op,
        src: npt.ArrayLike,
        dst: npt.ArrayLike,
        num_bytes: npt.ArrayLike,
        start_s: npt.ArrayLike = 0.0,
    ) -> Flows:
        """Flows from endpoints `src` to `dst` (F,) on one plane; sizes and starts are (F,) or one number for all.

        A flow to itself is free: it has no links. Raises ValueError for an endpoint that there is not, and for ends
        that the plane does not join.
        """
        src_F, dst_F = np.atleast_1d(np.asarray(src, dtype=np.int64)), np.atleast_1d(np.asarray(dst, dtype=np.int64))
        if src_F.shape != dst_F.shape or src_F.ndim != 1:
            raise ValueError(f"src, dst: shapes {src_F.shape} and {dst_F.shape} must be equal and of one dimension")
        ends = np.concatenate([src_F, dst_F])
        if np.any((ends < 0) | (ends >= len(self._node))):
            raise ValueError(
                f"src, dst: endpoints are numbered in [0, {len(self._node)}), not {ends.min()}..{ends.max()}"
            )
        pair_F = self._is_host[src_F].astype(np.int64) + self._is_host[dst_F]
        in_package = (plane == "ub") & (pair_F == 0) & (self._npu[src_F] == self._npu[dst_F])
        in_node = self._node[src_F] == self._node[dst_F]
        scope_F = np.where(in_package, _SCOPES.index("package"), np.where(in_node, _SCOPES.index("intra"), 0))
        is_self = src_F == dst_F
        alone, latency_s = np.full(len(src_F), np.inf), np.zeros(len(src_F))
        keys = pair_F * len(_SCOPES) + scope_F
        for key in np.unique(keys[~is_self]):
            pair, scope = divmod(int(key), len(_SCOPES))
            path = find_path(self._spec, plane=plane, pair=_PAIRS[pair], op=op, scope=_SCOPES[scope])
            chosen = (keys == key) & ~is_self
            alone[chosen], latency_s[chosen] = path.bytes_per_s, path_seconds(path, 0)
        links = self._links(plane, src_F, dst_F, in_package=in_package, between_nodes=(plane == "ub") & ~in_node)
        links[is_self] = len(self.link_bytes_per_s)
        return Flows(
            link_bytes_per_s_L=self.link_bytes_per_s,
            links_FH=links,
            alone_bytes_per_s_F=alone,
            latency_s_F=latency_s,
            num_bytes_F=np.broadcast_to(np.asarray(num_bytes, dtype=np.float64), src_F.shape),
            start_s_F=np.broadcast_to(np.asarray(start_s, dtype=np.float64), src_F.shape),
        )

    def _links(
        self,
        plane: PlaneName,
        src_F: Ints,
        dst_F: Ints,
        *,
        in_package: npt.NDArray[np.bool_],
        between_nodes: npt.NDArray[np.bool_],
    ) -> Ints:
        by_node = self._spec.planes[plane].port_owner == "node"
        links = np.full((len(src_F), 4), len(self.link_bytes_per_s), dtype=np.int64)
        links[:, 0] = self._blocks[f"{plane} out"].start + (self._node[src_F] if by_node else src_F)
        links[:, 1] = self._blocks[f"{plane} in"].start + (self._node[dst_F] if by_node else dst_F)
        up, down = self._blocks["uplink"].start, self._blocks["downlink"].start
        links[between_nodes, 2] = up + self._node[src_F[between_nodes]]
        links[between_nodes, 3] = down + self._node[dst_F[between_nodes]]
        package_link = src_F * self._spec.npu.num_dies + dst_F % self._spec.npu.num_dies
        links[in_package, 0] = self._blocks["package"].start + package_link[in_package]
        links[in_package, 1] = len(self.link_bytes_per_s)
        return links
