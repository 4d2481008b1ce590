"""One simulation by name: which workload it has, and the run or the figures that it gives.

Owns: `WorkloadSource`, and the way from a configuration and a source to a result.
Must not know: grids, plans, command lines.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving.config import RunConfig
from serving.errors import ConfigError
from serving.records import Goodput
from serving.report import to_json
from serving.simulator import load_workload, simulate
from serving.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadSource:
    """A trace, a built-in workload, or with neither the configuration's synthetic one; and what is taken of it.

    `rate` in requests per second replaces the source's own; `trace_digest` is that of the trace's bytes.
    """

    trace: str | None = None
    trace_digest: str | None = None
    name: str | None = None
    rate: float | None = None
    num_requests: int | None = None
    duration_s: float | None = None

    @property
    def identity(self) -> tuple[object, ...]:
        """All that decides the workload, beside the configuration; where the trace's file lies does not."""
        return (self.trace_digest, self.name, self.rate, self.num_requests, self.duration_s)


def load_source(config: RunConfig, source: WorkloadSource) -> Workload:
    """The requests of `source` under `config`. Raises ConfigError, or TraceError naming line and field."""
    workload = load_workload(config, trace=None if source.trace is None else Path(source.trace))
    return workload.limited(num_requests=source.num_requests, duration_s=source.duration_s)


def run_figures(config: RunConfig, source: WorkloadSource, *, goodput: Goodput | None) -> dict[str, Any]:
    """The figures of a simulation, as JSON values."""
    return to_json(simulate(config, load_source(config, source)).bench)
