"""`supernode expert-load`.

Owns: its options, and what it prints and writes.
Must not know: how load is measured or drawn.
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from serving.cli_options import listed, make_writable
from serving.errors import ConfigError

PICTURE_FILE = "expert_load.png"
LOAD_FILE = "expert_load.json"


def expert_load(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint in the hub's layout.", metavar="CHECKPOINT_DIR")],
    directory: Annotated[Path, typer.Argument(help="Where picture and file go.", metavar="OUT_DIR", file_okay=False)],
    num_problems: Annotated[int, typer.Option(help="Held-out problems per kind.", min=1)] = 64,
    kinds: Annotated[str | None, typer.Option(help="Kinds of problem, by comma; all if not given.")] = None,
    seed: Annotated[int, typer.Option(help="Of the problems.", min=0)] = 0,
) -> None:
    """Measure how much each expert is used, per kind of problem: a picture, and a file for model.expert_load."""
    from tqdm import tqdm

    from model.config import ModelConfig
    from model.expert_load import measure_expert_load
    from model.expert_load_picture import draw_expert_load, relative_load
    from model.reference import ReferenceModel
    from model.tasks.generator import KINDS
    from model.tokenizer import Tokenizer
    from serving.evaluation.questions import check_known
    from serving.expert_load import ExpertLoad

    names = tuple(KINDS) if kinds is None else listed(kinds)
    check_known("--kinds", names, tuple(KINDS))
    try:
        shape = ModelConfig.from_file(checkpoint / "config.json")
        tokenizer = Tokenizer.from_file(checkpoint / "tokenizer.json")
        model = ReferenceModel(shape, checkpoint)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{checkpoint}: {error}") from None
    if not shape.num_moe_layers:
        raise ConfigError(f"{checkpoint}: has no mixture layer, whose experts could be counted")
    make_writable(directory)
    load = ExpertLoad(
        shape=shape,
        divided_by="kinds",
        parts={
            name: measure_expert_load(model, tokenizer, name, num_problems=num_problems, seed=seed)
            for name in tqdm(names, unit="kind", disable=None)
        },
    )
    told = {
        "model": checkpoint.resolve().name,
        "source": f"{num_problems} held-out problems per kind, seed {seed}, teacher-forced",
    }
    (directory / LOAD_FILE).write_text(json.dumps(told | load.as_json()) + "\n", encoding="utf-8")
    draw_expert_load(
        {"overall": load.total, **load.parts},
        directory / PICTURE_FILE,
        first_layer=shape.first_k_dense_replace,
        title=f"Expert load of {told['model']}, {told['source']}",
    )
    for name, part in {**load.parts, "overall": load.total}.items():
        typer.echo(
            f"{name:<16}{part.sum() // (len(part) * shape.num_experts_per_tok):>9} tokens, busiest expert "
            f"{relative_load(part).max():.2f} x the mean of its layer"
        )
    typer.echo(f"wrote {directory / LOAD_FILE} and {directory / PICTURE_FILE}")
