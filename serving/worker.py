"""What runs in a device process: some NPUs of one instance with their ranks, or one CPU host.

Owns: the carrying out of steps and block movements, and the process's side of the channels.
Must not know: Ray (serving/ray_cluster.py wraps these classes), requests, schedules.

A worker reaches other workers through `Peers`: sockets between processes, plain calls within one (tests, and the
in-process twin of a cluster). Blocks are pulled by the side that needs them or pushed by the side that has them, as
RDMA and one-sided UB transfers are; the other side takes no decision and its steps do not wait.
"""

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from devices.host import Host, HostStats
from devices.npu import Npu, NpuStats
from devices.spec import NpuSpec
from model.config import ModelConfig
from model.layout import RankLayout
from model.step import StepInput, StepOutput
from serving import channel
from serving.batched_ranks import merge_steps, share_output, split_output
from serving.errors import EngineFailure
from serving.shared_memory import WindowGroupSpec

if TYPE_CHECKING:  # torch, which the control plane and a host do without
    from model.collectives import Collective, Exchange, Reply

BlockIds = NDArray[np.int32]
PoolPart = tuple[Any, list[int], list[int]]  # address of a host, handles there, their positions in the block list


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPlan:
    """What one rank is made of. Picklable, without tensors."""

    checkpoint: str  # directory in the hub's layout
    config: ModelConfig
    layout: RankLayout
    num_blocks: int
    block_size: int
    with_mtp: bool = False  # the MTP module, and its layer of the cache


