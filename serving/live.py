"""Runs with a wall: serving until a signal, serve-bench-shutdown in one go, and replays over real actors.

Owns: the order of boot and shutdown, when a signal may cut in, and the report of what is still held afterwards.
Must not know: how devices start (serving/ray_devices.py), what runs in the event loop (serving/system.py), routes.
"""

import asyncio
import dataclasses
import functools
import socket
import sys
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from devices.clock import ScaledClock, VirtualClock, run
from serving.bench import run_bench
from serving.bench_config import BenchConfig
from serving.build import host_plans
from serving.client_process import run_in_process
from serving.config import RunConfig
from serving.interrupts import Interrupts
from serving.ray_devices import RayDevices, checkpoint_directory
from serving.report import BenchResult
from serving.run_info import mean_rate
from serving.server import bind, serve
from serving.session import Session
from serving.simulator import (
    SimulationResult,
    cluster_figures,
    measured_expert_load,
    run_in_virtual_time,
)
from serving.system import System
from serving.workloads.load import load_workload
from serving.workloads.workload import Workload

OnReady = Callable[[System], Awaitable[None] | None]


def make_clock(config: RunConfig) -> VirtualClock | ScaledClock:
    """The clock of a live run; with scale 0 time jumps as soon as the devices are done."""
    return ScaledClock(config.clock.scale) if config.clock.scale else VirtualClock()


class LiveRun:
    """One booted system, from the session to the HTTP server. A context manager; `held` is what is left at its end.

    A signal ends the boot with KeyboardInterrupt and the serving in order. What is made and removed in between is never
    cut short.
    """

    def __init__(self, config: RunConfig, *, shards: str, address: str | None, keep_events: bool = False) -> None:
        self._config = config
        self._keep_events = keep_events
        self._shards = shards
        self._address = address
        self._stack = ExitStack()
        self._interrupts = Interrupts()
        self.devices: RayDevices | None = None
        self.held: dict[str, int] = {}

    def __enter__(self) -> "LiveRun":
        config, stack = self._config, self._stack
        stack.enter_context(self._interrupts)
        try:
            self.listener: socket.socket = stack.enter_context(bind(config.server.host, config.server.port))
            self.session = Session()
            stack.callback(self._close_session)
            if self._shards == "torch":
                self.devices = stack.enter_context(RayDevices(config, self.session, address=self._address))
                num_hosts = len(host_plans(config))
                print(f"booting {config.total_npus} NPUs, {num_hosts} hosts ...", file=sys.stderr, flush=True)
            with self._interrupts.raised():
                self.checkpoint = checkpoint_directory(config, self.session, with_weights=self.devices is not None)
                if self.devices is not None:
                    self.devices.start(self.checkpoint)
        except BaseException:
            stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def url(self) -> str:
        """Where the endpoint is."""
        host, port = self.listener.getsockname()[:2]
        return f"http://{'[' + host + ']' if ':' in host else host}:{port}"

    def serve(self, on_ready: OnReady) -> None:
        """Serve until a signal, or until the awaitable that `on_ready` returns is done; it is canceled at a signal."""
        clock = make_clock(self._config)
        run(self._serve(clock, on_ready), clock)

    async def _serve(self, clock: VirtualClock | ScaledClock, on_ready: OnReady) -> None:
        loop = asyncio.get_running_loop()
        transport = self.devices.open_transport() if self.devices is not None else None
        try:
            system = System(
                self._config,
                clock=clock,
                transport=transport,
                checkpoint=self.checkpoint,
                keep_events=self._keep_events,
            )
            system.start()
            stop = asyncio.Event()
            work: asyncio.Future[None] | None = None

            def ready() -> None:
                nonlocal work
                awaitable = on_ready(system)
                if awaitable is not None:
                    work = asyncio.ensure_future(awaitable)
                    work.add_done_callback(lambda _: stop.set())

            async def end() -> None:
                if self._interrupts.was_interrupted:
                    print("shutting down ...", file=sys.stderr, flush=True)
                if work is not None:
                    work.cancel()
                    await asyncio.wait((work,))
                await system.stop()

            with self._interrupts.redirected(lambda: loop.call_soon_threadsafe(stop.set)):
                await serve(system.app, self.listener, stop=stop, on_ready=ready, on_stop=end)
            self.held = system.held()
            if work is not None and not work.cancelled():
                work.result()
        finally:
            if self.devices is not None:
                await self.devices.close_transport()

    def _close_session(self) -> None:
        num_windows = self.session.num_windows  # what nobody gave back, before it is removed
        self.session.close()
        self.held |= {"processes": self.session.num_processes, "shared_memory_windows": num_windows}


def serve_forever(config: RunConfig, *, shards: str, address: str | None) -> dict[str, int]:
    """Boot, serve until Ctrl-C or SIGTERM, shut down; returns what is still held: all zero unless something is wrong.

    The address goes to standard output, once it can be used; everything else to standard error.
    """
    live = LiveRun(config, shards=shards, address=address)
    with live:
        live.serve(lambda system: print(f"serving {config.model.served_model_name} on {live.url}", flush=True))
    return live.held


def run_once(
    config: RunConfig, *, trace: Path | None, trace_divisor: int, shards: str, address: str | None
) -> BenchResult:
    """Boot, drive the endpoint with the load generator (in a process of its own), shut down."""
    num_requests = config.workload.num_requests  # of a trace too: live runs take as long as they simulate
    workload = load_workload(config, trace=trace, trace_divisor=trace_divisor, num_requests=num_requests)
    return run_workload(config, workload, shards=shards, address=address)


def run_workload(
    config: RunConfig,
    workload: Workload,
    *,
    shards: str,
    address: str | None,
    keep_events: bool = False,
    on_ready: Callable[[System], None] = lambda system: None,
) -> BenchResult:
    """The same with a given workload. `on_ready` sees the system before the first request; its log, if events are
    kept, its metrics and its clock may be read when this has returned.
    """
    config = config.with_port(0)
    live = LiveRun(config, shards=shards, address=address, keep_events=keep_events)
    bench: BenchResult | None = None
    figures: dict[str, float | int | str] = {}
    expert_load: dict[str, Any] | None = None
    with live:

        async def measure(system: System) -> None:
            print(f"serving on {live.url}", file=sys.stderr, flush=True)
            nonlocal bench, expert_load
            on_ready(system)
            bench = await run_in_process(functools.partial(run_bench, bench_config(config, live.url), workload))
            figures.update(cluster_figures(system.cluster))
            expert_load = measured_expert_load(system.cluster)
            if live.devices is not None:
                figures.update(await live.devices.step_figures())
            figures["simulated_s"] = system.clock.now_ns() / 1e9
            figures["lag_s"] = system.clock.lag_ns / 1e9

        live.serve(measure)
    if bench is None:
        raise KeyboardInterrupt
    # The load generator replays arrivals, and knows of no rate.
    info = dataclasses.replace(bench.info, request_rate=mean_rate(workload), burstiness=config.workload.burstiness)
    return dataclasses.replace(bench, info=info, cluster=figures, expert_load=expert_load, held_at_rest=live.held)


def replay(
    config: RunConfig, workload: Workload, *, address: str | None = None, keep_events: bool = False
) -> SimulationResult:
    """Run `workload` in virtual time with torch shards in Ray actors."""
    with (
        Interrupts() as interrupts,
        Session() as session,
        RayDevices(config, session, address=address) as devices,
        interrupts.raised(),
    ):
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
