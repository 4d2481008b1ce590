"""Which problems are asked: held out, the same for the same seed, the extra groups apart."""

from random import Random

import pytest

from model.tasks.generator import KINDS, generate
from model.tasks.problem import LEVELS
from serving.errors import ConfigError
from serving.evaluation.questions import EXTRA_GROUPS, draw_questions
from tests.problem_content import content_of


def by_group(questions):
    groups = {}
    for question in questions:
        groups.setdefault(question.group, []).append(question.problem)
    return groups


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_held_out_problem_is_among_those_of_training(kind, level):
    asked = draw_questions(num_problems=60, kinds=[kind], levels=[level])
    held_out = {content_of(q.problem.question) for q in asked}
    rng = Random(1)
    trained = {content_of(generate(rng, "train", kinds=[kind], levels=[level]).question) for _ in range(4000)}
    assert {content[0] for content in held_out} == {kind}
    assert all(q.problem.split == "test" for q in asked)
    assert held_out.isdisjoint(trained)


def test_every_kind_and_every_extra_group_is_asked_as_often():
    groups = by_group(draw_questions(num_problems=20))
    assert list(groups) == [*KINDS, *EXTRA_GROUPS]
    assert {len(problems) for problems in groups.values()} == {20}
    for group, problems in groups.items():
        assert len({problem.question for problem in problems}) == 20
        assert {problem.kind for problem in problems} == {EXTRA_GROUPS[group][0] if group in EXTRA_GROUPS else group}


def test_the_extra_groups_have_two_operands_of_three_digits():
    groups = by_group(draw_questions(num_problems=50, kinds=["addition", "subtraction"]))
    for group, sign in (("3-digit addition", "+"), ("3-digit subtraction", "-")):
        for problem in groups[group]:
            assert [len(number) for number in problem.key.split(sign)] == [3, 3]


def test_an_extra_group_that_the_levels_cannot_give_is_left_out():
    assert list(by_group(draw_questions(num_problems=3, kinds=["addition"], levels=[1]))) == ["addition"]


def test_a_kind_with_few_problems_gives_those_it_has():
    questions = draw_questions(num_problems=200, kinds=["weekday"], levels=[1])  # 63 keys, a tenth held out
    assert 3 <= len(questions) <= 15


def test_problems_follow_from_the_seed_and_not_from_what_else_is_asked():
    some = draw_questions(num_problems=5, kinds=["clock"])
    assert some == tuple(q for q in draw_questions(num_problems=5) if q.group == "clock")
    assert some == draw_questions(num_problems=9, kinds=["clock"])[:5]
    assert some != draw_questions(num_problems=5, kinds=["clock"], seed=1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_problems": 0}, ("--num-problems", "0", "1")),
        ({"num_problems": 1, "kinds": ["addition", "poetry"]}, ("--kinds", "'poetry'", "story")),
        ({"num_problems": 1, "kinds": []}, ("--kinds", "empty", "story")),
        ({"num_problems": 1, "levels": [4]}, ("--levels", "4", "1, 2, 3")),
    ],
)
def test_what_cannot_be_asked_is_refused(arguments, words):
    with pytest.raises(ConfigError) as refusal:
        draw_questions(**arguments)
    assert all(word in str(refusal.value) for word in words)
