"""A cluster in virtual time for the tests of the control plane, with books that must balance when a test is over.

`FakeDevices` keep token ids where real ones keep latents, and the next token is a digest of the context as it is read
through the block table. A block that is lost, reused too early or in the wrong place therefore gives other tokens.
"""

import asyncio
import dataclasses
import hashlib
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from devices.clock import VirtualClock, run_virtual
from devices.step_work import StepTime
from model.config import ModelConfig
from model.step import StepInput, StepOutput, TokenLogprobs
from serving.build import build_cluster
from serving.config import Role, RunConfig
from serving.config_file import load_config
from serving.core.event_log import EventLog
from serving.core.ids import BlockIds, InstanceId
from serving.core.scheduled_batch import ScheduledBatch
from serving.errors import EngineFailure
from serving.frontend import Frontend
from serving.messages import GenerateRequest, SamplingParams, TokenDelta
from serving.stream import TokenStream
from serving.transport import PoolObject, RankRef, Transport

EOS = 1
SMALL_MODEL = {
    "vocab_size": 272,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "n_shared_experts": 1,
    "n_routed_experts": 16,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "qk_nope_head_dim": 16,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "max_position_embeddings": 512,
    "num_nextn_predict_layers": 1,
}
INSTANCE = {"npus": 2, "dies_per_npu": 1, "num_blocks": 64, "max_num_batched_tokens": 64, "max_num_seqs": 8}
REPRESENTS = {"ep": 320, "num_redundant_experts": 32, "num_shared_expert_copies": 32}
BASE = {
    "model": {"config": "small.yaml", "max_model_len": 128},
    "timing": {
        "model": "model/deepseek-r1.yaml",
        "hardware": "hardware/cloudmatrix384.yaml",
        "represents": {
            "prefill": {"ep": 32, "num_redundant_experts": 32},
            "decode": REPRESENTS,
            "colocated": REPRESENTS,
        },
    },
    "cache": {"block_size": 4},
    "kv_pool": {"dram_bytes_per_host": 2**30},
    "workload": {"num_requests": 12, "input_len": 24, "output_len": 6, "prefix_len": 12, "request_rate": 100},
}
SHAPES = {
    "disaggregated": BASE | {"instances": {"prefill": INSTANCE, "decode": INSTANCE}},
    "colocated": BASE | {"instances": {"colocated": INSTANCE}, "kv_pool": {"enabled": False}},
}
MakeConfig = Callable[..., RunConfig]


@pytest.fixture(scope="session")
def config_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small runs, each with a model that a test can compute in a moment."""
    folder = tmp_path_factory.mktemp("configs")
    (folder / "small.yaml").write_text(yaml.safe_dump(SMALL_MODEL, sort_keys=False))
    for name, content in SHAPES.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder


@pytest.fixture(scope="session")
def make_config(config_folder: Path) -> MakeConfig:
    """A function: a small run by name, or a shipped preset with the small model, with overrides `a.b=c`."""

    def make(name: str, *overrides: str) -> RunConfig:
        if (config_folder / f"{name}.yaml").exists():
            return load_config(str(config_folder / f"{name}.yaml"), overrides)
        plain = ("model.checkpoint=random", "model.max_model_len=256", "speculative.num_speculative_tokens=0")
        return load_config(name, (f"model.config={config_folder / 'small.yaml'}", *plain, *overrides))

    return make


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of the small model."""
    from model.checkpoint import write_random_checkpoint

    directory = tmp_path_factory.mktemp("checkpoint")
    write_random_checkpoint(directory, ModelConfig.from_dict(SMALL_MODEL), seed=3)
    return directory


def prompt_of(num_tokens: int, *, seed: int = 0) -> tuple[int, ...]:
    """Token ids of a prompt; a longer one with the same seed begins with a shorter one."""
    return tuple(int(token) for token in np.random.default_rng(seed).integers(16, 256, 512)[:num_tokens])


def digest_token(context: Sequence[int]) -> int:
    """The model of the fake devices: a token that no other context gives, as far as one token can tell."""
    digest = hashlib.blake2b(np.array(context, "<i8").tobytes(), digest_size=8).digest()
    return 16 + int.from_bytes(digest, "little") % 240


