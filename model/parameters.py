"""The tensors that one rank holds, fused and stacked the way the layers use them.

Owns: which tensors belong together, their shapes, and how many bytes a rank keeps.
Must not know: files, names of the hub, forward passes.
Source: layouts follow DeepSeek-V3's matrices; all are (output, input) as torch.nn.functional.linear takes
them. A Weight is a float32 tensor of that shape, or INT8 (model/matrix.py).
"""

# Shapes: H hidden_size, n heads of this rank, N all heads, Q q_lora_rank, C kv_lora_rank, R qk_rope_head_dim,
#         D qk_nope_head_dim, V v_head_dim, I intermediate size, P experts of this rank, E logical experts

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from model.matrix import Weight


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttentionWeights:
    """MLA of one layer. Heads are those of this rank; everything else is whole on every rank."""

    qkv_a: Weight  # (Q + C + R, H): query and key-value down-projections in one product; (C + R, H) without Q
    q_a_norm: Tensor | None  # (Q,); None when q_lora_rank is None
    q_b: Weight  # (n (D + R), Q), or (n (D + R), H) without Q
    kv_a_norm: Tensor  # (C,)
    w_uk: Tensor  # (n, D, C) rows of kv_b_proj that make keys
    w_uv: Tensor  # (n, V, C) rows of kv_b_proj that make values
    o: Weight  # (H, N V)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MlpWeights:
    """SwiGLU of a dense layer or of the shared expert."""

    gate_up: Weight  # (2 I, H)
    down: Weight  # (H, I)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MoeWeights:
    """Mixture of experts of one layer: the router, this rank's physical experts, the shared expert."""

    gate: Tensor  # (E, H)
    gate_bias: Tensor  # (E,) e_score_correction_bias
    experts_gate_up: Weight  # (P, 2 I, H)
    experts_down: Weight  # (P, H, I)
    shared: MlpWeights | None  # None when the shared expert is dispatched: then it sits in slots


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlockWeights:
    """One decoder block."""

    input_norm: Tensor  # (H,)
    attention: AttentionWeights
    post_attention_norm: Tensor  # (H,)
    mlp: MlpWeights | MoeWeights


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MtpWeights:
    """One multi-token-prediction module. The embedding is the main model's, and the head too unless rotated."""

    enorm: Tensor  # (H,) norm of the next token's embedding
    hnorm: Tensor  # (H,) norm of the previous hidden state
    eh_proj: Weight  # (H, 2 H)
    block: BlockWeights
    head_norm: Tensor  # (H,)
    head: Tensor | None = None  # (vocab, H) of a rotated model; None: the main model's
    h_proj: Tensor | None = None  # (H, H) of a rotated model: the gains of the norm before hnorm


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RankWeights:
    """Everything that one rank holds."""

    embedding: Tensor  # (vocab, H)
    blocks: tuple[BlockWeights, ...]
    final_norm: Tensor  # (H,)
    lm_head: Tensor  # (vocab, H); the embedding itself when tied
    mtp: tuple[MtpWeights, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors; a tied head counts once."""
        unique = {tensor.data_ptr(): tensor for _, tensor in named_tensors(self)}
        return sum(tensor.numel() * tensor.element_size() for tensor in unique.values())


def named_tensors(part: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of `part` with its path, such as blocks.1.mlp.gate."""
    if isinstance(part, Tensor):
        yield prefix, part
    elif isinstance(part, tuple):
        for index, item in enumerate(part):
            yield from named_tensors(item, f"{prefix}.{index}")
    elif part is not None:
        for field in fields(part):
            yield from named_tensors(getattr(part, field.name), f"{prefix}.{field.name}".lstrip("."))
