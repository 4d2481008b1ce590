"""What operators achieve on a die, and where the experts of a full-size instance sit.

Owns: the achieved rates, fixed costs and latency tables of the time model, each with its source.
Must not know: formulas.
Source: operator tables of arXiv 2506.12708 (7 to 10), its sections 4.2 and 5.1, and public figures of Ascend A3
machines where it prints none.
"""

import math
from dataclasses import dataclass

from model.config import ModelConfig

INT8_BYTES = 1.0
BF16_BYTES = 2.0
FP32_BYTES = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """The part of a die's cube and vector cores that a stream may use."""

    aic: float
    aiv: float


WHOLE_DIE = Share(aic=1.0, aiv=1.0)
ATTENTION_STREAM = Share(aic=16 / 24, aiv=32 / 48)  # arXiv 2506.12708, section 4.2.3
MOE_STREAM = Share(aic=8 / 24, aiv=16 / 48)  # arXiv 2506.12708, section 4.2.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What the operators achieve. The defaults are the published figures; a calibration passes others."""

    gemm_utilization: float = 0.79  # of INT8 peak: arXiv 2506.12708 table 10, mean of its rows
    mla_utilization: float = 0.654  # of BF16 peak: table 8
    memory_utilization: float = 0.841  # of HBM bandwidth: table 9
    cube_launch_s: float = 10e-6  # fixed cost of an operator: light-llm-simulator conf/hardware_config.py
    attention_launch_s: float = 30e-6  # light-llm-simulator conf/hardware_config.py
    vector_launch_s: float = 2e-6  # Ascend/msmodeling tensor_cast/device.py
    graph_launch_s: float = 0.7e-3  # arXiv 2506.12708, section 4.2.4: 0.6 to 0.8 ms for each graph
    vector_contention: float = 1.0  # assumed: share of vector time that keeps cube work waiting
    aivs_for_95_percent: float = 24.0  # vector cores that drive 95 % of UB's peak: arXiv 2607.26444


# EP degree -> microseconds for 128 tokens per rank. Source: arXiv 2506.12708, table 7, CANN EP.
TABLE_7_EP = (8.0, 32.0, 64.0, 256.0)
TABLE_7_DISPATCH_US = (116.0, 133.0, 141.0, 152.0)
TABLE_7_COMBINE_US = (118.0, 146.0, 150.0, 149.0)
TABLE_7_TOKENS = 128
TABLE_7_TOPK = 8
TABLE_7_DISPATCH_BYTES = 7168 + 512  # per token copy, section 4.2.1
TABLE_7_COMBINE_BYTES = 2 * 7168
TABLE_7_WRITE_BYTES_PER_S = 135e9  # table 1, NPU to NPU between nodes

# EP degree -> GB/s of bulk all-to-all over SDMA. Source: sgl-kernel-npu README, DeepEP-Ascend on A3, normal mode.
BULK_EP = (8.0, 16.0, 32.0, 64.0, 128.0)
BULK_DISPATCH_GB_PER_S = (146.0, 107.0, 102.0, 81.0, 57.0)
BULK_COMBINE_GB_PER_S = (125.0, 103.0, 95.0, 91.0, 81.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertDeployment:
    """Where the experts of a full-size instance sit. `imbalance` is the load of the hottest die over the mean."""

    ep: int
    num_router_slots: int
    num_shared_slots: int  # dies that hold only the shared expert; 0: every die computes it for its own tokens
    imbalance: float

    def __post_init__(self) -> None:
        if self.ep < 1 or self.num_router_slots < 1 or self.num_shared_slots < 0 or not self.imbalance >= 1:
            raise ValueError(f"{self}: ep and router slots must be at least 1, shared slots 0, imbalance 1")

    @classmethod
    def published(cls, config: ModelConfig, *, ep: int, imbalance: float) -> "ExpertDeployment":
        """The paper's layout at its degrees, and the same rule at others.

        More dies than experts: one expert per die, what is left shared between copies of the shared expert and
        redundant ones (EP320 = 32 + 256 + 32). Else every die has the shared expert, its part of the routed ones and
        one redundant (EP32 = 1 + 8 + 1). Source: arXiv 2506.12708, section 5.1.
        """
        spare = ep - config.n_routed_experts
        if spare >= 2:
            return cls(ep=ep, num_router_slots=ep - spare // 2, num_shared_slots=spare // 2, imbalance=imbalance)
        slots = ep * (math.ceil(config.n_routed_experts / ep) + (1 if ep > 1 else 0))
        return cls(ep=ep, num_router_slots=slots, num_shared_slots=0, imbalance=imbalance if ep > 1 else 1.0)

    @property
    def router_slots_per_die(self) -> int:
        return math.ceil(self.num_router_slots / (self.ep - self.num_shared_slots))
