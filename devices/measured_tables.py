"""Measured operator times of DeepSeek-V3 shapes on H100 and H200, by name and sizes.

Owns: reading the tables, from a folder of extracts or from the package `aiconfigurator-core`, and answering questions.
Must not know: how operators form a layer or a step (devices/measured_step.py).
Source: ai-dynamo/aiconfigurator systems/data (Apache-2.0); the meaning of columns is in devices/table_files.py.

A table is read when it is first asked. Repeated measurements of one point are averaged.
"""

import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from devices.grid import Grid, OutOfGrid, TableError, TablesUnavailable, UnknownEntry
from devices.table_files import OPERATORS, TableFile

__all__ = ["Gpu", "MeasuredTables", "OutOfGrid", "TableError", "TablesUnavailable", "UnknownEntry"]

Gpu = Literal["h100", "h200"]
PACKAGE = "aiconfigurator_core"
Grids = Mapping[tuple[Any, ...], Grid]


class MeasuredTables:
    """The tables of one GPU."""

    def __init__(self, folder: Path, *, gpu: Gpu) -> None:
        if gpu not in get_args(Gpu):
            raise UnknownEntry("measured tables", "gpu", gpu, get_args(Gpu))
        self.folder = folder
        self.gpu = gpu
        self._is_package = (folder / f"{gpu}_sxm").is_dir()
        if not self._is_package and not any(folder.glob(f"aic_dsv3_{gpu}_*.parquet")):
            raise TablesUnavailable(f"{folder}: neither aic_dsv3_{gpu}_*.parquet nor a folder {gpu}_sxm")
        self._grids: dict[str, Grids] = {}

    @classmethod
    def from_directory(cls, path: str | Path, *, gpu: Gpu) -> "MeasuredTables":
        """Tables in `path`: aic_dsv3_{gpu}_*.parquet, or the `systems/data` of aiconfigurator-core.

        Raises TablesUnavailable if it holds neither.
        """
        return cls(Path(path), gpu=gpu)

    @classmethod
    def from_package(cls, *, gpu: Gpu) -> "MeasuredTables":
        """Tables of the installed package aiconfigurator-core, which is located, not imported."""
        found = importlib.util.find_spec(PACKAGE)
        if found is None or found.origin is None:
            raise TablesUnavailable(
                "no measured tables: pip install 'supernode-infer[tables-package]', or name a folder"
            )
        return cls(Path(found.origin).parent / "systems" / "data", gpu=gpu)

    def seconds(self, operator: str, **fields: float | str) -> float:
        """Time of one call of `operator`: its categories exactly, its sizes interpolated.

        `operator` is a key of devices.table_files.OPERATORS, `fields` are its categories and sizes.
        Raises OutOfGrid, UnknownEntry, TablesUnavailable.
        """
        table = self._table(operator)
        names = (*table.categories, *table.sizes)
        for name in fields:
            if name not in names:
                raise UnknownEntry(operator, "field", name, names)
        for name in names:
            if name not in fields:
                raise TableError(f"{operator}: {name} is not given; it takes {', '.join(names)}")
        grid = self._grid(operator, **{name: fields[name] for name in table.categories})
        sizes = [float(fields[name]) for name in table.sizes]
        if not all(math.isfinite(size) for size in sizes):
            raise TableError(f"{operator}: sizes {dict(zip(table.sizes, sizes, strict=True))} must be finite")
        return grid(sizes)

    def limits(self, operator: str, size: str, **categories: float | str) -> tuple[float, float]:
        """Smallest and largest measured value of a size."""
        table = self._table(operator)
        if size not in table.sizes:
            raise UnknownEntry(operator, "size", size, tuple(table.sizes))
        return self._grid(operator, **categories).limits[size]

    def grids(self, operator: str) -> Grids:
        """All grids of an operator, by its categories' values. Seconds."""
        if operator not in self._grids:
            self._grids[operator] = self._read(operator, self._table(operator))
        return self._grids[operator]

    def _table(self, operator: str) -> TableFile:
        if operator not in OPERATORS:
            raise UnknownEntry("measured tables", "operator", operator, tuple(OPERATORS))
        return OPERATORS[operator]

    def _grid(self, operator: str, **categories: float | str) -> Grid:
        grids = self.grids(operator)
        key: tuple[Any, ...] = ()
        for index, name in enumerate(self._table(operator).categories):
            value = categories.get(name)
            known = sorted({k[index] for k in grids if k[:index] == key})
            if value not in known:
                raise UnknownEntry(operator, name, value, tuple(known))
            key = (*key, value)
        return grids[key]

    def _read(self, operator: str, table: TableFile) -> Grids:
        cells: dict[tuple[Any, ...], dict[tuple[float, ...], list[float]]] = {}
        path = self._path(table)
        try:
            for row in _rows(path):
                if all(row.get(name, value) == value for name, value in table.rows.items()):
                    key = tuple(column(row) for column in table.categories.values())
                    point = tuple(float(column(row)) for column in table.sizes.values())
                    value = sum(row[name] for name in table.values) * table.unit_s
                    cells.setdefault(key, {}).setdefault(point, []).append(value)
        except KeyError as error:
            raise TablesUnavailable(f"{operator}: {path} has no column {error.args[0]!r}, which it needs") from error
        if not cells:
            raise TablesUnavailable(f"{operator}: {path} has no row with {dict(table.rows)}")
        return {
            key: Grid(
                operator,
                tuple(table.sizes),
                {point: sum(values) / len(values) for point, values in points.items()},
            )
            for key, points in cells.items()
        }

    def _path(self, table: TableFile) -> Path:
        if self._is_package:
            return self.folder / f"{self.gpu}_sxm" / f"{table.package_file}.parquet"
        return self.folder / f"aic_dsv3_{self.gpu}_{table.file}.parquet"


def _rows(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet as parquet  # takes longer to import than an estimate without tables takes

    if not path.is_file():
        raise TablesUnavailable(f"{path} is not there")
    rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    return rows
