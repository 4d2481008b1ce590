"""Seconds of each operator of one layer, on a share of a die's cores.

Owns: the formulas that join the counts of `model.work` with the achieved rates of devices/rates.py.
Must not know: how operators overlap, steps, clocks.
Source: roofline (the slower of compute and memory) with a fixed cost; arXiv 2506.12708, sections 4.2 and 4.3, for what
each operator does.

Everything is vectorized: token counts are float arrays or scalars, and seconds have the same shape. Bytes of an
operator are its weights, inputs and outputs, each touched once, which is how the paper's table 10 counts them.
"""

import math
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from devices.rates import (
    BF16_BYTES,
    BULK_COMBINE_GB_PER_S,
    BULK_DISPATCH_GB_PER_S,
    BULK_EP,
    FP32_BYTES,
    INT8_BYTES,
    TABLE_7_COMBINE_BYTES,
    TABLE_7_COMBINE_US,
    TABLE_7_DISPATCH_BYTES,
    TABLE_7_DISPATCH_US,
    TABLE_7_EP,
    TABLE_7_TOKENS,
    TABLE_7_TOPK,
    TABLE_7_WRITE_BYTES_PER_S,
    WHOLE_DIE,
    ExpertDeployment,
    Rates,
    Share,
)
from devices.spec import SupernodeSpec
from model import work
from model.config import ModelConfig

Seconds = npt.NDArray[np.float64]
# Tokens or seconds of one rank, or an array over ranks: on a few ranks numpy's calls cost more than a loop.
Amount = TypeVar("Amount", float, npt.NDArray[np.float64])


