"""`python -m model.train`, which is also `supernode train`: the mini R1 from a seed.

Owns: the options, the progress bar, and which files are left at the end.
Must not know: what a step computes.
"""

import time
from pathlib import Path
from typing import Annotated

import typer

from model.config import ModelConfig, ModelConfigError
from model.training.settings import TrainingSettings

DEFAULT_SHAPE = Path(__file__).parent.parent / "configs" / "model" / "mini-r1.yaml"
_EXIT_INTERRUPTED = 130


def train(
    output: Annotated[
        Path,
        typer.Argument(
            help="Folder for the checkpoint, and for the state of an unfinished run.", metavar="OUTPUT", file_okay=False
        ),
    ],
    shape: Annotated[
        Path,
        typer.Option(
            help="Hyper-parameters: config.json or YAML.", exists=True, dir_okay=False, show_default="mini-r1"
        ),
    ] = DEFAULT_SHAPE,
    seed: Annotated[int, typer.Option(help="Everything follows from it.", min=0)] = 0,
    steps: Annotated[int, typer.Option(help="Steps of the whole run.", min=1)] = TrainingSettings().num_steps,
    tokens: Annotated[int, typer.Option(help="Tokens of a shard.", min=1)] = TrainingSettings().tokens_per_shard,
    processes: Annotated[int, typer.Option(help="One-thread processes that share the shards.", min=1, max=2)] = 2,
    evaluate_every: Annotated[int, typer.Option(help="Steps between held-out measurements; 0: none.", min=0)] = 200,
) -> None:
    """Train the mini R1. Ctrl-C saves and stops; the same command goes on from there.

    The state is saved every 100 steps in OUTPUT/state.pt and removed when the checkpoint is written.
    """
    from model.training.processes import TrainingError
    from model.training.trainer import ResumeError

    settings = TrainingSettings(seed=seed, num_steps=steps, tokens_per_shard=tokens)
    try:
        is_finished = _train(output, _load_shape(shape), settings, processes, evaluate_every)
    except (ModelConfigError, ResumeError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    except TrainingError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    if not is_finished:
        typer.echo(f"Stopped; the state is saved in {output}. The same command goes on.", err=True)
        raise typer.Exit(_EXIT_INTERRUPTED)
    typer.echo(f"Checkpoint in {output}.")


def _train(output: Path, config: ModelConfig, settings: TrainingSettings, processes: int, evaluate_every: int) -> bool:
    """Run until the end, then write the checkpoint; False if interrupted.

    Raises ModelConfigError or ResumeError for what cannot be run.
    """
    from tqdm import tqdm

    from model.tasks.corpus_tokenizer import VOCAB_SIZE, train_tokenizer
    from model.training.held_out import Accuracy
    from model.training.processes import STATE_FILE, Run, run_processes
    from model.training.publish import publish
    from model.training.trainer import ResumeError, StepReport, Trainer

    if config.vocab_size != VOCAB_SIZE:
        raise ModelConfigError(f"vocab_size: {config.vocab_size} is not the tokenizer's {VOCAB_SIZE}")
    state = output / STATE_FILE
    if not state.exists() and (output / "model.safetensors").exists():
        raise ResumeError(f"{output}: already holds a checkpoint")
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(settings.seed)
    trainer = Trainer(config, settings, tokenizer)
    if state.exists():
        trainer.resume(state)  # refuses before anything is written
    tokenizer.save(output / "tokenizer.json")
    run = Run(
        config=config,
        settings=settings,
        tokenizer_file=output / "tokenizer.json",
        directory=output,
        processes=processes,
        evaluate_every=evaluate_every,
    )
    num_tokens, started = 0, time.perf_counter()
    with tqdm(total=settings.num_steps, initial=trainer.step, unit="step", smoothing=0.05) as bar:

        def show(report: object) -> None:
            if isinstance(report, StepReport):
                nonlocal num_tokens
                num_tokens += report.num_tokens
                speed = num_tokens / (time.perf_counter() - started)
                bar.set_postfix_str(
                    f"loss {report.loss:.4f}, MTP {report.mtp_loss:.4f}, load {report.max_load:.2f}, {speed:.0f} tok/s"
                )
                bar.update(report.step + 1 - bar.n)
            elif isinstance(report, Accuracy):
                bar.write(f"step {report.step}: {100 * report.mean:.1f} % of held-out replies reproduced exactly")

        if not run_processes(run, show):
            return False
    trainer.resume(state)
    publish(
        output,
        config,
        trainer.weights,
        tokenizer,
        settings=trainer.settings_as_dict,
        history=trainer.history,
        accuracies=trainer.accuracies,
    )
    state.unlink()
    return True


def _load_shape(path: Path) -> ModelConfig:
    import json

    import yaml

    text = path.read_text(encoding="utf-8")
    try:
        return ModelConfig.from_dict(json.loads(text) if path.suffix == ".json" else yaml.safe_load(text))
    except (yaml.YAMLError, TypeError, AttributeError) as error:
        raise ModelConfigError(f"{path}: no hyper-parameters: {' '.join(str(error).split())}") from None


if __name__ == "__main__":
    typer.run(train)
