"""Paged cache of MLA's latents: c_kv and k_pe of every token, for all layers of one rank.

Owns: the memory and its addressing (block, offset) -> slot.
Must not know: which request owns a block, prefixes, transfers. Blocks come and go as numpy arrays.
Source: DeepSeek-V2 (arXiv 2405.04434) for what is stored; vLLM for paging.
"""

# Shapes: L layers, B blocks, S slots per block, D = kv_lora_rank + qk_rope_head_dim, n blocks of one transfer

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.config import ModelConfig


class LatentCache:
    """Latents of one rank. Starts as zeros, so a slot that was never written still holds a finite number."""

    def __init__(self, config: ModelConfig, num_blocks: int, block_size: int, *, with_mtp: bool = False) -> None:
        """`with_mtp` adds one layer per MTP module behind the main model's."""
        num_layers = config.num_hidden_layers + (config.num_nextn_predict_layers if with_mtp else 0)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._data = torch.zeros(num_layers, num_blocks, block_size, config.latent_dim)
        self._layers = [layer.view(-1, config.latent_dim) for layer in self._data]

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    @property
    def block_shape(self) -> tuple[int, int, int]:
        """(L, S, D) of one block over all layers."""
        return (self._data.shape[0], self._data.shape[2], self._data.shape[3])

    @property
    def num_bytes(self) -> int:
        return self._data.numel() * self._data.element_size()

    def layer(self, index: int) -> Tensor:
        """(B S, D) slots of one layer; writing to it writes to the cache."""
        layer: Tensor = self._layers[index]
        return layer

    def read_blocks(self, block_ids: Sequence[int]) -> NDArray[np.float32]:
        """A copy of whole blocks over all layers: (L, n, S, D)."""
        blocks: NDArray[np.float32] = self._data[:, self._index(block_ids)].numpy()
        return blocks

    def write_blocks(self, block_ids: Sequence[int], blocks: NDArray[np.float32]) -> None:
        """Overwrite whole blocks with what read_blocks gave, here or on another rank: (L, n, S, D)."""
        layers, slots, width = self.block_shape
        assert blocks.shape == (layers, len(block_ids), slots, width), f"blocks of shape {blocks.shape}"
        # A copy: arrays from shared memory are often read-only, which torch does not take.
        self._data[:, self._index(block_ids)] = torch.from_numpy(np.array(blocks, np.float32))

    def _index(self, block_ids: Sequence[int]) -> Tensor:
        index = torch.as_tensor(list(block_ids), dtype=torch.long)
        assert all(0 <= block_id < self.num_blocks for block_id in block_ids), f"no such block: {block_ids}"
        return index
