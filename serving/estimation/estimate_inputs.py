"""What a what-if question gives: a machine, a model, sizes and choices, checked before anything is computed.

Owns: names and files of machines and models, defaults, the limits of numbers, the sum of what does not fit in HBM.
Must not know: how anything is timed, command lines.
Source: the capacity of a die is its description's; what lies on it is counted by serving/die_memory.py.

Everything raises ConfigError naming the field, its value and the limit.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib import resources
from numbers import Integral, Real
from typing import Any, Literal

from devices.deployment import ExpertDeployment
from devices.spec import SupernodeSpec
from model import work
from model.config import ModelConfig
from serving.config_file import load_part
from serving.die_memory import die_memory
from serving.errors import ConfigError, shown

# A shipped name, a YAML file, a description as such a file holds it, or what was read from one.
Hardware = str | Mapping[str, Any] | SupernodeSpec
Switch = Literal["on", "off"]
MOST = 10**15  # of any number, far above what is meaningful: squares and cubes of it are still ordinary floats
GIB = 2**30
_FILES = (".yaml", ".yml", ".json")


def hardware_of(hardware: Hardware) -> SupernodeSpec:
    """A machine by its shipped name or its YAML file, or from the contents of one."""
    if isinstance(hardware, str):
        read = _read_hardware if hardware.endswith(_FILES) else _shipped_hardware
        return read(hardware)
    if isinstance(hardware, SupernodeSpec):
        return hardware
    try:
        return _machine(hardware)
    except (ValueError, TypeError) as error:  # of the range checks; of a value of the wrong sort
        raise ConfigError(f"hardware: {error}") from None


def model_of(model: str) -> ModelConfig:
    """A model by its shipped name or its YAML or JSON file."""
    read = _read_model if model.endswith(_FILES) else _shipped_model
    return read(model)


def layout_of(shape: ModelConfig, ep: int) -> ExpertDeployment:
    """Experts on `ep` dies as the published deployments place them."""
    try:
        return ExpertDeployment.published(shape, ep=ep)
    except ValueError as error:
        raise ConfigError(f"ep: {error}") from None


def defaults_of(question: Callable[..., Any]) -> dict[str, Any]:
    """The arguments of an estimate that have a default, with it."""
    parameters = inspect.signature(question).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def check_counts(least: int, **values: int | None) -> None:
    """Whole numbers from `least`; None has been allowed already."""
    for name, value in values.items():
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise ConfigError(f"{name}: {shown(value)} must be a whole number")
        if value < least:
            raise ConfigError(f"{name}: {shown(value)} must be at least {least}")
        if value > MOST:
            raise ConfigError(f"{name}: {shown(value)} must be at most 10^15")


def check_shares(**values: float) -> None:
    """Numbers from 0 to 1."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value <= 1:
            raise ConfigError(f"{name}: {shown(value)} must be from 0 to 1")


def check_size(**values: float) -> None:
    """Numbers above 0."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value <= MOST:
            raise ConfigError(f"{name}: {shown(value)} must be above 0, and at most 10^15")


def check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    """One of some words."""
    if value not in known:
        raise ConfigError(f"{name}: {shown(value)} is not one of {', '.join(known)}")


def is_on(**values: str) -> bool:
    """A single switch, given by its name."""
    ((name, value),) = values.items()
    check_choice(name, value, ("on", "off"))
    return value == "on"


def check_dies(spec: SupernodeSpec, ep: int) -> None:
    """No more ranks than dies."""
    if ep > spec.num_dies:
        raise ConfigError(f"ep: {ep}, {spec.name} has {spec.num_dies} dies")


def check_hbm(name: str, hbm_bytes: float, **parts_bytes: float) -> None:
    """Whether the parts fit in a die of the machine `name` together; the error shows the sum."""
    used_bytes = sum(parts_bytes.values())
    if used_bytes > hbm_bytes:
        terms = " + ".join(f"{size / GIB:,.1f} GiB of {part.replace('_', ' ')}" for part, size in parts_bytes.items())
        told = f"{terms} = {used_bytes / GIB:,.1f} GiB" if len(parts_bytes) > 1 else terms
        raise ConfigError(f"does not fit in HBM: {told}, a die of {name} has {hbm_bytes / GIB:,.1f} GiB")


def check_instance_fits(
    spec: SupernodeSpec,
    shape: ModelConfig,
    layout: ExpertDeployment,
    *,
    is_prefill: bool,
    step_tokens: float,
    cached_tokens: float,
    has_mtp: bool,
) -> None:
    """Weights, buffers of `step_tokens` per die and latents of `cached_tokens` per die."""
    memory = die_memory(
        shape,
        layout,
        spec.rates,
        is_prefill=is_prefill,
        step_tokens=math.ceil(step_tokens),
        cache_bytes=math.ceil(cached_tokens) * work.kv_bytes_per_token(shape, include_mtp=has_mtp),
        has_mtp=has_mtp,
    )
    check_hbm(
        spec.name,
        spec.npu.die.hbm_bytes,
        weights=memory.weight_bytes,
        buffers=memory.buffer_bytes,
        latent_cache=memory.cache_bytes,
    )


def _read_hardware(name: str) -> SupernodeSpec:
    spec: SupernodeSpec = _part(name, "hardware", _machine)
    return spec


def _read_model(name: str) -> ModelConfig:
    shape: ModelConfig = _part(name, "model", ModelConfig.from_dict)
    return shape


# Shipped names only: a user's file may change between two questions.
_shipped_hardware = lru_cache(maxsize=8)(_read_hardware)
_shipped_model = lru_cache(maxsize=8)(_read_model)


def _machine(raw: Mapping[str, Any]) -> SupernodeSpec:
    spec = SupernodeSpec.from_dict(raw)
    if not isinstance(spec.name, str):
        raise ConfigError(f"name: {shown(spec.name)} must be a word")
    return spec


def _part(name: str, folder: str, parse: Callable[[dict[str, Any]], Any]) -> Any:
    path = name if name.endswith(_FILES) else f"{folder}/{name}.yaml"
    if path != name:
        files = resources.files("configs").joinpath(folder).iterdir()
        known = sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))
        if name not in known:
            raise ConfigError(
                f"{folder}: {shown(name)} is not shipped, only {', '.join(known)}; a file must end in .yaml"
            )
    try:
        return parse(load_part(path))
    except ConfigError as error:
        raise ConfigError(f"{folder}: {error}") from None
    except (ValueError, TypeError) as error:  # of the range checks; of a value of the wrong sort
        raise ConfigError(f"{folder}: {path}: {error}") from None
