"""Azure's request traces: csv of times and lengths, plain or gzip.

Owns: the format.
Must not know: how requests are sent or served.
Source: Azure/AzurePublicDataset LLM inference traces of 2023 and 2024 (TIMESTAMP, ContextTokens, GeneratedTokens).
"""

import csv
import re
from pathlib import Path

import numpy as np

from serving.errors import shown
from serving.workloads.requests import Ints, RequestTable
from serving.workloads.traces import TraceError, TraceOptions, check_not_empty, check_order, integer, lines_of
from serving.workloads.workload import Workload

AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_TIME = re.compile(r"\s*(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d:\d\d(?:\.\d{1,9})?)(?:Z|\+00:00)?\s*")
_INTEGER = re.compile(r"\s*-?\d{1,18}\s*")


def load_azure(path: str | Path, options: TraceOptions | None = None) -> Workload:
    """Read an Azure trace. It has no content: every prompt is a different one."""
    path, options = Path(path), options or TraceOptions()
    numbered = lines_of(path)
    _, header = next(numbered, (1, ""))
    columns = next(csv.reader([header]), [])
    for column in AZURE_COLUMNS:
        if column not in columns:
            raise TraceError(path, 1, column, f"missing column; the header is {shown(header.strip())}")
    time_index, input_index, output_index = (columns.index(column) for column in AZURE_COLUMNS)
    lines: list[int] = []
    times: list[str] = []
    lengths: list[tuple[int, int]] = []
    for line, text in numbered:
        if text.isspace():
            continue
        row = text.rstrip("\r\n").split(",") if '"' not in text else next(csv.reader([text]), [])
        if len(row) != len(columns):
            raise TraceError(path, line, None, f"{len(row)} fields, the header has {len(columns)} (truncated?)")
        match = _TIME.fullmatch(row[time_index])
        if match is None:
            raise TraceError(path, line, "TIMESTAMP", f"{shown(row[time_index])} is not a date and time")
        lines.append(line)
        times.append(f"{match[1]}T{match[2]}")
        num_input = _length(path, line, "ContextTokens", row[input_index], least=1)
        lengths.append((num_input, _length(path, line, "GeneratedTokens", row[output_index], least=0)))
    check_not_empty(path, lines)
    times_ns = _times_ns(path, lines, times)
    check_order(path, lines, "TIMESTAMP", times_ns)
    num_input, num_output = np.array(lengths, dtype=np.int64).T
    table = RequestTable.of_pieces(
        "azure",
        num_prompt_tokens=options.input_tokens(num_input),
        max_tokens=options.output_tokens(num_output),
        arrival_ns=times_ns - times_ns[0],
    )
    return Workload(name=path.name, requests=table, seed=options.seed, vocabulary=options.vocabulary)


def _length(path: Path, line: int, field: str, text: str, *, least: int) -> int:
    value = int(text) if _INTEGER.fullmatch(text) else text
    return integer(path, line, field, value, least=least)


def _times_ns(path: Path, lines: list[int], times: list[str]) -> Ints:
    try:
        return np.array(times, dtype="datetime64[ns]").astype(np.int64)
    except ValueError:
        for line, text in zip(lines, times, strict=True):
            try:
                np.datetime64(text, "ns")
            except ValueError:
                raise TraceError(path, line, "TIMESTAMP", f"{shown(text)} is not a date and time") from None
        raise
