"""The forward pass that is trained: the served mathematics over a packed batch, differentiable and whole.

Owns: the initial weights, the forward pass over the tensors that are served, and the losses.
Must not know: optimizers, processes, files.
Source: DeepSeek-V3 (arXiv 2412.19437): multi-token prediction section 2.2, auxiliary-loss-free balancing 2.1.2.

The MTP module's row of position q takes the hidden state of position q - 1 and the token at q, and predicts the token
at q + 1, as it does when it drafts; before the first position the hidden state is zero.
"""

# Shapes: T tokens, H hidden_size, N heads, E experts, K experts per token, L mixture layers with the MTP module's

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import ModelConfig
from model.layers import (
    LATENT_NORM_EPS,
    apply_rope,
    rms_norm,
    rope_inverse_frequencies,
    rope_magnitude,
    rope_turns,
    swiglu,
)  # fmt: skip
from model.matrix import Weight, linear
from model.moe import choose_experts, mlp
from model.parameters import AttentionWeights, BlockWeights, MlpWeights, MoeWeights, MtpWeights, RankWeights
from model.training.samples import Group, PackedBatch


@dataclass(frozen=True, slots=True, eq=False)
class Losses:
    """Mean cross entropies of one batch, and what balancing needs."""

    next_token: Tensor
    mtp: Tensor
    expert_counts: Tensor  # (L, E) choices of this batch's tokens


def initial_weights(config: ModelConfig, seed: int) -> RankWeights:
    """Random weights with unit gain; what writes to the residual stream starts at zero."""
    c, generator = config, torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float | None = None) -> Tensor:
        values = torch.randn(shape, generator=generator)
        return (values * (shape[-1] ** -0.5 if std is None else std)).requires_grad_()

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape).requires_grad_()

    def ones(size: int) -> Tensor:
        return torch.ones(size).requires_grad_()

    def dense(size: int) -> MlpWeights:
        return MlpWeights(gate_up=normal(2 * size, c.hidden_size), down=zeros(c.hidden_size, size))

    def block(*, is_moe: bool) -> BlockWeights:
        heads, rank = c.num_attention_heads, c.q_lora_rank
        attention = AttentionWeights(
            qkv_a=normal((rank or 0) + c.latent_dim, c.hidden_size),
            q_a_norm=None if rank is None else ones(rank),
            q_b=normal(heads * c.qk_head_dim, rank or c.hidden_size),
            kv_a_norm=ones(c.kv_lora_rank),
            w_uk=normal(heads, c.qk_nope_head_dim, c.kv_lora_rank),
            w_uv=normal(heads, c.v_head_dim, c.kv_lora_rank),
            o=zeros(c.hidden_size, heads * c.v_head_dim),
        )
        feed_forward: MlpWeights | MoeWeights = dense(c.intermediate_size)
        if is_moe:
            feed_forward = MoeWeights(
                gate=normal(c.n_routed_experts, c.hidden_size),
                gate_bias=torch.zeros(c.n_routed_experts),
                experts_gate_up=normal(c.n_routed_experts, 2 * c.moe_intermediate_size, c.hidden_size),
                experts_down=zeros(c.n_routed_experts, c.hidden_size, c.moe_intermediate_size),
                shared=dense(c.moe_intermediate_size * c.n_shared_experts),
            )
        return BlockWeights(
            input_norm=ones(c.hidden_size),
            attention=attention,
            post_attention_norm=ones(c.hidden_size),
            mlp=feed_forward,
        )

    def mtp() -> MtpWeights:
        return MtpWeights(
            enorm=ones(c.hidden_size),
            hnorm=ones(c.hidden_size),
            eh_proj=normal(c.hidden_size, 2 * c.hidden_size),
            block=block(is_moe=True),
            head_norm=ones(c.hidden_size),
        )

    return RankWeights(
        embedding=normal(c.vocab_size, c.hidden_size, std=1.0),
        blocks=tuple(block(is_moe=layer >= c.first_k_dense_replace) for layer in range(c.num_hidden_layers)),
        final_norm=ones(c.hidden_size),
        lm_head=zeros(c.vocab_size, c.hidden_size),
        mtp=tuple(mtp() for _ in range(c.num_nextn_predict_layers)),
    )


