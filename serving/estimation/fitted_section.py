"""The section `fitted` of a hardware file: the constants that `supernode calibrate` may change.

    fitted:
      constant_name: {value: 1.23e-8, low: 0.0, high: 1.0e-6, rows: [names of groups]}  # what it is

Owns: its form, reading it, a description with other constants, rewriting it in the file's text.
Must not know: the fit, the rest of a hardware file.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

from devices.spec import FITTED_KEYS
from serving.errors import ConfigError, shown
from serving.estimation.calibration import Bounds, FittedConstant

_ENTRY = re.compile(r"^(?P<indent> +)(?P<name>[A-Za-z_]\w*): *\{[^{}#]*\}(?P<rest> *(?:#.*)?)$")
_IGNORED = re.compile(r"^\s*(?:#.*)?$")


def read_fitted(description: Mapping[str, Any]) -> dict[str, Bounds]:
    """Start and range of every constant. Raises ConfigError naming the field."""
    section = description.get("fitted")
    if not isinstance(section, Mapping) or not section:
        raise ConfigError(f"fitted: must hold constants to fit, got {shown(section)}")
    bounds: dict[str, Bounds] = {}
    for name, entry in section.items():
        where = f"fitted.{name}"
        if not isinstance(entry, Mapping):
            raise ConfigError(f"{where}: must be a mapping of {', '.join(FITTED_KEYS)}, got {shown(entry)}")
        for key in [*entry, *FITTED_KEYS]:
            if key not in FITTED_KEYS or key not in entry:
                raise ConfigError(f"{where}.{key}: {'missing' if key in FITTED_KEYS else 'unknown key'}")
        for key in ("value", "low", "high"):
            if isinstance(entry[key], bool) or not isinstance(entry[key], int | float):
                raise ConfigError(f"{where}.{key}: must be a number, got {shown(entry[key])}")
        try:
            bounds[name] = Bounds(start=float(entry["value"]), low=float(entry["low"]), high=float(entry["high"]))
        except ConfigError as error:
            raise ConfigError(f"{where}.{error}") from None
    return bounds


def with_constants(description: Mapping[str, Any], constants: Mapping[str, float]) -> dict[str, Any]:
    """A copy of a hardware description with these values in its section `fitted`; unknown names are an error."""
    changed = copy.deepcopy(dict(description))
    for name, value in constants.items():
        if name not in changed.get("fitted", {}):
            raise ConfigError(f"fitted.{name}: unknown constant")
        changed["fitted"][name]["value"] = value
    return changed


def rewrite_fitted(text: str, fitted: Sequence[FittedConstant]) -> str:
    """The text of a hardware file with new values, and the groups of rows that each constant has an effect on.

    Everything before the section stays byte for byte, as do comments and the order within it. The section must be the
    last and hold one line per constant: raises ConfigError otherwise.
    """
    constants = {constant.name: constant for constant in fitted}
    lines = text.splitlines(keepends=True)
    heads = [index for index, line in enumerate(lines) if re.match(r"fitted:\s*(?:#.*)?$", line)]
    if len(heads) != 1:
        raise ConfigError(f"fitted: the file has {len(heads)} such sections, must have one")
    written = []
    for index in range(heads[0] + 1, len(lines)):
        line = lines[index].rstrip("\r\n")
        if _IGNORED.match(line):
            continue
        entry = _ENTRY.match(line)
        if entry is None or entry["name"] not in constants:
            raise ConfigError(f"line {index + 1}: {shown(line)} is not the one line of a constant in the last section")
        constant = constants[entry["name"]]
        values = f"value: {yaml_float(constant.value)}, low: {yaml_float(constant.bounds.low)}, "
        values += f"high: {yaml_float(constant.bounds.high)}, rows: [{', '.join(constant.groups)}]"
        ending = lines[index][len(line) :]
        lines[index] = f"{entry['indent']}{entry['name']}: {{{values}}}{entry['rest']}{ending}"
        written.append(entry["name"])
    if sorted(written) != sorted(constants):
        raise ConfigError(f"fitted: the file holds {', '.join(written)}, the fit {', '.join(constants)}")
    return "".join(lines)


def yaml_float(value: float) -> str:
    """The shortest text that YAML 1.1 reads back as this float: an exponent needs a point and a sign."""
    text = repr(float(value))
    mantissa, e, exponent = text.partition("e")
    if not e:
        return text
    sign = "" if exponent.startswith("-") else "+"
    return f"{mantissa if '.' in mantissa else mantissa + '.0'}e{sign}{exponent.lstrip('+')}"
