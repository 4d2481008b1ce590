"""Whether an answer lies within what was published or measured, and if not, which arguments lead out and where to.

Owns: the form in which every answer says so, and whether a machine is the published one.
Must not know: what was published (serving/estimation/published_coverage.py), what an estimate computes.

An answer's `coverage` has three keys: `inside`; `extrapolated`, from an argument to "above", "below" or "unpublished"
(it is no number, or among words, and has no figure); and `notes`, first the same in words, then what is assumed.
"""

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from devices.spec import SupernodeSpec
from serving.errors import ConfigError
from serving.estimation.estimate_inputs import hardware_of

Direction = Literal["above", "below", "unpublished"]


@dataclass(slots=True)
class Coverage:
    """What is said about the reach of one answer, while it is found out."""

    extrapolated: dict[str, Direction] = field(default_factory=dict)
    outside: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def leave(self, argument: str, direction: Direction, told: str) -> None:
        """`argument` leads out; of several reasons the first gives its direction."""
        self.extrapolated.setdefault(argument, direction)
        self.outside.append(told)

    def compare(self, argument: str, value: float, low: float, high: float) -> None:
        """Leave if `value` is not in [low, high]."""
        if value < low:
            self.leave(argument, "below", f"extrapolated: {argument} {number(value)} below {number(low)}")
        elif value > high:
            self.leave(argument, "above", f"extrapolated: {argument} {number(value)} above {number(high)}")

    def as_json(self) -> dict[str, Any]:
        """For an answer."""
        return {
            "inside": not self.outside,
            "extrapolated": dict(self.extrapolated),
            "notes": [*self.outside, *self.notes],
        }


def compare_machine(coverage: Coverage, spec: SupernodeSpec) -> None:
    """Leave if a description has the name of a shipped one, but is of another machine."""
    try:
        shipped = hardware_of(spec.name)
    except ConfigError:  # not shipped, so that no figure is about it
        return
    changed = [part.name for part in fields(spec) if getattr(spec, part.name) != getattr(shipped, part.name)]
    if changed == ["fitted"]:
        coverage.notes.append(f"hardware {spec.name}: the fitted constants are not the shipped ones")
    elif changed:
        told = f"hardware {spec.name}: {', '.join(changed)} not as shipped, which the published figures are of"
        coverage.leave("hardware", "unpublished", told)


def number(value: float) -> str:
    """Whole numbers with all their digits, up to a million; others with six."""
    return str(int(value)) if value == int(value) and abs(value) <= 1e6 else f"{value:g}"
