"""Every request's timeline as a table in a file.

Owns: the columns of the file, in parquet or CSV.
Must not know: how a run is driven, figures.

Instants are nanoseconds of simulated time, durations milliseconds; what did not happen is null, in CSV empty.
"""

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.errors import ConfigError
from serving.records import OUTCOMES
from serving.simulation.columns import NEVER, Ints, RequestColumns, RunColumns
from serving.timings import tpot_of

SUFFIXES = (".parquet", ".csv")
ROWS_AT_ONCE = 2**17  # a group of rows in the file, and what is in memory a second time

Column = list[Any] | NDArray[Any]  # or a masked array


def check_export(path: Path) -> None:
    """Before the run, not after it. Raises ConfigError if `write_requests` could not write this file."""
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"--requests: {path}: the suffix must be one of {', '.join(SUFFIXES)}")


def write_requests(run: RunColumns, path: Path) -> None:
    """One row per request that arrived, in the workload's order."""
    check_export(path)
    if path.suffix == ".csv":
        _write_csv(run, path)
    else:
        _write_parquet(run, path)


def _write_csv(run: RunColumns, path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        for i, part in enumerate(_parts(run)):
            if i == 0:
                writer.writerow(part)
            lists = [column if isinstance(column, list) else column.tolist() for column in part.values()]
            writer.writerows(zip(*lists, strict=True))  # None is written as an empty field


def _write_parquet(run: RunColumns, path: Path) -> None:
    import pyarrow  # its import costs more than a short run
    from pyarrow import parquet

    writer = None
    try:
        for part in _parts(run):
            table = pyarrow.table({name: _arrow(column) for name, column in part.items()})
            if writer is None:
                writer = parquet.ParquetWriter(path, table.schema, compression="zstd")
            writer.write_table(table)
    finally:
        if writer is not None:
            writer.close()


def _arrow(column: Column) -> Any:
    import pyarrow

    if isinstance(column, list):
        return pyarrow.array(column, pyarrow.string())
    if isinstance(column, np.ma.MaskedArray):
        return pyarrow.array(column.data, mask=np.ma.getmaskarray(column))
    return pyarrow.array(column)


def _parts(run: RunColumns) -> Iterator[Mapping[str, Column]]:
    """The columns of so many rows at a time; at least one part, so that no request gives a file too."""
    num_requests = len(run.requests)
    for start in range(0, max(num_requests, 1), ROWS_AT_ONCE):
        yield _columns(run, slice(start, min(start + ROWS_AT_ONCE, num_requests)))


def _columns(run: RunColumns, rows: slice) -> dict[str, Column]:
    requests = run.requests
    instances = [instance.instance_id for instance in run.instances]

    def name_of(names: list[str] | tuple[str, ...], codes: NDArray[Any]) -> list[str | None]:
        return [None if code == NEVER else names[code] for code in codes[rows].tolist()]

    def known(values: NDArray[Any]) -> NDArray[Any]:
        return np.ma.masked_equal(values[rows], NEVER)

    def ms(start_ns: Ints, end_ns: Ints) -> NDArray[Any]:
        """From one instant to another, where both are known."""
        unknown = (start_ns[rows] == NEVER) | (end_ns[rows] == NEVER)
        return np.ma.masked_array((end_ns[rows] - start_ns[rows]) / 1e6, mask=unknown)

    return {
        "request_id": list(requests.request_ids[rows]),
        "outcome": name_of(OUTCOMES, requests.outcome),
        "reason": name_of(requests.reasons, requests.reason),
        "num_prompt_tokens": requests.num_prompt_tokens[rows],
        "max_tokens": requests.max_tokens[rows],
        "num_output_tokens": requests.num_output_tokens[rows],
        "num_cached_tokens": requests.num_cached_tokens[rows],
        "num_pool_tokens": requests.num_pool_tokens[rows],
        "num_preemptions": requests.num_preemptions[rows],
        "prefill_instance": name_of(instances, requests.prefill_instance),
        "decode_instance": name_of(instances, requests.decode_instance),
        "decode_rank": known(requests.decode_rank),
        "arrival_ns": requests.arrival_ns[rows],
        "scheduled_ns": known(requests.scheduled_ns),
        "prefill_start_ns": known(requests.prefill_start_ns),
        "first_token_ns": known(requests.first_token_ns),
        "decode_start_ns": known(requests.decode_start_ns),
        "last_token_ns": known(requests.last_token_ns),
        "queue_ms": ms(requests.arrival_ns, requests.scheduled_ns),
        "ttft_ms": ms(requests.arrival_ns, requests.first_token_ns),
        "tpot_ms": _tpot_ms(requests, rows),
        "e2el_ms": ms(requests.arrival_ns, requests.last_token_ns),
    }


def _tpot_ms(requests: RequestColumns, rows: slice) -> NDArray[Any]:
    """Of finished ones and others alike; none for fewer than two tokens."""
    tpot_ns = tpot_of(
        num_tokens=requests.num_output_tokens[rows],
        first_ns=requests.first_token_ns[rows],
        last_ns=requests.last_token_ns[rows],
    )
    return np.ma.masked_invalid(tpot_ns / 1e6)
