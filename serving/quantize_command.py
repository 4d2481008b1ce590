"""`supernode quantize`: a float checkpoint to an INT8 one, or a table of what each technique buys.

Owns: the options, what is printed, and the JSON file.
Must not know: how quantization works (model/quantization). Torch is imported when the command runs.
"""

import dataclasses
import json
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from serving.cli_options import Json
from serving.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from model.config import ModelConfig
    from model.quantization.quantize import QuantizedModel, Techniques
    from model.quantization.samples import Samples


def quantize(
    checkpoint: Annotated[Path, typer.Argument(help="Float checkpoint in the hub's layout.")],
    out: Annotated[Path | None, typer.Argument(help="Directory to write; must be empty or new.")] = None,
    rotation: Annotated[bool, typer.Option(help="Absorb orthogonal transforms against outliers.")] = True,
    scale_search: Annotated[bool, typer.Option(help="Move range from activations to weights.")] = True,
    clipping: Annotated[bool, typer.Option(help="Search the clip factor of every output channel.")] = True,
    compensation: Annotated[bool, typer.Option(help="Spread rounding errors over the other inputs.")] = True,
    calibration: Annotated[
        str,
        typer.Option(help="tasks: generated problems; own: the model's own text; or a file, a sequence per line."),
    ] = "tasks",
    num_sequences: Annotated[int, typer.Option(help="Sequences to calibrate on, and measure with.", min=2)] = 64,
    sequence_len: Annotated[int, typer.Option(help="Tokens of a sequence, at most.", min=2)] = 128,
    seed: Annotated[int, typer.Option(help="Of rotations, problems and the model's own text.", min=0)] = 0,
    ablate: Annotated[
        bool, typer.Option("--ablate", help="Print what each technique buys; OUT is not needed.")
    ] = False,
    json_file: Json = None,
    disable_tqdm: Annotated[bool, typer.Option("--disable-tqdm", help="No progress bar.")] = False,
) -> None:
    """Write an INT8 checkpoint that `model.checkpoint` loads, or measure the techniques with --ablate."""
    from model.checkpoint_check import WeightsError
    from model.config import ModelConfigError
    from model.quantization.quantize import Techniques, read_float_checkpoint
    from model.quantization.samples import SamplesError
    from model.tokenizer import TokenizerError

    _check_target(out, ablate=ablate)
    techniques = Techniques(
        rotation=rotation, scale_search=scale_search, clipping=clipping, compensation=compensation, seed=seed
    )
    try:
        config, tensors = read_float_checkpoint(checkpoint)
        length = min(sequence_len, config.max_position_embeddings)
        samples = _samples(calibration, checkpoint, config, tensors, num=num_sequences, length=length, seed=seed)
    except SamplesError as error:
        raise ConfigError(f"--calibration: {error}") from None
    except (WeightsError, ModelConfigError, TokenizerError) as error:
        raise ConfigError(f"{checkpoint}: {error}" if str(checkpoint) not in str(error) else str(error)) from None
    with closing(_Progress(disabled=disable_tqdm)) as progress:
        if ablate:
            result = _ablate(checkpoint, config, tensors, samples, seed=seed, progress=progress)
        else:
            assert out is not None
            result = _quantize(checkpoint, out, config, tensors, samples, techniques, progress)
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _check_target(out: Path | None, *, ablate: bool) -> None:
    if out is None:
        if not ablate:
            raise ConfigError("OUT: a directory to write to is needed, but for --ablate")
    elif ablate:
        raise ConfigError("OUT: --ablate writes no checkpoint")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: is there already and is not an empty directory")


def _samples(
    source: str,
    checkpoint: Path,
    config: "ModelConfig",
    tensors: "dict[str, Tensor]",
    *,
    num: int,
    length: int,
    seed: int,
) -> "Samples":
    """What --calibration asks for."""
    from model.quantization.samples import Samples, lines_of, problems, self_generated
    from model.tokenizer import Tokenizer

    if source == "own":
        return Samples.split(self_generated(config, tensors, num=num, length=length, seed=seed))
    tokenizer = Tokenizer.from_file(checkpoint / "tokenizer.json")
    if source == "tasks":
        return problems(tokenizer, num=num, length=length, seed=seed)
    return lines_of(Path(source), tokenizer, num=num, length=length)


