"""Figures, table and exit code of an evaluation."""

import json

import pytest

from model.quantization_config import QuantizationConfig
from serving.config_file import load_config
from serving.evaluation.report import format_result
from serving.evaluation.result import EvaluationResult
from serving.evaluation.run import describe


@pytest.fixture
def result(answer):
    """Four additions, of which one is cut off right, one wrong, one malformed; a story; two of an extra group."""

    def make(**values):
        given = (
            answer(question="a"),
            answer(question="b", finish_reason="length"),
            answer("</think>8", question="c"),
            answer("3+4=", question="d", finish_reason="length"),
            answer(question="e", kind="story", group="story"),
            answer(question="f", group="3-digit addition"),
            answer("</think>", question="g", group="3-digit addition"),
        )
        settings = {"seed": 0, "temperature": 0.0}
        return EvaluationResult(**{"subject": {"model": "mini"}, "settings": settings, "answers": given} | values)

    return make


def test_the_table_literally(result):
    assert format_result(result()).splitlines() == [
        "============================ Accuracy on Held-out Problems ============================",
        "model:                mini",
        "seed:                 0",
        "temperature:          0.0",
        "-" * 87,
        "                        problems  accuracy %    95 % interval  well-formed %     tokens",
        "addition                       4       50.00     15.0 .. 85.0           50.0        9.0",
        "story                          1      100.00    20.7 .. 100.0          100.0        9.0",
        "-" * 87,
        "overall                        5       60.00     23.1 .. 88.2           60.0        9.0",
        "3-digit addition               2       50.00      9.5 .. 90.5          100.0        9.0",
        "-" * 87,
        "overall: all problems of the kinds. well-formed: thinking closed, ended by itself.",
        "tokens: mean of a reply.",
        "=" * 87,
    ]


def test_an_interrupted_result_says_so(result):
    partial = result(is_interrupted=True, num_not_asked=12)
    assert "INTERRUPTED: 12 problems were not answered; what follows is partial." in format_result(partial)
    assert partial.exit_code == 130


def test_a_result_of_nothing_can_be_printed(result):
    empty = result(answers=(), is_interrupted=True, num_not_asked=3)
    assert "overall                        0        0.00     0.0 .. 100.0" in format_result(empty)


def test_a_failed_request_is_told_and_fails_the_run(result, answer):
    failed = result(answers=(answer(), answer("", finish_reason=None, error="HTTP 500: out of order")))
    text = format_result(failed)
    assert "FAILED: 1 requests, counted as wrong; the first: HTTP 500: out of order" in text
    assert (failed.exit_code, failed.overall.accuracy) == (1, 0.5)


def test_what_is_still_held_fails_the_run(result):
    held = result(held_at_rest={"blocks": 0, "slots": 2})
    assert "STILL HELD at the end: {'slots': 2}" in format_result(held)
    assert (held.exit_code, result(held_at_rest={"blocks": 0}).exit_code) == (1, 0)


def test_the_json_has_the_figures_and_every_problem(result):
    values = json.loads(json.dumps(result().as_json()))
    assert values["groups"]["addition"]["accuracy"] == 0.5
    assert values["groups"]["addition"]["interval_95"] == pytest.approx([0.15, 0.85], abs=1e-3)
    assert values["overall"]["problems"] == 5
    assert len(values["problems"]) == 7
    assert values["problems"][2] == {
        "group": "addition",
        "kind": "addition",
        "level": 1,
        "question": "c",
        "expected": "7",
        "answer": "8",
        "correct": False,
        "well_formed": True,
        "finish_reason": "stop",
        "tokens": 9,
        "error": None,
    }


def test_random_weights_are_called_random(make_config):
    assert describe(make_config("colocated", "seed=5")) == {
        "checkpoint": "random, seed 5",
        "quantization": "none (float32)",
        "dispatch": "float32",
        "MTP drafts": "off",
    }


def test_a_checkpoint_tells_its_name_and_number_format(make_config, checkpoint, tmp_path):
    described = describe(make_config("colocated", f"model.checkpoint={checkpoint}", "model.dispatch_dtype=int8"))
    assert (described["checkpoint"], described["quantization"]) == (checkpoint.name, "none (float32)")
    assert described["dispatch"] == "int8"
    told = json.loads((checkpoint / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(told))
    config = make_config("colocated", f"model.checkpoint={tmp_path}")
    assert describe(config)["quantization"] == "unknown"  # no weights
    told["quantization_config"] = QuantizationConfig().to_dict()
    (tmp_path / "config.json").write_text(json.dumps(told))
    assert describe(config)["quantization"] == "supernode-int8"


def test_a_shipped_checkpoint_is_told_by_its_name_and_drafts_are_counted():
    described = describe(load_config("laptop", ("model.checkpoint=mini-r1", "speculative.num_speculative_tokens=1")))
    assert described == {
        "checkpoint": "mini-r1",
        "quantization": "none (bfloat16)",
        "dispatch": "float32",
        "MTP drafts": "1 per step",
    }
