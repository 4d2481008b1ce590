"""Seconds of each operator of one layer, and of what follows the layers, on some of a die's cores.

Owns: the formulas that join the model's shapes with a die's rates. Communication is in devices/expert_parallel.py.
Must not know: how operators overlap, steps, clocks.
Source: arXiv 2506.12708v2, sections 4.2 and 4.3, for what each operator does; its tables 8 to 10 for what they reach.

Attention differs between ranks and takes arrays over them; all else takes the numbers of the rank that decides.
Bytes of an operator are its weights, inputs and outputs, each touched once.

    attention    c + m - (1 - exposed) * min(c, m)    with compute c = FLOPs / rate, memory m = bytes / bandwidth
    activations  passes * bytes of q and of the output of all heads, over HBM bandwidth
"""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from devices.deployment import ExpertDeployment
from devices.gemm import Gemm
from devices.rates import BF16_BYTES, FP32_BYTES, INT8_BYTES
from devices.spec import SupernodeSpec
from model import work
from model.config import ModelConfig

Parts: TypeAlias = dict[str, float]  # operator -> seconds
# One number per rank. On a few ranks numpy's calls cost more than a loop, so a list is taken too.
PerRank: TypeAlias = Sequence[float] | npt.NDArray[np.float64]

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

    def absorbed_attention(self, tokens: float, context: PerRank, kv: PerRank, *, aic: int) -> Parts:
        """MLA in latent space: MLAProlog, fused attention, O_proj (arXiv 2506.12708v2, section 4.2.2).

        `tokens` of the rank that has most; `context` and `kv` of every rank: token pairs, and cached tokens to read.
        """
        c, f, gemm = self._config, self._flops, self._gemm.seconds
        heads = c.num_attention_heads
        latents = c.latent_dim + (c.q_lora_rank or 0)
        prolog = gemm(tokens, latents, c.hidden_size, aic=aic)
        prolog += gemm(tokens, heads * c.qk_head_dim, c.q_lora_rank or c.hidden_size, aic=aic)
        prolog += gemm(tokens, c.kv_lora_rank, c.qk_nope_head_dim, groups=heads, aic=aic)  # W_UK, head by head
        o_proj = gemm(tokens, c.v_head_dim, c.kv_lora_rank, groups=heads, aic=aic)  # W_UV
        o_proj += gemm(tokens, c.hidden_size, heads * c.v_head_dim, aic=aic)
        core = self._attention(context, kv, f.attention_absorbed_per_context_token, self._latent_bytes, aic)
        return {
            "mla_prolog": prolog + self._launch_s,
            "attention": core + self._launch_s,
            "o_proj": o_proj + self._launch_s,
            "activations": self._activations(tokens * self._absorbed_bytes),
        }

    def naive_attention(self, tokens: float, context: PerRank, kv: PerRank, *, aic: int) -> Parts:
        """Multi-head form on one rank: every context token is expanded to all heads first."""
        c, f, gemm = self._config, self._flops, self._gemm
        heads = c.num_attention_heads
        most_kv = float(max(kv))
        expanded_bytes = self._query_bytes + self._value_bytes
        prolog = gemm.seconds(tokens, c.latent_dim + (c.q_lora_rank or 0), c.hidden_size, aic=aic)
        prolog += gemm.seconds(tokens, heads * c.qk_head_dim, c.q_lora_rank or c.hidden_size, aic=aic)
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
        c, f, ep, aic = self._config, self._flops, self._deployment.ep, self._num_aic
        gemm = self._gemm
        heads = c.num_attention_heads
        up_proj = gemm.seconds(tokens * ep, _split(heads * c.qk_head_dim, ep), c.q_lora_rank or c.hidden_size, aic=aic)
        up_proj += gemm.seconds(
            kv * ep, _split(heads * (c.qk_nope_head_dim + c.v_head_dim), ep), c.kv_lora_rank, aic=aic
        )
        query_value_bytes = self._query_bytes + self._value_bytes
        core = self._attention([context], [kv], f.attention_naive_per_context_token, query_value_bytes, aic)
        # Queries of new tokens and the latent KV of all, the cached ones included, go to every other die.
        latent_bytes = tokens * BF16_BYTES * (c.q_lora_rank or c.hidden_size) + kv * self._latent_bytes
        return {
            "down_proj": gemm.launched(tokens, c.latent_dim + (c.q_lora_rank or 0), c.hidden_size, aic=aic),
            "latent_gather": self._collective(latent_bytes * (ep - 1), self._gather_bytes_per_s),
            "up_proj": up_proj + self._launch_s,
            "attention": core + self._launch_s,
            "head_exchange": self._collective(tokens * self._value_bytes * (ep - 1) / ep, self._exchange_bytes_per_s),
            "o_proj": gemm.launched(tokens, c.hidden_size, heads * c.v_head_dim, aic=aic),
            "activations": self._activations((tokens + kv) * query_value_bytes),
        }

    def gate(self, tokens: float, *, aic: int) -> float:
        """Router matrix in BF16, and the choice of experts."""
        c = self._config
        return self._gemm.launched(tokens, c.n_routed_experts, c.hidden_size, aic=aic, bf16=True) + self._launch_s

    def experts(self, mean_tokens: float, max_tokens: float, *, aic: int) -> float:
        """Expert MLPs of the hottest die, when every rank routes `mean_tokens` on average."""
        c, d = self._config, self._deployment
        slots = d.router_slots_per_die
        copies = d.hottest_copies(mean_tokens, c.num_experts_per_tok)
        groups = min(float(slots), copies)
        seconds = self._expert_mlp(copies / groups if groups else 0.0, groups=groups, aic=aic)
        if d.is_shared_dispatched:
            shared_copies = mean_tokens * d.ep / d.num_shared_slots
            seconds = max(seconds, self._expert_mlp(shared_copies, groups=c.n_shared_experts, aic=aic))
        else:
            seconds += self._expert_mlp(max_tokens, groups=c.n_shared_experts, aic=aic)
        return seconds + 3 * self._launch_s

    def dispatch_compute(self, copies: float, hottest_copies: float) -> float:
        """Vector work of prefill: quantize and order the copies sent, order what the hottest die received."""
        message = self._message_bytes
        num_bytes = copies * (BF16_BYTES * self._config.hidden_size + message) + hottest_copies * 2 * message
        return num_bytes / self._hbm_bytes_per_s + self._launch_s

    def expert_activations(self, mean_tokens: float, max_tokens: float) -> float:
        """Vector work of prefill between the products of the hottest die's experts: dequantize, SwiGLU, quantize."""
        c, d = self._config, self._deployment
        copies = d.hottest_copies(mean_tokens, c.num_experts_per_tok)
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

    def lm_head(self, samples: float, *, split: int) -> float:
        """Logits of `samples` rows, BF16, the vocabulary split over `split` dies. Nothing to do, no time."""
        c = self._config
        if not samples:
            return 0.0
        columns = _split(c.vocab_size, split)
        aic = self._num_aic
        seconds = self._gemm.seconds(samples, columns, c.hidden_size, aic=aic, bf16=True, out_bytes=FP32_BYTES)
        return seconds + self._launch_s

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
        if isinstance(context, np.ndarray):
            compute_s, memory_s = context * compute, np.asarray(kv) * memory
            return float((compute_s + memory_s - hidden * np.minimum(compute_s, memory_s)).max())
        pairs = [(c * compute, m * memory) for c, m in zip(context, kv, strict=True)]
        return float(max(c + m - hidden * (c if c < m else m) for c, m in pairs))

    def _expert_mlp(self, tokens: float, *, groups: float, aic: int) -> float:
        c = self._config
        hidden, wide = c.hidden_size, c.moe_intermediate_size
        gate_up = self._gemm.seconds(tokens, 2 * wide, hidden, groups=groups, aic=aic, m_varies=True)
        return gate_up + self._gemm.seconds(tokens, hidden, wide, groups=groups, aic=aic, m_varies=True)

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
