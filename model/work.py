"""Work of the model as pure counts: parameters, FLOPs and bytes, from shapes alone.

Owns: how many parameters each part has, what each operator computes per token, what the cache and the
messages weigh.
Must not know: devices, seconds, tensors, parallel degrees.
Source: shapes of DeepSeek-V3 (arXiv 2412.19437); message sizes of CloudMatrix-Infer (arXiv 2506.12708 section
4.2.1).

One multiply-add is 2 FLOPs. Norms, RoPE, softmax and activations are not counted: they are small beside the
products.
"""

from dataclasses import dataclass

from model.config import ModelConfig

SCALE_BYTES = 512  # the 4-byte scale of a quantized token copy is padded to 512 B (arXiv 2506.12708 section 4.2.1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterCounts:
    """Number of parameters of each part. `_per_layer` parts repeat in every layer that has them."""

    embedding: int
    lm_head: int  # 0 when tied to the embedding
    final_norm: int
    attention_per_layer: int  # five MLA matrices, without norms
    norms_per_layer: int  # input, post-attention and the two latent norms
    dense_mlp_per_layer: int
    routed_expert: int  # one expert of one layer
    shared_expert_per_layer: int
    gate_per_layer: int  # router matrix and e_score_correction_bias
    mtp_module: int  # one module: enorm, hnorm, eh_proj, head norm and a mixture block; embedding and head are shared
    total: int  # main model, without MTP modules


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightBytes:
    """Bytes of the same parts when large matrices and the rest have different widths."""

    embedding: float
    lm_head: float
    attention_per_layer: float  # with its norms
    dense_mlp_per_layer: float
    routed_expert: float
    shared_expert_per_layer: float
    gate_per_layer: float
    mtp_module: float
    total: float  # main model, without MTP modules


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorFlops:
    """FLOPs of each operator of one layer. Per token, except where the name says per token and context token."""

    q_a: int  # hidden -> q latent (0 when q_lora_rank is None)
    q_b: int  # q latent (or hidden) -> all heads
    kv_a: int  # hidden -> c_kv, k_pe
    absorb_k: int  # absorbed form: q_nope through W_UK
    absorb_v: int  # absorbed form: attention output through W_UV
    kv_b: int  # naive form: c_kv -> keys and values of all heads
    attention_absorbed_per_context_token: int  # scores over C + R and values over C, all heads
    attention_naive_per_context_token: int  # scores over qk_head_dim and values over v_head_dim, all heads
    o_proj: int
    gate: int
    expert: int  # one token copy through one routed expert
    shared_expert: int
    dense_mlp: int
    mtp_projection: int  # eh_proj of the MTP module
    lm_head: int

    @property
    def mla_prolog(self) -> int:
        """The paper's MLAProlog: Q down, Q up, KV down, W_UK absorption (decode)."""
        return self.q_a + self.q_b + self.kv_a + self.absorb_k


def attention_parameters(config: ModelConfig) -> int:
    """Parameters of the MLA matrices of one layer: q_a, q_b, kv_a, kv_b, o."""
    c = config
    heads = c.num_attention_heads
    if c.q_lora_rank is None:
        query = c.hidden_size * heads * c.qk_head_dim
    else:
        query = c.hidden_size * c.q_lora_rank + c.q_lora_rank * heads * c.qk_head_dim
    key_value = c.hidden_size * c.latent_dim + c.kv_lora_rank * heads * (c.qk_nope_head_dim + c.v_head_dim)
    return query + key_value + heads * c.v_head_dim * c.hidden_size


def parameter_counts(config: ModelConfig) -> ParameterCounts:
    """Number of parameters per part of the model."""
    c = config
    embedding = c.vocab_size * c.hidden_size
    lm_head = 0 if c.tie_word_embeddings else embedding
    attention = attention_parameters(c)
    norms = 2 * c.hidden_size + c.kv_lora_rank + (c.q_lora_rank or 0)
    dense = 3 * c.hidden_size * c.intermediate_size
    expert = 3 * c.hidden_size * c.moe_intermediate_size
    shared = expert * c.n_shared_experts
    gate = c.n_routed_experts * (c.hidden_size + 1)
    moe = c.n_routed_experts * expert + shared + gate
    total = (
        embedding
        + lm_head
        + c.hidden_size
        + c.num_hidden_layers * (attention + norms)
        + c.first_k_dense_replace * dense
        + c.num_moe_layers * moe
    )
    return ParameterCounts(
        embedding=embedding,
        lm_head=lm_head,
        final_norm=c.hidden_size,
        attention_per_layer=attention,
        norms_per_layer=norms,
        dense_mlp_per_layer=dense,
        routed_expert=expert,
        shared_expert_per_layer=shared,
        gate_per_layer=gate,
        mtp_module=2 * c.hidden_size * c.hidden_size + 3 * c.hidden_size + attention + norms + moe,
        total=total,
    )


