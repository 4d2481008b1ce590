"""Checkpoints whose MTP module guesses as well as a test wants it to; a random one's guesses are all wrong."""

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from model.checkpoint import write_random_checkpoint
from model.config import ModelConfig


def write_drafted_checkpoint(directory: Path, config: ModelConfig, *, seed: int = 0, context_gain: float = 0.0) -> None:
    """Random weights, but the module copies the embedding through, and blocks add `context_gain` of what they did.

    With a gain of 0 the main model's next token depends on the current one alone, the module computes the very same
    logits, and every draft is right. With a small gain some are wrong.
    """
    write_random_checkpoint(directory, config, seed)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    mtp = f"model.layers.{config.num_hidden_layers}."
    identity = np.eye(config.hidden_size, dtype=np.float32)
    tensors[f"{mtp}eh_proj.weight"] = np.concatenate([identity, 0 * identity], axis=1)
    tensors[f"{mtp}enorm.weight"] = np.ones(config.hidden_size, np.float32)
    tensors[f"{mtp}shared_head.norm.weight"] = tensors["model.norm.weight"].copy()
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name] = tensor * np.float32(0.0 if name.startswith(mtp) else context_gain)
    save_file(tensors, file, metadata={"format": "pt"})
