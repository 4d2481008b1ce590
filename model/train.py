"""`python -m model.train`, which is also `supernode train`: the mini R1 from a seed.

Owns: the options, the progress bar, and which files are left at the end.
Must not know: what a step computes.
"""

from pathlib import Path
from typing import Annotated

import typer

from model.config import ModelConfig, ModelConfigError
from model.training.settings import TrainingSettings

DEFAULT_SHAPE = Path(__file__).parent.parent / "configs" / "model" / "mini-r1.yaml"
_EXIT_INTERRUPTED = 130


def train(
    output: Annotated[Path, typer.Argument(help="Folder for the checkpoint, and for the state of an unfinished run.")],
    shape: Annotated[Path, typer.Option(help="Hyper-parameters: a config.json or YAML.", exists=True)] = DEFAULT_SHAPE,
    seed: Annotated[int, typer.Option(help="Everything follows from it.")] = 0,
    steps: Annotated[int, typer.Option(help="Steps of the whole run.", min=1)] = TrainingSettings().num_steps,
    tokens: Annotated[
        int, typer.Option(help="Tokens per shard and step.", min=1)
    ] = TrainingSettings().tokens_per_shard,
    processes: Annotated[int, typer.Option(help="One-thread processes that share the shards.", min=1)] = 2,
    evaluate_every: Annotated[int, typer.Option(help="Steps between held-out measurements; 0: none.", min=0)] = 200,
) -> None:
    """Train the mini R1. Ctrl-C saves and stops; the same command goes on from there.

    The state is saved every 100 steps in OUTPUT/state.pt and removed when the checkpoint is written.
    """
    from tqdm import tqdm

    from model.tasks.corpus_tokenizer import VOCAB_SIZE, train_tokenizer
    from model.training.processes import STATE_FILE, Run, train
    from model.training.publish import publish
    from model.training.trainer import StepReport, Trainer

    config = _load_shape(shape)
    if config.vocab_size != VOCAB_SIZE:
        raise ModelConfigError(f"vocab_size: {config.vocab_size} is not the tokenizer's {VOCAB_SIZE}")
    settings = TrainingSettings(seed=seed, num_steps=steps, tokens_per_shard=tokens)
    output.mkdir(parents=True, exist_ok=True)
    state = output / STATE_FILE
    if not state.exists() and (output / "model.safetensors").exists():
        raise typer.BadParameter(f"{output} already holds a checkpoint.")
    tokenizer = train_tokenizer(seed)
    tokenizer.save(output / "tokenizer.json")
    run = Run(
        config=config,
        settings=settings,
        tokenizer_file=output / "tokenizer.json",
        directory=output,
        processes=processes,
        evaluate_every=evaluate_every,
    )
    with tqdm(total=steps, unit="step", smoothing=0.05) as bar:

        def show(report: object) -> None:
            if isinstance(report, StepReport):
                bar.update(report.step + 1 - bar.n)
                bar.set_postfix(loss=f"{report.loss:.4f}", mtp=f"{report.mtp_loss:.4f}", load=f"{report.max_load:.2f}")
            else:
                bar.write(str(report))

        is_finished = train(run, show)
    if not is_finished:
        typer.echo(f"Stopped; the state is in {state}. The same command goes on.", err=True)
        raise typer.Exit(_EXIT_INTERRUPTED)
    trainer = Trainer(config, settings, tokenizer)
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
    typer.echo(f"Checkpoint in {output}.")


def _load_shape(path: Path) -> ModelConfig:
    import json

    import yaml

    text = path.read_text(encoding="utf-8")
    return ModelConfig.from_dict(json.loads(text) if path.suffix == ".json" else yaml.safe_load(text))


if __name__ == "__main__":
    typer.run(train)
