"""Seconds of matrix products on some of a die's cube cores.

Owns: tiles, waves over cores, and the memory bound.
Must not know: which operator of the model a product belongs to.
Source: tiles of 128 x 152 and the byte count (each matrix touched once) are those of arXiv 2506.12708v2, table 10.

    time = max(compute, bytes / HBM bandwidth) + launch
    compute = waves * (2 * 128 * tile n * k / (core peak * utilization) + begin and end), waves = ceil(tiles / cores)

An output of m x n is cut into tiles of `gemm_tile_m` x `gemm_tile_n`, each computed by one core; the last wave may
leave cores idle, and rows that do not fill a tile are computed nevertheless. A product with fewer rows than one tile
takes a lower tile, in steps of 16 rows, as its kernels do. Where kernels come in several widths (DeepGEMM on Hopper:
multiples of 16 columns, so that more cores get a tile), a product takes the width that is fastest.
"""

import math
from functools import lru_cache
from typing import TypeAlias

from devices.rates import BF16_BYTES, INT8_BYTES
from devices.spec import SupernodeSpec

ROW_STEP = 16  # rows of the cube unit's smallest fractal (Ascend: 16 x 16)


Widths: TypeAlias = tuple[tuple[int, float], ...]  # for every width of a tile: columns of tiles, seconds of a full one


class Product:
    """Matrix products of one shape: what they take on any number of cube cores, without the launch."""

    __slots__ = ("_groups", "_low", "_m_varies", "_memory_s", "_row_tiles", "_widths")

    def __init__(self, widths: Widths, groups: float, row_tiles: float, memory_s: float, m_varies: bool) -> None:
        self._widths, self._groups, self._row_tiles, self._memory_s = widths, groups, row_tiles, memory_s
        self._low = row_tiles if row_tiles < 1.0 else 1.0  # a low tile counts for its share
        self._m_varies = m_varies

    def seconds(self, aic: int) -> float:
        """On `aic` cube cores."""
        low, row_tiles, tiles = self._low, self._row_tiles, self._groups * self._row_tiles
        fastest = math.inf
        for columns, tile_s in self._widths:
            tiles_per_core = tiles * columns / aic
            if self._m_varies:
                waves = tiles_per_core + low / 2
                waves = waves if waves > row_tiles else row_tiles
            else:
                waves = math.ceil(tiles_per_core / low) * low
            seconds = waves * tile_s
            fastest = seconds if seconds < fastest else fastest
        return fastest if fastest > self._memory_s else self._memory_s


NOTHING = Product(((0, 0.0),), 1.0, 1.0, 0.0, False)


class Gemm:
    """Matrix products of one kind of die."""

    def __init__(self, supernode: SupernodeSpec) -> None:
        die, rates, fitted = supernode.npu.die, supernode.rates, supernode.fitted
        self._tile_m = rates.gemm_tile_m
        self._tile_widths = range(rates.gemm_tile_n, 0, -rates.gemm_tile_n_step)
        self._widths = lru_cache(maxsize=64)(self._widths_of)
        self._full_width = rates.gemm_tile_n
        flops_per_tile = 2.0 * self._tile_m * rates.gemm_tile_n
        per_core = fitted.gemm_utilization / die.num_aic
        self._int8_s_per_k = flops_per_tile / (die.int8_flops_per_s * per_core)
        self._bf16_s_per_k = flops_per_tile / (die.bf16_flops_per_s * per_core)
        self._tile_s = fitted.gemm_tile_s
        self._hbm_bytes_per_s = die.hbm_bytes_per_s * rates.memory_utilization
        self._launch_s = rates.launch_s

    def product(
        self,
        m: float,
        n: int,
        k: int,
        *,
        groups: float = 1.0,
        bf16: bool = False,
        out_bytes: float = 2.0,
        m_varies: bool = False,
    ) -> Product:
        """`groups` products of m x k by k x n; none of them, no time.

        INT8 inputs unless `bf16`; `out_bytes` per element of the result. With `m_varies`, `m` is the mean of numbers
        that differ from layer to layer: half a step of rows and half a wave are left over on average.
        """
        if m <= 0 or groups <= 0:
            return NOTHING
        width = BF16_BYTES if bf16 else INT8_BYTES
        memory_s = groups * (width * k * (m + n) + out_bytes * m * n) / self._hbm_bytes_per_s
        row_tiles = self._mean_row_tiles(m) if m_varies else self._row_tiles(m)
        return Product(self._widths(n, k, bf16), groups, row_tiles, memory_s, m_varies)

    def launched(self, m: float, n: int, k: int, *, aic: int, groups: float = 1.0, bf16: bool = False) -> float:
        """The same on `aic` cube cores as one operator: with its launch."""
        return self.product(m, n, k, groups=groups, bf16=bf16).seconds(aic) + self._launch_s

    def _widths_of(self, n: int, k: int, bf16: bool) -> Widths:
        full_tile_s = k * (self._bf16_s_per_k if bf16 else self._int8_s_per_k)
        return tuple(
            (math.ceil(n / width), full_tile_s * (width / self._full_width) + self._tile_s)
            for width in self._tile_widths
        )

    def _row_tiles(self, m: float) -> float:
        """Full tiles of `m` rows, or the share of one that a lower tile is."""
        if m <= self._tile_m:
            return math.ceil(m / ROW_STEP) * ROW_STEP / self._tile_m
        return math.ceil(m / self._tile_m)

    def _mean_row_tiles(self, m: float) -> float:
        """The same on average: half a step more, of low tiles for few rows, of full ones for many."""
        step = ROW_STEP + (self._tile_m - ROW_STEP) * min(1.0, m / self._tile_m)
        return (m + step / 2) / self._tile_m
