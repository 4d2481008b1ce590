"""`supernode calibrate`.

Owns: its options, and what it prints and writes.
Must not know: least squares, how an estimate is made.
"""

import json
from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from serving.cli_options import Json
from serving.errors import ConfigError
from serving.estimation.reproduce_command import Published


def calibrate(
    hardware: Annotated[str, typer.Option(help="Device, or its YAML file.")] = "cloudmatrix384",
    published: Published = None,
    write: Annotated[bool, typer.Option("--write", help="Put the values into the device's file.")] = False,
    json_file: Json = None,
) -> None:
    """Fit the free constants of a device to the published rows for calibration; the others stay unseen."""
    from serving.config_file import load_part
    from serving.estimation.calibration_run import calibrate_constants, format_calibration
    from serving.estimation.estimates import ESTIMATES
    from serving.estimation.fitted_section import read_fitted, rewrite_fitted
    from serving.estimation.published import load_published, published_of

    file = _file_of(hardware)
    description = load_part(str(file))
    told = load_published(published_of(str(description.get("name"))) if published is None else str(published))
    try:
        constants = read_fitted(description)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
    calibration = calibrate_constants(told, description, constants, ESTIMATES)
    typer.echo(format_calibration(calibration))
    if json_file is not None:
        json_file.write_text(json.dumps(calibration.as_json(), indent=2) + "\n", encoding="utf-8")
    if write:
        try:
            # As bytes: text mode would turn one kind of line end into another.
            text = rewrite_fitted(file.read_bytes().decode("utf-8"), calibration.fit.constants)
            file.write_bytes(text.encode("utf-8"))
        except (ConfigError, OSError) as error:
            raise ConfigError(f"{file}: {error}") from None
        typer.echo(f"wrote the section fitted of {file}")


def _file_of(hardware: str) -> Path:
    """A file, or the shipped one of a device. Raises ConfigError."""
    file = Path(hardware)
    if not hardware.endswith((".yaml", ".yml")):
        file = Path(str(resources.files("configs").joinpath(f"hardware/{hardware}.yaml")))
    if not file.is_file():
        raise ConfigError(f"--hardware: {hardware!r} is neither a YAML file nor a shipped device")
    return file