class Operators:
    """Seconds of the operators of one model on one machine.

    Attention takes numbers of one rank or arrays over ranks, since ranks differ; the rest takes the numbers of the rank
    that decides.
    """

    def __init__(
        self,
        config: ModelConfig,
        supernode: SupernodeSpec,
        deployment: ExpertDeployment,
        rates: Rates | None = None,
    ) -> None:
        self._config = config
        self._deployment = deployment
        self._rates = rates = rates if rates is not None else Rates()
        self._flops = work.operator_flops(config)
        self._params = work.parameter_counts(config)
        die, ub = supernode.npu.die, supernode.planes["ub"]
        self._num_aiv = die.num_aiv
        self._int8_flops_per_s = die.int8_flops_per_s * rates.gemm_utilization
        self._bf16_gemm_flops_per_s = die.bf16_flops_per_s * rates.gemm_utilization
        self._mla_flops_per_s = die.bf16_flops_per_s * rates.mla_utilization
        self._hbm_bytes_per_s = die.hbm_bytes_per_s * rates.memory_utilization
        self._ub_port_bytes_per_s = ub.die_port_bytes_per_s
        self._ub_write_bytes_per_s = ub.paths["npu_npu", "write", "inter"].bytes_per_s
        self._ub_latency_s = ub.paths["npu_npu", "write", "inter"].latency_ns * 1e-9
        self._dispatch_fixed_s = self._fixed_s(TABLE_7_DISPATCH_US, TABLE_7_DISPATCH_BYTES)
        self._combine_fixed_s = self._fixed_s(TABLE_7_COMBINE_US, TABLE_7_COMBINE_BYTES)

    def absorbed_attention(self, tokens: Amount, context: Amount, kv: Amount, share: Share) -> dict[str, Amount]:
        """MLA in latent space: MLAProlog, fused attention, O_proj (arXiv 2506.12708, section 4.2.2)."""
        c, f = self._config, self._flops
        heads = c.num_attention_heads
        prolog = self._int8(tokens, f.mla_prolog, BF16_BYTES * (c.hidden_size + heads * c.latent_dim), share)
        attention = self._roofline(
            context * f.attention_absorbed_per_context_token,
            self._mla_flops_per_s * share.aic,
            BF16_BYTES * (kv * c.latent_dim + tokens * heads * (c.latent_dim + c.kv_lora_rank)),
            self._rates.attention_launch_s,
        )
        o_bytes = BF16_BYTES * (heads * c.kv_lora_rank + c.hidden_size)
        o_proj = self._int8(tokens, f.absorb_v + f.o_proj, o_bytes, share)
        return {"mla_prolog": prolog, "attention": attention, "o_proj": o_proj, "norms": self._norms(tokens)}

    def naive_attention(self, tokens: Amount, context: Amount, kv: Amount, share: Share) -> dict[str, Amount]:
        """Multi-head form on one rank: every context token is expanded to all heads first."""
        c, f = self._config, self._flops
        heads = c.num_attention_heads
        expanded_bytes = BF16_BYTES * heads * (c.qk_head_dim + c.v_head_dim)
        prolog = self._int8(tokens, f.q_a + f.q_b + f.kv_a, BF16_BYTES * (c.hidden_size + heads * c.qk_head_dim), share)
        expand = self._int8(kv, f.kv_b, BF16_BYTES * c.kv_lora_rank + expanded_bytes, share)
        attention = self._roofline(
            context * f.attention_naive_per_context_token,
            self._mla_flops_per_s * share.aic,
            kv * expanded_bytes + tokens * expanded_bytes,
            self._rates.attention_launch_s,
        )
        o_proj = self._int8(tokens, f.o_proj, BF16_BYTES * (heads * c.v_head_dim + c.hidden_size), share)
        return {
            "mla_prolog": prolog,
            "kv_expand": expand,
            "attention": attention,
            "o_proj": o_proj,
            "norms": self._norms(tokens),
        }

    def split_attention(self, tokens: Amount, context: Amount, kv: Amount) -> dict[str, Amount]:
        """SP-TP-SP prefill on `ep` dies (arXiv 2506.12708, section 4.3.1); each argument is one die's part.

        Down-projections on a slice of the sequence, latents gathered, all tokens on the die's heads, outputs exchanged
        back to slices, O_proj.
        """
        c, f, ep = self._config, self._flops, self._deployment.ep
        heads = c.num_attention_heads
        query_bytes = BF16_BYTES * heads * c.qk_head_dim
        value_bytes = BF16_BYTES * heads * c.v_head_dim
        latent_bytes = BF16_BYTES * ((c.q_lora_rank or c.hidden_size) + c.latent_dim)
        down_proj = self._int8(tokens, f.q_a + f.kv_a, BF16_BYTES * c.hidden_size + latent_bytes, WHOLE_DIE)
        # Heads are split over the dies: a die has 1/ep of the weights and works on ep times the tokens.
        up_proj = self._int8(tokens, f.q_b, query_bytes + latent_bytes, WHOLE_DIE, weight_split=ep)
        up_proj += self._int8(kv, f.kv_b, query_bytes + value_bytes, WHOLE_DIE, weight_split=ep)
        attention = self._roofline(
            context * f.attention_naive_per_context_token,
            self._mla_flops_per_s,
            tokens * (query_bytes + value_bytes) + kv * (query_bytes + value_bytes),
            self._rates.attention_launch_s,
        )
        o_proj = self._int8(tokens, f.o_proj, value_bytes + BF16_BYTES * c.hidden_size, WHOLE_DIE)
        gather = self._collective(tokens * latent_bytes * (ep - 1), self._ub_port_bytes_per_s)
        exchange = self._collective(tokens * value_bytes * (ep - 1) / ep, self._ub_write_bytes_per_s)
        return {
            "down_proj": down_proj,
            "latent_gather": gather,
            "up_proj": up_proj,
            "attention": attention,
            "head_exchange": exchange,
            "o_proj": o_proj,
            "norms": self._norms(tokens),
        }

    def gate(self, tokens: float, share: Share) -> float:
        """Router matrix and choice of experts."""
        num_bytes = self._params.gate_per_layer * BF16_BYTES + tokens * BF16_BYTES * self._config.hidden_size
        seconds = max(
            tokens * self._flops.gate / (self._bf16_gemm_flops_per_s * share.aic), num_bytes / self._hbm_bytes_per_s
        )
        return seconds + self._rates.cube_launch_s + self._rates.vector_launch_s

    def experts(self, mean_tokens: float, max_tokens: float, share: Share) -> float:
        """Expert MLPs of the hottest die, when every rank routes `mean_tokens` on average."""
        c, d = self._config, self._deployment
        slots = d.router_slots_per_die
        copies = mean_tokens * c.num_experts_per_tok * d.ep / d.num_router_slots * slots * d.imbalance
        if d.num_shared_slots:
            shared_copies = mean_tokens * d.ep / d.num_shared_slots * c.n_shared_experts
            copies, num_experts = (
                max(copies, shared_copies),
                min(max(slots, c.n_shared_experts), copies + shared_copies),
            )
        else:
            num_experts = min(slots, copies) + c.n_shared_experts
            copies += max_tokens * c.n_shared_experts
        copy_bytes = 3 * c.hidden_size + 5 * c.moe_intermediate_size  # INT8 in, BF16 between and out
        num_bytes = num_experts * self._params.routed_expert * INT8_BYTES + copies * copy_bytes
        seconds = max(
            copies * self._flops.expert / (self._int8_flops_per_s * share.aic), num_bytes / self._hbm_bytes_per_s
        )
        return seconds + 2 * self._rates.cube_launch_s + self._rates.vector_launch_s

    def dispatch(self, tokens: float, share: Share) -> float:
        """FusedDispatch of `tokens` per rank: table 7's latency with its wire time scaled to these tokens."""
        return self._fused(tokens, work.dispatch_message_bytes(self._config), self._dispatch_fixed_s, share)

    def combine(self, tokens: float, share: Share) -> float:
        """FusedCombine, the same way."""
        return self._fused(tokens, work.combine_message_bytes(self._config), self._combine_fixed_s, share)

    def bulk_dispatch(self, tokens: float) -> float:
        """All-to-all of prefill over SDMA; the hottest die receives `imbalance` times the mean."""
        return self._bulk(tokens, work.dispatch_message_bytes(self._config), BULK_DISPATCH_GB_PER_S)

    def bulk_combine(self, tokens: float) -> float:
        return self._bulk(tokens, work.combine_message_bytes(self._config), BULK_COMBINE_GB_PER_S)

    def dispatch_compute(self, tokens: float) -> float:
        """DispatchCompute of prefill on vector cores: quantize and permute to be sent, permute what was received."""
        message = work.dispatch_message_bytes(self._config)
        return self._vector(self._num_copies(tokens) * (BF16_BYTES * self._config.hidden_size + 3 * message))

    def combine_compute(self, tokens: float) -> float:
        """CombineCompute of prefill on vector cores: permute to be sent back, weight and add what came back."""
        return self._vector(self._num_copies(tokens) * 4 * work.combine_message_bytes(self._config))

    def dense_mlp(self, tokens: float) -> float:
        c = self._config
        num_bytes = self._params.dense_mlp_per_layer * INT8_BYTES + tokens * 3 * c.hidden_size
        seconds = max(tokens * self._flops.dense_mlp / self._int8_flops_per_s, num_bytes / self._hbm_bytes_per_s)
        return seconds + 2 * self._rates.cube_launch_s + self._rates.vector_launch_s

    def mtp_projection(self, tokens: float) -> float:
        """eh_proj of the MTP module."""
        num_bytes = self._flops.mtp_projection / 2 * INT8_BYTES + tokens * BF16_BYTES * 3 * self._config.hidden_size
        seconds = max(tokens * self._flops.mtp_projection / self._int8_flops_per_s, num_bytes / self._hbm_bytes_per_s)
        return seconds + self._rates.cube_launch_s

    def lm_head(self, samples: float, *, split: int) -> float:
        """Logits of `samples` rows, BF16, the vocabulary split over `split` dies. Nothing to do, no time."""
        if not samples:
            return 0.0
        c = self._config
        num_bytes = (c.vocab_size * c.hidden_size * BF16_BYTES + samples * c.vocab_size * FP32_BYTES) / split
        flops_s = samples * self._flops.lm_head / split / self._bf16_gemm_flops_per_s
        return max(flops_s, num_bytes / self._hbm_bytes_per_s) + self._rates.cube_launch_s

    def sampling(self, samples: float) -> float:
        """Fused sampling on the NPU: softmax, filter, draw, each one pass over the logits."""
        return self._vector(3 * samples * self._config.vocab_size * FP32_BYTES) if samples else 0.0

    def _roofline(self, flops: Amount, flops_per_s: float, num_bytes: Amount, launch_s: float) -> Amount:
        compute_s, memory_s = flops / flops_per_s, num_bytes / self._hbm_bytes_per_s
        if isinstance(compute_s, float):
            return max(compute_s, memory_s) + launch_s
        seconds: Amount = np.maximum(compute_s, memory_s) + launch_s
        return seconds

    def _int8(
        self, tokens: Amount, flops_per_token: float, bytes_per_token: float, share: Share, *, weight_split: int = 1
    ) -> Amount:
        """A product with INT8 weights; their number is half the FLOPs per token."""
        weight_bytes = flops_per_token / 2 * INT8_BYTES / weight_split
        return self._roofline(
            tokens * flops_per_token,
            self._int8_flops_per_s * share.aic,
            tokens * bytes_per_token + weight_bytes,
            self._rates.cube_launch_s,
        )

    def _norms(self, tokens: Amount) -> Amount:
        """Three small vector operators of the attention half: norm and quantize, rotate and store KV, quantize."""
        num_bytes = 3 * 2 * BF16_BYTES * self._config.hidden_size * tokens
        return num_bytes / self._hbm_bytes_per_s + 3 * self._rates.vector_launch_s

    def _vector(self, num_bytes: float) -> float:
        return num_bytes / self._hbm_bytes_per_s + self._rates.vector_launch_s

    def _collective(self, num_bytes: Amount, bytes_per_s: float) -> Amount:
        if self._deployment.ep == 1:
            return num_bytes * 0.0
        return num_bytes / bytes_per_s + self._ub_latency_s + self._rates.vector_launch_s

    def _num_copies(self, tokens: float) -> float:
        """Token copies that `tokens` send: one for each chosen expert, and one to a dispatched shared expert."""
        shared = self._config.n_shared_experts if self._deployment.num_shared_slots else 0
        return tokens * (self._config.num_experts_per_tok + shared)

    def _fixed_s(self, table_us: tuple[float, ...], table_bytes: int) -> float:
        """What of table 7's latency does not depend on the bytes, at this EP degree."""
        latency_s = float(np.interp(math.log2(self._deployment.ep), np.log2(TABLE_7_EP), table_us)) * 1e-6
        return latency_s - TABLE_7_TOKENS * TABLE_7_TOPK * table_bytes / TABLE_7_WRITE_BYTES_PER_S

    def _fused(self, tokens: float, message_bytes: int, fixed_s: float, share: Share) -> float:
        if self._deployment.ep == 1:
            return 0.0
        drive = min(1.0, 0.95 * self._num_aiv * share.aiv / self._rates.aivs_for_95_percent)
        return fixed_s + self._num_copies(tokens) * message_bytes / (self._ub_write_bytes_per_s * drive)

    def _bulk(self, tokens: float, message_bytes: int, table_gb_per_s: tuple[float, ...]) -> float:
        ep = self._deployment.ep
        if ep == 1:
            return 0.0
        published = float(np.interp(math.log2(ep), np.log2(BULK_EP), table_gb_per_s)) * 1e9
        bytes_per_s = published * self._ub_write_bytes_per_s / TABLE_7_WRITE_BYTES_PER_S
        num_bytes = self._num_copies(tokens) * message_bytes * self._deployment.imbalance
        return num_bytes / bytes_per_s + self._ub_latency_s
