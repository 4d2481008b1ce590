"""Small models and a hand-driven engine for the tests of `model`.

`Instance` is the least machine that serves requests on several ranks in one process: it owns caches, deals out blocks
in a scrambled order, builds steps and drives the ranks in lockstep. Its exchange destroys every reply one exchange
later, so each test also checks that no rank keeps a view of a reply.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.checkpoint import write_random_checkpoint
from model.collectives import Collective, Reply, exchange_in_process, run_lockstep
from model.config import ModelConfig, RopeScaling
from model.latent_cache import LatentCache
from model.layout import RankLayout, make_layouts
from model.reference import ReferenceModel, Sampling
from model.step import SamplingBatch, StepInput, StepOutput
from model.tasks.corpus_tokenizer import train_tokenizer
from model.tokenizer import Tokenizer
from model.training.held_out import held_out_accuracy
from model.training.publish import publish
from model.training.settings import TrainingSettings
from model.training.trainer import Trainer
from model.transformer import Transformer
from model.weights import load_rank_weights

torch.set_num_threads(1)

YARN = RopeScaling(
    factor=4.0, original_max_position_embeddings=32, beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0
)
BASE = ModelConfig(
    vocab_size=272,
    hidden_size=64,
    intermediate_size=96,
    moe_intermediate_size=32,
    num_hidden_layers=3,
    num_attention_heads=8,
    n_shared_experts=1,
    n_routed_experts=16,
    routed_scaling_factor=2.5,
    kv_lora_rank=32,
    q_lora_rank=24,
    qk_rope_head_dim=8,
    v_head_dim=16,
    qk_nope_head_dim=16,
    n_group=4,
    topk_group=2,
    num_experts_per_tok=4,
    first_k_dense_replace=1,
    norm_topk_prob=True,
    max_position_embeddings=256,
    rope_scaling=YARN,
    num_nextn_predict_layers=1,
)
BLOCK_SIZE = 4


@dataclasses.dataclass
class Request:
    """One request on its way through an Instance."""

    prompt: list[int]
    num_tokens: int
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    num_computed: int = 0
    blocks: list[int] = dataclasses.field(default_factory=list)
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[Any] = dataclasses.field(default_factory=list)

    @property
    def context(self) -> list[int]:
        return self.prompt + self.tokens

    @property
    def is_done(self) -> bool:
        return len(self.tokens) == self.num_tokens


def build_step(requests: Sequence[Request], counts: Sequence[int]) -> StepInput:
    """A step that computes the next counts[i] tokens of requests[i], and samples where the context is then complete."""
    if not requests:
        return StepInput.idle()
    stops = [request.num_computed + count for request, count in zip(requests, counts, strict=True)]
    spans = [np.arange(request.num_computed, stop) for request, stop in zip(requests, stops, strict=True)]
    query_start = np.concatenate([[0], np.cumsum(counts)])
    sampled = [index for index, stop in enumerate(stops) if stop == len(requests[index].context)]
    chosen = [requests[index] for index in sampled]
    tables = np.zeros((len(requests), max(len(request.blocks) for request in requests)), np.int32)
    for row, request in zip(tables, requests, strict=True):
        row[: len(request.blocks)] = request.blocks
    wanted = [request.sampling.num_logprobs for request in chosen]
    return StepInput(
        token_ids=np.concatenate([np.array(r.context)[span] for r, span in zip(requests, spans, strict=True)]),
        positions=np.concatenate(spans),
        query_start=query_start,
        seq_lens=np.array(stops),
        block_tables=tables,
        sample_rows=query_start[1:][sampled] - 1,
        sampling=SamplingBatch(
            temperature=np.array([r.sampling.temperature for r in chosen]),
            top_p=np.array([r.sampling.top_p for r in chosen]),
            top_k=np.array([r.sampling.top_k for r in chosen]),
            seed=np.array([r.sampling.seed for r in chosen], np.uint64),
            position=np.array([len(r.context) for r in chosen]),
            suppress_eos=np.array([len(r.tokens) < r.sampling.min_tokens for r in chosen], np.bool_),
            want_logprobs=np.array([count is not None for count in wanted], np.bool_),
            num_logprobs=np.array([count or 0 for count in wanted]),
        ),
    )


class PoisonedExchange:
    """exchange_in_process whose replies are destroyed when the next exchange begins, as a reused window's are."""

    def __init__(self) -> None:
        self._lent: list[torch.Tensor] = []
        self.num_exchanges = 0

    def __call__(self, calls: Sequence[Collective]) -> list[Reply]:
        self.num_exchanges += 1
        replies = [[part.clone() for part in reply] for reply in exchange_in_process(calls)]
        for tensor in self._lent:
            tensor.fill_(float("nan") if tensor.is_floating_point() else 0x55)
        self._lent = [part for reply in replies for part in reply]
        return replies


