"""Which held-out problems an evaluation asks.

Owns: the drawing of problems by kind, and the groups beside the kinds.
Must not know: endpoints, replies, how a kind makes its problems.

A problem is held out by a hash of its key (model/tasks/problem.py), so none was in the training data. Every group draws
from a generator of its own: equal seeds give equal problems, whatever other groups are asked, and more problems begin
with the fewer.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from random import Random

from model.tasks.generator import KINDS, generate
from model.tasks.problem import LEVELS, Problem
from serving.errors import ConfigError

# Draws in a row without a question that is new and in its group, after which there are taken to be no more.
_MAX_DRAWS = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One problem to ask. Its group is its kind, or a group beside the kinds."""

    group: str
    problem: Problem


def has_three_digits(problem: Problem) -> bool:
    """Whether both operands of an addition or subtraction have exactly 3 digits."""
    return re.fullmatch(r"\d{3}[+-]\d{3}", problem.key) is not None


# Groups beside the kinds: the kind that they are part of, and which of its problems they hold.
Members = Callable[[Problem], bool]
EXTRA_GROUPS: dict[str, tuple[str, Members]] = {
    "3-digit addition": ("addition", has_three_digits),
    "3-digit subtraction": ("subtraction", has_three_digits),
}


def draw_questions(
    *, num_problems: int, kinds: Sequence[str] = tuple(KINDS), levels: Sequence[int] = LEVELS, seed: int = 0
) -> tuple[Question, ...]:
    """`num_problems` held-out problems of every kind, and of every extra group of these kinds; groups in order.

    No question is asked twice within a group. A group that has fewer questions at these levels gives all it has, and
    one that has none is left out. Raises ConfigError for an unknown kind or level.
    """
    if num_problems < 1:
        raise ConfigError(f"--num-problems: {num_problems} is below the limit 1")
    check_known("--kinds", kinds, tuple(KINDS))
    check_known("--levels", levels, LEVELS)
    groups: dict[str, tuple[str, Members]] = {kind: (kind, _all) for kind in KINDS if kind in kinds}
    groups |= {name: extra for name, extra in EXTRA_GROUPS.items() if extra[0] in kinds}
    ordered = sorted(set(levels))
    return tuple(
        Question(group=name, problem=problem)
        for name, (kind, belongs) in groups.items()
        for problem in islice(_distinct(Random(f"{seed}/{name}"), kind, ordered, belongs), num_problems)
    )


def check_known(option: str, values: Sequence[object], known: Sequence[object]) -> None:
    """Raise ConfigError unless there are `values`, all of them among the `known` ones."""
    if not values:
        raise ConfigError(f"{option}: is empty; there are {', '.join(map(str, known))}")
    for value in values:
        if value not in known:
            raise ConfigError(f"{option}: {value!r} is not one of {', '.join(map(str, known))}")


def _all(problem: Problem) -> bool:
    return True


def _distinct(rng: Random, kind: str, levels: Sequence[int], belongs: Members) -> Iterator[Problem]:
    asked: set[str] = set()
    num_draws = 0
    while num_draws < _MAX_DRAWS:
        problem = generate(rng, "test", kinds=[kind], levels=levels)
        num_draws += 1
        if problem.question not in asked and belongs(problem):
            asked.add(problem.question)
            num_draws = 0
            yield problem
