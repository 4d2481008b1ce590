"""What operators achieve on a die: measured rates, and the few constants that are fitted.

Owns: the `rates` and `fitted` sections of a configs/hardware/*.yaml file, and their range checks.
Must not know: formulas.
Source: every number carries its own in the YAML file; fitted ones name the published rows that they were fitted on.
"""

import math
from dataclasses import dataclass, fields
from typing import Literal, get_args

INT8_BYTES = 1.0
BF16_BYTES = 2.0
FP32_BYTES = 4.0

EpPlane = Literal["ub", "rdma"]
EpNear = Literal["package", "node"]
DecodeOverlap = Literal["cores", "communication"]
PrefillAttention = Literal["split", "data_parallel"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cores:
    """The part of a die that a stream may use."""

    aic: int  # cube cores: matrix products, attention
    aiv: int  # vector cores: these also write token copies to other dies


@dataclass(frozen=True, slots=True, kw_only=True)
class BulkAllToAll:
    """What large all-to-alls reach of a die's port, by EP degree; interpolated by log2 of it, constant outside.

    Counted in bytes of token copies, one for every chosen expert: above 1 where a copy crosses the port once for all
    experts of a node.
    """

    ep: tuple[int, ...]
    dispatch_utilization: tuple[float, ...]
    combine_utilization: tuple[float, ...]

    def __post_init__(self) -> None:
        sizes = {len(self.ep), len(self.dispatch_utilization), len(self.combine_utilization)}
        if len(sizes) != 1 or not self.ep or list(self.ep) != sorted(set(self.ep)) or self.ep[0] < 1:
            raise ValueError("ep: needs rising degrees, and one utilization of each kind for every one of them")
        if not all(share > 0 for share in (*self.dispatch_utilization, *self.combine_utilization)):
            raise ValueError("dispatch_utilization, combine_utilization: must be above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Measured elsewhere, and taken as they are."""

    gemm_tile_m: int  # rows of a full output tile
    gemm_tile_n: int  # columns
    gemm_tile_n_step: int  # kernels come in widths that are multiples of it; gemm_tile_n: in one width
    attention_utilization: float  # of BF16 peak, compute-bound
    memory_utilization: float  # of HBM bandwidth
    attention_small_operators: int  # of the attention half: all but prolog, attention core and O_proj
    launch_s: float  # of one operator inside a graph
    graph_launch_s: float
    ep_plane: EpPlane  # that token copies take
    ep_near: EpNear  # dies that copies reach over a nearer link: the package's, or the scale-up plane of a node
    ep_aiv_for_95_percent: float  # vector cores that drive 95 % of what all of them drive
    ep_scale_bytes: int  # of a quantized token copy, beside one byte per element
    ep_wire_factor: float  # bytes that the published bandwidths count, over bytes of messages
    collective_utilization: float  # of a die's port, large all-gather
    pool_read_bytes_per_s: float  # blocks or weights from the pool into one die
    bulk_all_to_all: BulkAllToAll
    bulk_cores: int  # that large all-to-alls hold; 0: they are engines' work
    decode_overlap: DecodeOverlap  # what two microbatches share: see devices/layer_overlap.py
    prefill_attention: PrefillAttention  # heads and sequence over all dies, or a die its own prompts

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "bulk_cores":
                if value < 0:
                    raise ValueError(f"bulk_cores: {value} must be at least 0")
            elif isinstance(value, int | float) and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{field.name}: {value} must be finite and above 0")
        if self.gemm_tile_n_step > self.gemm_tile_n:
            raise ValueError(f"gemm_tile_n_step: {self.gemm_tile_n_step} exceeds gemm_tile_n {self.gemm_tile_n}")
        words = {
            "ep_plane": EpPlane,
            "ep_near": EpNear,
            "decode_overlap": DecodeOverlap,
            "prefill_attention": PrefillAttention,
        }
        for name, known in words.items():
            if getattr(self, name) not in get_args(known):
                raise ValueError(f"{name}: {getattr(self, name)!r} is none of {', '.join(get_args(known))}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """What no source prints: found by least squares on published rows (`supernode calibrate`)."""

    gemm_utilization: float  # of peak, inside a tile of a matrix product
    gemm_tile_s: float  # of a core, to begin and end one full tile
    ep_copy_s: float  # of a die, to handle one token copy beside its bytes on the wire; a NIC needs no die for its own
    dispatch_fixed_s: float  # of a dispatch, whatever its size
    activation_passes: float  # how often attention's intermediate results cross HBM
    attention_exposed: float  # share of the shorter of compute and memory time that attention does not hide
    expert_load_skew: float  # of a decode batch's expert load, over that of the load generator
    expert_load_drift: float  # of a prefill batch's expert load from the statistics: sigma of a log-normal
    pool_vpc_efficiency: float  # of VPC's nominal bandwidth, that reads from the pool reach

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{field.name}: {value} must be finite and at least 0")
        for name in ("gemm_utilization", "pool_vpc_efficiency"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}: {getattr(self, name)} must be above 0 and at most 1")
