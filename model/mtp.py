"""Multi-token prediction: one module that guesses the token after next from the main model's hidden state.

Owns: the module's mathematics on one rank.
Must not know: drafting, verification, acceptance.
Source: DeepSeek-V3 (arXiv 2412.19437) section 2.2; vLLM's and transformers' readings of the checkpoint: the
embedding comes first in eh_proj's input, and the hidden state is the main model's after its final norm.

    position p:   hidden state of p  ---- hnorm ---\\
                                                     eh_proj -> block -> head norm -> lm_head -> token at p + 2
    token at p + 1:     embedding    ---- enorm ---/
"""

# Shapes: T tokens of the step, H hidden_size

from collections.abc import Generator

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention_batch import AttentionPlanner
from model.collectives import Collective, Reply
from model.config import ModelConfig
from model.latent_cache import LatentCache
from model.layers import rms_norm
from model.layout import RankLayout
from model.matrix import linear
from model.parameters import RankWeights
from model.step import StepInput
from model.transformer import Block


class MtpModule:
    """MTP module number `index` on one rank. Its latents go to layer num_hidden_layers + index of the cache."""

    def __init__(
        self, config: ModelConfig, layout: RankLayout, weights: RankWeights, cache: LatentCache, *, index: int = 0
    ) -> None:
        layer = config.num_hidden_layers + index
        assert layout.attention == "data_parallel", "an MTP module drafts during decode"
        assert index < len(weights.mtp), "weights were loaded without this MTP module"
        assert layer < cache.num_layers, "the cache was made without MTP layers"
        self._eps = config.rms_norm_eps
        self._weights = weights
        self._own = weights.mtp[index]
        self._cache = cache
        self._planner = AttentionPlanner(config, num_heads=config.num_attention_heads, block_size=cache.block_size)
        self._block = Block(config, layout, self._own.block, layer=layer)

    def forward(self, step: StepInput, hidden: Tensor) -> Generator[Collective, Reply, Tensor]:
        """Head-normed hidden states (T, H), for `logits` and for the next module.

        step.token_ids holds the tokens one position ahead (p + 1) beside positions p; `hidden` (T, H) is what
        Transformer.hidden_states gave for the same rows.
        """
        own = self._own
        if own.h_proj is not None:
            hidden = F.linear(hidden, own.h_proj)
        embedded = F.embedding(torch.from_numpy(step.token_ids), self._weights.embedding)
        inputs = [rms_norm(embedded, own.enorm, self._eps), rms_norm(hidden, own.hnorm, self._eps)]
        mixed = linear(torch.cat(inputs, dim=-1), own.eh_proj)
        output, _ = yield from self._block.forward(mixed, self._planner.plan(step), self._cache)
        return rms_norm(output, own.head_norm, self._eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """(T, vocab) of what `forward` returned."""
        return F.linear(hidden, self._weights.lm_head if self._own.head is None else self._own.head)
