"""One rank's share of the model: a step in, sampled tokens out, communication asked for on the way.

Owns: the order of the layers, and which of the step's rows are this rank's.
Must not know: processes, other ranks' state, requests, time.
Source: DeepSeek-V3 (arXiv 2412.19437); data-parallel and SP-TP-SP division of arXiv 2506.12708 sections 4.2
and 4.3.1.
"""

# Shapes: T tokens of the step, t tokens of this rank (T with data_parallel attention), H hidden_size,
#         K experts per token, E logical experts, S sample rows, s those of this rank

from collections.abc import Generator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention_batch import AttentionBatch, AttentionPlanner
from model.collectives import Collective, Reply
from model.config import ModelConfig
from model.latent_cache import LatentCache
from model.layers import rms_norm
from model.layout import RankLayout
from model.mla import AttentionForm, LatentAttention
from model.moe import MixtureOfExperts, mlp
from model.parameters import BlockWeights, MlpWeights, RankWeights
from model.sampling import sample
from model.step import StepInput, StepOutput


class Block:
    """One decoder block on one rank: attention, then a dense MLP or a mixture of experts."""

    def __init__(
        self,
        config: ModelConfig,
        layout: RankLayout,
        weights: BlockWeights,
        *,
        layer: int,
        form: AttentionForm | None = None,
    ) -> None:
        """`layer` counts over the whole model; MTP modules come after the last layer and use its placement."""
        self._eps = config.rms_norm_eps
        self._weights = weights
        self._layer = layer
        self._attention = LatentAttention(config, layout, weights.attention, form=form)
        self._moe: MixtureOfExperts | None = None
        if not isinstance(weights.mlp, MlpWeights):
            moe_layer = min(layer - config.first_k_dense_replace, config.num_moe_layers - 1)
            self._moe = MixtureOfExperts(config, layout, weights.mlp, moe_layer=moe_layer)

    def forward(
        self, hidden: Tensor, batch: AttentionBatch, cache: LatentCache
    ) -> Generator[Collective, Reply, tuple[Tensor, Tensor | None]]:
        """Hidden state (t, H) after the block, and the experts (t, K) chosen in it (None in a dense block)."""
        w = self._weights
        normed = rms_norm(hidden, w.input_norm, self._eps)
        hidden = hidden + (yield from self._attention.forward(normed, batch, cache.layer(self._layer)))
        normed = rms_norm(hidden, w.post_attention_norm, self._eps)
        if self._moe is None:
            assert isinstance(w.mlp, MlpWeights)
            return hidden + mlp(normed, w.mlp), None
        output, experts = yield from self._moe.forward(normed)
        return hidden + output, experts


class Transformer:
    """The main model on one rank."""

    def __init__(
        self,
        config: ModelConfig,
        layout: RankLayout,
        weights: RankWeights,
        cache: LatentCache,
        *,
        form: AttentionForm | None = None,
    ) -> None:
        """`form` overrides the layout's choice of naive or absorbed attention, for comparisons."""
        layout.check(config)
        self._config = config
        self._layout = layout
        self._weights = weights
        self._cache = cache
        heads = layout.local_heads(config)
        self._planner = AttentionPlanner(config, num_heads=heads.stop - heads.start, block_size=cache.block_size)
        self._blocks = [
            Block(config, layout, block, layer=layer, form=form) for layer, block in enumerate(weights.blocks)
        ]

    @property
    def cache(self) -> LatentCache:
        return self._cache

    def forward(self, step: StepInput) -> Generator[Collective, Reply, StepOutput]:
        """Run one step: latents of its tokens are cached, and the next token of this rank's sample rows is
        chosen.

        data_parallel: `step` holds this rank's own requests. sequence_tensor: every rank is given the same
        step, and answers for the sample rows in its slice of the tokens.
        """
        hidden, experts = yield from self.hidden_states(step)
        return self.sampled(step, hidden, experts)

    def sampled(self, step: StepInput, hidden: Tensor, experts: list[Tensor]) -> StepOutput:
        """The tokens after this rank's sample rows, from what `hidden_states` gave."""
        first = self._layout.own_rows(step.num_tokens).start
        is_own = (step.sample_rows >= first) & (step.sample_rows < first + len(hidden))
        sample_ids = np.flatnonzero(is_own)
        logits = self.logits(hidden[torch.from_numpy(step.sample_rows[sample_ids] - first).long()])
        token_ids, logprobs = sample(
            logits.numpy(), step.sampling.take(sample_ids), eos_token_id=self._config.eos_token_id
        )
        return StepOutput(
            sample_ids=sample_ids.astype(np.int32),
            token_ids=token_ids,
            logprobs=logprobs,
            expert_counts=self._expert_counts(experts),
        )

    def hidden_states(self, step: StepInput) -> Generator[Collective, Reply, tuple[Tensor, list[Tensor]]]:
        """Final-normed hidden states (t, H) of this rank's rows, and per mixture layer the experts (t, K)
        they chose."""
        num_tokens, limit = step.num_tokens, self._layout.max_num_tokens
        assert num_tokens <= limit, f"a step of {num_tokens} tokens exceeds max_num_tokens {limit}"
        batch = self._planner.plan(step)
        token_ids = torch.from_numpy(step.token_ids[self._layout.own_rows(num_tokens)])
        hidden = F.embedding(token_ids, self._weights.embedding)
        chosen: list[Tensor] = []
        for block in self._blocks:
            hidden, experts = yield from block.forward(hidden, batch, self._cache)
            if experts is not None:
                chosen.append(experts)
        return rms_norm(hidden, self._weights.final_norm, self._config.rms_norm_eps), chosen

    def logits(self, hidden: Tensor) -> Tensor:
        """(s, vocab) of final-normed hidden states (s, H)."""
        return F.linear(hidden, self._weights.lm_head)

    def _expert_counts(self, chosen: list[Tensor]) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
        num_layers, num_experts = self._config.num_moe_layers, self._config.n_routed_experts
        if not chosen:
            return np.zeros((num_layers, num_experts), np.int64)
        ids = torch.stack(chosen).flatten(1) + torch.arange(num_layers).unsqueeze(1) * num_experts
        counts = torch.bincount(ids.view(-1), minlength=num_layers * num_experts)
        return counts.view(num_layers, num_experts).numpy()
