"""Where tensors are read from: a checkpoint directory, or a dictionary in memory.

Owns: reading with every check that needs values: finiteness, scales above 0, what an INT8 matrix is made of.
Must not know: ranks, which tensors belong together.
Source: safetensors.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.checkpoint_check import FLOAT_DTYPES, WeightsError, check_checkpoint, check_header
from model.config import ModelConfig
from model.matrix import QuantizedMatrix, Weight
from model.quantization_config import QuantizationConfig

_DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int8: "I8"}


class TensorSource(ABC):
    """Tensors by the hub's names. Every read raises WeightsError naming the tensor that is missing or wrong."""

    def __init__(self, quantization: QuantizationConfig | None) -> None:
        self._quantization = quantization

    @abstractmethod
    def __contains__(self, name: str) -> bool:
        """Whether there is a tensor of this name."""

    @abstractmethod
    def _header(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and dtype, as safetensors spells it."""

    @abstractmethod
    def _rows(self, name: str, rows: slice) -> Tensor:
        """Some rows as they are stored."""

    def read(self, name: str, shape: tuple[int, ...], *, rows: slice | None = None) -> Tensor:
        """One tensor as float32, or some rows of it. `shape` is that of the whole tensor."""
        values = self._checked(name, shape, rows, FLOAT_DTYPES).to(torch.float32)
        if not bool(torch.isfinite(values).all()):
            raise WeightsError(f"{name}: holds NaN or infinity")
        return values

    def matrix(self, module: str, shape: tuple[int, int], *, rows: slice | None = None) -> Weight:
        """The weight of a module: INT8 with its scales if the configuration says so, otherwise float32."""
        if self._quantization is None or not self._quantization.is_quantized(module):
            return self.read(f"{module}.weight", shape, rows=rows)
        values = self._checked(f"{module}.weight", shape, rows, ("I8",))
        scale = self.read(f"{module}.weight_scale", (shape[0], 1), rows=rows)
        if not bool((scale > 0).all()):
            raise WeightsError(f"{module}.weight_scale: holds a scale that is not above 0")
        return QuantizedMatrix(values, scale)

    def _checked(self, name: str, shape: tuple[int, ...], rows: slice | None, dtypes: tuple[str, ...]) -> Tensor:
        if name not in self:
            raise WeightsError(f"{name}: missing from {self}")
        check_header(name, *self._header(name), shape, dtypes)
        return self._rows(name, slice(0, shape[0]) if rows is None else rows)


class TensorFiles(TensorSource):
    """The tensors of a checkpoint directory, checked against the model's shape as a whole."""

    def __init__(self, directory: str | Path, config: ModelConfig, *, with_mtp: bool = False) -> None:
        self._directory = Path(directory)
        self.headers, quantization = check_checkpoint(directory, config, with_mtp=with_mtp)
        paths = {header.path for header in self.headers.values()}
        self._files = {path: _open(path) for path in sorted(paths)}
        super().__init__(quantization)

    def __str__(self) -> str:
        return str(self._directory)

    def __contains__(self, name: str) -> bool:
        return name in self.headers

    def _header(self, name: str) -> tuple[tuple[int, ...], str]:
        return self.headers[name].shape, self.headers[name].dtype

    def _rows(self, name: str, rows: slice) -> Tensor:
        stored = self._files[self.headers[name].path].get_slice(name)  # type: ignore[no-untyped-call]
        values: Tensor = stored[rows.start : rows.stop]
        return values


class TensorDict(TensorSource):
    """Tensors in memory."""

    def __init__(self, tensors: Mapping[str, Tensor], quantization: QuantizationConfig | None = None) -> None:
        self._tensors = tensors
        super().__init__(quantization)

    def __str__(self) -> str:
        return "memory"

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def _header(self, name: str) -> tuple[tuple[int, ...], str]:
        tensor = self._tensors[name]
        return tuple(tensor.shape), _DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype))

    def _rows(self, name: str, rows: slice) -> Tensor:
        return self._tensors[name][rows]


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path}: {error}") from error
