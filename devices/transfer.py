"""Time of one transfer that has a path to itself, for any number of bytes.

Owns: the relation of bytes and time on a path, and which paths a machine has.
Must not know: other transfers (devices/fabric.py and devices/flows.py do), clocks, endpoints.
Source: arXiv 2506.12708v2, table 1: the bulk bandwidth and the latency of 512 bytes of every UB path.

Two published figures per path fix a straight line through the message of 512 bytes:

    time(n) = latency + (n - 512) / bandwidth          zero-byte latency = latency - 512 / bandwidth

So 512 bytes take exactly the published latency, the published bandwidth is approached from below, time never
falls with size, and neither does n / time. What lies between the two figures is interpolated, not measured.
Where 512 bytes alone take longer than the latency (a path made slow on purpose), the wire decides and the
zero-byte latency is 0.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from devices.spec import LATENCY_MESSAGE_BYTES, Op, Pair, PathSpec, PlaneName, SupernodeSpec

TransferScope = Literal["inter", "intra", "package"]  # package: between the dies of one NPU


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferTime:
    """One transfer alone: how long it takes, and its bytes over that time."""

    seconds: float
    bytes_per_s: float


def transfer_time(
    spec: SupernodeSpec, *, plane: PlaneName, pair: Pair, op: Op, scope: TransferScope, num_bytes: int
) -> TransferTime:
    """Time of a transfer alone; a message without bytes takes the zero-byte latency, at 0 bytes/s.

    Raises ValueError for a negative size, and for a path that the machine does not have, naming those it has.
    """
    if num_bytes < 0:
        raise ValueError(f"num_bytes: {num_bytes} must be at least 0")
    seconds = path_seconds(find_path(spec, plane=plane, pair=pair, op=op, scope=scope), num_bytes)
    return TransferTime(seconds=seconds, bytes_per_s=num_bytes / seconds if seconds > 0 else 0.0)


def find_path(spec: SupernodeSpec, *, plane: PlaneName, pair: Pair, op: Op, scope: TransferScope) -> PathSpec:
    """The path of a transfer. Raises ValueError if there is none, naming those that the plane has."""
    paths = plane_paths(spec, plane)
    if (pair, op, scope) not in paths:
        known = ", ".join(" ".join(key) for key in paths)
        raise ValueError(f"plane {plane} of {spec.name} has no path {pair} {op} {scope}; it has {known}")
    return paths[pair, op, scope]


def plane_paths(spec: SupernodeSpec, plane: PlaneName) -> dict[tuple[Pair, Op, TransferScope], PathSpec]:
    """Every path of a plane; UB has the link of a package among them."""
    paths: dict[tuple[Pair, Op, TransferScope], PathSpec] = {}
    for (pair, op, scope), path in spec.planes[plane].paths.items():
        paths[pair, op, scope] = path
    if plane == "ub" and spec.npu.num_dies > 1:
        for op in get_args(Op):
            paths["npu_npu", op, "package"] = spec.npu.die_to_die
    return paths


def path_seconds(path: PathSpec, num_bytes: float) -> float:
    """Seconds that `num_bytes` (at least 0) take on a path: exactly its latency for 512."""
    at_512_s = max(path.latency_ns * 1e-9, LATENCY_MESSAGE_BYTES / path.bytes_per_s)
    return at_512_s + (num_bytes - LATENCY_MESSAGE_BYTES) / path.bytes_per_s
