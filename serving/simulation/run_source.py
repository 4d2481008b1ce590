"""One simulation by name: which workload it has, and the run or the figures that it gives.

Owns: `WorkloadSource`, and the way from a configuration and a source to a result.
Must not know: grids, plans, command lines.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving.config import RunConfig
from serving.errors import ConfigError, shown
from serving.records import Goodput
from serving.simulation.columns import RunColumns
from serving.simulation.figures import figures
from serving.simulation.run import simulate
from serving.workloads.load import load_workload
from serving.workloads.workload import Workload


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

    @classmethod
    def of(
        cls,
        *,
        trace: Path | None = None,
        name: str | None = None,
        rate: float | None = None,
        num_requests: int | None = None,
        duration_s: float | None = None,
    ) -> "WorkloadSource":
        """What options say. Raises ConfigError if they say two things, or the trace cannot be read."""
        if trace is not None and name is not None:
            raise ConfigError(f"--workload: {shown(name)}, but --trace {trace} is the workload")
        try:
            digest = None if trace is None else file_digest(trace)
        except OSError as error:
            raise ConfigError(f"--trace: {trace}: {error.strerror}") from None
        return cls(
            trace=None if trace is None else str(trace.absolute()),
            trace_digest=digest,
            name=name,
            rate=rate,
            num_requests=num_requests,
            duration_s=duration_s,
        )

    @property
    def identity(self) -> tuple[object, ...]:
        """All that decides the workload, beside the configuration; where the trace's file lies does not."""
        return (self.trace_digest, self.name, self.rate, self.num_requests, self.duration_s)

    def __str__(self) -> str:
        return self.name or (Path(self.trace).name if self.trace else "the configuration's workload")


def file_digest(path: Path) -> str:
    """Of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def load_source(config: RunConfig, source: WorkloadSource) -> Workload:
    """The requests of `source` under `config`. Raises ConfigError, or TraceError naming line and field."""
    return load_workload(
        config,
        trace=None if source.trace is None else Path(source.trace),
        name=source.name,
        rate=source.rate,
        duration_s=source.duration_s,
        num_requests=source.num_requests,
    )


def run_source(config: RunConfig, source: WorkloadSource) -> RunColumns:
    """Simulate. Raises KeyboardInterrupt if that was cut short: half a run is no answer to anything asked here."""
    return _whole(simulate(config, load_source(config, source)))


def run_figures(config: RunConfig, source: WorkloadSource, *, goodput: Goodput | None) -> dict[str, Any]:
    """The figures of a simulation, as JSON values. Raises as `run_source`."""
    workload = load_source(config, source)
    return figures(config, workload, _whole(simulate(config, workload)), goodput=goodput)


def mean_lengths(config: RunConfig, source: WorkloadSource) -> tuple[float, float]:
    """Mean prompt and output tokens of a request."""
    workload = load_source(config, source)
    return float(workload.num_prompt_tokens.mean()), float(workload.max_tokens.mean())


def _whole(run: RunColumns) -> RunColumns:
    if run.interrupted:
        raise KeyboardInterrupt
    return run
