"""Multi-head latent attention over the paged latent cache, in its naive and its absorbed form.

Owns: the projections, both forms of attention, and the two ways to divide them over ranks.
Must not know: where a step comes from, the mixture of experts.
Source: DeepSeek-V2 (arXiv 2405.04434) section 2.1 and DeepSeek-V3's inference code for both forms; SP-TP-SP
of arXiv 2506.12708 section 4.3.1 for prefill.

naive     expands every cached latent to keys (D + R) and values (V) of each head: fewest FLOPs for many
          queries, which is prefill.
absorbed  moves W_UK to the query and W_UV behind the softmax and attends over the latents themselves, one
          key-value head for all query heads: fewest bytes for few queries, which is decode.
"""

# Shapes: T tokens of the step, t tokens of this rank's slice, H hidden_size, N heads, n heads of this rank,
#         D qk_nope_head_dim, R qk_rope_head_dim, C kv_lora_rank, V v_head_dim, X query input (q_lora_rank or H)
#         r pieces, q queries per piece, K context slots per piece of one query group

from collections.abc import Generator
from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention_batch import AttentionBatch
from model.collectives import AllGather, AllToAll, Collective, Reply
from model.config import ModelConfig
from model.layers import LATENT_NORM_EPS, apply_rope, rms_norm
from model.layout import RankLayout
from model.matrix import linear
from model.parameters import AttentionWeights


class AttentionForm(Protocol):
    """attend_naive or attend_absorbed: equal results, up to rounding."""

    def __call__(
        self,
        q_nope: Tensor,
        q_pe: Tensor,
        latents: Tensor,
        batch: AttentionBatch,
        weights: AttentionWeights,
        *,
        scale: float,
    ) -> Tensor:
        """(T, n, V) from q_nope (T, n, D), q_pe (T, n, R) and the layer's cache slots `latents` (B S, C + R)."""


def attend_naive(
    q_nope: Tensor, q_pe: Tensor, latents: Tensor, batch: AttentionBatch, weights: AttentionWeights, *, scale: float
) -> Tensor:
    """Attention over expanded keys and values."""
    num_tokens, num_heads, _ = q_nope.shape
    v_dim, rank = weights.w_uv.shape[1:]
    query = torch.cat([q_nope, q_pe], dim=-1) * scale
    output = query.new_empty(num_tokens, num_heads, v_dim)
    for group in batch.groups:
        r = group.num_pieces
        latent = latents.index_select(0, group.slots)
        c_kv, k_pe = latent.split_with_sizes([rank, q_pe.shape[-1]], dim=-1)
        k_nope = F.linear(c_kv, weights.w_uk.flatten(0, 1)).view(r, -1, num_heads, q_nope.shape[-1])
        value = F.linear(c_kv, weights.w_uv.flatten(0, 1)).view(r, -1, num_heads, v_dim)
        k_pe = k_pe.view(r, -1, 1, q_pe.shape[-1]).expand(-1, -1, num_heads, -1)
        key = torch.cat([k_nope, k_pe], dim=-1)
        piece = query.index_select(0, group.rows).view(r, -1, num_heads, key.shape[-1])
        scores = piece.transpose(1, 2) @ key.permute(0, 2, 3, 1)  # (r, n, q, K)
        scores += group.mask.transpose(1, 2)
        attended = torch.softmax(scores, dim=-1) @ value.transpose(1, 2)  # (r, n, q, V)
        output[group.rows] = attended.transpose(1, 2).flatten(0, 1)
    return output


def attend_absorbed(
    q_nope: Tensor, q_pe: Tensor, latents: Tensor, batch: AttentionBatch, weights: AttentionWeights, *, scale: float
) -> Tensor:
    """Attention over the latents, with W_UK applied to the query and W_UV to the result."""
    num_tokens, num_heads, _ = q_nope.shape
    rank = weights.w_uk.shape[2]
    q_latent = torch.bmm(q_nope.transpose(0, 1), weights.w_uk).transpose(0, 1)  # (T, n, C)
    query = torch.cat([q_latent, q_pe], dim=-1) * scale
    output = query.new_empty(num_tokens, num_heads, rank)
    for group in batch.groups:
        r = group.num_pieces
        latent = latents.index_select(0, group.slots).view(r, -1, query.shape[-1])
        piece = query.index_select(0, group.rows).view(r, -1, query.shape[-1])  # (r, q n, C + R)
        scores = torch.bmm(piece, latent.transpose(1, 2))
        scores.view(r, -1, num_heads, latent.shape[1]).add_(group.mask)
        attended = torch.bmm(torch.softmax(scores, dim=-1), latent[..., :rank])
        output[group.rows] = attended.view(-1, num_heads, rank)
    return torch.bmm(output.transpose(0, 1), weights.w_uv.transpose(1, 2)).transpose(0, 1)


