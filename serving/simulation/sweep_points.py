"""Points of a sweep: what is varied, and what one point gives.

Owns: the syntax of varied values, the cartesian grid, the identity of a point, its row of figures.
Must not know: where points run, what keeps their rows (serving/simulation/sweep_rows.py), command lines.

A point is a few words and numbers, so that it can be sent to any machine that has the package and the trace's path.
"""

import hashlib
import importlib.metadata
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from typing import Any

import yaml

from serving.config import RunConfig
from serving.config_file import load_config
from serving.errors import ConfigError, ServingError, shown
from serving.records import Goodput
from serving.simulation.run_source import WorkloadSource, run_figures

MAX_POINTS = 100_000  # beyond it a range was mistyped
RATE, SEED = "rate", "seed"  # columns of the axes that are options of their own
# A simulation depends on none of these, and the first is a path of this machine; the model's shape is counted apart.
IRRELEVANT: Mapping[str, Any] = {
    "model": {"checkpoint", "served_model_name"},
    "server": True,
    "ray": True,
    "clock": True,
}

Row = dict[str, Any]  # scalars by column


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One thing that is varied: a configuration key, `rate` or `seed`, and its values as YAML texts."""

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One simulation. `varied` is a value per axis, as a row shows it; `overrides` are `--set`s, the axes' too."""

    config: str
    overrides: tuple[str, ...]
    workload: WorkloadSource
    varied: Mapping[str, str | int | float | bool | None]
    goodput: Goodput | None = None


def parse_axis(text: str, *, option: str = "--set-grid") -> Axis:
    """An axis from `a.b=v1,v2`; values are YAML, and first:last:step counts numbers, the last one included.

    Raises ConfigError for a missing key or value, a value given twice, a range that does not count.
    """
    key, separator, values = text.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"{option} {shown(text)}: must be KEY=V1,V2")
    return Axis(key=key.strip(), values=parse_values(values, option=f"{option} {key.strip()}"))


def parse_values(text: str, *, option: str) -> tuple[str, ...]:
    """YAML texts of the values listed in `text`. Raises ConfigError as `parse_axis` does."""
    try:
        node = yaml.compose(f"[{text}]")
    except yaml.YAMLError:
        raise ConfigError(f"{option}: {shown(text)} is not a list of YAML values by comma") from None
    assert isinstance(node, yaml.SequenceNode)
    if node.end_mark.index != len(text) + 2:  # a bracket of the text closed ours
        raise ConfigError(f"{option}: {shown(text)} is not a list of YAML values by comma")
    values: list[str] = []
    for item in node.value:
        written = text[item.start_mark.index - 1 : item.end_mark.index - 1]
        is_range = isinstance(item, yaml.ScalarNode) and item.style is None and ":" in written
        values += _counted(written, option) if is_range else [written]
    if not values or not all(value.strip() for value in values):
        raise ConfigError(f"{option}: {shown(text)} needs at least one value, and none empty")
    twice = [value for value in values if values.count(value) > 1] if len(values) <= 1000 else []
    if twice:
        raise ConfigError(f"{option}: {shown(twice[0])} is given twice")
    return tuple(values)


def _counted(text: str, option: str) -> list[str]:
    parts = text.split(":")
    try:
        first, last, step = (Decimal(part.strip()) for part in (*parts, "1")[:3])
        number = (last - first) / step
        if len(parts) > 3 or not number.is_finite() or number < 0 or number >= MAX_POINTS:
            raise ConfigError(
                f"{option}: {shown(text)} must count from its first number to its last by a step that gets there, "
                f"in fewer than {MAX_POINTS} values"
            )
    except (InvalidOperation, ValueError, ZeroDivisionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{option}: {shown(text)} is not a range first:last:step of numbers") from None
    return [f"{first + i * step:f}" for i in range(int(number) + 1)]


def grid_points(base: Point, axes: Sequence[Axis]) -> list[Point]:
    """The cartesian product of the axes over `base`, the last one fastest. Raises ConfigError for a key given twice."""
    keys = [axis.key for axis in axes]
    fixed = {override.partition("=")[0].strip() for override in base.overrides}
    for key in keys:
        if keys.count(key) > 1:
            raise ConfigError(f"{key}: two axes vary it")
        if key in fixed:
            raise ConfigError(f"{key}: is both set and varied")
    number = math.prod(len(axis.values) for axis in axes)
    if number > MAX_POINTS:
        raise ConfigError(f"grid: {number} points exceed the limit {MAX_POINTS}")
    return [point_at(base, axes, values) for values in itertools.product(*(axis.values for axis in axes))]


def point_at(base: Point, axes: Sequence[Axis], values: Sequence[str]) -> Point:
    """`base` with one value per axis."""
    overrides, workload = list(base.overrides), base.workload
    varied: dict[str, Any] = {}
    for axis, text in zip(axes, values, strict=True):
        varied[axis.key] = _scalar(yaml.safe_load(text))
        if axis.key == RATE:
            workload = replace(workload, rate=_rate(varied[RATE]))
        else:
            overrides.append(f"{axis.key}={text}")
    return replace(base, overrides=tuple(overrides), workload=workload, varied=varied)


def _rate(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigError(f"--rate: {shown(value)} must be a number of requests per second above 0")
    return float(value)


def _scalar(value: object) -> str | int | float | bool | None:
    """As a column can hold it: anything with parts becomes its JSON text."""
    return value if value is None or isinstance(value, str | int | float | bool) else json.dumps(value, default=str)


def point_key(point: Point) -> str:
    """Identity of what a point simulates: configuration, workload, objectives, version of this package.

    A workload is drawn or read by pure functions of the configuration, the seed in it and `WorkloadSource`, which
    has a digest of a trace's bytes; so it need not be made to be known. Raises ConfigError if the configuration has a
    mistake.
    """
    config = load_config(point.config, point.overrides)
    return _digest([config_identity(config), repr(point.workload.identity), repr(point.goodput), version()])


def invalid_key(point: Point) -> str:
    """Identity of a point whose configuration cannot be loaded."""
    return _digest([point.config, repr(point.overrides), repr(point.workload.identity), repr(point.goodput), version()])


def config_identity(config: RunConfig) -> str:
    """Canonical text of all of a configuration that a simulation depends on, its included parts among it."""
    load = config.expert_load
    parts = (config.shape, config.charged_shape, config.hardware, None if load is None else load.tobytes().hex())
    return f"{json.dumps(config.model_dump(mode='json', exclude=dict(IRRELEVANT)), sort_keys=True)} {parts!r}"


def version() -> str:
    """Of this package: another one may simulate otherwise."""
    return importlib.metadata.version("supernode-infer")


def _digest(parts: Sequence[str]) -> str:
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()


def run_point(point: Point) -> Row:
    """Simulate one point; the row of a mistake has its `status` invalid and the `error`.

    Row: the axes' values, `status`, then every scalar of the figures, those of parts as `part.name`.
    """
    row: Row = dict(point.varied)
    try:
        config = load_config(point.config, point.overrides)
        figures = run_figures(config, point.workload, goodput=point.goodput)
    except (ServingError, ValueError) as error:
        return row | {"status": "invalid", "error": str(error)}
    return row | {"status": "ok", "error": None, "num_npus": config.total_npus} | dict(_scalars(figures))


def _scalars(figures: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str | int | float | bool | None]]:
    for name, value in figures.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{name}.")
        elif value is None or isinstance(value, str | int | float | bool):
            yield f"{prefix}{name}", value
