"""Reading configurations: YAML files, presets, included parts and `--set a.b=c` overrides.

Owns: where configurations come from and how their mistakes are told (file, key, value, limit).
Must not know: what the keys mean (serving/config.py).
"""

from collections.abc import Callable, Hashable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import ValidationError

from devices.spec import SupernodeSpec
from model.config import ModelConfig, ModelConfigError
from model.quantization_config import read_config
from serving.config import DEFAULT_SHAPE, Parts, RunConfig
from serving.errors import ConfigError, shown
from serving.expert_load import read_total_load
from serving.plan import check_plan

T = TypeVar("T")
PARTS = (
    ("model", "config"),
    ("model", "checkpoint"),
    ("model", "expert_load"),
    ("timing", "model"),
    ("timing", "hardware"),
)


def presets() -> list[str]:
    """Names of the shipped runs."""
    files = (file.name for file in resources.files("configs").iterdir())
    return sorted(name.removesuffix(".yaml") for name in files if name.endswith(".yaml"))


def load_config(name_or_path: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Load a preset (`laptop`) or a YAML file, apply `a.b=c` overrides, validate.

    Included parts are looked up relative to the file, then among the shipped ones.
    Raises ConfigError naming the file, the key, the value and the limit.
    """
    try:
        data = _read_yaml(_run_text(name_or_path))
        for override in overrides:
            _apply_override(data, override)
        if name_or_path.endswith((".yaml", ".yml")):
            _resolve_parts(data, Path(name_or_path).parent)
        config = RunConfig.model_validate(_with_shipped_checkpoint(data))
        shape = _model_shape(config)
        config = config.attach(
            Parts(
                shape=shape,
                charged_shape=_parse_part(config.timing.model, ModelConfig.from_dict),
                hardware=_parse_part(config.timing.hardware, SupernodeSpec.from_dict),
                expert_load=_measured_load(config, shape),
            )
        )
        check_plan(config)
        return config
    except ValidationError as error:
        raise ConfigError(f"{name_or_path}: {_describe(error)}") from None
    except ValueError as error:  # ConfigError, and the range checks of the parts
        raise ConfigError(f"{name_or_path}: {error}") from None


def shipped_checkpoints() -> dict[str, Path]:
    """Directories of the checkpoints that come with the package, by name."""
    folder = Path(str(resources.files("model").joinpath("checkpoints")))
    return {path.name: path for path in sorted(folder.iterdir()) if path.is_dir()} if folder.is_dir() else {}


def _with_shipped_checkpoint(data: dict[str, Any]) -> dict[str, Any]:
    """`data` with the directory in place of a shipped checkpoint's name; a directory of that name comes first."""
    model = data.get("model")
    name = model.get("checkpoint") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(name, str) or Path(name).is_dir():
        return data
    found = shipped_checkpoints().get(name)
    return data if found is None else {**data, "model": {**model, "checkpoint": str(found)}}


def _model_shape(config: RunConfig) -> ModelConfig:
    """The shape of the weights: a checkpoint brings its own, random weights are made to `model.config`.

    Also checks that the checkpoint is there and that it is quantized as `model.quantization` asks.
    """
    directory, wanted = config.model.checkpoint, config.model.quantization
    if directory == "random":
        if wanted is not None:
            raise ConfigError(f"model.quantization: {wanted}, but model.checkpoint random makes float32 weights")
        return _parse_part(config.model.shape_source, ModelConfig.from_dict)
    if not Path(directory).is_dir():
        shipped = ", ".join(shipped_checkpoints())
        raise ConfigError(f"model.checkpoint: {directory!r} is not a directory, nor 'random', nor shipped ({shipped})")
    if wanted is None and not (Path(directory) / "config.json").is_file():
        # Whoever starts the devices tells all that is missing in the directory.
        return _parse_part(config.model.config or DEFAULT_SHAPE, ModelConfig.from_dict)
    try:
        shape, found = read_config(directory)
    except ModelConfigError as error:
        raise ConfigError(f"model.checkpoint: {error}") from None
    if wanted is not None and found is None:
        raise ConfigError(
            f"model.quantization: {wanted}, but {Path(directory) / 'config.json'} has no quantization_config"
        )
    return shape if config.model.config is None else _parse_part(config.model.config, ModelConfig.from_dict)


def load_part(path: str) -> dict[str, Any]:
    """Load an included part: a file, or a shipped one such as `model/mini-r1.yaml`. Raises ConfigError."""
    file = Path(path)
    source = file if file.is_file() else resources.files("configs").joinpath(path)
    if not source.is_file():
        raise ConfigError(f"no part {path!r}: neither a file nor shipped")
    try:
        return _read_yaml(source.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except ValueError as error:  # ConfigError among them
        raise ConfigError(f"{path}: {error}") from None


def _parse_part(path: str, parse: Callable[[dict[str, Any]], T]) -> T:
    data = load_part(path)
    try:
        return parse(data)
    except (ValueError, TypeError) as error:  # of the range checks; of a value that is no number where one is needed
        raise ConfigError(f"{path}: {error}") from None


def _measured_load(config: RunConfig, shape: ModelConfig) -> NDArray[np.float64] | None:
    if config.model.expert_load is None:
        return None
    try:
        return read_total_load(config.model.expert_load, shape, model_name=config.model.shape_source)
    except ConfigError as error:
        raise ConfigError(f"model.expert_load: {error}") from None


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice; YAML itself lets the last one win."""


def _construct_mapping(loader: _UniqueKeyLoader, node: yaml.MappingNode) -> dict[Hashable, Any]:
    mapping: dict[Hashable, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        line = key_node.start_mark.line + 1
        if not isinstance(key, Hashable):
            raise ConfigError(f"line {line}: {key!r} cannot be a key")
        if key in mapping:
            raise ConfigError(f"line {line}: duplicate key {key!r}")
        mapping[key] = loader.construct_object(value_node, deep=True)
    return mapping


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)


def _run_text(name_or_path: str) -> str:
    if name_or_path.endswith((".yaml", ".yml")):
        try:
            return Path(name_or_path).read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(str(error.strerror)) from None
    if name_or_path not in presets():
        raise ConfigError(f"no such preset; there are {', '.join(presets())}; a file must end in .yaml")
    return resources.files("configs").joinpath(f"{name_or_path}.yaml").read_text(encoding="utf-8")


def _read_yaml(text: str) -> dict[str, Any]:
    try:
        data = yaml.load(text, Loader=_UniqueKeyLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"must hold a mapping, not {type(data).__name__}")
    return data


def _resolve_parts(data: dict[str, Any], folder: Path) -> None:
    for section, key in PARTS:
        part = data.get(section)
        if isinstance(part, dict) and isinstance(part.get(key), str) and (folder / part[key]).exists():
            part[key] = str((folder / part[key]).resolve())


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override!r}: expected a.b=value")
    *parents, last = key.split(".")
    target: Any = data
    for part in parents:
        target = target.setdefault(part, {})
        if not isinstance(target, dict):
            raise ConfigError(f"--set {override!r}: {part!r} is not a section")
    try:
        target[last] = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError:
        raise ConfigError(f"--set {override!r}: {text!r} is not a YAML value") from None


def _describe(error: ValidationError) -> str:
    problems: dict[str, list[str]] = {}  # by key; several where a value may be of one kind or another
    values: dict[str, object] = {}
    whole: list[str] = []
    for entry in error.errors():
        # pydantic marks keys, and the alternatives of a union, in the path.
        where = ".".join(str(p) for p in entry["loc"] if not str(p).startswith(("[key]", "constrained-", "literal[")))
        if entry["type"] == "value_error":
            whole.append(str(entry["ctx"]["error"]))
            continue
        message = f"{entry['msg'][0].lower()}{entry['msg'][1:]}"
        problems.setdefault(where, []).append("unknown key" if entry["type"] == "extra_forbidden" else message)
        if entry["type"] != "extra_forbidden" and not isinstance(entry["input"], dict):
            values[where] = entry["input"]
    described = [
        f"{where}: {' or '.join(messages)}" + (f", got {shown(values[where])}" if where in values else "")
        for where, messages in problems.items()
    ]
    return "; ".join(described + whole)
