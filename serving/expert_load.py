"""The load of a model's experts, as measured, and the file that it is kept in.

Owns: the file's layout, written by `supernode expert-load` and, under a key of their result, by `run` and `replay`.
Must not know: how load is measured, what is done with it.

    num_layers, num_experts, top_k   of the mixture layers
    first_layer                      number in the model of the first of them
    kinds, or instances              name -> [num_layers][num_experts] tokens that chose each expert
    total                            the sum of these
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from model.config import ModelConfig
from serving.errors import ConfigError, shown

KEY = "expert_load"  # in the result of a run


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertLoad:
    """Tokens per expert, (num_moe_layers, n_routed_experts), by `parts`: kinds of problem, or instances."""

    shape: ModelConfig
    divided_by: Literal["kinds", "instances"]
    parts: Mapping[str, NDArray[np.int64]]

    @property
    def total(self) -> NDArray[np.int64]:
        """All parts together."""
        zero = np.zeros((self.shape.num_moe_layers, self.shape.n_routed_experts), np.int64)
        return sum(self.parts.values(), zero)

    def as_json(self) -> dict[str, Any]:
        return {
            "num_layers": self.shape.num_moe_layers,
            "num_experts": self.shape.n_routed_experts,
            "top_k": self.shape.num_experts_per_tok,
            "first_layer": self.shape.first_k_dense_replace,
            self.divided_by: {name: load.tolist() for name, load in self.parts.items()},
            "total": self.total.tolist(),
        }


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RecordedLoad:
    """What such a file says of a model, whatever that is."""

    total: NDArray[np.float64]  # (num_layers, num_experts) tokens
    top_k: int
    first_layer: int


def read_recorded_load(path: str) -> RecordedLoad:
    """A file of this layout, or a run's result that holds one, with the shape that it was recorded from.

    Raises ConfigError naming the file, the field, what was expected and what was found.
    """
    data = _read(path)
    total = _total(data, path)
    if total.ndim != 2 or not total.size:
        raise ConfigError(f"{path}: total: expected layers x experts, found {_times(total.shape)}")
    for name, low in (("top_k", 1), ("first_layer", 0)):
        value = data.get(name)
        if not isinstance(value, int) or value < low:
            raise ConfigError(f"{path}: {name}: expected an integer from {low}, found {shown(value)}")
    return RecordedLoad(total=total, top_k=data["top_k"], first_layer=data["first_layer"])


def read_total_load(path: str, shape: ModelConfig, *, model_name: str) -> NDArray[np.float64]:
    """`total` of a file of this layout, or of a run's result that holds one, for a model of `shape`.

    Raises ConfigError naming the file, the field, what was expected and what was found.
    """
    total = _total(_read(path), path)
    expected = (shape.num_moe_layers, shape.n_routed_experts)
    if total.shape != expected:
        raise ConfigError(
            f"{path}: total: expected {_times(expected)} (mixture layers x experts of {model_name}), "
            f"found {_times(total.shape)}"
        )
    return total


def _read(path: str) -> dict[str, Any]:
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from None
    if isinstance(data, dict) and isinstance(data.get(KEY), dict):
        data = data[KEY]
    if not isinstance(data, dict) or "total" not in data:
        found = f"keys {', '.join(list(data)[:8]) or 'none'}" if isinstance(data, dict) else type(data).__name__
        raise ConfigError(f"{path}: total: expected tokens per layer and expert, found {found}")
    return data


def _total(data: dict[str, Any], path: str) -> NDArray[np.float64]:
    try:
        total = np.array(data["total"], np.float64)
    except (ValueError, TypeError):
        raise ConfigError(f"{path}: total: expected rows of numbers, found {shown(data['total'])}") from None
    if not np.isfinite(total).all() or (total < 0).any():
        raise ConfigError(f"{path}: total: expected counts, found a value that is negative or no number")
    return total


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a single value"
