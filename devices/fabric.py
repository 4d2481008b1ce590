"""Transfers between dies and hosts on the planes of a supernode, with contention.

Owns: until when every port is busy, which links are down or slow, and how many bytes each plane has carried.
Must not know: clocks (`now_ns` comes in), what the bytes are.
Source: bandwidth and latency of a transfer alone from the hardware file (arXiv 2506.12708, table 1 for UB), joined
as in devices/transfer.py.

Each endpoint has one port out and one port in per plane; on VPC a node's endpoints share its pair. A
transfer keeps both of its ports busy for bytes / bandwidth of its path, in the order in which transfers were
reserved:

    out port of src   |--- earlier ---|--- this ---|
    in port of dst    |-- earlier --|--- this ---|
                                                  ^ + zero-byte latency = finish: both ports have served it

A port that waits for the other one is not blocked meanwhile. So a reservation costs O(1), a port serves
FIFO, a transfer alone takes the time of devices/transfer.py (512 bytes exactly the path's latency), more
traffic never makes anything finish earlier, and a set of transfers reserved at one instant keeps each port
busy equally long in whatever order it was reserved.

The end of a reservation is known when it is made and never changes, which is what a control plane needs.
Links that are shared fairly, and the switches between the ports, are in devices/flows.py.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from devices.faults import LinkDown
from devices.spec import Op, Pair, PathSpec, PlaneName, SupernodeSpec

EndpointKind = Literal["die", "host"]


class Endpoint(NamedTuple):
    """A die of an NPU, or a host. A named tuple, since it is hashed at every transfer."""

    kind: EndpointKind
    node: int
    device: int  # NPU or host, numbered over the whole supernode
    die: int  # 0 for a host

    def __str__(self) -> str:
        return f"npu {self.device} die {self.die}" if self.kind == "die" else f"host {self.device}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaneStats:
    """What a plane has carried so far."""

    num_bytes: int
    num_transfers: int
    busy_ns: int  # summed over all out ports


class _Port:
    __slots__ = ("busy_ns", "busy_until_ns", "is_down", "slowdown")

    def __init__(self) -> None:
        self.busy_until_ns = 0
        self.busy_ns = 0
        self.is_down = False
        self.slowdown = 1.0


class _Plane:
    __slots__ = ("by_node", "in_ports", "num_bytes", "num_transfers", "out_ports")

    def __init__(self, *, by_node: bool) -> None:
        self.by_node = by_node
        self.out_ports: dict[Endpoint | int, _Port] = {}
        self.in_ports: dict[Endpoint | int, _Port] = {}
        self.num_bytes = 0
        self.num_transfers = 0


_PAIRS: dict[tuple[EndpointKind, EndpointKind], Pair] = {
    ("die", "die"): "npu_npu",
    ("die", "host"): "npu_host",
    ("host", "die"): "npu_host",
    ("host", "host"): "host_host",
}


class Fabric:
    """The three planes of one supernode."""

    def __init__(self, spec: SupernodeSpec) -> None:
        self._spec = spec
        self._planes = {name: _Plane(by_node=spec.planes[name].port_owner == "node") for name in get_args(PlaneName)}

    def die(self, npu_id: int, die_id: int = 0) -> Endpoint:
        """Endpoint of one die. Raises ValueError if the supernode has no such die."""
        if not 0 <= npu_id < self._spec.num_npus:
            raise ValueError(f"npu {npu_id}: {self._spec.name} has {self._spec.num_npus} NPUs")
        if not 0 <= die_id < self._spec.npu.num_dies:
            raise ValueError(f"npu {npu_id} die {die_id}: an NPU has {self._spec.npu.num_dies} dies")
        return Endpoint("die", npu_id // self._spec.npus_per_node, npu_id, die_id)

    def host(self, host_id: int) -> Endpoint:
        """Endpoint of one CPU socket. Raises ValueError if the supernode has no such host."""
        if not 0 <= host_id < self._spec.num_hosts:
            raise ValueError(f"host {host_id}: {self._spec.name} has {self._spec.num_hosts} hosts")
        return Endpoint("host", host_id // self._spec.hosts_per_node, host_id, 0)

    def path(self, plane: PlaneName, src: Endpoint, dst: Endpoint, *, op: Op) -> PathSpec:
        """Bandwidth and latency of one transfer alone from `src` to `dst`. LinkDown if there is none."""
        if plane == "ub" and src.kind == dst.kind == "die" and src.device == dst.device:
            return self._spec.npu.die_to_die
        scope: Literal["intra", "inter"] = "intra" if src.node == dst.node else "inter"
        path = self._spec.planes[plane].paths.get((_PAIRS[src.kind, dst.kind], op, scope))
        if path is None:
            raise LinkDown(plane, str(src), str(dst), f"the plane has no {op} path between them")
        return path

    def reserve(self, plane: PlaneName, src: Endpoint, dst: Endpoint, *, num_bytes: int, now_ns: int, op: Op) -> int:
        """Send `num_bytes` from `src` to `dst` as early as both ports allow; returns the instant of arrival.

        `op` is "read" if `dst` starts it and "write" if `src` does. Nothing, or to itself, is free.
        Raises LinkDown, and then nothing is reserved.
        """
        if num_bytes < 0:
            raise ValueError(f"transfer {src} to {dst}: {num_bytes} bytes is negative")
        if src == dst or num_bytes == 0:
            return now_ns
        path = self.path(plane, src, dst, op=op)
        state = self._planes[plane]
        out = _port(state.out_ports, src, state.by_node)
        into = _port(state.in_ports, dst, state.by_node)
        if out.is_down or into.is_down:
            raise LinkDown(plane, str(src), str(dst))
        slowdown = out.slowdown if out.slowdown > into.slowdown else into.slowdown
        busy_ns = max(1, round(num_bytes * slowdown * 1e9 / path.bytes_per_s))
        finish_ns = now_ns
        for port in (out, into):
            until_ns = max(now_ns, port.busy_until_ns) + busy_ns
            port.busy_until_ns = until_ns
            port.busy_ns += busy_ns
            finish_ns = max(finish_ns, until_ns)
        state.num_bytes += num_bytes
        state.num_transfers += 1
        return finish_ns + path.zero_byte_latency_ns

    def fail_link(self, plane: PlaneName, endpoint: Endpoint) -> None:
        """Take an endpoint off a plane. Transfers that were reserved before are not undone."""
        for port in self._ports_of(plane, endpoint):
            port.is_down = True

    def slow_link(self, plane: PlaneName, endpoint: Endpoint, *, slowdown: float) -> None:
        """Make every later transfer of an endpoint on a plane `slowdown` times longer on the wire (>= 1)."""
        if not slowdown >= 1:
            raise ValueError(f"slowdown of {endpoint} on {plane}: {slowdown} must be at least 1")
        for port in self._ports_of(plane, endpoint):
            port.slowdown = slowdown

    def restore_link(self, plane: PlaneName, endpoint: Endpoint) -> None:
        """Undo `fail_link` and `slow_link`."""
        for port in self._ports_of(plane, endpoint):
            port.is_down = False
            port.slowdown = 1.0

    def stats(self, plane: PlaneName) -> PlaneStats:
        state = self._planes[plane]
        return PlaneStats(
            num_bytes=state.num_bytes,
            num_transfers=state.num_transfers,
            busy_ns=sum(port.busy_ns for port in state.out_ports.values()),
        )

    def check_invariants(self) -> None:
        for state in self._planes.values():
            out_ns = sum(port.busy_ns for port in state.out_ports.values())
            in_ns = sum(port.busy_ns for port in state.in_ports.values())
            assert out_ns == in_ns  # what was sent was received
            assert state.num_transfers <= out_ns  # each took a nanosecond at least
            for port in (*state.out_ports.values(), *state.in_ports.values()):
                assert 0 <= port.busy_ns <= port.busy_until_ns

    def _ports_of(self, plane: PlaneName, endpoint: Endpoint) -> tuple[_Port, _Port]:
        state = self._planes[plane]
        return (
            _port(state.out_ports, endpoint, state.by_node),
            _port(state.in_ports, endpoint, state.by_node),
        )


def _port(ports: dict[Endpoint | int, _Port], endpoint: Endpoint, by_node: bool) -> _Port:
    key = endpoint.node if by_node else endpoint
    port = ports.get(key)
    if port is None:
        port = ports[key] = _Port()
    return port
