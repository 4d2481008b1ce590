"""An earlier result from its file, paired with a new one problem by problem."""

import json

import pytest

from serving.errors import ConfigError
from serving.evaluation.comparison import compare, read_earlier
from serving.evaluation.questions import draw_questions
from serving.evaluation.report import format_comparison
from serving.evaluation.result import EvaluationResult

WRONG = "</think>\n\n8"


@pytest.fixture
def results(answer):
    """Ten problems twice: then 9 right, now 3; three of an extra group, right both times."""

    def make(*rights, extra="3-digit addition"):
        def reply(index, num_right):
            return {} if index < num_right else {"reply": WRONG}

        return [
            EvaluationResult(
                subject={"model": "mini", "checkpoint": f"c{num_right}"},
                settings={},
                answers=(
                    *(answer(question=f"q{i}", **reply(i, num_right)) for i in range(10)),
                    *(answer(question=f"q{i}", group=extra) for i in range(3)),
                ),
            )
            for num_right in rights
        ]

    return make


@pytest.fixture
def saved(tmp_path):
    def save(content):
        path = tmp_path / "earlier.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return save


def test_problems_are_paired_and_the_difference_is_judged(results, saved):
    then, now = results(9, 3)
    kind, extra, overall = compare(now, read_earlier(saved(then.as_json())))
    assert (kind.num_problems, kind.num_earlier, kind.num_now) == (10, 9, 3)
    assert (kind.num_only_earlier, kind.num_only_now, kind.difference) == (6, 0, pytest.approx(-0.6))
    assert (kind.p_value, kind.is_significant) == (0.03125, True)
    assert (extra.group, extra.num_problems, extra.p_value) == ("3-digit addition", 3, 1.0)
    assert (overall.group, overall.num_problems) == ("overall", 10)  # without the extra group


def test_the_table_shows_both_side_by_side(results, saved):
    then, now = results(9, 3)
    earlier = read_earlier(saved(then.as_json()))
    text = format_comparison(compare(now, earlier), earlier)
    lines = text.splitlines()
    assert "checkpoint:           c9" in lines
    assert "addition                      10      90.00   30.00      -60.00     6     0   0.0312 *" in lines
    assert "3-digit addition               3     100.00  100.00       +0.00     0     0   1.0000" in lines
    assert "Overall difference -60.00 points: significant (p = 0.0312)." in lines


def test_only_common_problems_count(results, saved, answer):
    then, now = results(9, 9)
    more = EvaluationResult(subject={}, settings={}, answers=(*now.answers, answer(question="another")))
    assert [entry.num_problems for entry in compare(more, read_earlier(saved(then.as_json())))] == [10, 3, 10]


def test_a_result_of_other_problems_is_refused_before_the_work(results, saved):
    earlier = read_earlier(saved(results(9)[0].as_json()))
    with pytest.raises(ConfigError, match="none of these problems; give the --seed"):
        earlier.check_overlap(draw_questions(num_problems=2))


@pytest.mark.parametrize(
    ("content", "words"),
    [("{", "not valid JSON"), ("[]", "not a result"), ({"problems": [{}]}, "not a result"), ({"x": 1}, "not a result")],
)
def test_a_file_that_is_no_result_is_refused(saved, content, words):
    path = saved(content)
    with pytest.raises(ConfigError) as refusal:
        read_earlier(path)
    assert str(refusal.value).startswith(f"--compare: {path}: ")
    assert words in str(refusal.value)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"--compare: .*nope\.json: No such file"):
        read_earlier(tmp_path / "nope.json")
