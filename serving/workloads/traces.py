"""Traces: which reader a file needs, what of it is kept, and what is wrong with it.

Owns: the choice of the reader, the errors that name file, line and field, and the scaling of a trace to a small model.
Must not know: how requests are sent or served.
"""

import codecs
import gzip
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from serving.errors import ConfigError, ServingError, shown
from serving.workloads.requests import Ints
from serving.workloads.workload import DEFAULT_VOCABULARY, Workload

MOONCAKE_SPREAD_MS = 3000.0  # timestamps of kvcache-ai/Mooncake FAST25-release/traces come in steps of about 3 s
LARGEST = 2**62  # what a number of a trace may be: sums of two still fit


class TraceError(ServingError, ValueError):
    """A trace file does not hold what it should; the message names file, line (row of a table) and field."""

    def __init__(self, path: Path, line: int | None, field: str | None, problem: str, *, unit: str = "line") -> None:
        where = str(path)
        if line is not None:
            where += f":{line}" if unit == "line" else f": {unit} {line}"
        super().__init__(f"{where}: {problem}" if field is None else f"{where}: {field}: {problem}")
        self.path, self.line, self.field = path, line, field


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceOptions:
    """How a trace is turned into a workload.

    Every length, and the block size of hash ids, is divided by `length_divisor` (rounded up, at least 1) and
    then clipped; a clipped prompt keeps its first blocks, so shared prefixes stay shared. Requests that carry
    the same timestamp are spread uniformly over `spread_ms` (Mooncake only), never beyond the next timestamp.
    """

    length_divisor: int = 1
    max_input_tokens: int | None = None
    max_output_tokens: int | None = None
    spread_ms: float = MOONCAKE_SPREAD_MS
    seed: int = 0
    vocabulary: range = DEFAULT_VOCABULARY

    def __post_init__(self) -> None:
        if self.length_divisor < 1:
            raise ConfigError(f"length_divisor: {self.length_divisor} is below the limit 1")
        for field, value in (
            ("max_input_tokens", self.max_input_tokens),
            ("max_output_tokens", self.max_output_tokens),
        ):
            if value is not None and value < 1:
                raise ConfigError(f"{field}: {value} is below the limit 1")
        if not (math.isfinite(self.spread_ms) and self.spread_ms >= 0):
            raise ConfigError(f"spread_ms: {self.spread_ms} must be finite and at least the limit 0")

    def input_tokens(self, lengths: Ints) -> Ints:
        """Prompt tokens of the trace as tokens of the workload."""
        return self._scaled(lengths, self.max_input_tokens)

    def output_tokens(self, lengths: Ints) -> Ints:
        """Output tokens of the trace as tokens of the workload."""
        return self._scaled(lengths, self.max_output_tokens)

    def _scaled(self, lengths: Ints, limit: int | None) -> Ints:
        scaled = np.maximum(-(-lengths // self.length_divisor), 1)
        return scaled if limit is None else np.minimum(scaled, limit)


def load_trace(path: str | Path, options: TraceOptions | None = None) -> Workload:
    """Read a trace; its name says which: `.jsonl` is Mooncake's format, `.csv` Azure's, `.gz` either, `.parquet` that
    of samples of ServeGen.
    """
    from serving.workloads.azure import load_azure
    from serving.workloads.mooncake import load_mooncake
    from serving.workloads.servegen import load_servegen

    path, options = Path(path), options or TraceOptions()
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    last = suffixes[-1] if suffixes else ""
    if last in (".jsonl", ".json"):
        return load_mooncake(path, options)
    if last == ".csv":
        return load_azure(path, options)
    if last == ".parquet":
        return load_servegen(path, options)
    raise TraceError(path, None, None, "unknown format: the name must end in .jsonl or .csv (then .gz), or in .parquet")


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, line) of a text file, plain or gzip by its first bytes."""
    line = 0
    try:
        with path.open("rb") as raw:
            is_gzip = raw.read(2) == b"\x1f\x8b"
        with gzip.open(path) if is_gzip else path.open("rb") as stream:
            for line, data in enumerate(stream, 1):
                yield line, (data if line > 1 else data.removeprefix(codecs.BOM_UTF8)).decode()
    except FileNotFoundError:
        raise TraceError(path, None, None, "no such file") from None
    except UnicodeDecodeError as error:
        raise TraceError(path, line, None, f"not UTF-8 text ({error.reason})") from None
    except (EOFError, gzip.BadGzipFile) as error:
        raise TraceError(path, line + 1, None, f"compressed file is damaged or truncated ({error})") from None
    except OSError as error:
        raise TraceError(path, None, None, f"cannot be read ({error.strerror or error})") from None


def integer(path: Path, line: int, field: str, value: object, *, least: int) -> int:
    """`value`, if it is an integer in [least, LARGEST]; text of a number is none."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TraceError(path, line, field, f"{shown(value)} is not an integer")
    if value < least:
        raise TraceError(path, line, field, f"{value} is below the limit {least}")
    if value > LARGEST:
        raise TraceError(path, line, field, f"{shown(value)} is above the limit {LARGEST}")
    return value


def check_order(path: Path, lines: list[int], field: str, times: np.ndarray) -> None:
    """Raise if a time is earlier than the one before it."""
    is_late = np.diff(times) < 0
    if is_late.any():
        line = lines[int(is_late.argmax()) + 1]
        raise TraceError(path, line, field, "is earlier than that of the request before it")


def check_not_empty(path: Path, lines: list[int]) -> None:
    """Raise if there is no request."""
    if not lines:
        raise TraceError(path, None, None, "holds no request")
