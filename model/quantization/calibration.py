"""What the matrices of a model read while it runs over sample sequences.

Owns: the plain forward over whole sequences, and the recording of inputs.
Must not know: INT8, scales, files, where sequences come from.
Source: calibration by recorded inputs as in GPTQ (arXiv 2210.17323); all inputs are those of the float model.
"""

# Shapes: T tokens of a sequence, I inputs of a matrix, V vocabulary

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model.collectives import run_lockstep
from model.config import ModelConfig
from model.latent_cache import LatentCache
from model.layout import make_layouts
from model.matrix import GroupedProduct, Matrix, QuantizedRows, Rows, Weight
from model.mtp import MtpModule
from model.quantization_config import QuantizationConfig
from model.step import SamplingBatch, StepInput
from model.tensor_files import TensorDict, TensorSource
from model.transformer import Transformer
from model.weights import read_rank_weights

_BLOCK_SIZE = 16
_MAX_SAMPLES = 512


class Statistics:
    """Inputs of one matrix: second moments, largest values, and a sample of rows."""

    def __init__(self, num_inputs: int) -> None:
        self.gram = torch.zeros(num_inputs, num_inputs, dtype=torch.float64)  # sum of x^T x
        self.absmax = torch.zeros(num_inputs)
        self.num_rows = 0
        self._samples: list[Tensor] = []
        self._generator = torch.Generator().manual_seed(0)

    @property
    def samples(self) -> Tensor:
        """(at most 512, I) rows."""
        return torch.cat(self._samples) if self._samples else torch.zeros(0, len(self.absmax))

    def add(self, x: Tensor) -> None:
        """Record rows (T, I)."""
        if not len(x):
            return
        self.gram += (wide := x.to(torch.float64)).T @ wide
        self.absmax = torch.maximum(self.absmax, x.abs().amax(dim=0))
        self.num_rows += len(x)
        self._samples.append(x.clone())
        if sum(map(len, self._samples)) > 4 * _MAX_SAMPLES:
            self._thin()

    def finish(self) -> None:
        """No more rows will come."""
        if self._samples:
            self._thin()

    def divide(self, scale: Tensor) -> None:
        """As if every input had been divided by scale (I,)."""
        self.gram /= torch.outer(scale, scale).to(torch.float64)
        self.absmax = self.absmax / scale
        self._samples = [rows / scale for rows in self._samples]

    def _thin(self) -> None:
        rows = torch.cat(self._samples)
        chosen = torch.randperm(len(rows), generator=self._generator)[:_MAX_SAMPLES]
        self._samples = [rows[chosen]]


class PlainModel:
    """One rank over whole sequences, MTP modules included where asked for."""

    def __init__(self, config: ModelConfig, source: TensorSource, *, max_len: int, with_mtp: bool = False) -> None:
        (layout,) = make_layouts(config, world_size=1, max_num_tokens=max_len)
        weights = read_rank_weights(source, config, layout, with_mtp=with_mtp)
        cache = LatentCache(config, -(-max_len // _BLOCK_SIZE), _BLOCK_SIZE, with_mtp=with_mtp)
        self._main = Transformer(config, layout, weights, cache)
        self._mtp = [MtpModule(config, layout, weights, cache, index=i) for i in range(len(weights.mtp))]
        self._num_blocks = cache.num_blocks

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """(T, V) after every token of one sequence."""
        with torch.inference_mode():
            return self._main.logits(self._hidden(tokens))

    def mtp_logits(self, tokens: Sequence[int]) -> list[Tensor]:
        """(T - 1 - i, V) of every MTP module i: its guess of the token after next, and so on."""
        hidden, results = self._hidden(tokens), []
        for ahead, module in enumerate(self._mtp, start=1):
            step = self._step(tokens[ahead:])
            ((hidden),) = run_lockstep([module.forward(step, hidden[: len(tokens) - ahead])])
            with torch.inference_mode():
                results.append(module.logits(hidden))
        return results

    def _hidden(self, tokens: Sequence[int]) -> Tensor:
        ((hidden, _),) = run_lockstep([self._main.hidden_states(self._step(tokens))])
        return hidden

    def _step(self, tokens: Sequence[int]) -> StepInput:
        size = len(tokens)
        return StepInput(
            token_ids=np.array(tokens, np.int64),
            positions=np.arange(size),
            query_start=np.array([0, size], np.int32),
            seq_lens=np.array([size], np.int32),
            block_tables=np.arange(self._num_blocks, dtype=np.int32)[None],
            sample_rows=np.zeros(0, np.int32),
            sampling=SamplingBatch.greedy(np.zeros(0, np.int64)),
        )


def record_inputs(
    config: ModelConfig,
    tensors: dict[str, Tensor],
    sequences: Sequence[Sequence[int]],
    *,
    on_sequence: Callable[[], None] = lambda: None,
) -> dict[str, Statistics]:
    """Inputs of every product that may be INT8, by module; modules that read the same vectors share one entry."""
    observer = _Observer(tensors)
    with_mtp = config.num_nextn_predict_layers > 0 and config.num_moe_layers > 0
    model = PlainModel(config, observer, max_len=max(map(len, sequences)), with_mtp=with_mtp)
    for tokens in sequences:
        # With MTP modules the main model runs on the way to them.
        model.mtp_logits(tokens) if with_mtp else model.logits(tokens)
        on_sequence()
    for statistics in observer.by_module.values():
        statistics.finish()
    return observer.by_module


class _Observed(Matrix):
    """A float matrix that records what it reads."""

    def __init__(self, modules: list[str], weight: Tensor, by_module: dict[str, Statistics]) -> None:
        self.modules = modules
        self.weight = weight
        self._by_module = by_module
        self._statistics = Statistics(weight.shape[1])
        by_module.update(dict.fromkeys(modules, self._statistics))

    def __len__(self) -> int:
        return len(self.weight)

    def product(self, x: Tensor) -> Tensor:
        self._statistics.add(x)
        return F.linear(x, self.weight)

    def grouped(self) -> GroupedProduct:
        raise AssertionError("not stacked")

    def joined(self, others: Sequence[Matrix], *, stack: bool) -> Matrix:
        parts = [self, *(other for other in others if isinstance(other, _Observed))]
        if stack:
            return _ObservedStack(parts)
        modules = [module for part in parts for module in part.modules]
        return _Observed(modules, torch.cat([part.weight for part in parts]), self._by_module)


class _ObservedStack(Matrix):
    def __init__(self, parts: list[_Observed]) -> None:
        self._parts = parts

    def __len__(self) -> int:
        return len(self._parts)

    def product(self, x: Tensor) -> Tensor:
        raise AssertionError("stacked")

    def grouped(self) -> GroupedProduct:
        def product(x: Rows, counts: list[int]) -> Tensor:
            assert not isinstance(x, QuantizedRows), "calibration runs in float32"
            pieces = x.split_with_sizes(counts)
            return torch.cat([part.product(piece) for part, piece in zip(self._parts, pieces, strict=True)])

        return product

    def joined(self, others: Sequence[Matrix], *, stack: bool) -> Matrix:
        raise AssertionError("stacked already")


class _Observer(TensorDict):
    """Tensors in memory whose products record what they read."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__(tensors)
        self.by_module: dict[str, Statistics] = {}
        self._every_product = QuantizationConfig()

    def matrix(self, module: str, shape: tuple[int, int], *, rows: slice | None = None) -> Weight:
        weight = super().matrix(module, shape, rows=rows)
        if not self._every_product.is_quantized(module):
            return weight
        assert isinstance(weight, Tensor), "calibration runs in float32"
        return _Observed([module], weight, self.by_module)