class LatentAttention:
    """MLA of one layer on one rank."""

    def __init__(
        self, config: ModelConfig, layout: RankLayout, weights: AttentionWeights, *, form: AttentionForm | None = None
    ) -> None:
        """`form` defaults to absorbed for data_parallel and naive for sequence_tensor."""
        default = attend_absorbed if layout.attention == "data_parallel" else attend_naive
        self._form: AttentionForm = form or default
        self._config = config
        self._layout = layout
        self._weights = weights

    def forward(self, hidden: Tensor, batch: AttentionBatch, latents: Tensor) -> Generator[Collective, Reply, Tensor]:
        """Attention output (t, H) of this rank's normed tokens (t, H); new latents are written to `latents`.

        data_parallel: t = T and nothing is exchanged. sequence_tensor: t is this rank's slice of the T tokens.
        """
        if self._layout.attention == "sequence_tensor":
            return (yield from self._forward_sequence_tensor(hidden, batch, latents))
        query_input, latent = self._project_down(hidden, batch.turns)
        latents.index_copy_(0, batch.slot_mapping, latent)
        return linear(self._attend(query_input, batch, latents).flatten(1), self._weights.o)

    def _forward_sequence_tensor(
        self, hidden: Tensor, batch: AttentionBatch, latents: Tensor
    ) -> Generator[Collective, Reply, Tensor]:
        """SP: project this rank's slice down. TP: attend with this rank's heads over all tokens. SP: project up.

                  SP                     gather           TP            exchange          SP
        rank 0  [t0, H] -> latents of t0 ------> T tokens, heads of 0 ------> t0, all heads -> [t0, H]
        rank 1  [t1, H] -> latents of t1 ------> T tokens, heads of 1 ------> t1, all heads -> [t1, H]
        """
        bounds = self._layout.sequence_bounds(batch.num_tokens)
        own = slice(bounds[self._layout.rank], bounds[self._layout.rank + 1])
        query_input, latent = self._project_down(hidden, batch.turns[own])
        gathered = torch.cat((yield AllGather(torch.cat([query_input, latent], dim=-1))))
        widths = [query_input.shape[-1], latent.shape[-1]]
        query_input, latent = gathered.split_with_sizes(widths, dim=-1)
        latents.index_copy_(0, batch.slot_mapping, latent)
        attended = self._attend(query_input, batch, latents).flatten(1)  # (T, n V)
        sizes = [stop - start for start, stop in pairwise(bounds)]
        reply = yield AllToAll(list(attended.contiguous().split_with_sizes(sizes)))
        return linear(torch.cat(reply, dim=1), self._weights.o)

    def _project_down(self, hidden: Tensor, turns: Tensor) -> tuple[Tensor, Tensor]:
        """The query's input (t, X), and the latent to cache (t, C + R), of this rank's tokens."""
        w, c = self._weights, self._config
        projected = linear(hidden, w.qkv_a)
        if w.q_a_norm is None:
            query_input, kv_a = hidden, projected
        else:
            q_a, kv_a = projected.split_with_sizes([len(w.q_a_norm), c.latent_dim], dim=-1)
            query_input = rms_norm(q_a, w.q_a_norm, LATENT_NORM_EPS)
        c_kv, k_pe = kv_a.split_with_sizes([c.kv_lora_rank, c.qk_rope_head_dim], dim=-1)
        c_kv = rms_norm(c_kv, w.kv_a_norm, LATENT_NORM_EPS)
        return query_input, torch.cat([c_kv, apply_rope(k_pe, turns)], dim=-1)

    def _attend(self, query_input: Tensor, batch: AttentionBatch, latents: Tensor) -> Tensor:
        """(T, n, V) attention of this rank's heads."""
        c = self._config
        num_heads = len(self._weights.q_b) // c.qk_head_dim
        query = linear(query_input, self._weights.q_b).view(batch.num_tokens, num_heads, c.qk_head_dim)
        q_nope, q_pe = query.split_with_sizes([c.qk_nope_head_dim, c.qk_rope_head_dim], dim=-1)
        q_pe = apply_rope(q_pe, batch.turns)
        return self._form(q_nope, q_pe, latents, batch, self._weights, scale=c.softmax_scale)
