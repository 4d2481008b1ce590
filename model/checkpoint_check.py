"""Whether a checkpoint fits the model, told from its configuration and its files' headers, before a tensor is read.

Owns: the format of a safetensors header, and which tensors a checkpoint must, may and must not have.
Must not know: torch, ranks, the tensors' values (model/tensor_files.py checks those as it reads).
Source: safetensors' format description; its index of sharded files; names of deepseek-ai/DeepSeek-R1.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from model.checkpoint import tensor_specs
from model.config import ModelConfig, ModelConfigError
from model.quantization_config import QuantizationConfig, read_config

FLOAT_DTYPES = ("F32", "F16", "BF16")
# In published checkpoints, without a meaning for the model: transformers ignores them too.
_IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)
# Copies of the main model's tensors that a file may leave out.
_COPIES = (".embed_tokens.weight", ".shared_head.head.weight")
_MAX_HEADER_BYTES = 100 * 2**20  # safetensors' own limit


class WeightsError(ValueError):
    """A checkpoint does not fit the model. The message names the tensor, field or file and what is wrong with it."""


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """What a file says of one tensor."""

    dtype: str  # as safetensors spells it
    shape: tuple[int, ...]
    path: Path


def read_headers(directory: str | Path) -> dict[str, TensorHeader]:
    """Every tensor of a checkpoint directory: one model.safetensors, or shards with an index. Raises WeightsError."""
    directory = Path(directory)
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if index.exists():
        try:
            files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            paths = sorted(directory / file for file in files)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightsError(f"{index}: no index of safetensors files: {error!r}") from None
    elif single.exists():
        paths = [single]
    else:
        raise WeightsError(f"{directory}: neither {single.name} nor {index.name} is there")
    headers: dict[str, TensorHeader] = {}
    for path in paths:
        for name, (dtype, shape) in _file_header(path).items():
            if name in headers:
                raise WeightsError(f"{name}: in {headers[name].path.name} and again in {path.name}")
            headers[name] = TensorHeader(dtype, shape, path)
    return headers


def check_checkpoint(
    directory: str | Path, config: ModelConfig, *, with_mtp: bool = False
) -> tuple[dict[str, TensorHeader], QuantizationConfig | None]:
    """Headers and quantization of a directory whose configuration and tensors are those of `config`.

    Without a config.json the tensors alone are checked, as float. MTP tensors may be missing unless `with_mtp`.
    Raises WeightsError, naming the first field or tensor at fault.
    """
    directory = Path(directory)
    quantization = None
    if (directory / "config.json").exists():
        try:
            stored, quantization = read_config(directory)
        except ModelConfigError as error:
            raise WeightsError(f"{directory / 'config.json'}: {error}") from None
        for field in fields(ModelConfig):
            wanted, found = getattr(config, field.name), getattr(stored, field.name)
            if wanted != found:
                raise WeightsError(f"{directory / 'config.json'}: {field.name}: {found} is not {wanted}")
    headers = read_headers(directory)
    check_tensors(headers, config, quantization, directory=directory, with_mtp=with_mtp)
    return headers, quantization


def check_tensors(
    headers: Mapping[str, TensorHeader],
    config: ModelConfig,
    quantization: QuantizationConfig | None,
    *,
    directory: Path,
    with_mtp: bool = False,
) -> None:
    """Raise WeightsError unless names, shapes and dtypes are those of the model."""
    known = set()
    for name, (shape, dtypes) in expected_tensors(config, quantization).items():
        known.add(name)
        if name in headers:
            check_header(name, headers[name].shape, headers[name].dtype, shape, dtypes)
        elif _is_required(name, config, with_mtp=with_mtp):
            raise WeightsError(f"{name}: missing from {directory}")
    for name in sorted(set(headers) - known):
        if not name.endswith(_IGNORED_SUFFIXES):
            raise WeightsError(
                f"{name}: not a tensor of a model of {config.num_hidden_layers} layers, {config.n_routed_experts} "
                f"routed experts and {config.num_nextn_predict_layers} MTP modules"
                + ("" if quantization is not None or "weight_scale" not in name else " that is not quantized")
            )


def expected_tensors(
    config: ModelConfig, quantization: QuantizationConfig | None
) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Shape and readable dtypes of every tensor that a checkpoint may have, in layer order."""
    expected: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {}
    for spec in tensor_specs(config):
        module = spec.name.removesuffix(".weight")
        if quantization is not None and quantization.is_quantized(module):
            expected[spec.name] = (spec.shape, ("I8",))
            expected[f"{spec.name}_scale"] = ((spec.shape[0], 1), FLOAT_DTYPES)
        else:
            expected[spec.name] = (spec.shape, FLOAT_DTYPES)
    for layer in range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers):
        expected[h_proj_name(layer)] = ((config.hidden_size, config.hidden_size), FLOAT_DTYPES)
    return expected


def h_proj_name(layer: int) -> str:
    """The extra matrix of an MTP module in a rotated model. Not in published checkpoints."""
    return f"model.layers.{layer}.h_proj.weight"


def check_header(
    name: str, found: tuple[int, ...], dtype: str, shape: tuple[int, ...], dtypes: tuple[str, ...] = FLOAT_DTYPES
) -> None:
    """Raise WeightsError unless a tensor has the shape and one of the dtypes."""
    if found != shape:
        raise WeightsError(f"{name}: shape {found} is not {shape}")
    if dtype not in dtypes:
        wanted = f"one of {', '.join(dtypes)}" if len(dtypes) > 1 else dtypes[0]
        raise WeightsError(f"{name}: dtype {dtype} is not {wanted}")


def _is_required(name: str, config: ModelConfig, *, with_mtp: bool) -> bool:
    parts = name.split(".")
    is_mtp = parts[1] == "layers" and int(parts[2]) >= config.num_hidden_layers
    if not is_mtp:
        return True
    return with_mtp and not name.endswith((*_COPIES, ".h_proj.weight"))


def _file_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape by name: 8 bytes of length, little-endian, then JSON. Raises WeightsError."""
    try:
        with path.open("rb") as file:
            num_bytes = int.from_bytes(file.read(8), "little")
            if not 0 < num_bytes <= _MAX_HEADER_BYTES:
                raise ValueError(f"a header of {num_bytes} bytes")
            raw: dict[str, Any] = json.loads(file.read(num_bytes))
        return {name: (t["dtype"], tuple(t["shape"])) for name, t in raw.items() if name != "__metadata__"}
    except OSError as error:
        raise WeightsError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path}: no safetensors file: {error}") from None
