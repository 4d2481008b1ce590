"""What the mocked machine is made of: dies, NPUs, hosts, planes, supernode.

Owns: the numbers of a configs/hardware/*.yaml file, their range checks, and how NPUs and hosts sit in nodes.
Must not know: time, tensors, YAML.
Source: every number carries its own in the YAML file; the structure is that of arXiv 2506.12708, section 3.

A path is what one transfer can use alone: `paths[pair, op, scope]`. `read` is started by the receiver,
`write` by the sender. `inter` crosses nodes, `intra` stays inside one.
"""

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal, TypeAlias, TypeVar, cast, get_args

from devices.rates import BulkAllToAll, Fitted, Rates

Pair = Literal["npu_npu", "npu_host", "host_host"]
Op = Literal["read", "write"]
Scope = Literal["inter", "intra"]
PlaneName = Literal["ub", "rdma", "vpc"]
PathKey: TypeAlias = tuple[Pair, Op, Scope]

FITTED_KEYS = ("value", "low", "high", "rows")  # of one entry of a hardware file's section `fitted`
LATENCY_MESSAGE_BYTES = 512  # arXiv 2506.12708v2, table 1: the message whose latency it gives

SpecT = TypeVar("SpecT")


class SpecError(ValueError):
    """A hardware description is incomplete, or has an unknown key or a value out of range."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PathSpec:
    """One transfer alone between two endpoints: bulk bandwidth one way, and latency of a message of 512 bytes.

    The zero-byte latency is what a transfer takes beyond its time on the wire; devices/transfer.py has the relation.
    """

    bytes_per_s: float
    latency_ns: int
    zero_byte_latency_ns: int = field(init=False, repr=False)  # kept, since the fabric asks at every transfer

    def __post_init__(self) -> None:
        _positive("bytes_per_s", self.bytes_per_s)
        _not_negative("latency_ns", self.latency_ns)
        zero_byte_ns = self.latency_ns - round(LATENCY_MESSAGE_BYTES * 1e9 / self.bytes_per_s)
        object.__setattr__(self, "zero_byte_latency_ns", max(0, zero_byte_ns))


@dataclass(frozen=True, slots=True, kw_only=True)
class DieSpec:
    """One die: what the paper's operator tables and all parallel degrees count."""

    num_aic: int
    num_aiv: int
    int8_flops_per_s: float
    bf16_flops_per_s: float
    hbm_bytes: int
    hbm_bytes_per_s: float

    def __post_init__(self) -> None:
        for part in fields(self):
            _positive(part.name, getattr(self, part.name))


@dataclass(frozen=True, slots=True, kw_only=True)
class NpuSpec:
    """One package of dies: what the paper's throughput and batch sizes count."""

    num_dies: int
    die: DieSpec
    die_to_die: PathSpec  # between dies of one package

    def __post_init__(self) -> None:
        _positive("num_dies", self.num_dies)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostSpec:
    """One CPU socket with its DRAM."""

    dram_bytes: int

    def __post_init__(self) -> None:
        _positive("dram_bytes", self.dram_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaneSpec:
    """One network plane. `port_owner`: each endpoint has its own ports, or each node one pair for all."""

    die_port_bytes_per_s: float  # nominal, one way
    port_owner: Literal["endpoint", "node"]
    paths: Mapping[PathKey, PathSpec]

    def __post_init__(self) -> None:
        _positive("die_port_bytes_per_s", self.die_port_bytes_per_s)
        if self.port_owner not in ("endpoint", "node"):
            raise SpecError(f"port_owner: {self.port_owner!r} is neither 'endpoint' nor 'node'")

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], *, where: str = "plane") -> "PlaneSpec":
        """Read one entry of `planes`; `paths` is nested there as pair, op, scope."""
        if not isinstance(raw, Mapping):
            raise SpecError(f"{where}: {raw!r} is not a mapping")
        paths = _read_paths(_section(raw, "paths", f"{where}."), where=f"{where}.paths")
        return _build(cls, {**raw, "paths": paths}, where)


