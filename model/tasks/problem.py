"""One generated problem: a question, a worked trace, an answer, and its check.

Owns: what a problem is, its identity, the split of all problems into training and held-out ones, grading.
Must not know: tokens, models, how a kind makes its problems.
Source: the split by a hash of the identity is how large data sets keep their splits apart without a list.
"""

import re
import zlib
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "test"]
LEVELS = (1, 2, 3)

# One identity in ten is held out. CRC-32 is stable over machines and Python's hash seeds.
_HELD_OUT_ONE_IN = 10
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A question whose trace and answer are correct by construction.

    `key` says what is asked, whatever the wording: two problems with one key have one answer, and belong to the same
    split.
    """

    kind: str
    level: int  # 1 easy to 3 hard
    key: str
    question: str
    trace: str  # what goes between the thinking tags, without the line breaks next to them
    answer: str

    @property
    def split(self) -> Split:
        """The split that this problem's key belongs to."""
        return "test" if zlib.crc32(f"{self.kind}:{self.key}".encode()) % _HELD_OUT_ONE_IN == 0 else "train"

    def is_correct(self, answer: str) -> bool:
        """Whether `answer`, the visible text behind the thinking, gives this problem's answer.

        Case, white space, a final period and leading zeros of numbers do not count.
        """
        return _normalize(answer) == _normalize(self.answer)


def _normalize(text: str) -> str:
    flat = " ".join(text.lower().split()).rstrip(".").rstrip()
    return _NUMBER.sub(lambda digits: digits.group().lstrip("0") or "0", flat)
