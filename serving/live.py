"""Runs with a wall: serving until a signal, serve-bench-shutdown in one go, and replays over real actors.

Owns: the order of boot and shutdown, and the report of what is still held afterwards.
Must not know: how devices start (serving/ray_devices.py), routes, schedules.
"""

import asyncio
import dataclasses
import logging
import multiprocessing
import socket
import sys
from collections.abc import Awaitable, Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from devices.clock import ScaledClock, VirtualClock, run
from model.tokenizer import Tokenizer
from serving.bench import run_bench_until_interrupt
from serving.bench_config import BenchConfig
from serving.build import build_cluster
from serving.config import RunConfig
from serving.core.event_log import EventLog
from serving.frontend import Frontend
from serving.http_api import create_app
from serving.metrics import Metrics
from serving.observer import Observer
from serving.ray_devices import RayDevices, checkpoint_directory
from serving.report import BenchResult
from serving.server import bind, serve
from serving.session import Session, interruptible
from serving.simulator import SimulationResult, cluster_figures, load_workload, run_in_virtual_time
from serving.transport import WorkerTransport
from serving.workload import Workload

logger = logging.getLogger(__name__)
OnReady = Callable[[str, Frontend], None]


def make_clock(config: RunConfig) -> VirtualClock | ScaledClock:
    """The clock of a live run; with scale 0 time jumps as soon as the devices are done."""
    return ScaledClock(config.clock.scale) if config.clock.scale else VirtualClock()


class LiveRun:
    """One booted system, from the session to the HTTP server. A context manager; `held` is what is left at its end."""

    def __init__(self, config: RunConfig, *, shards: str, address: str | None) -> None:
        self._config = config
        self._shards = shards
        self._address = address
        self._stack = ExitStack()
        self.held: dict[str, int] = {}

    def __enter__(self) -> "LiveRun":
        self._stack.enter_context(interruptible())
        try:
            self.listener: socket.socket = self._stack.enter_context(
                bind(self._config.server.host, self._config.server.port)
            )
            self.session = Session()
            self._stack.callback(self._close_session)
            self.checkpoint = checkpoint_directory(self._config, self.session)
            self.devices: RayDevices | None = None
            if self._shards == "torch":
                self.devices = self._stack.enter_context(RayDevices(self._config, self.session, address=self._address))
                self.devices.start(self.checkpoint)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def url(self) -> str:
        """Where the endpoint is."""
        host, port = self.listener.getsockname()[:2]
        return f"http://{'[' + host + ']' if ':' in host else host}:{port}"

    def serve(self, on_ready: Callable[["System"], Awaitable[None] | None]) -> None:
        """Serve until a signal, or until the awaitable that `on_ready` returns is done."""
        clock = make_clock(self._config)
        run(self._serve(clock, on_ready), clock)

    async def _serve(
        self, clock: VirtualClock | ScaledClock, on_ready: Callable[["System"], Awaitable[None] | None]
    ) -> None:
        transport = self.devices.open_transport() if self.devices is not None else None
        try:
            system = System(self._config, clock=clock, transport=transport, checkpoint=self.checkpoint)
            system.start()
            stop = asyncio.Event()
            work: asyncio.Future[None] | None = None

            def ready() -> None:
                nonlocal work
                awaitable = on_ready(system)
                if awaitable is not None:
                    work = asyncio.ensure_future(awaitable)
                    work.add_done_callback(lambda _: stop.set())

            await serve(system.app, self.listener, stop=stop, on_ready=ready, on_stop=system.stop)
            if work is not None:
                work.cancel()
                await asyncio.gather(work, return_exceptions=True)
            self.held = system.held()
        finally:
            if self.devices is not None:
                await self.devices.close_transport()

    def _close_session(self) -> None:
        self.session.close()
        self.held |= self.session.held()


