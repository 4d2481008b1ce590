"""The import contracts of pyproject.toml name every module that there is: a new one cannot be forgotten."""

import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DEVICES_MAY_IMPORT = {"model.config", "model.work"}


def modules_of(package):
    """The modules and packages directly in a package."""
    files = {path.stem for path in (ROOT / package).glob("*.py")} - {"__init__"}
    return {f"{package}.{name}" for name in files | {path.parent.name for path in (ROOT / package).glob("*/*.py")}}


def forbidden_to(source, package):
    """Modules of `package` that the contracts forbid `source` to import, packages with what is in them."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (contract,) = (c for c in contracts if c["type"] == "forbidden" and c["source_modules"] == [source])
    assert not contract.get("ignore_imports")
    assert not contract.get("allow_indirect_imports")
    names = contract["forbidden_modules"]
    assert names == list(dict.fromkeys(names)), "a module is listed twice"
    return {name for name in names if name.startswith(f"{package}.")}


@pytest.mark.parametrize(
    ("source", "package", "allowed"),
    [("devices", "model", DEVICES_MAY_IMPORT), ("serving.core", "serving", {"serving.core"})],
)
def test_every_module_is_forbidden_or_allowed(source, package, allowed):
    modules = modules_of(package)
    assert allowed < modules
    assert forbidden_to(source, package) == modules - allowed