class Instance:
    """All ranks of one instance, driven step by step."""

    def __init__(self, config: ModelConfig, directory: Path, layouts: Sequence[RankLayout], *, num_blocks: int = 96):
        self.layouts = layouts
        self.ranks = [
            Transformer(
                config,
                layout,
                load_rank_weights(directory, config, layout),
                LatentCache(config, num_blocks, BLOCK_SIZE),
            )
            for layout in layouts
        ]
        self.exchange = PoisonedExchange()
        order = np.random.default_rng(5).permutation(num_blocks).tolist()
        self._free = [list(order) for _ in layouts]

    @property
    def is_data_parallel(self) -> bool:
        return self.layouts[0].attention == "data_parallel"

    def allocate(self, request: Request, rank: int) -> None:
        """Blocks for the whole life of a request; with sequence_tensor attention the same ids on every rank."""
        total = len(request.prompt) + request.num_tokens
        request.blocks = [self._free[rank].pop() for _ in range(-(-total // BLOCK_SIZE))]

    def step(self, per_rank: Sequence[Sequence[Request]], *, chunk: int | None = None) -> list[StepOutput]:
        """Advance every request by one step: up to `chunk` prompt tokens each, or one new token."""
        batches = per_rank if self.is_data_parallel else [per_rank[0]] * len(self.ranks)
        counts = [
            [min(len(r.context) - r.num_computed, chunk or len(r.context)) for r in requests] for requests in batches
        ]
        steps = [build_step(requests, count) for requests, count in zip(batches, counts, strict=True)]
        forwards = [rank.forward(step) for rank, step in zip(self.ranks, steps, strict=True)]
        outputs = run_lockstep(forwards, exchange=self.exchange)
        served = list(zip(batches, counts, range(len(batches)), strict=True))
        for requests, count, rank in served if self.is_data_parallel else served[:1]:
            for request, num_new in zip(requests, count, strict=True):
                request.num_computed += num_new
            chosen = [request for request in requests if request.num_computed == len(request.context)]
            answers = [outputs[rank]] if self.is_data_parallel else outputs
            self._record(chosen, answers)
        return outputs

    def _record(self, chosen: list[Request], answers: Sequence[StepOutput]) -> None:
        found = {
            sample_id: (token, logprobs)
            for output in answers
            for sample_id, token, logprobs in zip(
                output.sample_ids.tolist(), output.token_ids.tolist(), output.logprobs, strict=True
            )
        }
        assert sorted(found) == list(range(len(chosen))), "each sample is answered by exactly one rank"
        for sample_id, (token, logprobs) in found.items():
            chosen[sample_id].tokens.append(token)
            chosen[sample_id].logprobs.append(logprobs)

    def run(self, per_rank: Sequence[Sequence[Request]], *, chunk: int | None = None) -> list[list[int]]:
        """Serve every request to its end; their tokens in the order given."""
        everyone = [request for requests in per_rank for request in requests]
        for rank, requests in enumerate(per_rank):
            for request in requests:
                self.allocate(request, rank)
        while not all(request.is_done for request in everyone):
            self.step([[r for r in requests if not r.is_done] for requests in per_rank], chunk=chunk)
        return [request.tokens for request in everyone]


@pytest.fixture(scope="session")
def make_config() -> Callable[..., ModelConfig]:
    """The base configuration with some fields replaced."""
    return lambda **changes: dataclasses.replace(BASE, **changes)


@pytest.fixture(scope="session")
def base_config() -> ModelConfig:
    return BASE


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Directory of a random checkpoint of a configuration, written once per (configuration, seed)."""
    written: dict[tuple[ModelConfig, int], Path] = {}

    def write(config: ModelConfig, seed: int = 0) -> Path:
        if (config, seed) not in written:
            written[config, seed] = tmp_path_factory.mktemp("checkpoint")
            write_random_checkpoint(written[config, seed], config, seed)
        return written[config, seed]

    return write


@pytest.fixture(scope="session")
def reference_of(checkpoint_of: Callable[..., Path]) -> Callable[..., ReferenceModel]:
    """The one-rank reference of a configuration, loaded once."""
    loaded: dict[ModelConfig, ReferenceModel] = {}

    def load(config: ModelConfig) -> ReferenceModel:
        if config not in loaded:
            loaded[config] = ReferenceModel(config, checkpoint_of(config))
        return loaded[config]

    return load


@pytest.fixture(scope="session")
def make_instance(checkpoint_of: Callable[..., Path]) -> Callable[..., Instance]:
    """An instance of `world_size` ranks; keyword arguments go to make_layouts."""

    def make(config: ModelConfig, world_size: int, *, max_num_tokens: int = 128, **layout: Any) -> Instance:
        layouts = make_layouts(config, world_size=world_size, max_num_tokens=max_num_tokens, **layout)
        return Instance(config, checkpoint_of(config), layouts)

    return make


@pytest.fixture(scope="session")
def instance_of() -> type[Instance]:
    """An instance of a checkpoint that is not random."""
    return Instance


@pytest.fixture(scope="session")
def make_request() -> type[Request]:
    return Request


@pytest.fixture(scope="session")
def make_step() -> Callable[..., StepInput]:
    return build_step


@pytest.fixture
def random_prompt() -> Callable[[int], list[int]]:
    """Random byte tokens; the same sequence of prompts in every test."""
    generator = np.random.default_rng(11)
    return lambda length: generator.integers(7, 263, length).tolist()


@pytest.fixture(scope="session")
def corpus_tokenizer() -> Tokenizer:
    return train_tokenizer(0, num_problems=3000)


@pytest.fixture(scope="session")
def tiny_training_config() -> ModelConfig:
    return dataclasses.replace(
        BASE,
        vocab_size=2048,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        n_routed_experts=8,
        max_position_embeddings=1024,
    )


@pytest.fixture(scope="session")
def tiny_settings() -> TrainingSettings:
    return TrainingSettings(num_steps=5, tokens_per_shard=256, max_sample_tokens=256, warmup_steps=2, num_shards=2)


@pytest.fixture(scope="session")
def trained_checkpoint(tmp_path_factory, corpus_tokenizer, tiny_training_config, tiny_settings) -> Path:
    """A published checkpoint after three steps: all its files, and no skill."""
    directory = tmp_path_factory.mktemp("trained")
    trainer = Trainer(tiny_training_config, tiny_settings, corpus_tokenizer)
    for _ in range(3):
        trainer.run_step()
    accuracy = held_out_accuracy(trainer.network, trainer.weights, corpus_tokenizer, step=3, per_kind=2)
    publish(
        directory,
        tiny_training_config,
        trainer.weights,
        corpus_tokenizer,
        settings=trainer.settings_as_dict,
        history=trainer.history,
        accuracies=[accuracy.as_dict()],
    )
    return directory
