"""Mixture of experts: the gate, this rank's experts, and one layer's forward with its two exchanges.

Owns: which experts a token chooses and with what weight, and the experts' products.
Must not know: where physical experts are (dispatch and the layout know), attention.
Source: DeepSeek-V3 (arXiv 2412.19437) section 2.1.2 and its modeling code: sigmoid scores, a bias that only
chooses, choice limited to the best groups.
"""

# Shapes: t tokens of this rank, H hidden_size, E logical experts, K experts per token, G groups,
#         M received token copies, P experts of this rank, I moe_intermediate_size

from collections.abc import Generator

import torch
import torch.nn.functional as F
from torch import Tensor

from model.collectives import Collective, Reply
from model.config import ModelConfig
from model.dispatch import ExpertExchange
from model.layers import swiglu
from model.layout import RankLayout
from model.matrix import QuantizedRows, Rows, grouped_product, linear
from model.parameters import MlpWeights, MoeWeights


def mlp(x: Tensor, weights: MlpWeights) -> Tensor:
    """SwiGLU feed-forward: (t, H) to (t, H)."""
    return linear(swiglu(linear(x, weights.gate_up)), weights.down)


def choose_experts(x: Tensor, weights: MoeWeights, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Logical experts (t, K) of each token and their weights (t, K), best score first. Computed in float32.

    1. score = sigmoid(x . gate); choice = score + e_score_correction_bias
    2. a group's score is the sum of its two best choices; keep the topk_group best groups
    3. the K best choices of those groups; weights are their scores without the bias
    4. weights are divided by their sum if norm_topk_prob, then multiplied by routed_scaling_factor
    """
    c = config
    scores = torch.sigmoid(F.linear(x.to(torch.float32), weights.gate))
    choice = scores + weights.gate_bias
    if c.topk_group < c.n_group:
        grouped = choice.view(-1, c.n_group, c.experts_per_group)
        group_scores = grouped.topk(2, dim=-1).values.sum(dim=-1)
        kept = group_scores.topk(c.topk_group, dim=-1).indices
        is_dropped = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, kept, value=False)
        choice = grouped.masked_fill(is_dropped.unsqueeze(-1), -torch.inf).view_as(choice)
    experts = choice.topk(c.num_experts_per_tok, dim=-1).indices
    chosen = scores.gather(1, experts)
    if c.norm_topk_prob:
        chosen = chosen / (chosen.sum(dim=-1, keepdim=True) + 1e-20)
    return experts, chosen * c.routed_scaling_factor


class Experts:
    """The physical experts of one layer on one rank."""

    def __init__(self, weights: MoeWeights) -> None:
        self._gate_up = grouped_product(weights.experts_gate_up)
        self._down = grouped_product(weights.experts_down)
        self._num_experts = len(weights.experts_down)

    def forward(self, x: Rows, slots: Tensor) -> Tensor:
        """Outputs (M, H) of token copies x (M, H), copy m through this rank's expert slots[m] in [0, P)."""
        if not len(x):
            return x.dequantized() if isinstance(x, QuantizedRows) else x
        order = torch.argsort(slots, stable=True)
        counts = torch.bincount(slots, minlength=self._num_experts).tolist()
        ordered = x.index_select(order) if isinstance(x, QuantizedRows) else x.index_select(0, order)
        outputs = self._down(swiglu(self._gate_up(ordered, counts)), counts)
        return torch.empty_like(outputs).index_copy_(0, order, outputs)


class MixtureOfExperts:
    """The mixture of one layer on one rank."""

    def __init__(self, config: ModelConfig, layout: RankLayout, weights: MoeWeights, *, moe_layer: int) -> None:
        self._config = config
        self._weights = weights
        self._experts = Experts(weights)
        self._exchange = ExpertExchange(config, layout, layout.physical_to_logical[moe_layer])

    def forward(self, x: Tensor) -> Generator[Collective, Reply, tuple[Tensor, Tensor]]:
        """Output (t, H) of normed tokens x (t, H), and the logical experts (t, K) that they chose."""
        experts, expert_weights = choose_experts(x, self._weights, self._config)
        received = yield from self._exchange.dispatch(x, experts)
        outputs = self._experts.forward(received.rows, received.slots)
        result = yield from self._exchange.combine(outputs, received, expert_weights)
        if self._weights.shared is not None:
            result = result + mlp(x, self._weights.shared)
        return result, experts