def _quantize(
    checkpoint: Path,
    out: Path,
    config: "ModelConfig",
    tensors: "dict[str, Tensor]",
    samples: "Samples",
    techniques: "Techniques",
    progress: "_Progress",
) -> dict[str, Any]:
    from model.quantization.ablation import compare
    from model.quantization.quantize import quantize_tensors, write_checkpoint

    model = quantize_tensors(config, tensors, samples.calibration, techniques, on_progress=progress)
    progress("comparison", 0, 1)
    fidelity = compare(config, tensors, model, samples.held_out)
    try:
        write_checkpoint(checkpoint, out, model)
    except OSError as error:
        raise ConfigError(f"{out}: {error.strerror}") from None
    progress.close()
    before, after = (sum(f.stat().st_size for f in d.glob("*.safetensors")) for d in (checkpoint, out))
    names = [name for name, value in dataclasses.asdict(techniques).items() if value is True]
    typer.echo(f"techniques      {', '.join(names) or 'none (rounding)'}")
    typer.echo(f"file size       {before / 1e6:.2f} MB -> {after / 1e6:.2f} MB ({after / before:.0%})")
    typer.echo(f"logits          error {fidelity.error_median:.2%} (median), {fidelity.error_mean:.2%} (mean)")
    typer.echo(f"next token      KL {fidelity.kl_median:.1e} nats (median), same choice {fidelity.top1_agreement:.2%}")
    typer.echo("\n".join(_layer_lines(config, model)))
    return {
        "techniques": dataclasses.asdict(techniques),
        "file_bytes": {"before": before, "after": after},
        "fidelity": dataclasses.asdict(fidelity),
        "weight_error_by_layer": model.layer_errors(),
    }


def _layer_lines(config: "ModelConfig", model: "QuantizedModel") -> list[str]:
    lines = ["layer  error of outputs by rounded weights (mean over matrices)"]
    for layer, error in model.layer_errors().items():
        lines.append(f"{layer:5}  {error:.3%}" + ("  (MTP)" if layer >= config.num_hidden_layers else ""))
    return lines


def _ablate(
    checkpoint: Path,
    config: "ModelConfig",
    tensors: "dict[str, Tensor]",
    samples: "Samples",
    *,
    seed: int,
    progress: "_Progress",
) -> dict[str, Any]:
    from model.quantization.ablation import ablate
    from model.quantization.quantize import large_dtype

    rows = list(
        ablate(
            config,
            tensors,
            samples.calibration,
            samples.held_out,
            seed=seed,
            large=large_dtype(checkpoint),
            on_progress=progress,
        )
    )
    progress.close()
    float_bytes = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    typer.echo(f"{sum(map(len, samples.held_out))} held-out positions; float checkpoint {float_bytes / 1e6:.2f} MB")
    head = ("techniques", "error", "(mean)", "KL", "(mean)", "same choice", "weights", "MB")
    typer.echo("{:<22}{:>8}{:>8}{:>10}{:>10}{:>13}{:>9}{:>8}".format(*head))
    for row in rows:
        f = row.fidelity
        typer.echo(
            f"{row.name:<22}{f.error_median:>8.2%}{f.error_mean:>8.2%}{f.kl_median:>10.1e}{f.kl_mean:>10.1e}"
            f"{f.top1_agreement:>13.2%}{row.weight_error:>9.3%}{row.num_bytes / 1e6:>8.2f}"
        )
    return {"float_bytes": float_bytes, "variants": [dataclasses.asdict(row) for row in rows]}


class _Progress:
    """A bar per stage on standard error."""

    def __init__(self, *, disabled: bool) -> None:
        self._disabled = disabled or not sys.stderr.isatty()
        self._bar: Any = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        from tqdm import tqdm

        if self._bar is None or self._bar.desc != f"{stage}: ":
            self.close()
            self._bar = tqdm(total=total, disable=self._disabled, leave=False)
            self._bar.set_description(stage)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
