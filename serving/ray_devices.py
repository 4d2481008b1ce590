"""Devices in Ray actors: started, joined into exchange groups, reached over channels.

Owns: the order of a boot (weights, actors, groups, channels) and of its end.
Must not know: requests, time, HTTP.
"""

import asyncio
import math
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from model import work
from model.checkpoint import write_byte_tokenizer, write_random_checkpoint
from model.checkpoint_check import WeightsError, check_checkpoint
from model.tokenizer import Tokenizer, TokenizerError
from serving.build import exchange_window_bytes, host_plans, npu_worker_plans
from serving.channel import AsyncChannel
from serving.config import RunConfig
from serving.core.ids import InstanceId
from serving.errors import ConfigError, EngineFailure
from serving.ray_cluster import Placed, RayCluster
from serving.session import Session
from serving.shared_memory import WindowGroupSpec
from serving.transport import WorkerTransport
from serving.worker import NpuWorkerPlan, StepTimes

CLOSE_TIMEOUT_S = 5.0
# A model's vocabulary may be padded beyond its tokenizer's to a size that divides well: R1's by 465 of 129,280 ids.
_IDS_PER_PADDING_ID = 100


_FLOAT32_BYTES = 4


def machine_memory_bytes() -> int:
    """DRAM of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_random_weights(config: RunConfig) -> None:
    """Raise ConfigError if random weights are asked for, and one copy of them is more than this machine's memory."""
    if config.model.checkpoint != "random":
        return
    num_parameters = work.parameter_counts(config.shape).total
    needed, memory = num_parameters * _FLOAT32_BYTES, machine_memory_bytes()
    if needed > memory:
        num_hosts = len(host_plans(config))
        raise ConfigError(
            f"model.checkpoint: random weights of {num_parameters / 1e9:.0f} G parameters, {needed / 1e9:,.0f} GB in "
            f"float32, exceed this machine's memory of {memory / 1e9:,.0f} GB; they would be computed by actors for "
            f"{config.total_npus} NPUs, beside {num_hosts} hosts. `supernode simulate`, or `serve --shards timing`, "
            "needs no weights"
        )


def checkpoint_directory(config: RunConfig, session: Session, *, with_weights: bool = True) -> Path:
    """Where the weights are; random ones are written there first, or their tokenizer alone. Raises ConfigError if it
    lacks files.
    """
    if config.model.checkpoint == "random":
        directory = session.folder / "checkpoint"
        if with_weights:
            write_random_checkpoint(directory, config.shape, config.seed)
        else:
            write_byte_tokenizer(directory, config.shape)
        return directory
    directory = Path(config.model.checkpoint).resolve()  # workers may have another current directory
    for names in (("tokenizer.json",), ("model.safetensors", "model.safetensors.index.json")):
        if not any((directory / name).is_file() for name in names):
            raise ConfigError(f"model.checkpoint: {directory} has no {' nor '.join(names)}")
    try:
        tokenizer = Tokenizer.from_file(directory / "tokenizer.json")
        ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    except TokenizerError as error:
        raise ConfigError(f"model.checkpoint: {error}") from None
    vocab_size = tokenizer.vocab_size
    if vocab_size > config.shape.vocab_size:
        raise ConfigError(
            f"model.checkpoint: {directory / 'tokenizer.json'} has {vocab_size} tokens, "
            f"vocab_size of {config.model.shape_source} is {config.shape.vocab_size}"
        )
    max_padding = math.ceil(config.shape.vocab_size / _IDS_PER_PADDING_ID)
    if vocab_size < config.shape.vocab_size - max_padding:
        raise ConfigError(
            f"model.checkpoint: {directory / 'tokenizer.json'} has {vocab_size} tokens, vocab_size of "
            f"{config.model.shape_source} is {config.shape.vocab_size}, of which {max_padding} may be padding"
        )
    for name, token_id in ids.items():
        if token_id != getattr(config.shape, name):
            raise ConfigError(
                f"model.checkpoint: {directory / 'tokenizer.json'} has {name} {token_id}, "
                f"{config.model.shape_source} says {getattr(config.shape, name)}"
            )
    try:
        check_checkpoint(directory, config.shape, with_mtp=config.is_speculative)
    except WeightsError as error:
        raise ConfigError(f"model.checkpoint: {error}") from None
    return directory


