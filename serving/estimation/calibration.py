"""The fit of the timing model's free constants to the calibration rows.

Owns: least squares, how well each constant is determined, errors before and after.
Must not know: what the constants mean, how an estimate is made, files.
Source: trust-region reflective least squares of scipy.optimize; standard errors from the Jacobian at the optimum, as in
Bates and Watts, "Nonlinear Regression Analysis and Its Applications" (1988), section 2.2.

The fit works in shares of the constants' ranges, u = (value - low) / (high - low), so that constants of any size are
alike to it. A residual is a row's relative error.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.errors import ConfigError
from serving.estimation.evaluation import relative_error
from serving.estimation.published import PublishedRow

MAX_CONSTANTS = 10
_STEP = 3e-3  # of the differences, as a share of a range: wide enough to even out the steps of tiles and waves
_SINGULAR = 1e-6  # singular values below this share of the largest say nothing
_MAX_STEPS = 200  # a smooth model takes about ten; one with corners may not settle
_TETHER = 1e-6  # residual of a constant that went all its range away from its start; see fit
_VISIBLE = 1e-3  # a constant has a part in a direction, or an effect on a row, above this share of the largest
_DIGITS = 6  # significant ones of a fitted value, so that a file holds exactly what was evaluated

Constants = Mapping[str, float]
Evaluate = Callable[[Constants], Sequence[float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """Where the fit of a constant starts, and the range that it stays in."""

    start: float
    low: float
    high: float

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, (self.start, self.low, self.high))) or not self.low < self.high:
            raise ConfigError(f"low: {self.low} must be below high {self.high}, and both finite")
        if not self.low <= self.start <= self.high:
            raise ConfigError(f"value: {self.start} is not within [{self.low}, {self.high}]")


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedConstant:
    """One constant after the fit.

    `standard_error` has the constant's unit; None: not determined, because the constant can move with others (or alone)
    without any row noticing, or because there are no more rows than constants.
    """

    name: str
    bounds: Bounds
    value: float
    standard_error: float | None
    groups: tuple[str, ...]  # of the rows that it has an effect on

    @property
    def relative_uncertainty(self) -> float | None:
        """Standard error over the value; None: not determined."""
        return None if self.standard_error is None or self.value == 0 else self.standard_error / abs(self.value)

    @property
    def at_bound(self) -> bool:
        """Whether the range, rather than the rows, decided."""
        width = self.bounds.high - self.bounds.low
        return min(self.value - self.bounds.low, self.bounds.high - self.value) < _VISIBLE * width

    def as_json(self) -> dict[str, Any]:
        """For a report."""
        return {
            "name": self.name,
            "start": self.bounds.start,
            "value": self.value,
            "low": self.bounds.low,
            "high": self.bounds.high,
            "standard_error": self.standard_error,
            "relative_uncertainty": self.relative_uncertainty,
            "at_bound": self.at_bound,
            "groups": list(self.groups),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """The constants, and the directions in which no row holds them: shares of ranges by constant."""

    constants: tuple[FittedConstant, ...]
    singular_directions: tuple[Mapping[str, float], ...]
    num_evaluations: int
    converged: bool

    @property
    def start(self) -> dict[str, float]:
        return {constant.name: constant.bounds.start for constant in self.constants}

    @property
    def values(self) -> dict[str, float]:
        return {constant.name: constant.value for constant in self.constants}


def fit(rows: Sequence[PublishedRow], constants: Mapping[str, Bounds], evaluate: Evaluate) -> Fit:
    """Least squares of the relative errors of `rows`, from the start that `constants` give, within their ranges.

    `evaluate` returns ours for every row, in order. Everything is deterministic. A figure that stands in several rows,
    as in a second unit, weighs as often; standard errors take the rows' errors as independent.
    Raises ConfigError for no constant, more than MAX_CONSTANTS, fewer rows than constants, a row that is not for
    calibration, or one that publishes 0.
    """
    from scipy.optimize import least_squares  # takes a second to import

    _check(rows, constants)
    names = tuple(constants)
    low = np.array([constants[name].low for name in names])
    width = np.array([constants[name].high for name in names]) - low
    num_evaluations = 0

    def residuals(shares: NDArray[np.float64]) -> NDArray[np.float64]:
        nonlocal num_evaluations
        num_evaluations += 1
        ours = evaluate(dict(zip(names, (low + width * shares).tolist(), strict=True)))
        return np.array([relative_error(o, row.published) for o, row in zip(ours, rows, strict=True)])

    def jacobian(shares: NDArray[np.float64]) -> NDArray[np.float64]:
        """Central differences, one-sided at a bound."""
        columns = []
        for index in range(len(names)):
            below, above = shares.copy(), shares.copy()
            below[index] = max(0.0, shares[index] - _STEP)
            above[index] = min(1.0, shares[index] + _STEP)
            columns.append((residuals(above) - residuals(below)) / (above[index] - below[index]))
        return np.stack(columns, axis=1)

    start = (np.array([constants[name].start for name in names]) - low) / width
    # Without the tether, constants that no row holds make the problem singular, and the trust region then crawls: 800
    # Jacobians in place of 6. With it they stay at their start; what rows hold it cannot move.
    tether = _TETHER * np.eye(len(names))
    solution = least_squares(
        lambda shares: np.concatenate([residuals(shares), tether @ (shares - start)]),
        start,
        jac=lambda shares: np.concatenate([jacobian(shares), tether]),
        bounds=(0.0, 1.0),
        method="trf",
        xtol=1e-10,
        ftol=1e-10,
        gtol=1e-10,
        max_nfev=_MAX_STEPS,
    )
    rounded = [float(f"{value:.{_DIGITS - 1}e}") for value in low + width * solution.x]
    values = np.clip(rounded, low, low + width)
    shares = (values - low) / width
    slopes, errors = jacobian(shares), residuals(shares)
    deviations, directions = _uncertainty(slopes, errors)
    strongest = np.abs(slopes).max()
    return Fit(
        constants=tuple(
            FittedConstant(
                name=name,
                bounds=constants[name],
                value=float(values[index]),
                standard_error=None if deviation is None else float(deviation * width[index]),
                groups=_groups(rows, np.abs(slopes[:, index]) > _VISIBLE * strongest),
            )
            for index, (name, deviation) in enumerate(zip(names, deviations, strict=True))
        ),
        singular_directions=tuple(
            {name: float(part) for name, part in zip(names, direction, strict=True) if abs(part) > _VISIBLE}
            for direction in directions
        ),
        num_evaluations=num_evaluations,
        converged=bool(solution.success),
    )


def _uncertainty(
    slopes: NDArray[np.float64], errors: NDArray[np.float64]
) -> tuple[list[float | None], list[NDArray[np.float64]]]:
    """Standard deviation of each share, None if it is not determined; and the singular directions (unit vectors).

    slopes[row, constant] is the change of a relative error per range.
    """
    num_rows, num_constants = slopes.shape
    _, singular, directions = np.linalg.svd(slopes, full_matrices=True)
    is_singular = singular <= _SINGULAR * singular.max()
    loose = [direction * np.sign(direction[np.abs(direction).argmax()]) for direction in directions[is_singular]]
    kept = directions[~is_singular] / singular[~is_singular, None]
    degrees = num_rows - num_constants
    deviations: list[float | None] = []
    for index in range(num_constants):
        is_loose = any(abs(direction[index]) > _VISIBLE for direction in loose)
        variance = (kept[:, index] ** 2).sum() * (errors @ errors) / max(degrees, 1)
        deviations.append(None if is_loose or degrees == 0 else math.sqrt(variance))
    return deviations, loose


def _groups(rows: Sequence[PublishedRow], touched: NDArray[np.bool_]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(row.group for row, is_touched in zip(rows, touched, strict=True) if is_touched))


def _check(rows: Sequence[PublishedRow], constants: Mapping[str, Bounds]) -> None:
    if not 1 <= len(constants) <= MAX_CONSTANTS:
        raise ConfigError(f"fitted: {len(constants)} constants, must be 1 to {MAX_CONSTANTS}")
    for row in rows:
        if row.role != "calibration":
            raise ConfigError(f"{row.label}: role {row.role}, only calibration rows are fitted")
        if row.published == 0:
            raise ConfigError(f"{row.label}: published 0 has no relative error to fit")
    if len(rows) < len(constants):
        raise ConfigError(f"fitted: {len(constants)} constants exceed {len(rows)} calibration rows")
