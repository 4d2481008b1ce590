"""What a command costs from its start to its end, seen from outside: wall seconds, CPU seconds, peak memory.

Owns: how a process is measured.
Must not know: what it does.
"""

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

OURS = {"OMP_NUM_THREADS": "1"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of one process and those that it waited for; `cpu_s` is user and system time of all its threads."""

    wall_s: float
    cpu_s: float
    peak_rss_bytes: int


def cost_of(command: Sequence[str], *, stdout: Path | None = None, env: Mapping[str, str] | None = None) -> Cost:
    """Run `command` to its end, its output dropped or written to `stdout`.

    `env` is added to the environment. Raises CalledProcessError with what it wrote to standard error.
    """
    target = os.devnull if stdout is None else stdout
    with open(target, "wb") as output:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.PIPE, env=os.environ | OURS | (env or {}))
        assert process.stderr is not None
        with process.stderr:
            errors = process.stderr.read()  # until it ends, or closes it
        _, status, usage = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, stderr=errors.decode(errors="replace"))
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts KiB
    return Cost(wall_s=wall_s, cpu_s=usage.ru_utime + usage.ru_stime, peak_rss_bytes=usage.ru_maxrss * unit)
