"""Histograms that take a whole step's values at once, for the Prometheus text format.

Owns: bucket edges, and counting many values in one numpy call. prometheus_client's own histogram takes one value per
call, about a microsecond each, which a decode step of hundreds of requests cannot afford.
Must not know: what is measured.
Source: bucket edges of vLLM's `v1/metrics/loggers.py`.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

TTFT_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
TOKEN_TIME_BUCKETS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
REQUEST_TIME_BUCKETS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip
NUM_CHOICES_BUCKETS = (1.0, 2.0, 5.0, 10.0, 20.0)
ITERATION_TOKENS_BUCKETS = tuple(float(edge) for edge in (1, *(2**power for power in range(3, 15))))
# Not vLLM's: a decode step of a large instance takes tens of milliseconds, one of a toy less than one.
STEP_TIME_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 5.0)
# vLLM's for NIXL transfers.
TRANSFER_TIME_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 5.0)
TRANSFER_BYTES_BUCKETS = tuple(float(2 ** (10 + power)) for power in range(1, 25, 2))


def one_two_five_buckets(most: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50, ... up to `most`; vLLM's buckets for token counts."""
    edges: list[float] = []
    scale = 1
    while True:
        for mantissa in (1, 2, 5):
            if mantissa * scale > most:
                return tuple(edges)
            edges.append(float(mantissa * scale))
        scale *= 10


class Series:
    """One histogram with its label values fixed."""

    def __init__(self, edges: Sequence[float]) -> None:
        self._edges = tuple(edges)
        self._edges_array = np.asarray(edges)
        self._counts = np.zeros(len(edges) + 1, np.int64)  # the last one: above every edge
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._edges, value)] += 1
        self._sum += value

    def observe_many(self, values: NDArray[np.float64]) -> None:
        """Add every value of a one-dimensional array."""
        if values.size:
            bins = np.searchsorted(self._edges_array, values)
            self._counts += np.bincount(bins, minlength=self._counts.size)
            self._sum += float(values.sum())

    @property
    def num_values(self) -> int:
        return int(self._counts.sum())

    def samples(self) -> tuple[list[tuple[str, float]], float]:
        """Cumulative counts by upper edge, and the sum, as the text format wants them."""
        edges = [*map(floatToGoString, self._edges), "+Inf"]
        cumulative = np.cumsum(self._counts)
        return [(edge, float(count)) for edge, count in zip(edges, cumulative, strict=True)], self._sum


class Histogram(Collector):
    """A family of series, one for each combination of label values."""

    def __init__(
        self,
        name: str,
        documentation: str,
        *,
        label_names: Sequence[str],
        edges: Sequence[float],
        registry: CollectorRegistry,
    ) -> None:
        self._name, self._documentation = name, documentation
        self._label_names = tuple(label_names)
        self._edges = tuple(edges)
        self._series: dict[tuple[str, ...], Series] = {}
        registry.register(self)

    def labels(self, *values: str) -> Series:
        """The series of these label values, made on first use."""
        assert len(values) == len(self._label_names), f"{self._name} has labels {self._label_names}, got {values}"
        return self._series.setdefault(values, Series(self._edges))

    def collect(self) -> Iterator[HistogramMetricFamily]:
        family = HistogramMetricFamily(self._name, self._documentation, labels=self._label_names)
        for values, series in self._series.items():
            buckets, total = series.samples()
            family.add_metric(values, buckets=buckets, sum_value=total)
        yield family

    def describe(self) -> Iterator[HistogramMetricFamily]:
        """Names without samples: what the registry needs to refuse a second metric of this name."""
        yield HistogramMetricFamily(self._name, self._documentation, labels=self._label_names)
