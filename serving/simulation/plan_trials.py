"""What a plan is made of: splits, caps, the trials of both, and what became of them.

Owns: these values.
Must not know: what is tried, in which order.
"""

import math
from dataclasses import dataclass, field

from serving.simulation.slo import Attained


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Split:
    """Instances of each role. `num_npus` of all."""

    num_npus: int
    prefill: int
    decode: int

    def __str__(self) -> str:
        return f"{self.prefill} prefill + {self.decode} decode"


@dataclass(frozen=True, slots=True, kw_only=True)
class Caps:
    """Batch caps: `decode` is its max_num_seqs, `prefill` its max_num_batched_tokens."""

    decode: int
    prefill: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One simulation of the search. `error` in place of `attained`: the configuration cannot be."""

    split: Split
    caps: Caps
    rate: float
    attained: Attained | None
    error: str | None = None

    @property
    def holds(self) -> bool:
        """Whether it could run, and held the objectives."""
        return self.attained is not None and self.attained.holds

    @property
    def excess(self) -> float:
        """How far it misses them, see Attained.excess; infinite where it could not run."""
        return math.inf if self.attained is None else self.attained.excess

    def reasons(self) -> list[str]:
        """Why it does not hold."""
        return [self.error or ""] if self.attained is None else self.attained.reasons()


@dataclass(slots=True, kw_only=True)
class Plan:
    """`chosen` is None where nothing holds. `outcomes` has the best trial of every split that was tried."""

    chosen: Trial | None = None
    outcomes: dict[Split, Trial] = field(default_factory=dict)
    first_misses: dict[Split, Trial] = field(
        default_factory=dict
    )  # of a search for a rate: just above the one that holds
    notes: list[str] = field(default_factory=list)
    is_complete: bool = True  # False: the simulations allowed did not suffice, or it was interrupted
    is_interrupted: bool = False

    @property
    def held(self) -> list[Trial]:
        """Of the splits that hold, their best trials."""
        return [trial for trial in self.outcomes.values() if trial.holds]

    @property
    def closest(self) -> Trial | None:
        """What misses the objectives least."""
        return min(self.outcomes.values(), key=lambda trial: (trial.excess, trial.split), default=None)
