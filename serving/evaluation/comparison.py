"""An evaluation against an earlier one, problem by problem.

Owns: reading an earlier result, pairing its problems with ours, and whether the difference is significant.
Must not know: how problems were asked.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving.errors import ConfigError
from serving.evaluation.client import Answer
from serving.evaluation.questions import EXTRA_GROUPS, Question
from serving.evaluation.result import OVERALL, EvaluationResult
from serving.evaluation.statistics import mcnemar_p

SIGNIFICANCE = 0.05

# Group and question name a problem; the seed alone would not, if kinds changed meanwhile.
Key = tuple[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class EarlierResult:
    """What an earlier evaluation found, from its JSON file."""

    file: str
    subject: dict[str, str]
    is_correct: dict[Key, bool]

    def check_overlap(self, questions: Sequence[Question]) -> None:
        """Raise ConfigError if none of these questions was asked then."""
        if not any((question.group, question.problem.question) in self.is_correct for question in questions):
            raise ConfigError(
                f"--compare: {self.file} has none of these problems; give the --seed, --kinds and --levels of then"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupComparison:
    """One group's problems that both evaluations asked."""

    group: str
    num_problems: int
    num_earlier: int  # right then
    num_now: int  # right now
    num_only_earlier: int
    num_only_now: int

    @property
    def difference(self) -> float:
        """Accuracy now less that of then."""
        return (self.num_now - self.num_earlier) / max(1, self.num_problems)

    @property
    def p_value(self) -> float:
        """Of McNemar's exact test."""
        return mcnemar_p(self.num_only_earlier, self.num_only_now)

    @property
    def is_significant(self) -> bool:
        """Whether chance would give a difference like this less often than SIGNIFICANCE."""
        return self.p_value < SIGNIFICANCE

    def as_json(self) -> dict[str, Any]:
        return {
            "problems": self.num_problems,
            "accuracy_earlier": self.num_earlier / max(1, self.num_problems),
            "accuracy_now": self.num_now / max(1, self.num_problems),
            "difference": self.difference,
            "only_earlier": self.num_only_earlier,
            "only_now": self.num_only_now,
            "p_value": self.p_value,
            "significant": self.is_significant,
        }


def read_earlier(path: Path) -> EarlierResult:
    """The earlier result in a file that `supernode eval --json` wrote. Raises ConfigError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--compare: {path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"--compare: {path}: not valid JSON: {error}") from None
    try:
        is_correct = {(str(p["group"]), str(p["question"])): bool(p["correct"]) for p in data["problems"]}
        subject = {str(key): str(value) for key, value in data["subject"].items()}
    except (LookupError, TypeError, AttributeError):
        raise ConfigError(f"--compare: {path}: is not a result of supernode eval") from None
    return EarlierResult(file=str(path), subject=subject, is_correct=is_correct)


def compare(result: EvaluationResult, earlier: EarlierResult) -> list[GroupComparison]:
    """Per group, and last over all kinds, the problems that both have asked."""
    pairs: dict[str, list[tuple[bool, bool]]] = {}
    for answer in result.answers:
        key = _key(answer)
        if key in earlier.is_correct:
            pairs.setdefault(key[0], []).append((earlier.is_correct[key], answer.is_correct))
    of_kinds = [pair for group, group_pairs in pairs.items() if group not in EXTRA_GROUPS for pair in group_pairs]
    return [_compared(group, group_pairs) for group, group_pairs in [*pairs.items(), (OVERALL, of_kinds)]]


def _key(answer: Answer) -> Key:
    return answer.question.group, answer.question.problem.question


def _compared(group: str, pairs: Sequence[tuple[bool, bool]]) -> GroupComparison:
    return GroupComparison(
        group=group,
        num_problems=len(pairs),
        num_earlier=sum(before for before, _ in pairs),
        num_now=sum(now for _, now in pairs),
        num_only_earlier=sum(before and not now for before, now in pairs),
        num_only_now=sum(now and not before for before, now in pairs),
    )
