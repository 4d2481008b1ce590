"""Ray: the local cluster that a launch starts or the running one that it joins, and the actors that stand for devices.

Owns: `ray.init`, placement groups, the wrapping of workers (serving/worker.py) as actors, their end; functions mapped
over arguments as tasks.
Must not know: requests, schedules, simulated time. The only module that imports ray; actors have no logic of their own.

Engine steps and cache blocks do not go through Ray (serving/channel.py says why): an actor is created here, tells where
it listens, and is ended here.
"""

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from serving.channel import Address
from serving.core.ids import InstanceId
from serving.errors import ConfigError, EngineFailure
from serving.session import Session
from serving.worker import HostPlan, HostWorker, NpuWorker, NpuWorkerPlan

# Before ray is imported: it reads its environment once.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # Ray 2.60 switches tokens on by itself after a first start
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # our NPUs are no accelerators that Ray may hide

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

A = TypeVar("A")
R = TypeVar("R")
NPU, HOST = "NPU", "CPU_HOST"  # names of the custom resources that stand for devices
CONNECT_TIMEOUT_S = 5.0
OBJECT_STORE_BYTES = 80 * 1024 * 1024  # little more than Ray's minimum: no tensor passes through it


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A started worker: where its channels listen and on which Ray node it runs."""

    address: Address
    node_id: str


@contextlib.contextmanager
def _signal_handlers_kept() -> Iterator[None]:
    """Put the handlers back that `ray.init` replaces: its own, for SIGTERM, in Python and in C++, end the process.

    One that comes meanwhile is passed on as KeyboardInterrupt.
    """
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in previous.items():
                signal.signal(number, handler)


class RayCluster:
    """The devices of one launch as actors. Blocking calls; a context manager."""

    def __init__(self, session: Session, *, address: str | None, startup_timeout_s: float) -> None:
        self._session = session
        self._timeout_s = startup_timeout_s
        self._actors: dict[str, Any] = {}
        self._node_of: dict[str, str] = {}
        self._groups: list[PlacementGroup] = []
        self._address = address

    def __enter__(self) -> "RayCluster":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self, *, num_npus: int, num_hosts: int) -> None:
        """Start a private local cluster with so many devices, or join the one at `address`.

        Raises ConfigError when the joined cluster has too few devices.
        """
        resources = {NPU: num_npus, HOST: max(num_hosts, 1)}
        _init_ray(self._session, address=self._address, num_cpus=1, resources=resources)
        if self._address is not None:
            self._check_resources({NPU: num_npus, HOST: num_hosts})

    def launch(
        self, npus: Mapping[InstanceId, Sequence[NpuWorkerPlan]], hosts: Sequence[HostPlan]
    ) -> dict[str, Placed]:
        """Create every worker: one gang of NPU workers per instance, packed; hosts spread. Returns them by id.

        Raises EngineFailure when a worker does not start in time.
        """
        actor_class = ray.remote(NpuWorker)
        for plans in npus.values():
            self._create_group(actor_class, plans, [{NPU: len(plan.npus)} for plan in plans], "PACK")
        if hosts:
            self._create_group(ray.remote(HostWorker), hosts, [{HOST: 1} for _ in hosts], "SPREAD")
        addresses = self.call_all(dict.fromkeys(self._actors, ("address", ())))
        return {
            worker_id: Placed(address=address, node_id=self._node_of[worker_id])
            for worker_id, address in addresses.items()
        }

    def call_all(self, calls: Mapping[str, tuple[str, tuple[Any, ...]]]) -> dict[str, Any]:
        """Call a method of several workers at once and wait for all. Raises EngineFailure naming the worker."""
        refs = {
            worker_id: getattr(self._actors[worker_id], method).remote(*args)
            for worker_id, (method, args) in calls.items()
        }
        _ready, waiting = ray.wait(list(refs.values()), num_returns=len(refs), timeout=self._timeout_s)
        late = [worker_id for worker_id, ref in refs.items() if ref in waiting]
        if late:
            raise EngineFailure(
                f"workers {', '.join(late)} did not answer within ray.startup_timeout_s {self._timeout_s:g}"
            )
        results = {}
        for worker_id, ref in refs.items():
            try:
                results[worker_id] = ray.get(ref)
            except ray.exceptions.RayError as error:
                raise EngineFailure(f"worker {worker_id}: {_reason(error)}") from error
        return results

    def node_ip(self, node_id: str) -> str:
        """Address of a Ray node."""
        return next(str(node["NodeManagerAddress"]) for node in ray.nodes() if node["NodeID"] == node_id)

    def kill(self, worker_id: str) -> None:
        """End one worker's process at once, as a device fault would."""
        ray.kill(self._actors[worker_id], no_restart=True)

    def close(self) -> None:
        """End every actor; leave the joined cluster, or end the private one. Closing twice is harmless."""
        if not ray.is_initialized():
            return
        if self._address is not None:  # a private cluster goes as a whole; one that has died would not even answer
            for actor in self._actors.values():
                ray.kill(actor, no_restart=True)
            for group in self._groups:
                ray.util.remove_placement_group(group)
        self._actors.clear()
        self._groups.clear()
        ray.shutdown()

    def _check_resources(self, needed: Mapping[str, int]) -> None:
        available = ray.available_resources()
        for name, number in needed.items():
            if number > available.get(name, 0):
                wanted = "{" + ", ".join(f'"{key}": {value}' for key, value in needed.items()) + "}"
                raise ConfigError(
                    f"the Ray cluster has {available.get(name, 0):g} free {name}, {number} are needed; "
                    f"start it with --resources='{wanted}'"
                )

    def _create_group(
        self,
        actor_class: Any,
        plans: Sequence[NpuWorkerPlan | HostPlan],
        bundles: list[dict[str, float]],
        strategy: str,
    ) -> None:
        group = placement_group(bundles, strategy=strategy)
        self._groups.append(group)
        if not group.wait(self._timeout_s):
            raise EngineFailure(
                f"Ray could not place workers of {bundles} within ray.startup_timeout_s {self._timeout_s:g}"
            )
        nodes = placement_group_table(group)["bundles_to_node_id"]
        here = ray.get_runtime_context().get_node_id()
        for index, plan in enumerate(plans):
            node = nodes[index]
            listen: Address = (
                str(self._session.folder / f"{plan.worker_id}.sock") if node == here else (self.node_ip(node), 0)
            )
            options = {
                "num_cpus": 0,
                "resources": bundles[index],
                "max_restarts": 0,  # a lost rank has lost its cache: the control plane decides what happens
                "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
            }
            actor = actor_class.options(**options).remote(plan, listen=listen, authkey=self._session.authkey)
            self._actors[plan.worker_id] = actor
            self._node_of[plan.worker_id] = node


