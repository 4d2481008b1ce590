"""Seconds of equal transfers that start at once from different sources and meet in one port.

Owns: which endpoints send, and to which one.
Must not know: units and keys of an answer, how flows share links (devices/flows.py), what the links are
(devices/topology.py).
Source: endpoints and nodes are the machine description's.

The target is in the first node. Sources in other nodes are taken from all nodes in turn, so that the target's port
fills before any node's links do.
"""

from typing import Literal

from devices.flows import finish_times
from devices.spec import Op, PlaneName, SupernodeSpec
from devices.topology import Topology
from devices.transfer import TransferScope
from serving.errors import ConfigError

End = Literal["npu", "cpu"]


def incast_seconds(
    spec: SupernodeSpec,
    *,
    plane: PlaneName,
    source: End,
    target: End,
    op: Op,
    scope: TransferScope,
    num_bytes: int,
    flows: int,
) -> float:
    """When the last of `flows` transfers of `num_bytes` (at least 1) each has arrived, at max-min fair rates.

    Raises ConfigError where the machine's links are not known, and for more flows than it has sources.
    """
    if spec.ub_topology is None:
        raise ConfigError(f"flows: {flows}, but ub_topology of {spec.name} is missing: its links are not known")
    topology = Topology(spec)
    into = topology.die(0) if target == "npu" else topology.host(0)
    sources = _sources(spec, plane=plane, source=source, scope=scope, into=into)
    if flows > len(sources):
        where = {"inter": "in other nodes", "intra": "in a node", "package": "in a package"}[scope]
        raise ConfigError(f"flows: {flows}, {spec.name} has {len(sources)} such sources ({source}) {where}")
    senders = sources[:flows]
    return float(finish_times(topology.flows(plane, op=op, src=senders, dst=[into] * flows, num_bytes=num_bytes)).max())


def _sources(spec: SupernodeSpec, *, plane: PlaneName, source: End, scope: TransferScope, into: int) -> list[int]:
    """Endpoints, dies before hosts, that reach `into` in the first node by this scope."""
    dies = spec.npu.num_dies
    if scope == "package":
        return list(range(1, dies))
    first, per_node = (0, spec.npus_per_node * dies) if source == "npu" else (spec.num_dies, spec.hosts_per_node)
    if scope == "inter":
        return [first + node * per_node + index for index in range(per_node) for node in range(1, spec.num_nodes)]
    # On UB the dies of one NPU have a link of their own: scope package.
    beside = set(range(dies)) if plane == "ub" and into == 0 else {into}
    return [end for end in range(first, first + per_node) if end not in beside]
