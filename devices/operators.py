"""Seconds of each operator of one layer, and of what follows the layers, on some of a die's cores.

Owns: the formulas that join the model's shapes with a die's rates. Communication is in devices/expert_parallel.py.
Must not know: how operators overlap, steps, clocks.
Source: arXiv 2506.12708v2, sections 4.2 and 4.3, for what each operator does; its tables 8 to 10 for what they reach.

Attention takes the context of every rank that may be the slowest; all else the numbers of the rank that decides.
What depends on numbers of tokens alone is remembered: they come back step after step, while context moves on.
Bytes of an operator are its weights, inputs and outputs, each touched once.

    attention    c + m - (1 - exposed) * min(c, m)    with compute c = FLOPs / rate, memory m = bytes / bandwidth
    activations  passes * bytes of q and of the output of all heads, over HBM bandwidth
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TypeAlias

from devices.deployment import ExpertDeployment
from devices.gemm import Gemm, Product
from devices.rates import BF16_BYTES, FP32_BYTES, INT8_BYTES
from devices.spec import SupernodeSpec
from model import work
from model.config import ModelConfig

Parts: TypeAlias = dict[str, float]  # operator -> seconds
PerRank: TypeAlias = Sequence[float]  # one number for each rank that may be the slowest

REMEMBERED = 4096  # results of each kind, the latest used; some hundred bytes each

# Fused sampling, bytes per logit: softmax, filter and draw read each 32-bit logit once; nucleus sampling sorts them, a
# radix sort of 4 passes that read and write key and index.
SAMPLING_BYTES_PER_LOGIT = 3 * 4 + 4 * 2 * 8


class Operators:
    """Seconds of the operators of one model on one machine."""

    def __init__(self, config: ModelConfig, supernode: SupernodeSpec, deployment: ExpertDeployment) -> None:
        self._config, self._deployment = config, deployment
        die, rates = supernode.npu.die, supernode.rates
        self._flops = work.operator_flops(config)
        self._gemm = Gemm(supernode)
        self._launch_s = rates.launch_s
        self._hbm_bytes_per_s = die.hbm_bytes_per_s * rates.memory_utilization
        self._attention_flops_per_s_per_aic = die.bf16_flops_per_s * rates.attention_utilization / die.num_aic
        self._exposed = supernode.fitted.attention_exposed
        self._passes = supernode.fitted.activation_passes
        self._small_s = rates.attention_small_operators * rates.launch_s
        self._message_bytes = work.dispatch_message_bytes(config, scale_bytes=rates.ep_scale_bytes)
        self._num_aic = die.num_aic
        ub = supernode.planes["ub"]
        path = ub.paths.get(("npu_npu", "write", "inter")) or ub.paths["npu_npu", "write", "intra"]
        self._gather_bytes_per_s = ub.die_port_bytes_per_s * rates.collective_utilization
        self._exchange_bytes_per_s = path.bytes_per_s
        self._latency_s = path.latency_ns * 1e-9
        heads = config.num_attention_heads
        self._latent_bytes = BF16_BYTES * config.latent_dim
        self._absorbed_bytes = BF16_BYTES * heads * (config.latent_dim + config.kv_lora_rank)
        self._query_bytes = BF16_BYTES * heads * config.qk_head_dim
        self._value_bytes = BF16_BYTES * heads * config.v_head_dim
        # Of one rank, as nearly always one decides: what `_attention` would work out, kept by cube cores.
        flops = self._flops.attention_absorbed_per_context_token
        self._absorbed_s_per_pair = [math.inf] + [
            flops / (self._attention_flops_per_s_per_aic * aic) for aic in range(1, die.num_aic + 1)
        ]
        self._latent_s, self._hidden = self._latent_bytes / self._hbm_bytes_per_s, 1 - self._exposed
        remember = lru_cache(REMEMBERED)
        self._absorbed_products = remember(self._make_absorbed_products)
        self.around_absorbed = remember(self._around_absorbed_core)
        self._around_split = remember(self._around_split_core)
        self._hottest_copies = remember(deployment.hottest_copies)
        self._gate_product = remember(self._make_gate_product)
        self._expert_products = remember(self._make_expert_products)

    def absorbed_attention(self, tokens: float, context: PerRank, kv: PerRank, *, aic: int) -> Parts:
        """MLA in latent space: MLAProlog, fused attention, O_proj (arXiv 2506.12708v2, section 4.2.2).

        `tokens` of the rank that has most; `context` and `kv` of every rank: token pairs, and cached tokens to read.
        """
        core = self.absorbed_core(context, kv, aic)
        prolog, o_proj, activations = self.around_absorbed(tokens, aic)
        return {"mla_prolog": prolog, "attention": core, "o_proj": o_proj, "activations": activations}

    def absorbed_core(self, context: PerRank, kv: PerRank, aic: int) -> float:
        """Its fused attention alone."""
        if len(context) > 1:
            flops = self._flops.attention_absorbed_per_context_token
            return self._attention(context, kv, flops, self._latent_bytes, aic) + self._launch_s
        compute_s, memory_s = context[0] * self._absorbed_s_per_pair[aic], kv[0] * self._latent_s
        seconds = compute_s + memory_s - self._hidden * (compute_s if compute_s < memory_s else memory_s)
        return seconds + self._launch_s

    def naive_attention(self, tokens: float, context: PerRank, kv: PerRank, *, aic: int) -> Parts:
        """Multi-head form on one rank: every context token is expanded to all heads first."""
        c, f, gemm = self._config, self._flops, self._gemm
        heads = c.num_attention_heads
        most_kv = float(max(kv))
        expanded_bytes = self._query_bytes + self._value_bytes
        (down, query_up, _), _ = self._absorbed_products(tokens)
        prolog = down.seconds(aic) + query_up.seconds(aic)
        core = self._attention(context, kv, f.attention_naive_per_context_token, expanded_bytes, aic)
        return {
            "mla_prolog": prolog + self._launch_s,
            "kv_expand": gemm.launched(most_kv, heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank, aic=aic),
            "attention": core + self._launch_s,
            "o_proj": gemm.launched(tokens, c.hidden_size, heads * c.v_head_dim, aic=aic),
            "activations": self._activations((tokens + most_kv) * expanded_bytes),
        }

    def split_attention(self, tokens: float, context: float, kv: float) -> Parts:
        """SP-TP-SP prefill on `ep` dies (arXiv 2506.12708v2, section 4.3.1); each argument is one die's part.

        Down-projections on a slice of the sequence, latents gathered, all tokens on the die's heads, outputs exchanged
        back to slices, O_proj. A die has 1/ep of the heads, and ep times the tokens in the middle.
        """
        c, ep, aic = self._config, self._deployment.ep, self._num_aic
        heads = c.num_attention_heads
        down_proj, query_up, head_exchange, o_proj = self._around_split(tokens)
        key_value_columns = _split(heads * (c.qk_nope_head_dim + c.v_head_dim), ep)
        up_proj = query_up + self._gemm.product(kv * ep, key_value_columns, c.kv_lora_rank).seconds(aic)
        query_value_bytes = self._query_bytes + self._value_bytes
        flops = self._flops.attention_naive_per_context_token
        core = self._attention([context], [kv], flops, query_value_bytes, aic)
        # Queries of new tokens and the latent KV of all, the cached ones included, go to every other die.
        latent_bytes = tokens * BF16_BYTES * (c.q_lora_rank or c.hidden_size) + kv * self._latent_bytes
        return {
            "down_proj": down_proj,
            "latent_gather": self._collective(latent_bytes * (ep - 1), self._gather_bytes_per_s),
            "up_proj": up_proj + self._launch_s,
            "attention": core + self._launch_s,
            "head_exchange": head_exchange,
            "o_proj": o_proj,
            "activations": self._activations((tokens + kv) * query_value_bytes),
        }

    def gate(self, tokens: float, *, aic: int) -> float:
        """Router matrix in BF16, and the choice of experts."""
        return self._gate_product(tokens).seconds(aic) + self._launch_s + self._launch_s

    def experts(self, mean_tokens: float, max_tokens: float, *, aic: int) -> float:
        """Expert MLPs of the hottest die, when every rank routes `mean_tokens` on average."""
        (gate_up, down), (shared_gate_up, shared_down) = self._expert_products(mean_tokens, max_tokens)
        seconds = gate_up.seconds(aic) + down.seconds(aic)
        shared_s = shared_gate_up.seconds(aic) + shared_down.seconds(aic)
        seconds = max(seconds, shared_s) if self._deployment.is_shared_dispatched else seconds + shared_s
        return seconds + 3 * self._launch_s

    def dispatch_compute(self, copies: float, hottest_copies: float) -> float:
        """Vector work of prefill: quantize and order the copies sent, order what the hottest die received."""
        message = self._message_bytes
        num_bytes = copies * (BF16_BYTES * self._config.hidden_size + message) + hottest_copies * 2 * message
        return num_bytes / self._hbm_bytes_per_s + self._launch_s

    def expert_activations(self, mean_tokens: float, max_tokens: float) -> float:
        """Vector work of prefill between the products of the hottest die's experts: dequantize, SwiGLU, quantize."""
        c, d = self._config, self._deployment
        copies = self._hottest_copies(mean_tokens, c.num_experts_per_tok)
        copies += 0 if d.is_shared_dispatched else max_tokens * c.n_shared_experts
        bytes_per_copy = c.moe_intermediate_size * (
            2 * 2 * BF16_BYTES + 3 * INT8_BYTES
        )  # gate and up, then the product
        return copies * bytes_per_copy / self._hbm_bytes_per_s + self._launch_s

    def combine_compute(self, copies: float, hottest_copies: float) -> float:
        """Vector work of prefill: order what the hottest die sends back; weight and add what came back."""
        num_bytes = 2 * (copies + hottest_copies) * work.combine_message_bytes(self._config)
        return num_bytes / self._hbm_bytes_per_s + self._launch_s

    def dense_mlp(self, tokens: float) -> float:
        c, aic = self._config, self._num_aic
        gate_up = self._gemm.launched(tokens, 2 * c.intermediate_size, c.hidden_size, aic=aic)
        return gate_up + self._gemm.launched(tokens, c.hidden_size, c.intermediate_size, aic=aic) + self._launch_s

    def mtp_projection(self, tokens: float) -> float:
        """eh_proj of the MTP module."""
        hidden = self._config.hidden_size
        return self._gemm.launched(tokens, hidden, 2 * hidden, aic=self._num_aic)

    def lm_head(self, samples: float, split: int) -> float:
        """Logits of `samples` rows, BF16, the vocabulary split over `split` dies. Nothing to do, no time."""
        c = self._config
        if not samples:
            return 0.0
        columns = _split(c.vocab_size, split)
        logits = self._gemm.product(samples, columns, c.hidden_size, bf16=True, out_bytes=FP32_BYTES)
        return logits.seconds(self._num_aic) + self._launch_s

    def sampling(self, samples: float) -> float:
        """Fused sampling on the NPU."""
        if not samples:
            return 0.0
        num_bytes = samples * self._config.vocab_size * SAMPLING_BYTES_PER_LOGIT
        return num_bytes / self._hbm_bytes_per_s + self._launch_s

    def _attention(self, context: PerRank, kv: PerRank, flops: float, kv_bytes: float, aic: int) -> float:
        """Of the slowest rank."""
        compute, memory = flops / (self._attention_flops_per_s_per_aic * aic), kv_bytes / self._hbm_bytes_per_s
        hidden = 1 - self._exposed
        slowest = 0.0
        for rank_context, rank_kv in zip(context, kv, strict=True):
            compute_s, memory_s = rank_context * compute, rank_kv * memory
            seconds = compute_s + memory_s - hidden * (compute_s if compute_s < memory_s else memory_s)
            slowest = seconds if seconds > slowest else slowest
        return slowest

    def _make_absorbed_products(self, tokens: float) -> tuple[tuple[Product, ...], tuple[Product, ...]]:
        """Of MLAProlog (down, queries up, W_UK head by head), and of what follows attention (W_UV, O_proj)."""
        c, product = self._config, self._gemm.product
        heads = c.num_attention_heads
        prolog = (
            product(tokens, c.latent_dim + (c.q_lora_rank or 0), c.hidden_size),
            product(tokens, heads * c.qk_head_dim, c.q_lora_rank or c.hidden_size),
            product(tokens, c.kv_lora_rank, c.qk_nope_head_dim, groups=heads),
        )
        return prolog, (
            product(tokens, c.v_head_dim, c.kv_lora_rank, groups=heads),
            product(tokens, c.hidden_size, heads * c.v_head_dim),
        )

    def _around_absorbed_core(self, tokens: float, aic: int) -> tuple[float, float, float]:
        """Prolog, O_proj, activations."""
        (down, query_up, absorb_k), (absorb_v, out) = self._absorbed_products(tokens)
        prolog = down.seconds(aic) + query_up.seconds(aic) + absorb_k.seconds(aic)
        o_proj = absorb_v.seconds(aic) + out.seconds(aic)
        activations = self._activations(tokens * self._absorbed_bytes)
        return prolog + self._launch_s, o_proj + self._launch_s, activations

    def _around_split_core(self, tokens: float) -> tuple[float, float, float, float]:
        """Down-projections, queries up (without a launch of its own), exchange of outputs, O_proj."""
        c, ep, aic, gemm = self._config, self._deployment.ep, self._num_aic, self._gemm
        heads = c.num_attention_heads
        query_up = gemm.product(tokens * ep, _split(heads * c.qk_head_dim, ep), c.q_lora_rank or c.hidden_size)
        return (
            gemm.launched(tokens, c.latent_dim + (c.q_lora_rank or 0), c.hidden_size, aic=aic),
            query_up.seconds(aic),
            self._collective(tokens * self._value_bytes * (ep - 1) / ep, self._exchange_bytes_per_s),
            gemm.launched(tokens, c.hidden_size, heads * c.v_head_dim, aic=aic),
        )

    def _make_gate_product(self, tokens: float) -> Product:
        return self._gemm.product(tokens, self._config.n_routed_experts, self._config.hidden_size, bf16=True)

    def _make_expert_products(self, mean_tokens: float, max_tokens: float) -> tuple[tuple[Product, ...], ...]:
        """Of the hottest die's routed experts, and of the shared one."""
        c, d = self._config, self._deployment
        copies = self._hottest_copies(mean_tokens, c.num_experts_per_tok)
        groups = min(float(d.router_slots_per_die), copies)
        shared_tokens = mean_tokens * d.ep / d.num_shared_slots if d.is_shared_dispatched else max_tokens
        routed = self._expert_mlp(copies / groups if groups else 0.0, groups)
        return routed, self._expert_mlp(shared_tokens, c.n_shared_experts)

    def _expert_mlp(self, tokens: float, groups: float) -> tuple[Product, Product]:
        c, product = self._config, self._gemm.product
        hidden, wide = c.hidden_size, c.moe_intermediate_size
        gate_up = product(tokens, 2 * wide, hidden, groups=groups, m_varies=True)
        return gate_up, product(tokens, hidden, wide, groups=groups, m_varies=True)

    def _activations(self, num_bytes: float) -> float:
        """Norms, rotation, quantization and layout changes of the attention half."""
        return self._passes * num_bytes / self._hbm_bytes_per_s + self._small_s

    def _collective(self, num_bytes: float, bytes_per_s: float) -> float:
        if self._deployment.ep == 1:
            return 0.0
        return num_bytes / bytes_per_s + self._latency_s + self._launch_s


def _split(total: int, num_parts: int) -> int:
    """Columns of one part; no fewer than one."""
    return -(-total // num_parts)
