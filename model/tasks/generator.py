"""Problems by kind, level and split, from a random generator.

Owns: the table of kinds, and the promise that a problem of one split never has the key of the other.
Must not know: how a kind makes its problems, tokens, models.
"""

from collections.abc import Callable, Sequence
from random import Random

from model.tasks import arithmetic, everyday
from model.tasks.problem import LEVELS, Problem, Split

KINDS: dict[str, Callable[[Random, int], Problem]] = {
    "addition": arithmetic.addition,
    "subtraction": arithmetic.subtraction,
    "multiplication": arithmetic.multiplication,
    "division": arithmetic.division,
    "comparison": arithmetic.comparison,
    "sorting": everyday.sorting,
    "letters": everyday.letters,
    "clock": everyday.clock,
    "weekday": everyday.weekday,
    "equation": everyday.equation,
    "story": everyday.story,
}


def generate(
    rng: Random, split: Split, *, kinds: Sequence[str] = tuple(KINDS), levels: Sequence[int] = LEVELS
) -> Problem:
    """One problem of a random kind and level. Raises KeyError for an unknown kind."""
    make, level = KINDS[rng.choice(kinds)], rng.choice(levels)
    while True:
        problem = make(rng, level)
        if problem.split == split:
            return problem
