"""Published throughputs of DeepSeek-V3/R1 on H800 and H100 beside what measured operators give.

Owns: how the rows of configs/published/measured_tables.yaml are asked of tables.
Must not know: how steps are put together, the figures.
Source: every row carries its own.
"""

from collections.abc import Callable, Mapping
from typing import Any

from devices.measured_tables import MeasuredTables
from serving.estimation.evaluation import Estimate, EvaluatedRow, evaluate_rows
from serving.estimation.measured_estimates import MEASURED
from serving.estimation.published import load_published

__all__ = ["measured_rows"]

ROWS_FILE = "published/measured_tables.yaml"


def measured_rows(tables: MeasuredTables) -> tuple[EvaluatedRow, ...]:
    """Every published row beside the answer of these tables. Raises ConfigError naming the row where they end."""
    estimates: Mapping[str, Estimate] = {name: _of(tables, question) for name, question in MEASURED.items()}
    return evaluate_rows(load_published(ROWS_FILE).rows, estimates, hardware=tables.gpu)


def _of(tables: MeasuredTables, question: Callable[..., dict[str, Any]]) -> Estimate:
    return lambda *, hardware, **arguments: question(tables, **arguments)
