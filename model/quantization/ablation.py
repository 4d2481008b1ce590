"""What each technique buys: INT8 models with one of them switched off, against the float model.

Owns: the variants and the measures.
Must not know: files, how tables look.

Measured over every position of held-out sequences, logits of the float model against those of the INT8 model:
relative error |z - z'| / |z|, KL divergence of the next token's distribution in nats, and how often both have the
same most likely token. Medians stand beside means, because a token whose experts change (rare, but then its logits
are others) dominates the means.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import ModelConfig
from model.quantization.calibration import PlainModel
from model.quantization.quantize import QuantizedModel, Techniques, quantize_tensors
from model.tensor_files import TensorDict

SWITCHES = ("rotation", "scale_search", "clipping", "compensation")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fidelity:
    """How close an INT8 model is to its float original."""

    error_mean: float
    error_median: float
    kl_mean: float  # nats
    kl_median: float
    top1_agreement: float  # share of positions


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One row of the table."""

    name: str
    fidelity: Fidelity
    weight_error: float  # of the matrices' outputs, relative, mean over layers; activations not rounded
    num_bytes: int  # of the stored tensors


def variants() -> dict[str, Techniques]:
    """All techniques, each switched off, each alone, and none."""
    rows = {"all": Techniques()}
    rows |= {f"without {name}": dataclasses.replace(Techniques(), **{name: False}) for name in SWITCHES}
    rows |= {f"only {name}": dataclasses.replace(Techniques.none(), **{name: True}) for name in SWITCHES}
    return rows | {"none (rounding)": Techniques.none()}


def compare(
    config: ModelConfig, tensors: dict[str, Tensor], model: QuantizedModel, sequences: Sequence[Sequence[int]]
) -> Fidelity:
    """The float model of `tensors` against `model`, over every position of `sequences`."""
    max_len = max(map(len, sequences))
    exact = PlainModel(config, TensorDict(tensors), max_len=max_len)
    rounded = PlainModel(model.config, TensorDict(model.tensors, model.quantization), max_len=max_len)
    errors, divergences, agreements = [], [], []
    for tokens in sequences:
        wanted, found = exact.logits(tokens), rounded.logits(tokens)
        errors.append((wanted - found).norm(dim=-1) / wanted.norm(dim=-1))
        log_p, log_q = wanted.double().log_softmax(-1), found.double().log_softmax(-1)
        divergences.append((log_p.exp() * (log_p - log_q)).sum(-1))
        agreements.append((wanted.argmax(-1) == found.argmax(-1)).double())
    error, divergence = torch.cat(errors), torch.cat(divergences)
    return Fidelity(
        error_mean=float(error.mean()),
        error_median=float(error.median()),
        kl_mean=float(divergence.mean()),
        kl_median=float(divergence.median()),
        top1_agreement=float(torch.cat(agreements).mean()),
    )


def ablate(
    config: ModelConfig,
    tensors: dict[str, Tensor],
    calibration: Sequence[Sequence[int]],
    held_out: Sequence[Sequence[int]],
    *,
    seed: int = 0,
    large: torch.dtype = torch.float32,
    on_progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Iterator[Variant]:
    """Every variant, calibrated on one set of sequences and measured on another, one by one.

    `large` is the dtype that embedding and heads are stored in.
    """
    for name, techniques in variants().items():
        techniques = dataclasses.replace(techniques, seed=seed)
        model = quantize_tensors(config, tensors, calibration, techniques, on_progress=on_progress)
        errors = model.layer_errors().values()
        yield Variant(
            name=name,
            fidelity=compare(config, tensors, model, held_out),
            weight_error=sum(errors) / len(errors),
            num_bytes=model.num_bytes(large),
        )
