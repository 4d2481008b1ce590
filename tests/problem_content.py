"""What a question asks, whatever its wording: read from its words alone, so that it can judge keys and splits."""

import re
from collections.abc import Hashable

Content = tuple[Hashable, ...]

_DAYS = "Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday"
_STORY = re.compile(r"(has|gives away|loses|buys|finds) (\d+)")
_SIGNS = {"has": 1, "buys": 1, "finds": 1, "gives away": -1, "loses": -1}
# Kinds by the words of their questions; the groups are operands. Two patterns of a kind put them in another order.
_PATTERNS = (
    ("addition", r"What is (\d+) \+ (\d+)\?|Add (\d+) and (\d+)\.|Compute (\d+) \+ (\d+)\."),
    ("addition", r"What is the sum of (\d+) and (\d+)\?"),
    ("subtraction", r"What is (\d+) - (\d+)\?|Compute (\d+) - (\d+)\.|What is (\d+) minus (\d+)\?"),
    ("from", r"Subtract (\d+) from (\d+)\."),
    ("multiplication", r"What is (\d+) \* (\d+)\?|Multiply (\d+) by (\d+)\.|Compute (\d+) \* (\d+)\."),
    ("multiplication", r"What is (\d+) times (\d+)\?"),
    ("division", r"Divide (\d+) by (\d+) with remainder\.|What are quotient and remainder of (\d+) / (\d+)\?"),
    ("comparison", r"Which is larger, (\d+) or (\d+)\?|What is the larger number of (\d+) and (\d+)\?"),
    ("sorting", r"(?:Sort these numbers|Put in ascending order): ([\d, ]+)"),
    ("letters", r"How many times does the letter ([a-z]) occur in: ([a-z ]+)\?|Count the letter ([a-z]) in: ([a-z ]+)"),
    ("clock", r"It is (\d\d:\d\d)\. What time is it (.+) later\?"),
    ("clock", r"A train leaves at (\d\d:\d\d) and travels (.+)\. When does it arrive\?"),
    ("weekday", rf"Today is ({_DAYS})\. What day (is|was) it (?:in )?(\d+) days(?: ago)?\?"),
    ("equation", r"Solve (\d+)x ([+-]) (\d+) = (\d+) for x\.|Find x: (\d+)x ([+-]) (\d+) = (\d+)"),
    ("story", r"(\w+ has \d+ \w+\..*) How many \w+ does \w+ have now\?"),
)


def content_of(question: str) -> Content:
    """The kind and what is asked. Equal for two questions exactly if they are one problem in other words or order."""
    for kind, pattern in _PATTERNS:
        if match := re.fullmatch(pattern, question):
            return _content(kind, [group for group in match.groups() if group is not None])
    raise AssertionError(f"no known wording: {question!r}")


def _content(kind: str, parts: list[str]) -> Content:
    match kind:
        case "addition" | "multiplication" | "comparison":
            return kind, *sorted(map(int, parts))
        case "from":
            return "subtraction", int(parts[1]), int(parts[0])
        case "subtraction" | "division":
            return kind, *map(int, parts)
        case "sorting":
            return kind, *sorted(int(number) for number in parts[0].split(", "))
        case "letters":
            return kind, parts[0], frozenset(parts[1].split())
        case "clock":
            hours, minutes = (re.search(rf"(\d+) {unit}", parts[1]) for unit in ("hours", "minutes"))
            assert minutes is not None
            return kind, parts[0], int(hours[1]) if hours else 0, int(minutes[1])
        case "weekday":
            day, direction, count = parts
            return kind, day, direction, int(count)
        case "equation":
            factor, sign, summand, result = parts
            return kind, int(factor), int(sign + summand), int(result)
        case _:
            return kind, *(_SIGNS[verb] * int(number) for verb, number in _STORY.findall(parts[0]))
