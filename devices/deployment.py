"""Where the experts of a full-size instance sit, and how unevenly they are used.

Owns: slots per die, the dies of the shared expert, the load of the hottest die.
Must not know: seconds, which expert is in which slot (serving/core/expert_placement.py).
Source: layouts of arXiv 2506.12708v2, section 5.1.
"""

import math
from bisect import bisect_left
from dataclasses import dataclass
from itertools import pairwise

from model.config import ModelConfig

DIES_PER_SHARED_COPY = 10  # arXiv 2506.12708v2, section 5.1: 32 copies of the shared expert on 320 dies


@dataclass(frozen=True, slots=True, kw_only=True)
class Imbalance:
    """Routed load of the hottest die over the mean die's, by tokens per die; between, by the logarithm of tokens.

    Constant outside. Chance alone makes few tokens uneven, so the values fall; but never so fast that more tokens
    would make the hottest die's load smaller.
    """

    tokens: tuple[float, ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.values) or not self.tokens or list(self.tokens) != sorted(set(self.tokens)):
            raise ValueError("imbalance: needs rising numbers of tokens, and a value for each")
        if self.tokens[0] <= 0 or not min(self.values) >= 1:
            raise ValueError("imbalance: tokens must be above 0 and values at least 1")
        for (low, before), (high, after) in pairwise(zip(self.tokens, self.values, strict=True)):
            if after < (before - after) / math.log(high / low):
                raise ValueError(f"imbalance: falls from {before} at {low} tokens to {after} at {high}, too fast")

    @classmethod
    def constant(cls, value: float) -> "Imbalance":
        """The same for any number of tokens."""
        return cls(tokens=(1.0,), values=(value,))

    def at(self, tokens: float) -> float:
        """With `tokens` per die."""
        right = bisect_left(self.tokens, tokens)
        if right == 0 or right == len(self.tokens):
            return self.values[min(right, len(self.tokens) - 1)]
        low, high = self.tokens[right - 1], self.tokens[right]
        share = math.log(tokens / low) / math.log(high / low)
        return self.values[right - 1] * (1 - share) + self.values[right] * share


BALANCED = Imbalance.constant(1.0)  # "perfect EPLB"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertDeployment:
    """One instance. `imbalance` is among the dies that have routed experts."""

    ep: int
    num_router_slots: int
    num_shared_slots: int  # dies that hold only the shared expert; 0: every die computes it for its own tokens
    imbalance: Imbalance = BALANCED

    def __post_init__(self) -> None:
        if self.ep < 1 or self.num_router_slots < 1 or self.num_shared_slots < 0:
            raise ValueError(f"{self}: ep and router slots must be at least 1, shared slots 0")
        if self.num_shared_slots >= self.ep:
            raise ValueError(f"{self}: shared slots must leave dies of {self.ep} to routed experts")

    @classmethod
    def published(cls, config: ModelConfig, *, ep: int, imbalance: Imbalance = BALANCED) -> "ExpertDeployment":
        """The paper's layout at its degrees, and the same rule at others.

        More dies than experts: one expert per die, half of what is left for copies of the shared expert and half for
        redundant ones (EP320 = 32 + 256 + 32), but a shared copy for every 10 dies, as there, since all tokens go to
        one. Where that many are not left, and with fewer dies than experts, every die has the shared expert, its part
        of the routed ones and one redundant (EP32 = 1 + 8 + 1). Where the routed ones do not divide, the slots that are
        left over are the redundant ones (EP144 = 1 + 2, with 32 redundant: open-infra-index, day 6; EP72 = 1 + 4:
        SGLang's 288 slots).
        """
        spare = ep - config.n_routed_experts
        fewest_shared = math.ceil(ep / DIES_PER_SHARED_COPY)
        if spare >= fewest_shared and config.n_shared_experts:
            num_shared = max(spare // 2, fewest_shared)
            return cls(ep=ep, num_router_slots=ep - num_shared, num_shared_slots=num_shared, imbalance=imbalance)
        extra = 1 if ep > 1 and config.n_routed_experts % ep == 0 else 0
        slots = ep * (math.ceil(config.n_routed_experts / ep) + extra)
        return cls(ep=ep, num_router_slots=slots, num_shared_slots=0, imbalance=imbalance if ep > 1 else BALANCED)

    def hottest_copies(self, tokens: float, top_k: int) -> float:
        """Routed token copies on the hottest die when every die routes `tokens` on average, each to `top_k` experts."""
        return tokens * top_k * self.ep / self.num_router_dies * self.imbalance.at(tokens)

    @property
    def num_router_dies(self) -> int:
        return self.ep - self.num_shared_slots

    @property
    def router_slots_per_die(self) -> int:
        return math.ceil(self.num_router_slots / self.num_router_dies)

    @property
    def is_shared_dispatched(self) -> bool:
        """Whether a token is sent to the shared expert too."""
        return self.num_shared_slots > 0
