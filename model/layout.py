"""How one model instance is divided over its ranks.

Owns: which rank holds which physical expert, heads and slice of the sequence, and the size of the static
exchange buffers.
Must not know: tensors, weights, which expert is hot (that decision comes in as `physical_to_logical`).
Source: EPLB's physical_to_logical map; arXiv 2506.12708 sections 4.2.1 (static buffers) and 4.3.1 (SP-TP-SP
attention).

Physical slots of one layer, 20 slots on 4 ranks:  | 0 1 2 3 4 | 5 6 7 8 9 | 10 .. 14 | 15 .. 19 |
                                          rank:    |     0     |     1     |    2     |    3     |
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from model.config import ModelConfig

AttentionMode = Literal["data_parallel", "sequence_tensor"]
SharedExpertMode = Literal["local", "dispatched"]
DispatchDtype = Literal["float32", "int8"]


class LayoutError(ValueError):
    """A layout does not fit the model. The message names field, value and limit."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RankLayout:
    """The place of one rank in its instance. Ranks of an instance differ in `rank` only.

    attention: "data_parallel" (decode, colocated): each rank serves its own requests with all heads.
      "sequence_tensor" (prefill): all ranks serve one packed batch; projections are split by sequence,
      attention by heads (SP-TP-SP).
    physical_to_logical: (num_moe_layers, num_physical) logical expert of each slot; n_routed_experts stands
      for the shared expert, which occupies slots only if shared_expert is "dispatched".
    max_num_tokens: most tokens of one StepInput; bounds the static buffers.
    """

    rank: int
    world_size: int
    attention: AttentionMode
    physical_to_logical: NDArray[np.int64]
    shared_expert: SharedExpertMode = "local"
    dispatch_dtype: DispatchDtype = "float32"
    max_num_tokens: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "physical_to_logical", np.asarray(self.physical_to_logical, np.int64))
        if not 0 <= self.rank < self.world_size:
            raise LayoutError(f"rank: {self.rank} is outside [0, world_size {self.world_size})")
        if self.max_num_tokens < 1:
            raise LayoutError(f"max_num_tokens: {self.max_num_tokens} is below 1")
        if self.physical_to_logical.ndim != 2:
            raise LayoutError(
                f"physical_to_logical: shape {self.physical_to_logical.shape} is not (num_moe_layers, slots)"
            )
        if self.num_physical % self.world_size:
            raise LayoutError(
                f"physical_to_logical: {self.num_physical} slots do not divide over {self.world_size} ranks"
            )

    @property
    def num_physical(self) -> int:
        return int(self.physical_to_logical.shape[1])

    @property
    def slots_per_rank(self) -> int:
        return self.num_physical // self.world_size

    @property
    def local_experts(self) -> NDArray[np.int64]:
        """(num_moe_layers, slots_per_rank) logical experts that this rank holds."""
        start = self.rank * self.slots_per_rank
        return self.physical_to_logical[:, start : start + self.slots_per_rank]

    @property
    def max_local_tokens(self) -> int:
        """Most tokens that this rank routes in one step: the batch, or its slice of the sequence."""
        if self.attention == "data_parallel":
            return self.max_num_tokens
        return -(-self.max_num_tokens // self.world_size)

    def sequence_bounds(self, num_tokens: int) -> list[int]:
        """Slice borders of a packed batch: rank r computes rows [bounds[r], bounds[r + 1])."""
        return [num_tokens * r // self.world_size for r in range(self.world_size + 1)]

    def own_rows(self, num_tokens: int) -> slice:
        """Rows of a step that this rank computes: all of its own step, or its slice of the packed batch."""
        if self.attention == "data_parallel":
            return slice(0, num_tokens)
        bounds = self.sequence_bounds(num_tokens)
        return slice(bounds[self.rank], bounds[self.rank + 1])

    def local_heads(self, config: ModelConfig) -> slice:
        """Attention heads of this rank: all of them with data_parallel attention."""
        if self.attention == "data_parallel":
            return slice(0, config.num_attention_heads)
        share = config.num_attention_heads // self.world_size
        return slice(self.rank * share, (self.rank + 1) * share)

    def copies_per_token(self, config: ModelConfig) -> int:
        """Copies of one token that dispatch sends: its experts, and the shared expert if that is dispatched."""
        return config.num_experts_per_tok + (self.shared_expert == "dispatched")

    def max_rows_per_peer(self, config: ModelConfig) -> int:
        """Most token copies that one rank sends another in one layer: the static buffer's rows per pair."""
        return max_tokens_per_rank(
            local_batch=self.max_local_tokens,
            top_k=self.copies_per_token(config),
            experts_per_rank=self.slots_per_rank,
        )

    def check(self, config: ModelConfig) -> None:
        """Raise LayoutError unless the layout fits the model."""
        layers, heads = config.num_moe_layers, config.num_attention_heads
        if len(self.physical_to_logical) != layers:
            raise LayoutError(
                f"physical_to_logical: {len(self.physical_to_logical)} layers, the model has {layers} MoE layers"
            )
        if self.attention == "sequence_tensor" and heads % self.world_size:
            raise LayoutError(f"world_size: {self.world_size} does not divide num_attention_heads {heads}")
        if self.shared_expert == "dispatched" and config.n_shared_experts != 1:
            raise LayoutError(f"shared_expert: 'dispatched' needs n_shared_experts 1, not {config.n_shared_experts}")
        num_logical = config.n_routed_experts + (self.shared_expert == "dispatched")
        for layer, row in enumerate(self.physical_to_logical):
            if not ((row >= 0) & (row < num_logical)).all():
                raise LayoutError(f"physical_to_logical[{layer}]: ids must be in [0, {num_logical})")
            missing = np.setdiff1d(np.arange(num_logical), row)
            if len(missing):
                raise LayoutError(f"physical_to_logical[{layer}]: logical expert {missing[0]} has no slot")


def uniform_placement(
    config: ModelConfig, *, world_size: int, num_redundant: int = 0, num_shared: int = 0
) -> NDArray[np.int64]:
    """A placement that knows no load: (num_moe_layers, n_routed_experts + num_redundant + num_shared).

    Redundant slots repeat the logical experts 0, 1, 2, ... in turn. Each expert goes to the rank that holds
    the fewest copies of it, then the fewest experts, then the lowest rank: copies lie on different ranks as
    far as there is room.
    """
    num_physical = config.n_routed_experts + num_redundant + num_shared
    if num_physical % world_size:
        raise LayoutError(f"num_redundant: {num_physical} physical experts do not divide over {world_size} ranks")
    experts = np.concatenate(
        [
            np.full(num_shared, config.n_routed_experts),
            np.arange(config.n_routed_experts + num_redundant) % config.n_routed_experts,
        ]
    )
    held: list[list[int]] = [[] for _ in range(world_size)]
    for expert in experts.tolist():
        with_room = (rank for rank in range(world_size) if len(held[rank]) < num_physical // world_size)
        held[min(with_room, key=lambda rank: (held[rank].count(expert), len(held[rank]), rank))].append(expert)
    return np.tile(np.array(held, np.int64).reshape(-1), (config.num_moe_layers, 1))


def make_layouts(
    config: ModelConfig,
    *,
    world_size: int,
    attention: AttentionMode = "data_parallel",
    physical_to_logical: NDArray[np.int64] | None = None,
    shared_expert: SharedExpertMode = "local",
    dispatch_dtype: DispatchDtype = "float32",
    max_num_tokens: int,
) -> list[RankLayout]:
    """The layouts of all ranks of one instance, checked against the model. Default placement: uniform, one
    copy each."""
    if physical_to_logical is None:
        num_shared = world_size if shared_expert == "dispatched" else 0
        physical_to_logical = uniform_placement(config, world_size=world_size, num_shared=num_shared)
    layouts = [
        RankLayout(
            rank=rank,
            world_size=world_size,
            attention=attention,
            physical_to_logical=physical_to_logical,
            shared_expert=shared_expert,
            dispatch_dtype=dispatch_dtype,
            max_num_tokens=max_num_tokens,
        )
        for rank in range(world_size)
    ]
    layouts[0].check(config)
    return layouts


def copy_table(
    physical: Sequence[int] | NDArray[np.int64], num_logical: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Slots of every logical expert of one layer: (num_logical, most copies) padded with 0, and the number of
    copies.

    Slots of an expert are in ascending order, so the rule "copy number c" means the same on every rank.
    """
    physical = np.asarray(physical, np.int64)
    num_copies = np.bincount(physical, minlength=num_logical)
    slots = np.zeros((num_logical, int(num_copies.max(initial=1))), np.int64)
    order = np.argsort(physical, kind="stable")
    first = np.concatenate([[0], np.cumsum(num_copies)[:-1]])
    slots[physical[order], np.arange(len(physical)) - first[physical[order]]] = order
    return slots, num_copies


def max_tokens_per_rank(*, local_batch: int, top_k: int, experts_per_rank: int) -> int:
    """Most token copies from one rank to another: local_batch x min(topK, experts per rank). arXiv 2506.12708
    section 4.2.1."""
    return local_batch * min(top_k, experts_per_rank)


def static_buffer_bytes(
    *, rank_num: int, local_batch: int, top_k: int, experts_per_rank: int, message_bytes: int
) -> int:
    """Bytes of one static receive buffer (dispatch or combine): rank_num x max_tokens x msg_size.

    Source: arXiv 2506.12708 section 4.2.1. Its example: 320 ranks x 96 tokens x 7.5 KiB = 225 MiB for
    dispatch.
    """
    max_tokens = max_tokens_per_rank(local_batch=local_batch, top_k=top_k, experts_per_rank=experts_per_rank)
    return rank_num * max_tokens * message_bytes
