"""A float checkpoint in, an INT8 checkpoint out.

Owns: the order of the techniques, and the files of the result.
Must not know: the command line.
Source: arXiv 2506.12708 section 4.5; docs/quantization.md says how it is read here.

    rotation -> calibration -> scale search -> clipping and compensation, matrix by matrix
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model.checkpoint_check import WeightsError, read_headers
from model.config import ModelConfig
from model.quantization import names
from model.quantization.calibration import Statistics, record_inputs
from model.quantization.model_card import CARD_FILE, model_card
from model.quantization.rotation import rotate
from model.quantization.rounding import output_error, round_matrix
from model.quantization.scales import search_scales
from model.quantization_config import QuantizationConfig, read_config
from model.tensor_files import TensorFiles
from model.weights import write_tensors

# Of a checkpoint directory, beside what is written anew.
_COPIED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "LICENSE")
_COPIED_PATTERNS = ("*.jinja",)  # chat templates
# These keep the source's dtype. Norms, gates and kv_b_proj are float32, because factors were absorbed in them.
_LARGE = ("embed_tokens.weight", "lm_head.weight", "shared_head.head.weight")
_STORED_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Techniques:
    """What is done beyond rounding to the nearest integer."""

    rotation: bool = True
    scale_search: bool = True
    clipping: bool = True
    compensation: bool = True
    seed: int = 0  # of the rotation

    @classmethod
    def none(cls) -> "Techniques":
        """Plain rounding."""
        return cls(rotation=False, scale_search=False, clipping=False, compensation=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedModel:
    """An INT8 model in memory."""

    config: ModelConfig
    quantization: QuantizationConfig
    tensors: dict[str, Tensor]
    squares: dict[str, tuple[float, float]]  # by module: of the output's error, of the output

    def stored(self, large: torch.dtype) -> dict[str, Tensor]:
        """The tensors as they are written: embedding and heads in `large`, the source's dtype."""
        return {name: t.to(large) if name.endswith(_LARGE) else t for name, t in self.tensors.items()}

    def num_bytes(self, large: torch.dtype = torch.float32) -> int:
        """Of all stored tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.stored(large).values())

    def layer_errors(self) -> dict[int, float]:
        """By layer: root of the error's share of the outputs' squares, mean over the layer's matrices."""
        errors: dict[int, list[float]] = {}
        for module, (error, total) in self.squares.items():
            if total > 0:  # an expert that no calibration token chose has none
                errors.setdefault(int(module.split(".")[2]), []).append((error / total) ** 0.5)
        return {layer: sum(values) / len(values) for layer, values in errors.items()}


def read_float_checkpoint(directory: str | Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Every tensor of a float checkpoint, as float32. Raises WeightsError or ModelConfigError."""
    config, quantization = read_config(directory)
    if quantization is not None:
        raise WeightsError(f"{Path(directory) / 'config.json'}: quantization_config: the checkpoint is INT8 already")
    has_mtp = config.num_nextn_predict_layers > 0
    files = TensorFiles(directory, config, with_mtp=has_mtp)
    tensors = {name: files.read(name, header.shape) for name, header in files.headers.items()}
    for layer in names.mtp_layers(config):  # copies of the main model's that a file may leave out
        prefix = names.block_prefix(layer)
        head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
        tensors.setdefault(f"{prefix}embed_tokens.weight", tensors["model.embed_tokens.weight"])
        tensors.setdefault(f"{prefix}shared_head.head.weight", tensors[head])
    return config, tensors


def large_dtype(directory: str | Path) -> torch.dtype:
    """Dtype of the embedding in a checkpoint directory."""
    return _STORED_DTYPES[read_headers(directory)["model.embed_tokens.weight"].dtype]


def quantize_tensors(
    config: ModelConfig,
    tensors: dict[str, Tensor],
    sequences: Sequence[Sequence[int]],
    techniques: Techniques,
    *,
    on_progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> QuantizedModel:
    """The INT8 model of float32 `tensors`, calibrated on token `sequences`.

    `on_progress` is told a stage, what is done of it and its total.
    """
    if techniques.rotation:
        on_progress("rotation", 0, 1)
        config, tensors = rotate(config, tensors, seed=techniques.seed)
    tensors, done = dict(tensors), 0

    def count() -> None:
        nonlocal done
        done += 1
        on_progress("calibration", done, len(sequences))

    statistics = record_inputs(config, tensors, sequences, on_sequence=count)
    if techniques.scale_search:
        on_progress("scale search", 0, 1)
        search_scales(config, tensors, statistics)
    modules, squares = names.quantized_modules(config), {}
    for index, module in enumerate(modules):
        on_progress("rounding", index, len(modules))
        squares[module] = _round(module, tensors, statistics[module], techniques)
    return QuantizedModel(
        config=config,
        quantization=QuantizationConfig(
            ignore=tuple(names.kept_modules(config)), techniques=dataclasses.asdict(techniques)
        ),
        tensors=tensors,
        squares=squares,
    )


def write_checkpoint(source: str | Path, target: str | Path, model: QuantizedModel) -> None:
    """Write config.json, model card and model.safetensors to `target`, and what tokenizers need from `source`.

    The weights come last and under their final name at once: a directory that has them is whole.
    """
    source, target = Path(source), Path(target)
    target.mkdir(parents=True, exist_ok=True)
    copied = {source / name for name in _COPIED}.union(*(source.glob(pattern) for pattern in _COPIED_PATTERNS))
    for path in sorted(copied):
        if path.is_file():
            shutil.copyfile(path, target / path.name)
    raw = json.loads((source / "config.json").read_text(encoding="utf-8"))
    raw["tie_word_embeddings"] = model.config.tie_word_embeddings
    raw["quantization_config"] = model.quantization.to_dict()
    (target / "config.json").write_text(json.dumps(raw, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (target / CARD_FILE).write_text(model_card(source, target, model.quantization), encoding="utf-8")
    # safetensors refuses tensors that share memory.
    own = {name: tensor.clone().contiguous() for name, tensor in model.stored(large_dtype(source)).items()}
    write_tensors(target / "model.safetensors", own)


def _round(
    module: str, tensors: dict[str, Tensor], statistics: Statistics, techniques: Techniques
) -> tuple[float, float]:
    weight, gram = tensors[f"{module}.weight"], statistics.gram
    values, scale = round_matrix(weight, gram, clipping=techniques.clipping, compensation=techniques.compensation)
    tensors[f"{module}.weight"], tensors[f"{module}.weight_scale"] = values, scale
    assert values.dtype == torch.int8
    return output_error(weight, values, scale, gram)
