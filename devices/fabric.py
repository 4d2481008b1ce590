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

from collections.abc import Sequence
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


class _End:
    """An endpoint on one plane, with what every transfer asks of it."""

    __slots__ = ("as_source", "as_target", "device", "into", "node", "out")

    def __init__(self, endpoint: Endpoint, *, out: _Port, into: _Port) -> None:
        is_host = endpoint.kind == "host"
        self.as_source = 1 if is_host else 0  # the sum of the two tells the kinds of a pair
        self.as_target = 2 if is_host else 0
        self.node = endpoint.node
        self.device = endpoint.device
        self.out = out
        self.into = into


_SAME_NODE, _SAME_NPU = 4, 8  # added to the kinds of a pair: transfers with one sum have one path


class _Plane:
    __slots__ = ("by_node", "ends", "in_ports", "num_bytes", "num_transfers", "out_ports")

    def __init__(self, *, by_node: bool) -> None:
        self.by_node = by_node
        self.ends: dict[Endpoint, _End] = {}
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
        return self.reserve_all(plane, (src,), (dst,), num_bytes=num_bytes, now_ns=now_ns, op=op)

    def reserve_all(
        self,
        plane: PlaneName,
        sources: Sequence[Endpoint],
        targets: Sequence[Endpoint],
        *,
        num_bytes: int,
        now_ns: int,
        op: Op,
    ) -> int:
        """Send `num_bytes` from each of `sources` to its entry of `targets`; returns the instant of the last arrival.

        The same as one `reserve` after the other. Raises LinkDown at the first transfer that has no way; those before
        it stay reserved.
        """
        if num_bytes < 0:
            ends = ", ".join(f"{src} to {dst}" for src, dst in zip(sources, targets, strict=True))
            raise ValueError(f"transfer {ends}: {num_bytes} bytes is negative")
        arrival_ns = now_ns
        if num_bytes == 0:
            return arrival_ns
        state = self._planes[plane]
        known = state.ends
        wires: list[tuple[int, int, PathSpec] | None] = [None] * (_SAME_NPU + 1)  # time on the wire, latency, path
        for src, dst in zip(sources, targets, strict=True):
            start = known.get(src) or _end(state, src)
            end = known.get(dst) or _end(state, dst)
            if start is end:
                continue
            sort = start.as_source + end.as_target
            if start.node == end.node:
                sort += _SAME_NPU if sort == 0 and start.device == end.device else _SAME_NODE
            wire = wires[sort]
            if wire is None:
                path = self.path(plane, src, dst, op=op)
                wire = wires[sort] = (_wire_ns(num_bytes, path), path.zero_byte_latency_ns, path)
            busy_ns, latency_ns, path = wire
            out, into = start.out, end.into
            if out.is_down or into.is_down:
                raise LinkDown(plane, str(src), str(dst))
            slowdown = out.slowdown if out.slowdown > into.slowdown else into.slowdown
            if slowdown != 1.0:
                busy_ns = _wire_ns(num_bytes, path, slowdown)
            out_ns, in_ns = out.busy_until_ns, into.busy_until_ns
            out.busy_until_ns = out_ns = (out_ns if out_ns > now_ns else now_ns) + busy_ns
            into.busy_until_ns = in_ns = (in_ns if in_ns > now_ns else now_ns) + busy_ns
            out.busy_ns += busy_ns
            into.busy_ns += busy_ns
            state.num_bytes += num_bytes
            state.num_transfers += 1
            finish_ns = (out_ns if out_ns > in_ns else in_ns) + latency_ns
            if finish_ns > arrival_ns:
                arrival_ns = finish_ns
        return arrival_ns

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
        end = state.ends.get(endpoint) or _end(state, endpoint)
        return end.out, end.into


def _end(state: _Plane, endpoint: Endpoint) -> _End:
    """An endpoint that is new to a plane."""
    key = endpoint.node if state.by_node else endpoint
    out, into = state.out_ports.setdefault(key, _Port()), state.in_ports.setdefault(key, _Port())
    state.ends[endpoint] = end = _End(endpoint, out=out, into=into)
    return end


def _wire_ns(num_bytes: int, path: PathSpec, slowdown: float = 1.0) -> int:
    return max(1, round(num_bytes * slowdown * 1e9 / path.bytes_per_s))