@dataclass(frozen=True, slots=True, kw_only=True)
class UbTopologySpec:
    """The UB plane's switch chips. Chip i of a node's first level belongs to sub-plane i of the second.

    Every first-level chip has `l1_uplinks_per_chip` links to the second-level chips of its sub-plane.
    """

    link_bytes_per_s: float  # one way
    l1_chips_per_node: int  # also the number of sub-planes
    l1_uplinks_per_chip: int
    l2_chips_per_sub_plane: int
    l2_ports_per_chip: int
    l2_chips_per_logical_switch: int
    host_port_bytes_per_s: float  # one way, per CPU socket

    def __post_init__(self) -> None:
        for part in fields(self):
            _positive(part.name, getattr(self, part.name))
        if self.l2_chips_per_sub_plane % self.l2_chips_per_logical_switch:
            raise SpecError(
                f"l2_chips_per_sub_plane: {self.l2_chips_per_sub_plane} is not a multiple of "
                f"l2_chips_per_logical_switch {self.l2_chips_per_logical_switch}"
            )

    @property
    def node_uplink_bytes_per_s(self) -> float:
        """All links of one node to the second level, one way."""
        return self.l1_chips_per_node * self.l1_uplinks_per_chip * self.link_bytes_per_s

    @property
    def max_nodes(self) -> int:
        """Nodes that one second level can join without losing bandwidth: its ports over a node's uplinks."""
        return self.l2_chips_per_sub_plane * self.l2_ports_per_chip // self.l1_uplinks_per_chip


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageSpec:
    """Where models come from: an object-storage bucket that all instances share, and hosts' DRAM."""

    bucket_bytes_per_s: float
    model_load_bytes_per_s: float  # from cached DRAM into the NPUs of one instance

    def __post_init__(self) -> None:
        for part in fields(self):
            _positive(part.name, getattr(self, part.name))


@dataclass(frozen=True, slots=True, kw_only=True)
class SupernodeSpec:
    """A whole machine. NPUs, hosts and nodes are numbered from 0, node by node."""

    name: str
    num_nodes: int
    npus_per_node: int
    hosts_per_node: int
    npu: NpuSpec
    host: HostSpec
    planes: Mapping[PlaneName, PlaneSpec]
    rates: Rates
    fitted: Fitted
    ub_topology: UbTopologySpec | None = None  # None: not known
    storage: StorageSpec | None = None  # None: not known

    def __post_init__(self) -> None:
        for name in ("num_nodes", "npus_per_node", "hosts_per_node"):
            _positive(name, getattr(self, name))
        for plane in get_args(PlaneName):
            if plane not in self.planes:
                raise SpecError(f"planes.{plane}: missing")
        for op in get_args(Op):
            if ("npu_npu", op, "inter") not in self.planes[self.rates.ep_plane].paths:
                raise SpecError(f"rates.ep_plane: {self.rates.ep_plane} has no npu_npu.{op}.inter path")
        if self.rates.decode_overlap == "cores" and min(self.npu.die.num_aic, self.npu.die.num_aiv) < 2:
            raise SpecError("npu.die: two streams of decode need two cube and two vector cores")
        if self.rates.bulk_cores >= self.npu.die.num_aic:
            raise SpecError(f"rates.bulk_cores: {self.rates.bulk_cores} must leave cores of {self.npu.die.num_aic}")
        if self.ub_topology is not None and self.num_nodes > self.ub_topology.max_nodes:
            raise SpecError(f"num_nodes: {self.num_nodes} exceeds the {self.ub_topology.max_nodes} of ub_topology")

    @property
    def num_npus(self) -> int:
        return self.num_nodes * self.npus_per_node

    @property
    def num_hosts(self) -> int:
        return self.num_nodes * self.hosts_per_node

    @property
    def num_dies(self) -> int:
        return self.num_npus * self.npu.num_dies

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "SupernodeSpec":
        """Read the contents of a configs/hardware/*.yaml file. Raises SpecError, naming the field."""
        values = dict(raw)
        npu = dict(_section(values, "npu"))
        npu["die"] = _build(DieSpec, _section(npu, "die", "npu."), "npu.die")
        npu["die_to_die"] = _build(PathSpec, _section(npu, "die_to_die", "npu."), "npu.die_to_die")
        values["npu"] = _build(NpuSpec, npu, "npu")
        values["host"] = _build(HostSpec, _section(values, "host"), "host")
        planes: dict[PlaneName, PlaneSpec] = {}
        for name, plane in _section(values, "planes").items():
            if name not in get_args(PlaneName):
                raise SpecError(f"planes.{name}: unknown key")
            planes[cast(PlaneName, name)] = PlaneSpec.from_dict(plane, where=f"planes.{name}")
        values["planes"] = planes
        for name, part in (("ub_topology", UbTopologySpec), ("storage", StorageSpec)):
            if name in values:
                values[name] = _build(part, _section(values, name), name)
        rates = dict(_section(values, "rates"))
        bulk = _section(rates, "bulk_all_to_all", "rates.")
        rates["bulk_all_to_all"] = _build(BulkAllToAll, _tuples(bulk), "rates.bulk_all_to_all")
        values["rates"] = _build(Rates, rates, "rates")
        values["fitted"] = _build(Fitted, _fitted_values(_section(values, "fitted")), "fitted")
        return _build(cls, values, "")


