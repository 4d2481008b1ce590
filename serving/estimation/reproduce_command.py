"""`supernode reproduce`.

Owns: its options, and what it prints and writes.
Must not know: how rows are evaluated or drawn.
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from serving.cli_options import Json, check_writable

Hardware = Annotated[str, typer.Option(help="Device that the rows are about.")]
Published = Annotated[
    Path | None, typer.Option(help="File of published rows; the shipped one if not given.", dir_okay=False)
]


def _check_picture(path: Path | None) -> Path | None:
    if path is not None and path.suffix != ".png":
        raise typer.BadParameter(f"{path} must end in .png.")
    return check_writable(path)


def reproduce(
    hardware: Hardware = "cloudmatrix384",
    group: Annotated[str | None, typer.Option(help="Only the rows of this group.")] = None,
    published: Published = None,
    json_file: Json = None,
    picture: Annotated[
        Path | None,
        typer.Option(help="Draw published against ours to this PNG.", dir_okay=False, callback=_check_picture),
    ] = None,
) -> None:
    """Show every published figure beside ours, with the error and whether the model was fitted to it."""
    from serving.estimation.estimates import ESTIMATES
    from serving.estimation.evaluation import evaluate_rows, summarize
    from serving.estimation.picture import draw_reproduction
    from serving.estimation.published import load_published, published_of
    from serving.estimation.reproduction import format_reproduction, reproduction_as_json

    told = load_published(published_of(hardware) if published is None else str(published))
    if group is not None:
        told = told.of_group(group)
    rows = evaluate_rows(told.rows, ESTIMATES, hardware=told.hardware, description=hardware)
    summary = summarize(rows)
    typer.echo(format_reproduction(rows, summary, has_bars=group is None))
    if json_file is not None:
        json_file.write_text(json.dumps(reproduction_as_json(rows, summary), indent=2) + "\n", encoding="utf-8")
    if picture is not None:
        draw_reproduction(rows, picture, title=f"{hardware}: published against ours, {len(rows)} figures")
