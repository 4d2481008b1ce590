"""Readers of public request traces: Mooncake jsonl and Azure csv, plain or gzip.

Owns: the formats, the errors that name file, line and field, and the scaling of a trace to a small model.
Must not know: how requests are sent or served.
Source: kvcache-ai/Mooncake FAST25-release/traces (timestamp in ms, input_length, output_length, hash_ids of
chained 512-token blocks; timestamps come in steps of about 3 s); Azure/AzurePublicDataset LLM inference
traces (TIMESTAMP, ContextTokens, GeneratedTokens).
"""

import codecs
import csv
import gzip
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.errors import ConfigError, ServingError, shown
from serving.workloads.arrivals import generator_for
from serving.workloads.requests import Piece, WorkloadRequest
from serving.workloads.workload import DEFAULT_VOCABULARY, Workload

MOONCAKE_BLOCK_SIZE = 512
MOONCAKE_SPREAD_MS = 3000.0
AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_AZURE_TIME = re.compile(r"(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d:\d\d(?:\.\d{1,9})?)(?:Z|\+00:00)?")


class TraceError(ServingError, ValueError):
    """A trace file does not hold what it should; the message names file, line and field."""

    def __init__(self, path: Path, line: int | None, field: str | None, problem: str) -> None:
        where = str(path) if line is None else f"{path}:{line}"
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

    def input_tokens(self, length: int) -> int:
        """`length` prompt tokens of the trace as tokens of the workload."""
        return self._scaled(length, self.max_input_tokens)

    def output_tokens(self, length: int) -> int:
        """`length` output tokens of the trace as tokens of the workload."""
        return self._scaled(length, self.max_output_tokens)

    def _scaled(self, length: int, limit: int | None) -> int:
        scaled = max(-(-length // self.length_divisor), 1)
        return scaled if limit is None else min(scaled, limit)


def load_trace(path: str | Path, options: TraceOptions | None = None) -> Workload:
    """Read a trace; its name says which: `.jsonl` is Mooncake's format, `.csv` Azure's, `.gz` either."""
    path = Path(path)
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    if suffixes and suffixes[-1] in (".jsonl", ".json"):
        return load_mooncake(path, options)
    if suffixes and suffixes[-1] == ".csv":
        return load_azure(path, options)
    raise TraceError(path, None, None, "unknown format: the name must end in .jsonl or .csv (then .gz)")


def load_mooncake(path: str | Path, options: TraceOptions | None = None) -> Workload:
    """Read a Mooncake trace. Equal hash ids become equal blocks of tokens."""
    path, options = Path(path), options or TraceOptions()
    if MOONCAKE_BLOCK_SIZE % options.length_divisor:
        raise ConfigError(
            f"length_divisor: {options.length_divisor} does not divide the trace's block "
            f"of {MOONCAKE_BLOCK_SIZE} tokens"
        )
    block_size = MOONCAKE_BLOCK_SIZE // options.length_divisor
    times_ms: list[float] = []
    rows: list[tuple[int, int, tuple[int, ...]]] = []
    for line, text in _lines(path):
        if not text.strip():
            continue
        record = _json_object(path, line, text)
        when = _number(path, line, "timestamp", record)
        _check_order(path, line, "timestamp", when, times_ms)
        num_input = _integer(path, line, "input_length", record.get("input_length"), least=1)
        num_output = _integer(path, line, "output_length", record.get("output_length"), least=0)
        hash_ids = _hash_ids(path, line, record, num_input)
        times_ms.append(when)
        num_prompt = options.input_tokens(num_input)
        rows.append((num_prompt, options.output_tokens(num_output), hash_ids[: -(-num_prompt // block_size)]))
    _check_not_empty(path, rows)
    times = _spread(np.array(times_ms) - times_ms[0], options)
    requests = tuple(
        WorkloadRequest(
            request_id=f"mooncake-{i}",
            arrival_ns=int(times[i]),
            num_prompt_tokens=num_prompt,
            max_tokens=num_output,
            hash_ids=hash_ids,
        )
        for i, (num_prompt, num_output, hash_ids) in enumerate(rows)
    )
    return Workload(
        name=path.name,
        requests=requests,
        seed=options.seed,
        vocabulary=options.vocabulary,
        hash_block_size=block_size,
    )


def load_azure(path: str | Path, options: TraceOptions | None = None) -> Workload:
    """Read an Azure trace. It has no content: every prompt is a different one."""
    path, options = Path(path), options or TraceOptions()
    lines = _lines(path)
    _, header = next(lines, (1, ""))
    columns = next(csv.reader([header]), [])
    for column in AZURE_COLUMNS:
        if column not in columns:
            raise TraceError(path, 1, column, f"missing column; the header is {shown(header.strip())}")
    requests: list[WorkloadRequest] = []
    times_ns: list[float] = []
    for line, text in lines:
        if not text.strip():
            continue
        row = next(csv.reader([text]), [])
        if len(row) != len(columns):
            raise TraceError(path, line, None, f"{len(row)} fields, the header has {len(columns)} (truncated?)")
        record = dict(zip(columns, row, strict=True))
        when = _azure_time_ns(path, line, record["TIMESTAMP"])
        _check_order(path, line, "TIMESTAMP", when, times_ns)
        times_ns.append(when)
        num_input = _integer(path, line, "ContextTokens", record["ContextTokens"], least=1)
        num_prompt = options.input_tokens(num_input)
        num_output = _integer(path, line, "GeneratedTokens", record["GeneratedTokens"], least=0)
        requests.append(
            WorkloadRequest(
                request_id=f"azure-{len(requests)}",
                arrival_ns=int(when - times_ns[0]),
                num_prompt_tokens=num_prompt,
                max_tokens=options.output_tokens(num_output),
                pieces=(Piece(len(requests), num_prompt),),
            )
        )
    _check_not_empty(path, requests)
    return Workload(name=path.name, requests=tuple(requests), seed=options.seed, vocabulary=options.vocabulary)


def _spread(times_ms: NDArray[np.float64], options: TraceOptions) -> NDArray[np.int64]:
    """Arrival times in ns: each batch of equal timestamps uniform over its window, in the file's order."""
    starts, batch_of = np.unique(times_ms, return_inverse=True)
    widths = np.minimum(np.diff(starts, append=np.inf), options.spread_ms)
    offsets = generator_for(options.seed, "spread").random(len(times_ms))
    offsets = offsets[np.lexsort((offsets, batch_of))]  # times do not decrease, so batches stay in place
    return np.rint((times_ms + offsets * widths[batch_of]) * 1e6).astype(np.int64)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, line) of a text file, plain or gzip by its first bytes."""
    line = 0
    try:
        with path.open("rb") as raw:
            is_gzip = raw.read(2) == b"\x1f\x8b"
        with gzip.open(path) if is_gzip else path.open("rb") as stream:
            for line, data in enumerate(stream, 1):
                yield line, data.removeprefix(codecs.BOM_UTF8).decode()
    except FileNotFoundError:
        raise TraceError(path, None, None, "no such file") from None
    except UnicodeDecodeError as error:
        raise TraceError(path, line, None, f"not UTF-8 text ({error.reason})") from None
    except (EOFError, gzip.BadGzipFile) as error:
        raise TraceError(path, line + 1, None, f"compressed file is damaged or truncated ({error})") from None
    except OSError as error:
        raise TraceError(path, None, None, f"cannot be read ({error.strerror or error})") from None


def _json_object(path: Path, line: int, text: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except ValueError as error:
        raise TraceError(path, line, None, f"not a complete JSON object (truncated?): {error}") from None
    if not isinstance(record, dict):
        raise TraceError(path, line, None, f"not a JSON object: {shown(record)}")
    for field in ("timestamp", "input_length", "output_length", "hash_ids"):
        if field not in record:
            raise TraceError(path, line, field, "missing field")
    return record


def _hash_ids(path: Path, line: int, record: dict[str, Any], num_input: int) -> tuple[int, ...]:
    values = record["hash_ids"]
    if not isinstance(values, list):
        raise TraceError(path, line, "hash_ids", f"{shown(values)} is not a list")
    hash_ids = tuple(_integer(path, line, "hash_ids", value, least=0) for value in values)
    num_blocks = -(-num_input // MOONCAKE_BLOCK_SIZE)
    if len(hash_ids) != num_blocks:
        raise TraceError(
            path,
            line,
            "hash_ids",
            f"{len(hash_ids)} ids, input_length {num_input} has {num_blocks} blocks of {MOONCAKE_BLOCK_SIZE}",
        )
    return hash_ids


def _number(path: Path, line: int, field: str, record: dict[str, Any]) -> float:
    value = record[field]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TraceError(path, line, field, f"{shown(value)} is not a number")
    if value < 0:
        raise TraceError(path, line, field, f"{value} is below the limit 0")
    return float(value)


def _integer(path: Path, line: int, field: str, value: object, *, least: int) -> int:
    number = int(value) if isinstance(value, str) and re.fullmatch(r"-?\d{1,18}", value.strip()) else value
    if isinstance(number, bool) or not isinstance(number, int):
        raise TraceError(path, line, field, f"{shown(value)} is not an integer")
    if number < least:
        raise TraceError(path, line, field, f"{number} is below the limit {least}")
    return number


def _azure_time_ns(path: Path, line: int, text: str) -> int:
    match = _AZURE_TIME.fullmatch(text.strip())
    try:
        if match is None:
            raise ValueError
        return int(np.datetime64(f"{match[1]}T{match[2]}", "ns").astype(np.int64))
    except ValueError:
        raise TraceError(path, line, "TIMESTAMP", f"{shown(text)} is not a date and time") from None


def _check_order(path: Path, line: int, field: str, when: float, before: list[Any]) -> None:
    if before and when < before[-1]:
        raise TraceError(path, line, field, "is earlier than that of the request before it")


def _check_not_empty(path: Path, rows: list[Any]) -> None:
    if not rows:
        raise TraceError(path, None, None, "holds no request")
