"""A calibration from published rows to a report: which rows reach the fit, and what is said of the result.

Owns: that the fit sees calibration rows about its own device alone; errors before and after; how it is told.
Must not know: least squares, files, how an estimate is made.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from serving.errors import ConfigError
from serving.estimation.calibration import Bounds, Constants, Fit, fit
from serving.estimation.evaluation import Estimate, EvaluatedRow, evaluate_rows, summarize
from serving.estimation.fitted_section import with_constants
from serving.estimation.published import PublishedRow, PublishedRows
from serving.estimation.reproduction import format_summary


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """A fit, and the rows of calibration and then validation with the constants before and after it."""

    fit: Fit
    before: tuple[EvaluatedRow, ...]
    after: tuple[EvaluatedRow, ...]

    def as_json(self) -> dict[str, Any]:
        """Constants, directions that are not determined, rows with both errors, both summaries."""
        return {
            "constants": [constant.as_json() for constant in self.fit.constants],
            "singular_directions": [dict(direction) for direction in self.fit.singular_directions],
            "num_evaluations": self.fit.num_evaluations,
            "converged": self.fit.converged,
            "rows": [
                {**new.as_json(), "error_before": old.error} for old, new in zip(self.before, self.after, strict=True)
            ],
            "before": summarize(self.before).as_json(),
            "after": summarize(self.after).as_json(),
        }


def calibrate_constants(
    told: PublishedRows,
    description: Mapping[str, Any],
    constants: Mapping[str, Bounds],
    estimates: Mapping[str, Estimate],
) -> Calibration:
    """Fit `constants` of a device's description to the calibration rows; the validation rows are evaluated beside.

    Raises ConfigError if the rows, or one for calibration, are about another device, or the fit cannot be made.
    """
    device = description.get("name")
    if told.hardware != device:
        raise ConfigError(f"the published rows are about {told.hardware}, the description is of {device}")
    calibration = told.of_role("calibration")
    for row in calibration:
        if row.hardware not in (None, device):
            raise ConfigError(f"{row.label}: a calibration row about {row.hardware}, the description is of {device}")

    def evaluated(rows: Sequence[PublishedRow], values: Constants) -> tuple[EvaluatedRow, ...]:
        changed = with_constants(description, values)
        return evaluate_rows(rows, estimates, hardware=told.hardware, description=changed)

    found = fit(calibration, constants, lambda values: [row.ours for row in evaluated(calibration, values)])
    reported = [*calibration, *told.of_role("validation")]
    return Calibration(fit=found, before=evaluated(reported, found.start), after=evaluated(reported, found.values))


def format_calibration(calibration: Calibration) -> str:
    """The constants, the directions that nothing holds, the error of every row before and after, the bars."""
    constants = calibration.fit.constants
    wide = max(len(constant.name) for constant in constants)
    lines = [f"{'constant':<{wide}}{'start':>14}{'fitted':>14}{'+-':>10}{'low':>12}{'high':>12}  groups of its rows"]
    for constant in constants:
        uncertainty, bounds = constant.relative_uncertainty, constant.bounds
        told = "unknown" if uncertainty is None else f"{uncertainty:.1%}"
        numbers = f"{bounds.start:>14.6g}{constant.value:>14.6g}{told:>10}{bounds.low:>12.4g}{bounds.high:>12.4g}"
        at_bound = "; AT ITS BOUND" if constant.at_bound else ""
        lines.append(f"{constant.name:<{wide}}{numbers}  {', '.join(constant.groups) or 'none'}{at_bound}")
    for direction in calibration.fit.singular_directions:
        parts = ", ".join(f"{part:+.3f} of the range of {name}" for name, part in direction.items())
        lines.append(f"NOT DETERMINED: no row changes along {parts}")
    if not calibration.fit.converged:
        lines.append("NOT CONVERGED: values may still move")
    labels = [row.row.label for row in calibration.after]
    wide = max(map(len, labels))
    lines += ["", f"{'error of':<{wide}}{'before':>10}{'after':>10}  role"]
    for label, old, new in zip(labels, calibration.before, calibration.after, strict=True):
        lines.append(f"{label:<{wide}}{old.error:>+10.2%}{new.error:>+10.2%}  {new.row.role}")
    for when, rows in (("before", calibration.before), ("after", calibration.after)):
        lines += ["", f"{when}:", *format_summary(summarize(rows))]
    return "\n".join(lines)