def _init_ray(session: Session, *, address: str | None, num_cpus: int, resources: Mapping[str, float]) -> None:
    """Join the cluster at `address`, or start a private one in the session's folder. Raises ConfigError."""
    logging.getLogger("ray._private.accelerators.npu").setLevel(logging.CRITICAL)  # looks for a real Ascend
    common: dict[str, Any] = {
        "namespace": f"supernode-{session.session_id}",
        "log_to_driver": False,
        "logging_level": logging.ERROR,
    }
    if address is None:
        with _signal_handlers_kept():
            ray.init(
                address="local",  # whatever RAY_ADDRESS says
                num_cpus=num_cpus,
                resources=dict(resources),
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=str(session.folder / "ray"),
                **common,
            )
        return
    _check_reachable(address)
    try:
        with _signal_handlers_kept():
            ray.init(address=address, **common)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        raise ConfigError(f"--address: no Ray cluster at {address!r}: {error}") from error


class TaskCluster:
    """Ray for independent tasks: a private cluster of `num_cpus`, or the one at `address`. A context manager."""

    def __init__(self, session: Session, *, address: str | None, num_cpus: int) -> None:
        _init_ray(session, address=address, num_cpus=num_cpus, resources={})

    def __enter__(self) -> "TaskCluster":
        return self

    def __exit__(self, *_: object) -> None:
        ray.shutdown()

    def map(self, function: Callable[[A], R], arguments: Sequence[A]) -> Iterator[tuple[int, R | EngineFailure]]:
        """Call `function` with every argument, one task on one CPU each; yields (index, result) as they are done.

        A task that crashes gives an EngineFailure in place of its result. The tasks that are under way when the
        iterator is closed are cancelled.
        """
        task = ray.remote(num_cpus=1, max_retries=1)(function)
        at_once = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))  # one runs, one waits, on every CPU
        index_of: dict[Any, int] = {}
        next_index = 0
        try:
            while next_index < len(arguments) or index_of:
                while next_index < len(arguments) and len(index_of) < at_once:
                    index_of[task.remote(arguments[next_index])] = next_index
                    next_index += 1
                done, _waiting = ray.wait(list(index_of), num_returns=1)
                for ref in done:
                    index = index_of.pop(ref)
                    try:
                        yield index, ray.get(ref)
                    except ray.exceptions.RayError as error:
                        yield index, EngineFailure(_reason(error))
        finally:
            for ref in index_of:
                ray.cancel(ref, force=True)


def _check_reachable(address: str) -> None:
    """Raises ConfigError if nobody listens at HOST:PORT. Ray itself would try for minutes."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal():
        return  # `auto` and the like, which Ray looks up
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--address: no Ray cluster at {address!r}: {error}") from None


def _reason(error: ray.exceptions.RayError) -> str:
    """What went wrong in a worker, without the trace through Ray: of an error at its creation, the last line."""
    cause = getattr(error, "cause", None)
    if cause is not None:
        return f"{type(cause).__name__}: {cause}"
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
