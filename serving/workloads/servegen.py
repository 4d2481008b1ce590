"""Samples of ServeGen: a parquet table of times and lengths.

Owns: the format.
Must not know: how requests are sent or served.
Source: alibaba/ServeGen (arXiv:2505.09999), the fields of its generated requests: t_s, seconds from the start;
input_tokens, output_tokens. Others, such as client and reason_ratio, are not read.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.workloads.requests import Ints, RequestTable
from serving.workloads.traces import LARGEST, TraceError, TraceOptions
from serving.workloads.workload import Workload, to_ns

SERVEGEN_COLUMNS = ("t_s", "input_tokens", "output_tokens")
_MAX_TIME_S = 1e9  # in ns it has to fit in 64 bits


def load_servegen(path: str | Path, options: TraceOptions | None = None) -> Workload:
    """Read a sample. It has no content: every prompt is a different one."""
    path, options = Path(path), options or TraceOptions()
    columns = read_columns(path, SERVEGEN_COLUMNS)
    times_s = columns["t_s"].astype(np.float64)
    if not len(times_s):
        raise TraceError(path, None, None, "holds no request")
    _check_rows(path, "t_s", times_s, ~np.isfinite(times_s), "is not a number")
    _check_rows(path, "t_s", times_s, times_s < 0, "is below the limit 0")
    _check_rows(path, "t_s", times_s, times_s > _MAX_TIME_S, f"is above the limit {_MAX_TIME_S:g}")
    is_late = np.diff(times_s, prepend=0.0) < 0
    _check_rows(path, "t_s", times_s, is_late, "is earlier than that of the request before it")
    table = RequestTable.of_pieces(
        "servegen",
        num_prompt_tokens=options.input_tokens(_lengths(path, "input_tokens", columns, least=1)),
        max_tokens=options.output_tokens(_lengths(path, "output_tokens", columns, least=0)),
        arrival_ns=to_ns(times_s - times_s[0]),
    )
    return Workload(name=path.name, requests=table, seed=options.seed, vocabulary=options.vocabulary)


def read_columns(path: Path, names: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    """Columns of numbers of a parquet file. Raises TraceError if they are not there, or hold something else."""
    import pyarrow  # takes longer to import than a small trace of text takes
    import pyarrow.parquet as parquet

    if not path.exists():
        raise TraceError(path, None, None, "no such file")
    try:
        table = parquet.ParquetFile(path, memory_map=True)
        present = table.schema_arrow.names
        for name in names:
            if name not in present:
                raise TraceError(path, None, name, f"missing column; the columns are {', '.join(present)}")
        columns = table.read(columns=list(names), use_threads=False)
    except (pyarrow.ArrowException, OSError) as error:
        problem = str(error).splitlines()[0]
        raise TraceError(path, None, None, f"cannot be read as parquet (truncated?): {problem}") from None
    arrays = {}
    for name in names:
        column = columns[name]
        if not (pyarrow.types.is_integer(column.type) or pyarrow.types.is_floating(column.type)):
            raise TraceError(path, None, name, f"a column of type {column.type}, not of numbers")
        if column.null_count:
            row = column.is_null().to_pylist().index(True)
            raise TraceError(path, row, name, "no value", unit="row")
        arrays[name] = column.to_numpy()
    return arrays


def _lengths(path: Path, field: str, columns: dict[str, NDArray[Any]], *, least: int) -> Ints:
    values = columns[field]
    _check_rows(path, field, values, ~(values == np.floor(values)), "is not an integer")
    _check_rows(path, field, values, values < least, f"is below the limit {least}")
    _check_rows(path, field, values, values > LARGEST, f"is above the limit {LARGEST}")
    return values.astype(np.int64)


def _check_rows(path: Path, field: str, values: NDArray[Any], is_wrong: NDArray[np.bool_], problem: str) -> None:
    if is_wrong.any():
        row = int(is_wrong.argmax())
        raise TraceError(path, row, field, f"{values[row]} {problem}", unit="row")
