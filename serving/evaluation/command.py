"""`supernode eval`.

Owns: its options, and what it prints and writes.
Must not know: how anything is done.
"""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from serving.cli_options import Json, Overrides, Ray, listed
from serving.errors import ConfigError


def evaluate(
    config: Annotated[
        str | None,
        typer.Argument(help="Preset or YAML file to boot; not needed with --base-url.", metavar="CONFIG"),
    ] = None,
    overrides: Overrides = None,
    base_url: Annotated[str | None, typer.Option(help="Ask this endpoint, which runs already.")] = None,
    kinds: Annotated[str | None, typer.Option(help="Kinds of problem, by comma; all if not given.")] = None,
    levels: Annotated[str, typer.Option(help="Levels of difficulty, by comma.")] = "1,2,3",
    num_problems: Annotated[int, typer.Option(help="Problems per kind, and per group beside the kinds.")] = 100,
    seed: Annotated[int, typer.Option(help="Of the problems; equal seeds ask equal problems.", min=0)] = 0,
    concurrency: Annotated[int, typer.Option(help="Requests in flight.")] = 32,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    max_tokens: Annotated[int, typer.Option(help="Tokens of a reply at most.")] = 400,
    compare: Annotated[
        Path | None, typer.Option(help="Compare with this earlier result, problem by problem.", dir_okay=False)
    ] = None,
    model: Annotated[str | None, typer.Option(help="With --base-url: model to ask for; else the first.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", help="With --base-url: bearer token.")] = None,
    json_file: Json = None,
    address: Ray = None,
    disable_tqdm: Annotated[bool, typer.Option("--disable-tqdm", help="No progress bar.")] = False,
) -> None:
    """Measure accuracy on held-out problems of every kind, asked through the chat endpoint."""
    from model.tasks.generator import KINDS
    from serving.config_file import load_config
    from serving.evaluation import comparison, questions, report, run
    from serving.evaluation.client import AskSettings

    if config is None and base_url is None:
        raise ConfigError("eval: needs a configuration to boot, or --base-url")
    if config is None and overrides:
        raise ConfigError(f"--set {overrides[0]!r}: there is no configuration to override")
    asked = questions.draw_questions(
        num_problems=num_problems,
        kinds=tuple(KINDS) if kinds is None else listed(kinds),
        levels=[int(level) if level.isdecimal() else level for level in listed(levels)],  # type: ignore[misc]
        seed=seed,
    )
    earlier = None if compare is None else comparison.read_earlier(compare)
    if earlier is not None:
        earlier.check_overlap(asked)
    settings = AskSettings(
        base_url=base_url or "http://localhost",
        model=model,
        api_key=api_key,
        concurrency=concurrency,
        temperature=temperature,
        max_tokens=max_tokens,
        seed=seed,
        disable_tqdm=disable_tqdm or None,
    )
    loaded = None if config is None else load_config(config, overrides or ())
    if base_url is not None:
        subject = None if loaded is None else run.describe(loaded)
        result = run.evaluate_endpoint(settings, asked, subject=subject)
    else:
        assert loaded is not None
        result = run.evaluate_config(loaded, settings, asked, address=address)
    drawn = {"seed": seed, "levels": levels, "num_problems": num_problems}
    result = dataclasses.replace(result, settings=drawn | dict(result.settings))
    typer.echo(report.format_result(result))
    values = result.as_json()
    if earlier is not None:
        compared = comparison.compare(result, earlier)
        typer.echo(report.format_comparison(compared, earlier))
        values["comparison"] = {entry.group: entry.as_json() for entry in compared}
    if json_file is not None:
        json_file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if result.exit_code:
        raise typer.Exit(result.exit_code)
