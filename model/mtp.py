"""Multi-token prediction: one module that guesses the token after next from the main model's hidden state.

Owns: the module's mathematics on one rank.
Must not know: drafting, verification, acceptance (model/speculation.py).
Source: DeepSeek-V3 (arXiv 2412.19437) section 2.2; vLLM's and transformers' readings of the checkpoint: the
embedding comes first in eh_proj's input, and the hidden state is the main model's after its final norm.

    token at position q:     embedding    ---- enorm ---\\
                                                         eh_proj -> block -> head norm -> lm_head -> token at q + 1
    hidden state of q - 1 (zeros for q = 0) -- hnorm ---/

Row q turns by position q and writes its latent to slot q of the module's layer, so slot q depends on the tokens
up to q and on nothing later, as the main model's slots do. One exception: the first row behind a cache hit, whose
hidden state is not known, takes zeros; then the latents of this layer, and only of this one, depend on what was cached.
Drafts may differ by it, tokens may not.
"""

# Shapes: T tokens of the step, t tokens of this rank (T with data_parallel attention), H hidden_size

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
        assert index < len(weights.mtp), "weights were loaded without this MTP module"
        assert layer < cache.num_layers, "the cache was made without MTP layers"
        self._eps = config.rms_norm_eps
        self._layout = layout
        self._weights = weights
        self._own = weights.mtp[index]
        self._cache = cache
        heads = layout.local_heads(config)
        self._planner = AttentionPlanner(config, num_heads=heads.stop - heads.start, block_size=cache.block_size)
        self._block = Block(config, layout, self._own.block, layer=layer)

    def forward(self, step: StepInput, previous: Tensor) -> Generator[Collective, Reply, Tensor]:
        """Head-normed hidden states (t, H) of this rank's rows, for `logits` and for the next module.

        `previous` (t, H): for each of this rank's rows the main model's final-normed hidden state of the position
        before it; zeros where that is unknown.
        """
        own, num_tokens = self._own, step.num_tokens
        limit = self._layout.max_num_tokens
        assert num_tokens <= limit, f"an MTP step of {num_tokens} tokens exceeds max_num_tokens {limit}"
        if own.h_proj is not None:
            previous = F.linear(previous, own.h_proj)
        token_ids = torch.from_numpy(step.token_ids[self._layout.own_rows(num_tokens)])
        embedded = F.embedding(token_ids, self._weights.embedding)
        inputs = [rms_norm(embedded, own.enorm, self._eps), rms_norm(previous, own.hnorm, self._eps)]
        mixed = linear(torch.cat(inputs, dim=-1), own.eh_proj)
        output, _ = yield from self._block.forward(mixed, self._planner.plan(step), self._cache)
        return rms_norm(output, own.head_norm, self._eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """(T, vocab) of what `forward` returned."""
        return F.linear(hidden, self._weights.lm_head if self._own.head is None else self._own.head)
