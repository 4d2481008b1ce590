"""One rank of the live model: its slice of the weights, its latent cache, its forward.

Owns: the tensors of one die. With the gloo exchange the only module of `serving` that needs torch.
Must not know: other ranks but through the collectives that its forward yields; requests; processes.
"""

from collections.abc import Generator

import numpy as np
import torch
from numpy.typing import NDArray

from model.collectives import Collective, Reply
from model.latent_cache import LatentCache
from model.mtp import MtpModule
from model.speculation import SpeculativeTransformer
from model.step import StepInput, StepOutput
from model.transformer import Transformer
from model.weights import load_rank_weights
from serving.batched_ranks import shifted
from serving.worker import RankPlan


class ModelRank:
    """A `Transformer`, if need be with its MTP module, with its weights loaded and its cache allocated."""

    def __init__(self, plan: RankPlan) -> None:
        # One thread per rank: ranks are many and the cores few, and OpenMP teams that share a core stall each other.
        torch.set_num_threads(1)
        with_mtp = plan.with_mtp
        weights = load_rank_weights(plan.checkpoint, plan.config, plan.layout, with_mtp=with_mtp)
        self._cache = LatentCache(
            plan.config, num_blocks=plan.num_blocks, block_size=plan.block_size, with_mtp=with_mtp
        )
        transformer = Transformer(plan.config, plan.layout, weights, self._cache)
        self._model: Transformer | SpeculativeTransformer = transformer
        if with_mtp:
            module = MtpModule(plan.config, plan.layout, weights, self._cache)
            self._model = SpeculativeTransformer(plan.config, plan.layout, transformer, module)

    def step(self, step: StepInput) -> Generator[Collective, Reply, StepOutput]:
        """One forward, as the generator that the collectives' driver advances."""
        return self._model.forward(step)

    def member(self, index: int, *, num_blocks: int) -> "MemberRank":
        """Member `index` of the ranks that this one merges, with `num_blocks` blocks each; 0: they share all."""
        return MemberRank(self, index, num_blocks)

    def read_blocks(self, block_ids: NDArray[np.int32]) -> NDArray[np.float32]:
        """Latent KV of blocks, (num_layers, num_blocks, block_size, kv_lora_rank + qk_rope_head_dim)."""
        return self._cache.read_blocks(block_ids.tolist())

    def write_blocks(self, block_ids: NDArray[np.int32], latents: NDArray[np.float32]) -> None:
        """Overwrite blocks with latent KV of the shape that `read_blocks` gives."""
        self._cache.write_blocks(block_ids.tolist(), latents)


class MemberRank:
    """One of the ranks that a merged rank stands for: its blocks. Its steps are the merged rank's."""

    def __init__(self, merged: ModelRank, index: int, num_blocks: int) -> None:
        self._merged = merged
        self._index = index
        self._num_blocks = num_blocks

    def step(self, step: StepInput) -> Generator[Collective, Reply, StepOutput]:
        """Not called: the worker steps the merged rank."""
        raise AssertionError("a merged rank's members make no steps of their own")

    def read_blocks(self, block_ids: NDArray[np.int32]) -> NDArray[np.float32]:
        """As ModelRank, of this member's blocks."""
        return self._merged.read_blocks(shifted(block_ids, rank=self._index, num_blocks=self._num_blocks))

    def write_blocks(self, block_ids: NDArray[np.int32], latents: NDArray[np.float32]) -> None:
        """As ModelRank, of this member's blocks."""
        self._merged.write_blocks(shifted(block_ids, rank=self._index, num_blocks=self._num_blocks), latents)
