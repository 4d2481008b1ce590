"""Rows of a sweep on disk: a journal while it runs, one parquet file at its end.

Owns: what is done already, by the identity of its point; that a row once told is not lost, whoever kills the sweep.
Must not know: what a row says.

Beside F.parquet lies F.parquet.journal while a sweep runs: a JSON object per line, each complete as soon as its point
is done. A process that is killed leaves the journal, and the next sweep begins with it; half a line at its end is
dropped.
"""

import fcntl
import json
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from serving.errors import ConfigError
from serving.simulation.sweep_points import Row

KEY = "key"  # the column of a point's identity


class RowStore:
    """The rows of one file, by key. A context manager: leaving it, by whatever way, writes the parquet file.

    Raises ConfigError when the file cannot be read or written, is no sweep's, or another sweep is writing it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._journal_path = path.with_name(path.name + ".journal")
        self._rows: dict[str, Row] = {}
        self._journal: IO[bytes] | None = None

    def __enter__(self) -> "RowStore":
        try:
            journal = self._journal_path.open("ab+")
        except OSError as error:
            raise ConfigError(f"--out: {self._journal_path}: {error.strerror}") from None
        try:
            try:
                fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ConfigError(f"--out: {self._path}: another sweep is writing to it") from None
            if os.fstat(journal.fileno()).st_nlink == 0:  # removed between opening and locking
                raise ConfigError(f"--out: {self._path}: another sweep has just written to it")
            if self._path.exists():
                self._add(read_rows(self._path))
            journal.seek(0)
            text = journal.read()
            whole = text[: text.rfind(b"\n") + 1]
            self._add(json.loads(line) for line in whole.splitlines())
            journal.truncate(len(whole))
        except BaseException:
            journal.close()
            raise
        self._journal = journal
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        assert self._journal is not None
        try:
            if self._rows:
                write_rows(self._path, list(self._rows.values()))
            self._journal_path.unlink()  # while it is locked: nobody else has begun to write to it
        finally:
            self._journal.close()

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def __getitem__(self, key: str) -> Row:
        return self._rows[key]

    def add(self, key: str, row: Row) -> None:
        """Keep a row; it is on disk when this returns."""
        assert self._journal is not None
        row = {KEY: key} | row
        self._journal.write(json.dumps(row).encode() + b"\n")
        self._journal.flush()
        self._rows[key] = row

    def _add(self, rows: Iterable[Row]) -> None:
        for row in rows:
            if not isinstance(row, dict) or not isinstance(row.get(KEY), str):
                raise ConfigError(f"--out: {self._path} has no column {KEY}: no sweep wrote it")
            self._rows[row[KEY]] = row


def read_rows(path: Path) -> list[Row]:
    """Rows of a parquet file; what a row does not have is left out. Raises ConfigError."""
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise ConfigError(f"--out: {path} cannot be read: {str(error).splitlines()[0]}") from None
    return [{name: value for name, value in row.items() if value is not None} for row in table.to_pylist()]


def write_rows(path: Path, rows: list[Row]) -> None:
    """One row per point, columns in the order in which they first come up; replaces the file as a whole."""
    import pyarrow
    from pyarrow import parquet

    names = list(dict.fromkeys(name for row in rows for name in row))
    table = pyarrow.table({name: _column([row.get(name) for row in rows]) for name in names})
    new = path.with_name(path.name + ".new")
    parquet.write_table(table, new)
    os.replace(new, path)


def _column(values: list[Any]) -> Any:
    """An array of one type: what is mixed becomes numbers if all are, else text."""
    import pyarrow

    kinds = {type(value) for value in values if value is not None}
    if kinds == {int, float}:
        return pyarrow.array([None if value is None else float(value) for value in values])
    if len(kinds) > 1:
        return pyarrow.array([v if v is None or isinstance(v, str) else json.dumps(v) for v in values])
    return pyarrow.array(values)
