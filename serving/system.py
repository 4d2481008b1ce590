"""Everything of one serving system that lives in the event loop: control plane, metrics, the HTTP application.

Owns: how these are put together, their start and their orderly end.
Must not know: devices' processes, sockets, signals.
"""

import asyncio
import logging
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from devices.clock import ScaledClock, VirtualClock
from model.tokenizer import Tokenizer
from serving.build import build_cluster
from serving.config import RunConfig
from serving.core.event_log import EventLog
from serving.frontend import Frontend
from serving.http_api import create_app
from serving.metrics import Metrics
from serving.observer import Observer
from serving.transport import WorkerTransport

logger = logging.getLogger(__name__)
STOP_TIMEOUT_S = 10.0


class System:
    """Everything of one serving system that lives in the event loop."""

    def __init__(
        self,
        config: RunConfig,
        *,
        clock: VirtualClock | ScaledClock,
        transport: WorkerTransport | None,
        checkpoint: Path,
        keep_events: bool = False,
    ) -> None:
        self.config = config
        self.clock = clock
        self.metrics = Metrics(model_name=config.model.served_model_name, max_model_len=config.model.max_model_len)
        self.observer = Observer(self.metrics, config=config)
        self.log = EventLog(keep=keep_events)
        self.cluster = build_cluster(
            config, clock=clock, log=self.log, transport=transport, on_step=self.observer.on_step
        )
        self.frontend = Frontend(
            self.cluster,
            tokenizer=Tokenizer.from_file(checkpoint / "tokenizer.json"),
            on_outcome=self.observer.on_outcome,
        )
        self.observer.watch(self.cluster, self.frontend)
        if transport is not None:
            transport.watch(self.cluster.lose_instance, self.cluster.lose_host)
        api_key = config.server.api_key
        self.app = create_app(
            self.frontend,
            metrics=self.metrics,
            api_keys=[api_key] if api_key else [],
            version=package_version(),
        )

    def start(self) -> None:
        """Start the step loops."""
        self.cluster.start()

    async def stop(self) -> None:
        """Refuse new requests, end running ones, wait until nothing is held, end the step loops.

        A device that hangs is not waited for longer than STOP_TIMEOUT_S; what it keeps is then still held.
        """
        self.frontend.drain()
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await self.frontend.abort_all()
                await self.cluster.stop()
        except TimeoutError:
            logger.error("not at rest %g s after the end: %s", STOP_TIMEOUT_S, self.held())
        else:
            self.cluster.check_invariants()

    def held(self) -> dict[str, int]:
        """What is still held; all zero at rest."""
        tasks = [task for task in asyncio.all_tasks() if task.get_name().startswith(("life", "engine", "move"))]
        return self.cluster.held() | {
            "lives": self.frontend.num_lives,
            "queued": self.frontend.num_waiting,
            "tasks": len(tasks),
        }


def package_version() -> str:
    """Version of the installed distribution."""
    try:
        return version("supernode-infer")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "0.0.0"