class System:
    """Everything of one serving system that lives in the event loop."""

    def __init__(
        self,
        config: RunConfig,
        *,
        clock: VirtualClock | ScaledClock,
        transport: WorkerTransport | None,
        checkpoint: Path,
    ) -> None:
        self.config = config
        self.clock = clock
        self.metrics = Metrics(model_name=config.model.served_model_name, max_model_len=config.model.max_model_len)
        self.observer = Observer(self.metrics, config=config)
        self.log = EventLog()
        self.cluster = build_cluster(
            config, clock=clock, log=self.log, transport=transport, on_step=self.observer.on_step
        )
        self.frontend = Frontend(
            self.cluster,
            tokenizer=Tokenizer.from_file(checkpoint / "tokenizer.json"),
            on_outcome=self.observer.on_outcome,
        )
        self.observer.watch(self.cluster, self.frontend)
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
        """Refuse new requests, end running ones, wait until nothing is held, end the step loops."""
        self.frontend.drain()
        await self.frontend.abort_all()
        await self.cluster.stop()
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


def serve_forever(config: RunConfig, *, shards: str, address: str | None) -> dict[str, int]:
    """Boot, serve until Ctrl-C or SIGTERM, shut down; returns what is still held: all zero unless something is wrong."""
    live = LiveRun(config, shards=shards, address=address)
    with live:
        print(f"booting {config.total_npus} NPUs, {config.kv_pool.hosts} hosts ...", file=sys.stderr, flush=True)
        live.serve(
            lambda system: print(f"serving {config.model.served_model_name} on {live.url}", file=sys.stderr, flush=True)
        )
        print("shutting down ...", file=sys.stderr, flush=True)
    return live.held


def run_once(
    config: RunConfig, *, trace: Path | None, trace_divisor: int, shards: str, address: str | None
) -> BenchResult:
    """Boot, drive the endpoint with the load generator (in a process of its own), shut down."""
    workload = load_workload(config, trace=trace, trace_divisor=trace_divisor)
    config = config.with_port(0)
    live = LiveRun(config, shards=shards, address=address)
    bench: BenchResult | None = None
    figures: dict[str, float | int | str] = {}
    with live:
        print(f"booting {config.total_npus} NPUs, {config.kv_pool.hosts} hosts ...", file=sys.stderr, flush=True)

        async def measure(system: System) -> None:
            print(f"serving on {live.url}", file=sys.stderr, flush=True)
            nonlocal bench
            bench = await _bench_in_child(bench_config(config, live.url), workload)
            figures.update(cluster_figures(system.cluster))
            if live.devices is not None:
                figures.update(await live.devices.step_figures())
            figures["simulated_s"] = system.clock.now_ns() / 1e9
            figures["lag_s"] = system.clock.lag_ns / 1e9

        live.serve(measure)
    if bench is None:
        raise KeyboardInterrupt
    return dataclasses.replace(bench, cluster=figures, held_at_rest=live.held)


def replay(
    config: RunConfig, workload: Workload, *, address: str | None = None, keep_events: bool = False
) -> SimulationResult:
    """Run `workload` in virtual time with torch shards in Ray actors."""
    with interruptible(), Session() as session, RayDevices(config, session, address=address) as devices:
        devices.start(checkpoint_directory(config, session))
        return run_in_virtual_time(
            config,
            workload,
            open_transport=devices.open_transport,
            close_transport=devices.close_transport,
            keep_events=keep_events,
        )


def bench_config(config: RunConfig, url: str) -> BenchConfig:
    """How `run` drives its own endpoint: the workload's arrivals, on the clock's scale."""
    is_closed = config.workload.max_concurrency is not None
    return BenchConfig(
        base_url=url,
        model=config.model.served_model_name,
        api_key=config.server.api_key,
        replay=not is_closed,
        time_factor=config.clock.scale or 1.0,
        max_concurrency=config.workload.max_concurrency,
        percentile_metrics=("ttft", "tpot", "itl", "e2el"),
        seed=config.seed,
    )


async def _bench_in_child(bench: BenchConfig, workload: Workload) -> BenchResult:
    """Run the load generator in a process of its own, so that it takes no time of the server's event loop."""
    context = multiprocessing.get_context("spawn")
    loop = asyncio.get_running_loop()
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return await loop.run_in_executor(pool, run_bench_until_interrupt, bench, workload)
