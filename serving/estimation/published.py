"""Published figures as data: one row each, with how ours is computed.

Owns: the form of a configs/published/*.yaml file, and how its mistakes are told (file, row, field).
Must not know: the estimates, errors between published and ours, the fit.
Source: every row carries its own.
"""

from collections.abc import Mapping
from importlib import resources
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, ValidationError, model_validator

from serving.config import Section
from serving.config_file import load_part
from serving.errors import ConfigError, shown

RowRole = Literal["calibration", "validation", "input", "comparison"]
ROLES: tuple[RowRole, ...] = get_args(RowRole)
Scalar = bool | int | float | str | None
Word = Annotated[str, Field(min_length=1)]
Number = Annotated[float, Field(allow_inf_nan=False)]


class Ours(Section):
    """How ours is computed: `factor` * (estimate - `minus`) / `over`, with the value of one estimate under `key`.

    `minus` and `over` hold the arguments in which the subtracted and the dividing estimate differ from the first.
    """

    estimate: Word
    key: Word
    arguments: dict[str, Scalar] = Field(alias="with")
    minus: dict[str, Scalar] | None = None
    over: dict[str, Scalar] | None = None
    factor: Number = 1.0  # of units: 100 from a share to percent, 8 from an NPU to a node of eight


class PublishedRow(Section):
    """One published figure. `error` in reports is relative to `published`, which keeps its sign."""

    group: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]
    row: Word
    quantity: Word
    unit: Word
    published: Number
    role: RowRole
    source: Word
    note: Word | None = None
    hardware: Word | None = None  # None: the file's
    ours: Ours

    @property
    def label(self) -> str:
        """What a message or a picture calls the row."""
        return f"{self.group} / {self.row} / {self.quantity}"


class PublishedRows(Section):
    """The contents of one file. No two rows have the same group, row and quantity."""

    hardware: Word
    rows: Annotated[tuple[PublishedRow, ...], Field(min_length=1, strict=False)]  # YAML has lists only

    @model_validator(mode="after")
    def _check_unique(self) -> "PublishedRows":
        seen: set[str] = set()
        for row in self.rows:
            if row.label in seen:
                raise ValueError(f"{row.label}: given twice")
            seen.add(row.label)
        return self

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups in the order of the file."""
        return tuple(dict.fromkeys(row.group for row in self.rows))

    def of_group(self, group: str) -> "PublishedRows":
        """The rows of one group alone. Raises ConfigError if there is no such group."""
        if group not in self.groups:
            raise ConfigError(f"--group: {group!r}, there are {', '.join(self.groups)}")
        return self.model_copy(update={"rows": tuple(row for row in self.rows if row.group == group)})

    def of_role(self, role: RowRole) -> tuple[PublishedRow, ...]:
        """The rows of one role."""
        return tuple(row for row in self.rows if row.role == role)


def published_of(hardware: str) -> str:
    """The part with the rows about a device, such as published/cloudmatrix384.yaml. Raises ConfigError if none is."""
    path = f"published/{hardware}.yaml"
    if hardware not in _names("published") or hardware not in _names("hardware"):
        known = ", ".join(device for device in _names("published") if device in _names("hardware"))
        raise ConfigError(
            f"--hardware: no published rows about {hardware!r}, only about {known}; give --published FILE"
        )
    return path


def _names(folder: str) -> list[str]:
    files = resources.files("configs").joinpath(folder).iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def load_published(path: str) -> PublishedRows:
    """Read a file, or a shipped part. Raises ConfigError naming file, row and field."""
    raw = load_part(path)
    try:
        return PublishedRows.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{path}: {'; '.join(_describe(raw, dict(entry)) for entry in error.errors())}") from None


def _describe(raw: Mapping[str, Any], entry: Mapping[str, Any]) -> str:
    """One mistake: the row by number and name, the field, the rule and the value."""
    if entry["type"] == "value_error":
        return str(entry["ctx"]["error"])
    # pydantic puts the alternatives of a union at the end of the path.
    where = [part for part in entry["loc"] if part not in ("bool", "int", "float", "str", "none")]
    named = ""
    if where[:1] == ["rows"] and len(where) > 1:
        row = raw["rows"][where[1]]
        keys = ("group", "row", "quantity")
        words = " / ".join(str(row[key]) for key in keys if key in row) if isinstance(row, Mapping) else ""
        named = f"row {where[1] + 1}{f' ({words})' if words else ''}: "
        where = where[2:]
    field = ".".join(str(part) for part in where)
    if entry["type"] == "extra_forbidden":
        return f"{named}{field}: unknown key"
    if entry["type"] == "missing":
        return f"{named}{field}: missing"
    message = f"{entry['msg'][0].lower()}{entry['msg'][1:]}"
    return f"{named}{field + ': ' if field else ''}{message}, got {shown(entry['input'])}"
