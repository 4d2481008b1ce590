"""Problems: their traces and answers against an independent calculation, their split, their grading."""

import re
from datetime import datetime, timedelta
from random import Random

import pytest

from model.tasks.arithmetic import add_columns, multiply_digit
from model.tasks.generator import KINDS, generate
from model.tasks.problem import LEVELS, Problem, Split
from tests.problem_content import Content, content_of

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]


def numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def answer_from_question(problem: Problem) -> str:
    """The right answer, worked out from the words of the question alone."""
    question, found = problem.question, numbers(problem.question)
    match problem.kind:
        case "addition":
            return str(sum(found))
        case "subtraction":
            return str(max(found) - min(found))
        case "multiplication":
            return str(found[0] * found[1])
        case "division":
            return f"{found[0] // found[1]} remainder {found[0] % found[1]}"
        case "comparison":
            return str(max(found))
        case "sorting":
            return ", ".join(map(str, sorted(found)))
        case "letters":
            letter, text = re.search(r"letter (\w) .*?in: (.*?)\??$", question).groups()
            return str(text.count(letter))
        case "clock":
            span = found[2:] if len(found) == 4 else [0, found[2]]
            start = datetime(2000, 1, 1, found[0], found[1])
            return (start + timedelta(hours=span[0], minutes=span[1])).strftime("%H:%M")
        case "weekday":
            start = next(i for i, day in enumerate(DAYS) if day in question)
            return DAYS[(start + (-found[0] if "ago" in question else found[0])) % 7]
        case "equation":
            a, sign, b, c = re.search(r"(\d+)x ([+-]) (\d+) = (\d+)", question).groups()
            solutions = [x for x in range(200) if int(a) * x + int(sign + b) == int(c)]
            return f"x = {solutions[0]}"
        case "story":
            amount, *changes = found
            signs = [-1 if verb in ("gives away", "loses") else 1 for verb in
                     re.findall(r"gives away|loses|buys|finds", question)]  # fmt: skip
            return str(amount + sum(sign * change for sign, change in zip(signs, changes, strict=True)))
    raise AssertionError(problem.kind)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_what_the_question_asks(kind, level):
    rng = Random(f"{kind}{level}")
    for _ in range(200):
        problem = generate(rng, "train", kinds=[kind], levels=[level])
        assert (problem.kind, problem.level) == (kind, level)
        assert problem.answer == answer_from_question(problem), problem
        assert problem.is_correct(problem.answer)


@pytest.mark.parametrize(
    "kind", ["addition", "subtraction", "multiplication", "division", "equation", "story", "clock"]
)
def test_every_line_of_a_trace_that_states_an_equation_is_true(kind):
    rng = Random(kind)
    checked = 0
    for _ in range(300):
        problem = generate(rng, "train", kinds=[kind])
        for left, right in re.findall(r"(?:^|=)([\d+\-*/]*[+\-*/][\d+\-*/]*)=([\d,]+)$", problem.trace, re.MULTILINE):
            value = eval(re.sub(r"\b0+(\d)", r"\1", left).replace("/", "//"))  # digits and operators only
            first = int(right.split(",")[0])
            # A borrowed digit is the difference modulo ten.
            assert first == (value % 10 if kind == "subtraction" else value), (problem, left)
            checked += 1
    assert checked >= 300


def test_column_addition_is_written_as_on_paper():
    assert add_columns(347, 285) == ("347+285:\n7+5+0=12\n4+8+1=13\n3+2+1=06\n=632", 632)
    assert multiply_digit(47, 6) == ("47*6:\n7*6+0=42\n4*6+4=28\n=282", 282)


@pytest.mark.parametrize("kind", KINDS)
def test_no_content_is_in_both_splits_whatever_its_wording(kind):
    """At the levels with the fewest problems, so that most contents are drawn in several wordings."""
    rng = Random(kind)
    wordings: dict[Content, set[str]] = {}
    contents: dict[Split, set[Content]] = {"train": set(), "test": set()}
    for split, count in (("train", 4000), ("test", 1000)):
        for level in (1, 2) * (count // 2):
            problem = generate(rng, split, kinds=[kind], levels=[level])
            content = content_of(problem.question)
            assert (problem.split, content[0]) == (split, kind)
            contents[split].add(content)
            wordings.setdefault(content, set()).add(problem.question)
    assert contents["train"].isdisjoint(contents["test"])
    assert kind == "weekday" or max(map(len, wordings.values())) > 1


def test_a_key_is_a_content():
    rng = Random(3)
    contents: dict[tuple[str, str], set[Content]] = {}
    for kind, level in 600 * [(kind, level) for kind in KINDS for level in LEVELS]:
        problem = KINDS[kind](rng, level)
        contents.setdefault((problem.kind, problem.key), set()).add(content_of(problem.question))
    assert {len(found) for found in contents.values()} == {1}


def test_operands_in_another_order_are_the_same_problem():
    rng = Random(4)
    for kind, separator in (("addition", " + "), ("multiplication", " * "), ("comparison", " or "), ("sorting", ", ")):
        by_answer: dict[str, set[str]] = {}
        for _ in range(20000):
            problem = KINDS[kind](rng, 1)
            if separator in problem.question:
                operands = ",".join(map(str, sorted(numbers(problem.question))))
                by_answer.setdefault(operands, set()).add(problem.key)
        assert all(len(keys) == 1 for keys in by_answer.values())


def test_about_one_key_in_ten_is_held_out():
    rng = Random(5)
    keys = {(problem.kind, problem.key): problem.split for problem in (KINDS["addition"](rng, 3) for _ in range(5000))}
    share = sum(split == "test" for split in keys.values()) / len(keys)
    assert 0.08 < share < 0.12


def test_equal_seeds_give_equal_problems():
    first, second = Random(9), Random(9)
    assert [generate(first, "test") for _ in range(50)] == [generate(second, "test") for _ in range(50)]


@pytest.mark.parametrize(
    ("reply", "is_right"),
    [("632", True), (" 632.\n", True), ("0632", True), ("The answer is 632", False), ("63", False), ("", False)],
)
def test_grading_ignores_only_what_does_not_matter(reply, is_right):
    problem = Problem(kind="addition", level=2, key="285+347", question="?", trace="", answer="632")
    assert problem.is_correct(reply) is is_right


def test_unknown_kind_is_refused():
    with pytest.raises(KeyError, match="poetry"):
        generate(Random(0), "train", kinds=["poetry"])
