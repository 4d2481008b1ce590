"""A run in virtual time from a configuration and a workload: one function, whatever drives it.

Owns: the choice of the driver, and what the run cost this machine.
Must not know: how drivers work, how figures are made of the columns.
"""

import dataclasses
import resource
import sys
import time
from collections.abc import Callable

from serving.config import RunConfig
from serving.simulation.columns import RunColumns
from serving.simulation.fast import run_fast
from serving.workloads.workload import Workload


def simulate(
    config: RunConfig,
    workload: Workload,
    *,
    moves: bool = False,
    digest: bool = False,
    on_progress: Callable[[int], None] = lambda num_over: None,
) -> RunColumns:
    """Run `workload` with timing shards, in this process. Ctrl-C ends it early: the columns are `interrupted` then.

    `moves` keeps every movement of blocks, `digest` gives that of the events. `on_progress` is told now and then how
    many requests are over. Raises AssertionError if anything contradicts itself in the end.
    """
    started = time.perf_counter()
    if config.disaggregated:
        columns = run_fast(config, workload, moves=moves, digest=digest, on_progress=on_progress)
    else:
        from serving.simulation.plain import run_plain  # the asyncio plane takes a while to import

        columns = run_plain(config, workload, moves=moves, digest=digest, on_progress=on_progress)
    return dataclasses.replace(columns, wall_s=time.perf_counter() - started, peak_rss_bytes=peak_rss_bytes())


def peak_rss_bytes() -> int:
    """Most memory that this process has had so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB
