"""Devices of this process: the same workers as in actors, called directly, ranks of an instance in lockstep.

Owns: the in-process twin of a cluster's devices, for tests and for runs without Ray.
Must not know: requests, time.
"""

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

from serving.build import host_plans, npu_worker_plans
from serving.config import RunConfig
from serving.errors import EngineFailure
from serving.transport import WorkerTransport
from serving.worker import HostWorker, LocalPeers, NpuWorker


def local_transport(config: RunConfig, checkpoint: Path) -> WorkerTransport:
    """Workers for every instance and host in this process. An order is carried out when it is given."""
    peers = LocalPeers()
    ranks = {}
    for instance_id, plans in npu_worker_plans(config, checkpoint).items():
        whole = dataclasses.replace(
            plans[0],
            npus=tuple(npu for plan in plans for npu in plan.npus),
            merged=plans[0].merged if len(plans) == 1 else None,
        )
        peers.workers[whole.worker_id] = NpuWorker(whole, peers=peers)
        ranks[instance_id] = [(whole.worker_id, whole.ranks)]
    hosts = host_plans(config)
    for host in hosts:
        peers.workers[host.worker_id] = HostWorker(host)

    def invoke(worker_id: str, lane: str, method: str, args: tuple[Any, ...]) -> "asyncio.Future[Any]":
        future = asyncio.get_running_loop().create_future()
        try:
            future.set_result(peers.call(worker_id, method, *args))
        except Exception as error:  # noqa: BLE001 - told as a channel tells it
            future.set_exception(EngineFailure(f"{method}: {type(error).__name__}: {error}"))
        return future

    return WorkerTransport(
        invoke=invoke,
        ranks=ranks,
        hosts=[host.worker_id for host in hosts],
        address_of={worker_id: worker_id for worker_id in peers.workers},
    )
