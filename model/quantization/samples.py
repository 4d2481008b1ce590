"""Token sequences to calibrate on and to measure with.

Owns: where they come from: the problems that the mini R1 is made for, a text file, or the model itself.
Must not know: INT8, how they are used.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
from torch import Tensor

from model.collectives import run_lockstep
from model.config import ModelConfig
from model.latent_cache import LatentCache
from model.layout import make_layouts
from model.step import SamplingBatch, StepInput
from model.tasks.generator import generate
from model.tensor_files import TensorDict
from model.tokenizer import Tokenizer
from model.training.samples import encode_sample
from model.transformer import Transformer
from model.weights import read_rank_weights

_BLOCK_SIZE = 16
_PROMPT_LEN = 8
_HELD_OUT_SHARE = 4  # every fourth sequence measures what the others calibrate

Sequences = list[list[int]]


class SamplesError(ValueError):
    """A text file that gives no sequences. The message names it."""


@dataclass(frozen=True, slots=True)
class Samples:
    """Two sets of sequences."""

    calibration: Sequences
    held_out: Sequences

    @classmethod
    def split(cls, sequences: Sequence[list[int]]) -> "Samples":
        """Every fourth sequence is held out."""
        return cls(
            [tokens for index, tokens in enumerate(sequences) if index % _HELD_OUT_SHARE],
            list(sequences[::_HELD_OUT_SHARE]),
        )


def problems(tokenizer: Tokenizer, *, num: int, length: int, seed: int) -> Samples:
    """`num` conversations of model/tasks, at most `length` tokens each, and half as many of its held-out problems."""
    rng = Random(f"{seed}/calibration")
    used = [encode_sample(tokenizer, generate(rng, "train")).token_ids[:length] for _ in range(num)]
    held_out = [encode_sample(tokenizer, generate(rng, "test")).token_ids[:length] for _ in range(-(-num // 2))]
    return Samples(used, held_out)


def lines_of(path: Path, tokenizer: Tokenizer, *, num: int, length: int) -> Samples:
    """The first `num` lines of a text that are not blank, control tokens and all. Raises SamplesError."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise SamplesError(f"{path}: {error.strerror}") from None
    except ValueError:
        raise SamplesError(f"{path}: not UTF-8 text") from None
    if len(lines) < 2:
        raise SamplesError(f"{path}: {len(lines)} lines of text, at least 2 are needed")
    return Samples.split([tokenizer.encode(line, add_bos=True, parse_control=True)[:length] for line in lines[:num]])


def self_generated(
    config: ModelConfig, tensors: dict[str, Tensor], *, num: int, length: int, seed: int
) -> list[list[int]]:
    """`num` sequences of `length` tokens that the model writes, at temperature 1, after 8 random tokens each."""
    generator = np.random.default_rng(seed)
    prompts = generator.integers(0, config.vocab_size, (num, min(_PROMPT_LEN, length)))
    (layout,) = make_layouts(config, world_size=1, max_num_tokens=prompts.size)
    blocks = -(-length // _BLOCK_SIZE)
    cache = LatentCache(config, num * blocks, _BLOCK_SIZE)
    model = Transformer(config, layout, read_rank_weights(TensorDict(tensors), config, layout), cache)
    tables = np.arange(num * blocks, dtype=np.int32).reshape(num, blocks)
    tokens, num_computed = prompts, 0
    while tokens.shape[1] < length:
        size = tokens.shape[1]
        count = size - num_computed
        step = StepInput(
            token_ids=tokens[:, num_computed:].reshape(-1),
            positions=np.tile(np.arange(num_computed, size), num),
            query_start=np.arange(num + 1) * count,
            seq_lens=np.full(num, size),
            block_tables=tables,
            sample_rows=np.arange(1, num + 1) * count - 1,
            sampling=SamplingBatch(
                temperature=np.ones(num, np.float32),
                top_p=np.ones(num, np.float32),
                top_k=np.zeros(num, np.int32),
                seed=np.arange(num).astype(np.uint64) + np.uint64(seed),
                position=np.full(num, size),
                suppress_eos=np.ones(num, np.bool_),
                want_logprobs=np.zeros(num, np.bool_),
                num_logprobs=np.zeros(num, np.int32),
            ),
        )
        num_computed = size
        (output,) = run_lockstep([model.forward(step)])
        tokens = np.concatenate([tokens, output.token_ids[:, None]], axis=1)
    return [[int(token) for token in row] for row in tokens]
