"""Distributions as tables of quantiles, drawn from by normal scores.

Owns: the interpolation between quantiles, and how two quantities are made to depend on each other.
Must not know: what is drawn.
Source: inverse transform sampling; dependence by a Gaussian copula (Nelsen, An Introduction to Copulas, 2006).
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from serving.errors import ConfigError

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantiles:
    """A positive quantity. Between two quantiles its logarithm is linear in the normal score, as of a log-normal one;
    beyond the outermost it stays what it is there.
    """

    probabilities: tuple[float, ...]  # rising, in (0, 1)
    values: tuple[float, ...]  # above 0, not falling

    def __post_init__(self) -> None:
        if len(self.probabilities) != len(self.values) or len(self.values) < 2:
            raise ConfigError(f"{len(self.values)} values for {len(self.probabilities)} probabilities, of at least 2")
        if not (np.diff(self.probabilities) > 0).all() or not 0 < self.probabilities[0] <= self.probabilities[-1] < 1:
            raise ConfigError("probabilities: must rise inside (0, 1)")
        if not (np.diff(self.values) >= 0).all() or self.values[0] <= 0:
            raise ConfigError("values: must be above the limit 0 and must not fall")

    def at_scores(self, scores: Floats) -> Floats:
        """The quantiles of standard normal scores, of their shape."""
        normal = NormalDist()
        known = [normal.inv_cdf(probability) for probability in self.probabilities]
        return np.asarray(np.exp(np.interp(scores, known, np.log(self.values))))

    def draw(self, rng: np.random.Generator, count: int) -> Floats:
        """`count` independent values."""
        return self.at_scores(rng.standard_normal(count))


def correlated_scores(rng: np.random.Generator, scores: Floats, correlation: float) -> Floats:
    """Standard normal scores of the given correlation with `scores`, of their shape."""
    fresh = rng.standard_normal(len(scores))
    return correlation * scores + math.sqrt(1 - correlation**2) * fresh
