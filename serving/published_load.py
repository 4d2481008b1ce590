"""The shipped generator of expert load and the published figures that it is held against.

Owns: the layout of configs/expert_load/*.yaml.
Must not know: how load is drawn (serving/core/expert_load_model.py).
Source: every number carries its own in the YAML file.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar

from serving.config_file import load_part
from serving.core.expert_load_model import LoadModel
from serving.errors import ConfigError, shown

DEFAULT_FILE = "expert_load/deepseek-r1.yaml"
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedBalance:
    """One measured deployment; imbalances are max / mean - 1, all figures means over layers and iterations."""

    name: str
    balance: Literal["eplb", "none"]
    num_ranks: int
    num_slots: int
    rank_std_tokens: float
    rank_imbalance: float
    slot_std_tokens: float
    slot_imbalance: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedLoad:
    """A fitted generator, the shape that it was fitted for, and its targets."""

    model: LoadModel
    num_layers: int
    num_experts: int
    top_k: int
    tokens_per_iteration: int  # of all ranks together
    published: tuple[PublishedBalance, ...]
    published_layers: Mapping[str, tuple[float, ...]]  # rank imbalance of single layers


def read_published_load(path: str = DEFAULT_FILE) -> PublishedLoad:
    """Read a file, or a shipped part of that name. Raises ConfigError naming file and key."""
    data = load_part(path)
    try:
        data["model"] = _build(LoadModel, data.get("model"), "model")
        data["published"] = tuple(
            _build(PublishedBalance, row, f"published[{index}]") for index, row in enumerate(data.get("published", ()))
        )
        layers = data.get("published_layers", {})
        if not isinstance(layers, Mapping):
            raise ConfigError(f"published_layers: {shown(layers)} is not a mapping")
        data["published_layers"] = {name: tuple(map(float, values)) for name, values in layers.items()}
        return _build(PublishedLoad, data, "")
    except (ValueError, TypeError) as error:  # of a range check; of a value of the wrong sort
        raise ConfigError(f"{path}: {error}") from None


def _build(cls: type[T], raw: Any, where: str) -> T:
    """`cls(**raw)` with errors that name the whole path."""
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{where}: {shown(raw)} is not a mapping")
    names = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    prefix = f"{where}." if where else ""
    for name in [*raw, *names]:
        if name not in names or name not in raw:
            raise ConfigError(f"{prefix}{name}: {'unknown key' if name in raw else 'missing'}")
    return cls(**raw)