def weight_bytes(config: ModelConfig, *, matrix_bytes: float = 1.0, other_bytes: float = 2.0) -> WeightBytes:
    """Bytes per part; `matrix_bytes` per parameter of attention and MLP products, `other_bytes` for all else.

    The defaults are INT8 products with BF16 embedding, head, norms and gate, as in arXiv 2506.12708 section
    4.5.
    """
    count = parameter_counts(config)
    attention = count.attention_per_layer * matrix_bytes + count.norms_per_layer * other_bytes
    dense = count.dense_mlp_per_layer * matrix_bytes
    expert = count.routed_expert * matrix_bytes
    shared = count.shared_expert_per_layer * matrix_bytes
    gate = count.gate_per_layer * other_bytes
    moe = config.n_routed_experts * expert + shared + gate
    projection = 2 * config.hidden_size * config.hidden_size * matrix_bytes
    return WeightBytes(
        embedding=count.embedding * other_bytes,
        lm_head=count.lm_head * other_bytes,
        attention_per_layer=attention,
        dense_mlp_per_layer=dense,
        routed_expert=expert,
        shared_expert_per_layer=shared,
        gate_per_layer=gate,
        mtp_module=projection + 3 * config.hidden_size * other_bytes + attention + moe,
        total=(count.embedding + count.lm_head + count.final_norm) * other_bytes
        + config.num_hidden_layers * attention
        + config.first_k_dense_replace * dense
        + config.num_moe_layers * moe,
    )


def kv_bytes_per_token(config: ModelConfig, *, element_bytes: float = 2.0, include_mtp: bool = False) -> int:
    """Latent cache of one token over all layers: (kv_lora_rank + qk_rope_head_dim) elements per layer."""
    layers = config.num_hidden_layers + (config.num_nextn_predict_layers if include_mtp else 0)
    return round(layers * config.latent_dim * element_bytes)


def operator_flops(config: ModelConfig) -> OperatorFlops:
    """FLOPs of each operator, per token (see OperatorFlops)."""
    c = config
    heads, latent = c.num_attention_heads, c.kv_lora_rank
    query_input = c.hidden_size if c.q_lora_rank is None else c.q_lora_rank
    expert = 2 * 3 * c.hidden_size * c.moe_intermediate_size
    return OperatorFlops(
        q_a=0 if c.q_lora_rank is None else 2 * c.hidden_size * c.q_lora_rank,
        q_b=2 * query_input * heads * c.qk_head_dim,
        kv_a=2 * c.hidden_size * c.latent_dim,
        absorb_k=2 * heads * c.qk_nope_head_dim * latent,
        absorb_v=2 * heads * latent * c.v_head_dim,
        kv_b=2 * latent * heads * (c.qk_nope_head_dim + c.v_head_dim),
        attention_absorbed_per_context_token=2 * heads * (c.latent_dim + latent),
        attention_naive_per_context_token=2 * heads * (c.qk_head_dim + c.v_head_dim),
        o_proj=2 * heads * c.v_head_dim * c.hidden_size,
        gate=2 * c.hidden_size * c.n_routed_experts,
        expert=expert,
        shared_expert=expert * c.n_shared_experts,
        dense_mlp=2 * 3 * c.hidden_size * c.intermediate_size,
        mtp_projection=2 * 2 * c.hidden_size * c.hidden_size,
        lm_head=2 * c.hidden_size * c.vocab_size,
    )


def dispatch_message_bytes(config: ModelConfig, *, quantized: bool = True, scale_bytes: int = SCALE_BYTES) -> int:
    """One token copy on its way to an expert: INT8 payload and padded scale, or BF16 payload. 7.5 KiB for R1."""
    return config.hidden_size + scale_bytes if quantized else 2 * config.hidden_size


def combine_message_bytes(config: ModelConfig) -> int:
    """One token copy on its way back, in BF16. 14 KiB for R1."""
    return 2 * config.hidden_size