def _read_paths(raw: object, *, where: str) -> dict[PathKey, PathSpec]:
    paths: dict[PathKey, PathSpec] = {}
    for pair, by_op in _mapping(raw, where).items():
        for op, by_scope in _mapping(by_op, f"{where}.{pair}").items():
            for scope, path in _mapping(by_scope, f"{where}.{pair}.{op}").items():
                name = f"{where}.{pair}.{op}.{scope}"
                if pair not in get_args(Pair) or op not in get_args(Op) or scope not in get_args(Scope):
                    raise SpecError(f"{name}: unknown key")
                paths[cast(PathKey, (pair, op, scope))] = _build(PathSpec, _mapping(path, name), name)
    return paths


def _tuples(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in raw.items()}


def _fitted_values(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Each constant is a mapping: its `value`, and the bounds and rows of its fit."""
    values = {}
    for name, entry in raw.items():
        for key in _mapping(entry, f"fitted.{name}"):
            if key not in FITTED_KEYS:
                raise SpecError(f"fitted.{name}.{key}: unknown key")
        for key in FITTED_KEYS:
            if key not in entry:
                raise SpecError(f"fitted.{name}.{key}: missing")
        values[name] = entry["value"]
    return values


def _build(cls: type[SpecT], raw: Mapping[str, Any], where: str) -> SpecT:
    """`cls(**raw)`, with numbers of the declared kind and errors that name the whole path."""
    prefix = f"{where}." if where else ""
    given = [part for part in fields(cls) if part.init]  # type: ignore[arg-type]
    kinds = {part.name: part.type for part in given}
    optional = {part.name for part in given if part.default is not MISSING}
    if unknown := [name for name in raw if name not in kinds]:
        raise SpecError(f"{prefix}{unknown[0]}: unknown key")
    values: dict[str, Any] = {}
    for name, kind in kinds.items():
        if name not in raw:
            if name in optional:
                continue
            raise SpecError(f"{prefix}{name}: missing")
        value = raw[name]
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if (kind is int and not (number and value == int(value))) or (kind is float and not number):
            raise SpecError(f"{prefix}{name}: {value!r} is not {'an integer' if kind is int else 'a number'}")
        values[name] = int(value) if kind is int else float(value) if kind is float else value
    try:
        return cls(**values)
    except ValueError as error:
        raise SpecError(f"{prefix}{error}") from None


def _section(raw: Mapping[str, Any], name: str, prefix: str = "") -> Mapping[str, Any]:
    if name not in raw:
        raise SpecError(f"{prefix}{name}: missing")
    return _mapping(raw[name], f"{prefix}{name}")


def _mapping(raw: object, where: str) -> Mapping[str, Any]:
    if not isinstance(raw, Mapping):
        raise SpecError(f"{where}: {raw!r} is not a mapping")
    return raw


def _positive(name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise SpecError(f"{name}: {value} must be finite and above 0")


def _not_negative(name: str, value: float) -> None:
    if not (value >= 0 and math.isfinite(value)):
        raise SpecError(f"{name}: {value} must be finite and at least 0")
