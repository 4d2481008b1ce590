"""The result of an evaluation: what was asked of which model, and the figures of every group.

Owns: the figures, and their JSON form.
Must not know: how questions were asked, tables.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from serving.evaluation.client import Answer
from serving.evaluation.questions import EXTRA_GROUPS
from serving.evaluation.statistics import wilson_interval

OVERALL = "overall"


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """The figures of one group of problems."""

    group: str
    num_problems: int
    num_correct: int
    num_well_formed: int
    num_failed: int  # requests that failed; they count as wrong
    num_tokens: int

    @classmethod
    def of(cls, group: str, answers: Sequence[Answer]) -> "Score":
        return cls(
            group=group,
            num_problems=len(answers),
            num_correct=sum(answer.is_correct for answer in answers),
            num_well_formed=sum(answer.is_well_formed for answer in answers),
            num_failed=sum(answer.finish_reason is None for answer in answers),
            num_tokens=sum(answer.num_tokens for answer in answers),
        )

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.num_correct / max(1, self.num_problems)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of the accuracy."""
        return wilson_interval(self.num_correct, self.num_problems)

    @property
    def well_formed(self) -> float:
        """Share of replies that closed their thinking and ended by themselves."""
        return self.num_well_formed / max(1, self.num_problems)

    @property
    def mean_tokens(self) -> float:
        """Mean length of a reply, thinking and end of text included."""
        return self.num_tokens / max(1, self.num_problems)

    def as_json(self) -> dict[str, Any]:
        return {
            "problems": self.num_problems,
            "correct": self.num_correct,
            "accuracy": self.accuracy,
            "interval_95": list(self.interval),
            "well_formed": self.well_formed,
            "mean_reply_tokens": self.mean_tokens,
            "failed_requests": self.num_failed,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationResult:
    """A finished evaluation. `subject` says what was evaluated as far as it is known, `settings` how."""

    subject: Mapping[str, str]
    settings: Mapping[str, Any]
    answers: tuple[Answer, ...]
    is_interrupted: bool = False
    num_not_asked: int = 0
    held_at_rest: Mapping[str, int] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """0; 1 if a request failed or something is still held; 130 if it was interrupted."""
        if self.is_interrupted:
            return 130
        has_failures = any(answer.finish_reason is None for answer in self.answers)
        return 1 if has_failures or any(self.held_at_rest.values()) else 0

    def scores(self) -> list[Score]:
        """One per group, in the order of the questions."""
        groups = dict.fromkeys(answer.question.group for answer in self.answers)
        return [Score.of(group, [a for a in self.answers if a.question.group == group]) for group in groups]

    @property
    def overall(self) -> Score:
        """All problems of the kinds; the extra groups would count some of them twice."""
        return Score.of(OVERALL, [a for a in self.answers if a.question.group not in EXTRA_GROUPS])

    def as_json(self) -> dict[str, Any]:
        """The result as JSON values, with the outcome of every problem."""
        return {
            "subject": dict(self.subject),
            "settings": dict(self.settings),
            "interrupted": self.is_interrupted,
            "not_asked": self.num_not_asked,
            "held_at_rest": dict(self.held_at_rest),
            "groups": {score.group: score.as_json() for score in self.scores()},
            "overall": self.overall.as_json(),
            "problems": [_problem(answer) for answer in self.answers],
        }


def _problem(answer: Answer) -> dict[str, Any]:
    problem = answer.question.problem
    return {
        "group": answer.question.group,
        "kind": problem.kind,
        "level": problem.level,
        "question": problem.question,
        "expected": problem.answer,
        "answer": answer.text,
        "correct": answer.is_correct,
        "well_formed": answer.is_well_formed,
        "finish_reason": answer.finish_reason,
        "tokens": answer.num_tokens,
        "error": answer.error,
    }