class RayDevices:
    """The actors of one launch. `start` and `close` block; `open_transport` is for the event loop."""

    def __init__(self, config: RunConfig, session: Session, *, address: str | None) -> None:
        """Raises ConfigError if the weights cannot be made here; nothing has started then."""
        check_random_weights(config)
        self._config = config
        self._session = session
        self._ray = RayCluster(session, address=address, startup_timeout_s=config.ray.startup_timeout_s)
        self._workers: dict[InstanceId, list[NpuWorkerPlan]] = {}
        self._hosts = host_plans(config)
        self._placed: dict[str, Placed] = {}
        self._channels: dict[tuple[str, str], AsyncChannel] = {}
        self._num_groups = 0

    def __enter__(self) -> "RayDevices":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self, checkpoint: Path) -> None:
        """Start every actor. Raises ConfigError or EngineFailure; then `close` still has to be called."""
        self._workers = npu_worker_plans(self._config, checkpoint)
        self._ray.start(num_npus=self._config.total_npus, num_hosts=len(self._hosts))
        self._placed = self._ray.launch(self._workers, self._hosts)
        calls: dict[str, tuple[str, tuple[Any, ...]]] = {}
        for instance_id, plans in self._workers.items():
            if len(plans) > 1:
                spec = self._group_spec(instance_id, plans)
                calls |= {plan.worker_id: ("open_exchange", (spec, i)) for i, plan in enumerate(plans)}
        self._num_groups = len(calls)
        self._ray.call_all(calls)  # all at once: a group opens when its last member has come

    def open_transport(self) -> WorkerTransport:
        """Connect to every worker, from the running event loop."""

        def invoke(worker_id: str, lane: str, method: str, args: tuple[Any, ...]) -> "asyncio.Future[Any]":
            return self._channels[worker_id, lane].call(method, *args)

        transport = WorkerTransport(
            invoke=invoke,
            ranks={
                instance_id: [(plan.worker_id, plan.ranks) for plan in plans]
                for instance_id, plans in self._workers.items()
            },
            hosts=[host.worker_id for host in self._hosts],
            address_of={worker_id: placed.address for worker_id, placed in self._placed.items()},
        )
        for worker_id, placed in self._placed.items():
            for lane in ("step", "data"):
                try:
                    self._channels[worker_id, lane] = AsyncChannel(
                        placed.address,
                        self._session.authkey,
                        name=worker_id,
                        on_lost=partial(transport.lose, worker_id),
                    )
                except OSError as error:
                    raise EngineFailure(f"worker {worker_id} cannot be reached: {error}") from error
        return transport

    async def close_transport(self) -> None:
        """Leave the exchange groups and close every channel, from the event loop in which it was opened."""
        if self._num_groups:
            leaving = [
                self._channels[plan.worker_id, "data"].call("close_exchange")
                for plans in self._workers.values()
                for plan in plans
                if len(plans) > 1
            ]
            done, _ = await asyncio.wait(leaving, timeout=CLOSE_TIMEOUT_S)
            for future in done:
                future.exception()  # a worker that is lost has left
        for channel in self._channels.values():
            channel.close()
        self._channels.clear()

    async def step_figures(self) -> dict[str, float]:
        """Real milliseconds of a mean step per instance, of the slowest worker: wall, in exchanges, CPU."""
        figures = {}
        for instance_id, plans in self._workers.items():
            calls = [self._channels[plan.worker_id, "data"].call("step_times") for plan in plans]
            replies = await asyncio.gather(*calls, return_exceptions=True)
            times = [reply for reply in replies if isinstance(reply, StepTimes)]
            if len(times) < len(plans):  # a worker is lost
                continue
            slowest = max(times, key=lambda entry: entry.wall_ns)
            steps = max(1, slowest.num_steps)
            figures[f"{instance_id} ms/step wall"] = slowest.wall_ns / steps / 1e6
            figures[f"{instance_id} ms/step exchange"] = slowest.exchange_ns / steps / 1e6
            figures[f"{instance_id} ms/step CPU"] = slowest.cpu_ns / steps / 1e6
        return figures

    def close(self) -> None:
        """End every actor and, if it is ours, Ray."""
        self._ray.close()

    def _group_spec(self, instance_id: InstanceId, plans: Sequence[NpuWorkerPlan]) -> Any:
        """How the workers of one instance exchange: shared memory on one node, gloo between nodes."""
        config = self._config
        ranks_by_process = tuple(plan.exchange_ranks for plan in plans)
        world_size = sum(len(ranks) for ranks in ranks_by_process)
        one_node = len({self._placed[plan.worker_id].node_id for plan in plans}) == 1
        kind = config.ray.exchange
        if kind == "shared_memory" or (kind == "auto" and one_node):
            return WindowGroupSpec(
                path=str(self._session.windows / instance_id),
                world_size=world_size,
                ranks_by_process=ranks_by_process,
                window_bytes=exchange_window_bytes(config, (plans[0].merged or plans[0].npus[0].ranks[0]).layout),
                timeout_s=config.ray.exchange_timeout_s,
                epoch=0,
            )
        from serving.gloo_exchange import GlooGroupSpec  # torch, which a driver on one node does without

        first = plans[0].worker_id
        host = self._ray.node_ip(self._placed[first].node_id)
        port = self._ray.call_all({first: ("start_store", (host,))})[first]
        return GlooGroupSpec(
            store_host=host,
            store_port=port,
            world_size=world_size,
            ranks_by_process=ranks_by_process,
            timeout_s=config.ray.exchange_timeout_s,
            epoch=0,
            name=instance_id,
        )
