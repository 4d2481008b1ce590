"""Plain generation with one rank in one process: the answer that every other arrangement must reproduce.

Owns: the simplest loop over Transformer: prefill in one step, then one token per step.
Must not know: schedulers, several ranks, blocks' reuse.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from model.collectives import run_lockstep
from model.config import ModelConfig
from model.latent_cache import LatentCache
from model.layout import make_layouts
from model.step import SamplingBatch, StepInput, TokenLogprobs
from model.transformer import Transformer
from model.weights import load_rank_weights

_BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to sample one request. The defaults are greedy."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    min_tokens: int = 0  # EOS is suppressed before this many tokens
    num_logprobs: int | None = None  # None = no log-probabilities
    stop_at_eos: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """Tokens of one request, EOS included if it stopped there."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]


class ReferenceModel:
    """A checkpoint loaded once, for several generations."""

    def __init__(self, config: ModelConfig, weights_dir: str | Path) -> None:
        self._config = config
        self._layout = make_layouts(config, world_size=1, max_num_tokens=config.max_position_embeddings)[0]
        self._weights = load_rank_weights(weights_dir, config, self._layout)

    def generate(self, prompt: Sequence[int], num_tokens: int, sampling: Sampling | None = None) -> Generation:
        """The next `num_tokens` tokens after `prompt`, fewer if EOS may stop it."""
        sampling = sampling or Sampling()
        total = len(prompt) + num_tokens
        num_blocks = -(-total // _BLOCK_SIZE)
        cache = LatentCache(self._config, num_blocks, _BLOCK_SIZE)
        model = Transformer(self._config, self._layout, self._weights, cache)
        tokens = list(prompt)
        logprobs: list[TokenLogprobs | None] = []
        num_computed_tokens = 0
        while len(tokens) < total:
            step = _step(tokens, num_computed_tokens, num_blocks, len(tokens) - len(prompt), sampling)
            num_computed_tokens = len(tokens)
            (output,) = run_lockstep([model.forward(step)])
            tokens.append(int(output.token_ids[0]))
            logprobs.append(output.logprobs[0])
            if sampling.stop_at_eos and tokens[-1] == self._config.eos_token_id:
                break
        return Generation(token_ids=tokens[len(prompt) :], logprobs=logprobs)

    def expert_counts(self, token_ids: Sequence[int]) -> NDArray[np.int64]:
        """How many of these tokens chose each expert, (num_moe_layers, n_routed_experts), in one prefill step."""
        num_blocks = -(-len(token_ids) // _BLOCK_SIZE)
        cache = LatentCache(self._config, num_blocks, _BLOCK_SIZE)
        model = Transformer(self._config, self._layout, self._weights, cache)
        (output,) = run_lockstep([model.forward(_step(list(token_ids), 0, num_blocks, 0, Sampling()))])
        return output.expert_counts


def generate(
    config: ModelConfig,
    weights_dir: str | Path,
    prompt: Sequence[int],
    num_tokens: int,
    sampling: Sampling | None = None,
) -> Generation:
    """Load the checkpoint and generate once. See ReferenceModel.generate."""
    return ReferenceModel(config, weights_dir).generate(prompt, num_tokens, sampling)


def _step(
    tokens: list[int], num_computed_tokens: int, num_blocks: int, num_sampled: int, sampling: Sampling
) -> StepInput:
    new_tokens = tokens[num_computed_tokens:]
    return StepInput(
        token_ids=np.array(new_tokens, np.int64),
        positions=np.arange(num_computed_tokens, len(tokens), dtype=np.int64),
        query_start=np.array([0, len(new_tokens)], np.int32),
        seq_lens=np.array([len(tokens)], np.int32),
        block_tables=np.arange(num_blocks, dtype=np.int32)[None],
        sample_rows=np.array([len(new_tokens) - 1], np.int32),
        sampling=SamplingBatch(
            temperature=np.array([sampling.temperature], np.float32),
            top_p=np.array([sampling.top_p], np.float32),
            top_k=np.array([sampling.top_k], np.int32),
            seed=np.array([sampling.seed], np.uint64),
            position=np.array([len(tokens)], np.int64),
            suppress_eos=np.array([num_sampled < sampling.min_tokens]),
            want_logprobs=np.array([sampling.num_logprobs is not None]),
            num_logprobs=np.array([sampling.num_logprobs or 0], np.int32),
        ),
    )