@dataclass(frozen=True, slots=True, kw_only=True)
class NpuPlan:
    """One NPU: a rank per die in use."""

    npu_id: int
    ranks: tuple[RankPlan, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class NpuWorkerPlan:
    """One worker: some NPUs of one instance, in rank order."""

    worker_id: str
    npus: tuple[NpuPlan, ...]
    spec: NpuSpec
    reserved_bytes: Mapping[str, int]  # per die, as charged: weights, buffers, cache
    merged: RankPlan | None = None  # all ranks as one (serving/batched_ranks.py); None: in lockstep

    @property
    def is_data_parallel(self) -> bool:
        """Whether each rank has requests and blocks of its own."""
        return self.npus[0].ranks[0].layout.attention == "data_parallel"

    @property
    def exchange_ranks(self) -> tuple[int, ...]:
        """Ranks that this worker drives in its group: its own, or the merged one."""
        return self.ranks if self.merged is None else (self.merged.layout.rank,)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Ranks of the instance that live here."""
        return tuple(rank.layout.rank for npu in self.npus for rank in npu.ranks)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostPlan:
    """One CPU host."""

    worker_id: str
    host_id: int
    dram_bytes: int
    block_bytes: int  # as charged


@dataclass(slots=True)
class StepTimes:
    """Real time of a worker's steps, in total: wall, of it inside exchanges (waiting included), and CPU."""

    num_steps: int = 0
    wall_ns: int = 0
    exchange_ns: int = 0
    cpu_ns: int = 0


class Peers(Protocol):
    """Other workers."""

    def call(self, address: Any, method: str, *args: Any) -> Any:
        """Call a method of the worker at `address` and wait for its result. Raises EngineFailure if it is lost."""


class LocalPeers:
    """Workers of this process; an address is a worker's id."""

    def __init__(self) -> None:
        self.workers: dict[str, NpuWorker | HostWorker] = {}

    def call(self, address: Any, method: str, *args: Any) -> Any:
        return getattr(self.workers[address], method)(*args)


class SocketPeers:
    """Workers of other processes, over one connection per calling thread and peer."""

    def __init__(self, authkey: bytes) -> None:
        self._authkey = authkey
        self._local = threading.local()

    def call(self, address: Any, method: str, *args: Any) -> Any:
        connections: dict[Any, Connection] = self._local.__dict__.setdefault("connections", {})
        if address not in connections or connections[address].closed:
            try:
                connections[address] = channel.connect(address, self._authkey)
            except (OSError, EOFError, AuthenticationError) as error:
                raise EngineFailure(f"{method}: no worker answers at {address}: {error or 'it closed'}") from error
        return channel.call(connections[address], method, *args)


class _Served:
    """A worker whose methods are reached over channels."""

    METHODS: tuple[str, ...] = ()

    def __init__(self, listen: channel.Address | None, authkey: bytes) -> None:
        self._server = None
        if listen is not None:
            methods = {name: getattr(self, name) for name in self.METHODS}
            self._server = channel.ChannelServer(listen, authkey, methods)

    def address(self) -> channel.Address:
        """Where the worker listens."""
        assert self._server is not None, "a worker of this process has no address"
        return self._server.address

    def process_id(self) -> int:
        """Of the process that the worker runs in."""
        return os.getpid()


class NpuWorker(_Served):
    """NPUs of one instance. Without `listen` it is used in this process, through `peers`."""

    METHODS = (
        "step",
        "read_blocks",
        "pull_blocks",
        "load_blocks",
        "store_blocks",
        "stats",
        "step_times",
        "close_exchange",
    )

    def __init__(
        self,
        plan: NpuWorkerPlan,
        *,
        listen: channel.Address | None = None,
        authkey: bytes = b"",
        peers: Peers | None = None,
    ) -> None:
        """Load the weights of every rank. Raises OutOfDeviceMemory, WeightsError."""
        from model.collectives import exchange_in_process, run_lockstep
        from serving.rank import ModelRank

        self._merged = None
        if plan.merged is not None:
            self._merged = ModelRank(plan.merged)
            # Blocks of a member rank: its own part of the merged cache, or (sequence_tensor) all of it.
            self._num_member_blocks = plan.npus[0].ranks[0].num_blocks if plan.is_data_parallel else 0
        self._npus: list[Npu[StepInput, StepOutput]] = []
        self._place: dict[int, tuple[Npu[StepInput, StepOutput], int]] = {}  # rank -> its NPU and die
        for npu_plan in plan.npus:
            npu: Npu[StepInput, StepOutput] = Npu(npu_plan.npu_id, plan.spec, num_dies=len(npu_plan.ranks))
            for die, rank_plan in enumerate(npu_plan.ranks):
                make_rank: Callable[[], Any] = partial(ModelRank, rank_plan)
                if self._merged is not None:
                    make_rank = partial(self._merged.member, len(self._place), num_blocks=self._num_member_blocks)
                npu.load(die, make_rank, reserved_bytes=plan.reserved_bytes)
                self._place[rank_plan.layout.rank] = (npu, die)
            self._npus.append(npu)
        self._run_lockstep = run_lockstep
        self._exchange: Exchange = exchange_in_process
        self._times = StepTimes()
        self._open_group: Any = None
        self._peers = peers or SocketPeers(authkey)
        super().__init__(listen, authkey)  # last: from here on others may call

    def open_exchange(self, spec: Any, process_index: int) -> None:
        """Join the group of the instance's workers; all must be called at once. Raises CollectiveTimeout."""
        import torch

        if isinstance(spec, WindowGroupSpec):
            from serving.shared_memory import SharedMemoryExchange

            self._open_group = SharedMemoryExchange(spec, process_index, from_array=torch.from_numpy, borrow=True)
        else:
            from serving.gloo_exchange import GlooExchange

            self._open_group = GlooExchange(spec, process_index)
        self._exchange = self._open_group.exchange

    def start_store(self, host: str) -> int:
        """Serve the store through which a gloo group meets; returns its port."""
        from serving.gloo_exchange import start_store

        self._store = start_store(host)
        return int(self._store.port)

    def close_exchange(self) -> None:
        """Leave the group."""
        if self._open_group is not None:
            self._open_group.close()
            self._open_group = None

    def step(self, inputs: Sequence[StepInput], charged_ns: int) -> list[StepOutput]:
        """One step of the local ranks, in rank order, together with the group's other workers."""
        start_ns, start_cpu_ns = time.perf_counter_ns(), time.thread_time_ns()
        outputs = self._step_merged(inputs, charged_ns) if self._merged else self._step_each(inputs, charged_ns)
        self._times.num_steps += 1
        self._times.wall_ns += time.perf_counter_ns() - start_ns
        self._times.cpu_ns += time.thread_time_ns() - start_cpu_ns
        return outputs

    def _step_each(self, inputs: Sequence[StepInput], charged_ns: int) -> list[StepOutput]:
        """Every rank on its own, in lockstep."""
        generators = []
        for npu in self._npus:
            own, inputs = inputs[: npu.num_dies], inputs[npu.num_dies :]
            generators += npu.forward(own, charged_ns=charged_ns)
        return self._run_lockstep(generators, exchange=self._timed_exchange)

    def _step_merged(self, inputs: Sequence[StepInput], charged_ns: int) -> list[StepOutput]:
        """All local ranks as one batch."""
        assert self._merged is not None
        for npu in self._npus:
            npu.charge(charged_ns)
        num_blocks = self._num_member_blocks
        merged = merge_steps(inputs, num_blocks=num_blocks) if num_blocks else inputs[0]
        [output] = self._run_lockstep([self._merged.step(merged)], exchange=self._timed_exchange)
        return split_output(output, inputs) if num_blocks else share_output(output, len(inputs))

    def step_times(self) -> "StepTimes":
        """Where the steps' real time went so far."""
        return self._times

    def _timed_exchange(self, collectives: "Sequence[Collective]") -> "Sequence[Reply]":
        start_ns = time.perf_counter_ns()
        replies = self._exchange(collectives)
        self._times.exchange_ns += time.perf_counter_ns() - start_ns
        return replies

    def read_blocks(self, rank: int, block_ids: BlockIds) -> NDArray[np.float32]:
        """Cache blocks of one rank."""
        npu, die = self._place[rank]
        blocks: NDArray[np.float32] = npu.read_blocks(die, block_ids)
        return blocks

    def pull_blocks(
        self, rank: int, block_ids: BlockIds, source: Any, source_rank: int, source_block_ids: BlockIds
    ) -> None:
        """Copy cache blocks of a rank of another worker into `block_ids` of a local rank."""
        blocks = self._peers.call(source, "read_blocks", source_rank, source_block_ids)
        npu, die = self._place[rank]
        npu.write_blocks(die, block_ids, blocks)

    def load_blocks(self, ranks: Sequence[int], block_ids: BlockIds, parts: Sequence[PoolPart]) -> None:
        """Copy pool objects into cache blocks of local ranks, the same for all."""
        for address, handles, positions in parts:
            blocks = np.stack(self._peers.call(address, "read", handles), axis=1)
            for rank in ranks:
                npu, die = self._place[rank]
                npu.write_blocks(die, block_ids[positions], blocks)

    def store_blocks(self, rank: int, block_ids: BlockIds, parts: Sequence[PoolPart]) -> None:
        """Copy cache blocks of a local rank into pool objects."""
        for address, handles, positions in parts:
            blocks = self.read_blocks(rank, block_ids[positions])
            self._peers.call(address, "write", handles, [blocks[:, i] for i in range(blocks.shape[1])])

    def stats(self) -> list[NpuStats]:
        """State and totals of every NPU."""
        return [npu.stats() for npu in self._npus]


class HostWorker(_Served):
    """One host. Called by many at once."""

    METHODS = ("write", "read", "free", "stats")

    def __init__(self, plan: HostPlan, *, listen: channel.Address | None = None, authkey: bytes = b"") -> None:
        self._host = Host(plan.host_id, dram_bytes=plan.dram_bytes, block_bytes=plan.block_bytes)
        self._lock = threading.Lock()
        super().__init__(listen, authkey)

    def write(self, handles: Sequence[int], blocks: Sequence[NDArray[np.float32]]) -> None:
        """Store blocks under new handles."""
        with self._lock:
            for handle, block in zip(handles, blocks, strict=True):
                self._host.write(handle, block)

    def read(self, handles: Sequence[int]) -> list[NDArray[np.float32]]:
        """Blocks by handle."""
        with self._lock:
            return self._host.read(handles)

    def free(self, handles: Sequence[int]) -> None:
        """Drop blocks; of a store that failed, some were never written."""
        with self._lock:
            stored = self._host.dram.reservations
            self._host.free([handle for handle in handles if handle in stored])

    def stats(self) -> HostStats:
        """State and totals."""
        with self._lock:
            return self._host.stats()