class Network:
    """The model over packed batches. The tensors of `weights` are read at every call."""

    def __init__(self, config: ModelConfig, weights: RankWeights) -> None:
        assert len(weights.mtp) <= 1, "one MTP module, as R1 has"
        self._config = config
        self._weights = weights
        self._frequencies = rope_inverse_frequencies(config)
        self._magnitude = rope_magnitude(config)

    def losses(self, batch: PackedBatch) -> Losses:
        """Both losses over the batch's learned tokens."""
        hidden, counts = self.hidden_states(batch)
        next_token = self._cross_entropy(hidden, batch)
        if not self._weights.mtp:
            return Losses(next_token, torch.zeros(()), counts)
        mtp_hidden, mtp_counts = self.mtp_hidden_states(batch, hidden)
        return Losses(next_token, self._cross_entropy(mtp_hidden, batch), torch.cat([counts, mtp_counts.unsqueeze(0)]))

    def mtp_hidden_states(self, batch: PackedBatch, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Head-normed hidden states (T, H) of the MTP module after the main model's `hidden`, and its experts' counts
        (E,)."""
        w, own, eps = self._weights, self._weights.mtp[0], self._config.rms_norm_eps
        previous = F.pad(hidden, (0, 0, 1, 0))[:-1].masked_fill((batch.positions == 0).unsqueeze(1), 0.0)
        embedded = rms_norm(F.embedding(batch.token_ids, w.embedding), own.enorm, eps)
        mixed = linear(torch.cat([embedded, rms_norm(previous, own.hnorm, eps)], dim=-1), own.eh_proj)
        output, counts = self._block(mixed.float(), own.block, batch, self._turns(batch))
        assert counts is not None, "an MTP module is a mixture layer"
        return rms_norm(output, own.head_norm, eps), counts

    def hidden_states(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """Final-normed hidden states (T, H), and the experts' counts of each mixture layer."""
        w = self._weights
        turns = self._turns(batch)
        hidden = F.embedding(batch.token_ids, w.embedding)
        counts = []
        for block in w.blocks:
            hidden, count = self._block(hidden, block, batch, turns)
            if count is not None:
                counts.append(count)
        return rms_norm(hidden, w.final_norm, self._config.rms_norm_eps), torch.stack(counts)

    def _turns(self, batch: PackedBatch) -> Tensor:
        return rope_turns(batch.positions, self._frequencies, self._magnitude)

    def _cross_entropy(self, hidden: Tensor, batch: PackedBatch) -> Tensor:
        logits = F.linear(hidden.index_select(0, batch.learned_rows), self._weights.lm_head)
        return F.cross_entropy(logits.float(), batch.targets)

    def _block(
        self, hidden: Tensor, weights: BlockWeights, batch: PackedBatch, turns: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        eps = self._config.rms_norm_eps
        hidden = hidden + self._attention(rms_norm(hidden, weights.input_norm, eps), weights.attention, batch, turns)
        normed = rms_norm(hidden, weights.post_attention_norm, eps)
        if isinstance(weights.mlp, MlpWeights):
            return hidden + mlp(normed, weights.mlp), None
        output, counts = self._mixture(normed, weights.mlp)
        return hidden + output, counts

    def _attention(self, x: Tensor, w: AttentionWeights, batch: PackedBatch, turns: Tensor) -> Tensor:
        """Naive multi-head latent attention, one padded product per group."""
        c = self._config
        projected = linear(x, w.qkv_a)
        query_input, kv_a = x, projected
        if w.q_a_norm is not None:
            query_input, kv_a = projected.split_with_sizes([len(w.q_a_norm), c.latent_dim], dim=-1)
            query_input = _latent_norm(query_input, w.q_a_norm)
        c_kv, k_pe = kv_a.split_with_sizes([c.kv_lora_rank, c.qk_rope_head_dim], dim=-1)
        c_kv = _latent_norm(c_kv, w.kv_a_norm)
        heads = c.num_attention_heads
        query = linear(query_input, w.q_b).view(-1, heads, c.qk_head_dim)
        q_nope, q_pe = query.split_with_sizes([c.qk_nope_head_dim, c.qk_rope_head_dim], dim=-1)
        k_pe = apply_rope(k_pe.float(), turns).unsqueeze(1).expand(-1, heads, -1)
        k_nope = F.linear(c_kv, w.w_uk.flatten(0, 1)).view(-1, heads, c.qk_nope_head_dim)
        value = F.linear(c_kv, w.w_uv.flatten(0, 1)).view(-1, heads, c.v_head_dim)
        query = torch.cat([q_nope, apply_rope(q_pe.float(), turns).to(q_nope.dtype)], dim=-1)
        key = torch.cat([k_nope, k_pe.to(k_nope.dtype)], dim=-1)
        sizes = [group.stop - group.start for group in batch.groups]
        parts = zip(
            batch.groups,
            query.split_with_sizes(sizes),
            key.split_with_sizes(sizes),
            value.split_with_sizes(sizes),
            strict=True,
        )
        attended = torch.cat([self._attend(group, *tensors) for group, *tensors in parts])
        return linear(attended, w.o)

    def _attend(self, group: Group, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Causal attention (t, N V) inside each sample of a group. Plain products: on a CPU the backward pass of the
        fused kernel takes several times as long for such short samples."""

        def padded(x: Tensor) -> Tensor:  # (t, N, d) to (b N, L, d)
            rows = x.new_zeros(group.num_samples * group.length, *x.shape[1:]).index_copy(0, group.places, x)
            return rows.view(group.num_samples, group.length, *x.shape[1:]).transpose(1, 2).flatten(0, 1)

        scores = torch.bmm(padded(query * self._config.softmax_scale), padded(key).mT)
        weights = torch.softmax(scores + group.mask.to(scores.dtype), dim=-1)
        attended = torch.bmm(weights, padded(value)).view(group.num_samples, -1, group.length, value.shape[-1])
        return attended.transpose(1, 2).flatten(2).flatten(0, 1).index_select(0, group.places)

    def _mixture(self, x: Tensor, w: MoeWeights) -> tuple[Tensor, Tensor]:
        """Routed and shared experts of every token; tokens are sorted by expert, one product per expert."""
        assert w.shared is not None
        with torch.autocast("cpu", enabled=False):  # rounding must not choose experts
            experts, gates = choose_experts(x.float(), w, self._config)
        flat = experts.flatten()
        order = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat, minlength=self._config.n_routed_experts)
        rows = order // experts.shape[1]
        sizes = counts.tolist()
        gate_up = _per_expert(x.index_select(0, rows), sizes, w.experts_gate_up)
        outputs = _per_expert(swiglu(gate_up), sizes, w.experts_down)
        weighted = outputs.float() * gates.flatten()[order].unsqueeze(1)
        return torch.zeros_like(x).index_add(0, rows, weighted) + mlp(x, w.shared), counts


def _latent_norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm in float32, in the width of x: the fused kernel takes no mixed ones."""
    return rms_norm(x.float(), weight, LATENT_NORM_EPS).to(x.dtype)


def _per_expert(x: Tensor, sizes: list[int], weights: Weight) -> Tensor:
    assert isinstance(weights, Tensor), "INT8 weights are not trained"
    # unbind and split have cheap gradients; indexing would make a zero-filled copy per expert.
    pieces = zip(x.split_with_sizes(sizes), weights.unbind(0), strict=True)
    return torch.cat([F.linear(piece, weight) for piece, weight in pieces])
