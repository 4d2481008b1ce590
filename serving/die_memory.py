"""What one die of an instance holds: weights, buffers of dispatch and combine, latent cache.

Owns: the bytes of each, for any shape, layout and batch.
Must not know: configurations, whether it fits.
Source: placement of weights as in arXiv 2506.12708v2, sections 4.2.1 (buffers), 4.3.1 (heads split in prefill) and 5.1
(experts per die). INT8 products, BF16 elsewhere and in the cache.
"""

import math
from dataclasses import dataclass

from devices.deployment import ExpertDeployment
from devices.rates import Rates
from model import work
from model.config import ModelConfig
from model.layout import static_buffer_bytes

BULK_BUFFER_ROOM = 2  # assumed: bulk all-to-alls of prefill have room for twice the mean number of copies


@dataclass(frozen=True, slots=True, kw_only=True)
class DieMemory:
    """Bytes of one die."""

    weight_bytes: int
    buffer_bytes: int  # of dispatch and combine
    cache_bytes: int
    experts_per_die: int

    @property
    def used_bytes(self) -> int:
        """All of it."""
        return self.weight_bytes + self.buffer_bytes + self.cache_bytes


def die_memory(
    shape: ModelConfig,
    deployment: ExpertDeployment,
    rates: Rates,
    *,
    is_prefill: bool,
    step_tokens: int,
    cache_bytes: int,
    has_mtp: bool,
) -> DieMemory:
    """`step_tokens`: most tokens of one pass on a die. With split attention a prefill die has 1/ep of the heads."""
    weights = work.weight_bytes(shape)
    local_shared = 0 if deployment.is_shared_dispatched else 1
    experts_per_die = math.ceil((deployment.num_router_slots + deployment.num_shared_slots) / deployment.ep)
    attention = weights.attention_per_layer
    if is_prefill and rates.prefill_attention == "split":  # SP-TP-SP
        flops = work.operator_flops(shape)
        split = (flops.q_b + flops.kv_b) / (flops.q_a + flops.kv_a + flops.q_b + flops.kv_b + flops.o_proj)
        attention *= 1 - split * (1 - 1 / deployment.ep)
    own_experts = experts_per_die * weights.routed_expert + local_shared * weights.shared_expert_per_layer
    weight_bytes = (
        weights.embedding
        + weights.lm_head
        + shape.num_hidden_layers * attention
        + shape.first_k_dense_replace * weights.dense_mlp_per_layer
        + shape.num_moe_layers * (weights.gate_per_layer + own_experts)
    )
    if has_mtp:  # its experts are divided like those of every layer
        all_experts = shape.n_routed_experts * weights.routed_expert + weights.shared_expert_per_layer
        weight_bytes += weights.mtp_module - all_experts + own_experts - (weights.attention_per_layer - attention)
    top_k = shape.num_experts_per_tok + deployment.is_shared_dispatched  # a copy for the shared expert
    messages = (work.dispatch_message_bytes(shape, scale_bytes=rates.ep_scale_bytes), work.combine_message_bytes(shape))
    if is_prefill:
        buffer_bytes = BULK_BUFFER_ROOM * step_tokens * top_k * sum(messages)
    else:
        buffer_bytes = sum(
            static_buffer_bytes(
                rank_num=deployment.ep,
                local_batch=step_tokens,
                top_k=top_k,
                experts_per_rank=experts_per_die,
                message_bytes=message_bytes,
            )
            for message_bytes in messages
        )
    return DieMemory(
        weight_bytes=round(weight_bytes),
        buffer_bytes=buffer_bytes,
        cache_bytes=cache_bytes,
        experts_per_die=experts_per_die,
    )