@dataclasses.dataclass
class FakeDevices:
    """A transport to devices that are arrays here. `latency_s`: wall time that every order takes.

    `faults` maps an order's name to what its next calls raise; None lets one pass.
    """

    config: RunConfig
    next_token: Callable[[Sequence[int]], int] = digest_token
    latency_s: float = 0.0
    faults: dict[str, list[Exception | None]] = dataclasses.field(default_factory=dict)
    stored: dict[PoolObject, np.ndarray] = dataclasses.field(default_factory=dict)
    num_calls: Counter[str] = dataclasses.field(default_factory=Counter)
    caches: dict[tuple[str, int], np.ndarray] = dataclasses.field(default_factory=dict)

    def generate(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        """What a request must get, whatever happens on the way."""
        context = list(prompt)
        for _ in range(num_tokens):
            context.append(self.next_token(context))
        return context[len(prompt) :]

    def step(
        self, instance_id: InstanceId, inputs: Sequence[StepInput], *, charged_ns: int
    ) -> Awaitable[list[StepOutput]]:
        is_replicated = role_of(instance_id) == "prefill"

        def run() -> list[StepOutput]:
            return [
                self._rank_step(self._cache(instance_id, rank), step, answers=rank == 0 or not is_replicated)
                for rank, step in enumerate(inputs)
            ]

        return self._order("step", run)

    def kv_transfer(
        self, source: RankRef, source_blocks: BlockIds, target: RankRef, target_blocks: BlockIds
    ) -> Awaitable[None]:
        def copy() -> None:
            blocks = self._cache(source.instance_id, source.rank)[source_blocks]
            self._cache(target.instance_id, target.rank)[target_blocks] = blocks

        return self._order("kv_transfer", copy)

    def pool_load(
        self, target: RankRef | InstanceId, objects: Sequence[PoolObject], blocks: BlockIds
    ) -> Awaitable[None]:
        if isinstance(target, RankRef):
            caches = [self._cache(target.instance_id, target.rank)]
        else:
            caches = [self._cache(target, rank) for rank in range(self.config.world_size(role_of(target)))]

        def copy() -> None:
            for item, block in zip(objects, blocks, strict=True):
                if item not in self.stored:
                    raise EngineFailure(f"pool_load: host {item.host_id} has no block {item.handle}")
                for cache in caches:
                    cache[block] = self.stored[item]

        return self._order("pool_load", copy)

    def pool_store(self, source: RankRef, blocks: BlockIds, objects: Sequence[PoolObject]) -> Awaitable[None]:
        def copy() -> None:
            for item, block in zip(objects, blocks, strict=True):
                assert item not in self.stored, f"{item} holds a block already"
                self.stored[item] = self._cache(source.instance_id, source.rank)[block].copy()
                assert (self.stored[item] >= 0).all(), "a block that is not full was stored"

        return self._order("pool_store", copy)

    def pool_free(self, objects: Sequence[PoolObject]) -> None:
        for item in objects:
            self.stored.pop(item, None)

    def watch(self, on_instance_lost: Any, on_host_lost: Any) -> None:
        self.on_instance_lost, self.on_host_lost = on_instance_lost, on_host_lost

    def _order(self, name: str, action: Callable[[], Any]) -> Awaitable[Any]:
        self.num_calls[name] += 1
        faults = self.faults.get(name)
        fault = faults.pop(0) if faults else None

        async def carry_out() -> Any:
            if self.latency_s:
                await asyncio.sleep(self.latency_s)
            result = action() if fault is None or name != "step" else None
            if fault is not None:
                raise fault
            return result

        return carry_out()

    def _cache(self, instance_id: InstanceId, rank: int) -> np.ndarray:
        section = self.config.instances[role_of(instance_id)]
        shape = (section.num_blocks, self.config.cache.block_size)
        return self.caches.setdefault((instance_id, rank), np.full(shape, -1, np.int64))

    def _rank_step(self, cache: np.ndarray, step: StepInput, *, answers: bool) -> StepOutput:
        slots = cache.reshape(-1)
        rows = np.repeat(np.arange(step.num_seqs), np.diff(step.query_start))
        slots[self._slot(step.block_tables, rows, step.positions)] = step.token_ids
        tokens, logprobs = [], []
        for sample, row in enumerate(step.sample_rows if answers else ()):
            seq = int(rows[row])
            positions = np.arange(step.seq_lens[seq])
            context = slots[self._slot(step.block_tables, np.full(len(positions), seq), positions)].tolist()
            token = self.next_token(context)
            if token == EOS and step.sampling.suppress_eos[sample]:
                token = 2
            tokens.append(token)
            wants = step.sampling.want_logprobs[sample]
            logprobs.append(TokenLogprobs(logprob=-float(token), top=()) if wants else None)
        return StepOutput(
            sample_ids=np.arange(len(tokens), dtype=np.int32),
            token_ids=np.array(tokens, np.int64),
            logprobs=tuple(logprobs),
            expert_counts=self._expert_counts(step.num_tokens if answers else 0),
        )

    def _expert_counts(self, num_tokens: int) -> np.ndarray:
        """As if every token chose the first experts of each layer."""
        shape = self.config.shape
        counts = np.zeros((shape.num_moe_layers, shape.n_routed_experts), np.int64)
        counts[:, : shape.num_experts_per_tok] = num_tokens
        return counts

    def _slot(self, tables: np.ndarray, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        block_size = self.config.cache.block_size
        return tables[rows, positions // block_size] * block_size + positions % block_size


def role_of(instance_id: InstanceId) -> Role:
    """`decode` of `decode-0`."""
    return instance_id.rpartition("-")[0]  # type: ignore[return-value]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reply:
    """All that a stream gave."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    finish_reason: str | None  # None: the reader left before the end
    stop_reason: int | str | None
    error: str | None


class RunningSystem:
    """A cluster and its frontend while they run, and the books on them."""

    def __init__(
        self, config: RunConfig, clock: VirtualClock, transport: Transport | None, step_ns: dict[str, int] | None
    ) -> None:
        self.config = config
        self.clock = clock
        self.transport = transport
        self.log = EventLog(keep=True)
        self.outcomes: list[tuple[str, str]] = []  # request and reason, in the order of the ends
        self.cluster = build_cluster(
            config, clock=clock, log=self.log, transport=transport, charge_for=None if step_ns is None else self._charge
        )
        self._step_ns = step_ns or {}
        self.frontend = Frontend(self.cluster, tokenizer=None, on_outcome=self._on_outcome)

    def submit(self, request_id: str, prompt: Sequence[int], *, priority: int = 0, **sampling: Any) -> TokenStream:
        """Greedy and without EOS, unless `sampling` says otherwise."""
        params = SamplingParams(**{"max_tokens": 8, "temperature": 0.0, "ignore_eos": True} | sampling)
        return self.frontend.submit(
            GenerateRequest(request_id=request_id, prompt_token_ids=tuple(prompt), sampling=params, priority=priority)
        )

    async def read(self, stream: TokenStream) -> Reply:
        """Read a stream to its end."""
        token_ids: list[int] = []
        logprobs: list[TokenLogprobs] = []
        last = TokenDelta(token_ids=())
        async for delta in stream:
            token_ids += delta.token_ids
            logprobs += delta.logprobs or ()
            last = delta
        return Reply(
            token_ids=token_ids,
            logprobs=logprobs,
            finish_reason=last.finish_reason,
            stop_reason=last.stop_reason,
            error=last.error,
        )

    async def generate(self, request_id: str, prompt: Sequence[int], **sampling: Any) -> Reply:
        """Submit and read to the end."""
        return await self.read(self.submit(request_id, prompt, **sampling))

    def events(self, *kinds: str) -> list[str]:
        """The log so far, or the events of these kinds, one line each."""
        return [
            " ".join([f"{e.now_ns:>8} {e.kind} {e.subject}", *(f"{name}={value}" for name, value in e.details)])
            for e in self.log.events
            if not kinds or e.kind in kinds
        ]

    def check_rest(self) -> None:
        """Nothing is held, nothing contradicts itself, and every request that came has exactly one outcome."""
        assert self.cluster.held() == dict.fromkeys(self.cluster.held(), 0)
        assert (self.frontend.num_lives, self.frontend.num_waiting) == (0, 0)
        self.cluster.check_invariants()
        self.log.check_invariants()
        arrived = Counter(e.subject for e in self.log.events if e.kind == "arrive")
        assert arrived == Counter(e.subject for e in self.log.events if e.kind == "outcome")
        assert arrived == Counter(request_id for request_id, _ in self.outcomes)
        if isinstance(self.transport, FakeDevices) and self.cluster.pool is not None:
            assert len(self.transport.stored) == self.cluster.pool.index.num_blocks

    def _charge(self, config: RunConfig, role: Role) -> Callable[[ScheduledBatch], StepTime]:
        return lambda batch: StepTime(ns=self._step_ns[role], breakdown={})

    def _on_outcome(self, request: Any, times: Any, instance_id: str) -> None:
        request.check_invariants()
        self.outcomes.append((request.request_id, str(request.outcome.reason)))


RunSystem = Callable[..., Any]


@pytest.fixture
def run_system() -> Iterator[RunSystem]:
    """A function: run `program(system)` in virtual time. Whatever it did, everything must be at rest afterwards."""
    systems: list[RunningSystem] = []

    def run(
        config: RunConfig,
        program: Callable[[RunningSystem], Coroutine[Any, Any, Any]],
        *,
        transport: Transport | None = None,
        step_ns: dict[str, int] | None = None,
    ) -> Any:
        async def main(clock: VirtualClock) -> Any:
            system = RunningSystem(config, clock, transport, step_ns)
            systems.append(system)
            system.cluster.start()
            try:
                return await program(system)
            finally:
                await system.frontend.abort_all()
                await system.cluster.stop()

        return run_virtual(main)

    yield run
    for system in systems:
        system.check_rest()


@pytest.fixture(scope="session")
def fake_devices() -> type[FakeDevices]:
    """The class, for tests that script faults."""
    return FakeDevices


@pytest.fixture(scope="session")
def prompt() -> Callable[..., tuple[int, ...]]:
    """See prompt_of."""
    return prompt_of
