"""What is said about the reach of an answer: inside what was published, or extrapolated and in which direction."""

import copy
import itertools
from importlib import resources

import pytest
import yaml

from serving.config_file import load_part
from serving.errors import ConfigError
from serving.estimation import published_coverage
from serving.estimation.coverage import Coverage
from serving.estimation.estimates import ESTIMATES
from serving.estimation.published import load_published
from serving.estimation.what_if import complete_arguments, estimate

GEMM = {"groups": 4, "m": 7168, "n": 4096, "k": 4096}


@pytest.fixture
def description():
    return copy.deepcopy(load_part("hardware/cloudmatrix384.yaml"))


def coverage_of(name, **arguments):
    return estimate(name, **arguments)["coverage"]


def test_the_form():
    coverage = Coverage(notes=["assumed"])
    coverage.compare("tokens", 128, 128, 128)
    assert coverage.as_json() == {"inside": True, "extrapolated": {}, "notes": ["assumed"]}
    coverage.compare("tokens", 2_000_000, 1, 4096)
    coverage.compare("share", 0.05, 0.125, 0.9)
    coverage.leave("tokens", "unpublished", "tokens: odd")
    assert coverage.as_json() == {
        "inside": False,
        "extrapolated": {"tokens": "above", "share": "below"},
        "notes": [
            "extrapolated: tokens 2e+06 above 4096",
            "extrapolated: share 0.05 below 0.125",
            "tokens: odd",
            "assumed",
        ],
    }


def published_questions():
    """Every estimate that a row about the machine itself is compared with."""
    told = load_published("published/cloudmatrix384.yaml")
    for row in told.rows:
        if row.hardware in (None, told.hardware):
            for changed in ({}, row.ours.minus, row.ours.over):
                if changed is not None:
                    yield row.label, row.ours.estimate, row.ours.arguments | changed


def test_every_published_figure_is_inside():
    questions = list(published_questions())
    assert len(questions) > 80
    outside = [label for label, name, arguments in questions if not coverage_of(name, **arguments)["inside"]]
    assert outside == []


@pytest.mark.parametrize(
    ("name", "arguments", "extrapolated", "note"),
    [
        ("decode", {"kv_len": 32768, "batch_per_npu": 16}, {"kv_len": "above"}, "kv_len 32768 above 4096"),
        ("decode", {"batch_per_npu": 4}, {"batch_per_npu": "below"}, "batch_per_npu 4 below 8"),
        ("decode", {"ep": 256}, {"ep": "below"}, "ep 256 below 320"),
        ("decode", {"mtp": 2, "batch_per_npu": 8}, {"mtp": "above"}, "mtp 2 above 1"),
        ("decode", {"attention_aic": 12}, {"attention_aic": "below"}, "attention_aic 12 below 16"),
        ("prefill", {"reuse": 1.0}, {"reuse": "above"}, "reuse 1 above 0.9"),
        (
            "prefill",
            {"prompt_len": 128, "tokens_per_npu": 8192},
            {"prompt_len": "below", "tokens_per_npu": "below"},
            "prompt_len 128 below 4096",
        ),
        ("dispatch", {"ep": 320, "tokens": 48}, {"ep": "above", "tokens": "below"}, "tokens 48 below 128"),
        ("combine", {"ep": 4}, {"ep": "below"}, "ep 4 below 8"),
        ("gemm", GEMM | {"groups": 1}, {"groups": "below"}, "groups 1 below 4"),
        ("attention", {"query_tokens": 4}, {"query_tokens": "above"}, "query_tokens 4 above 2"),
        ("transfer", {"num_bytes": 100}, {"num_bytes": "below"}, "num_bytes 100 below 512"),
        ("switches", {"npus": 96}, {"npus": "below"}, "npus 96 below 192"),
        ("load_model", {"instances": 9}, {"instances": "above"}, "instances 9 above 8"),
    ],
)
def test_the_direction_is_told(name, arguments, extrapolated, note):
    told = coverage_of(name, **arguments)
    assert (told["inside"], told["extrapolated"]) == (False, extrapolated)
    assert f"extrapolated: {note}" in told["notes"]


@pytest.mark.parametrize(
    ("name", "arguments", "argument", "note"),
    [
        ("decode", {"balance": "none"}, "balance", "balance none: no published figure"),
        ("decode", {"mtp_pipelined": "off"}, "mtp_pipelined", "mtp_pipelined off: no published figure"),
        ("prefill", {"balance": "none"}, "balance", "balance none: no published figure"),
        ("decode", {"model": "mini-r1"}, "model", "model mini-r1: published figures are of deepseek-r1"),
        (
            "transfer",
            {"plane": "vpc", "num_bytes": 10**6},
            "plane",
            "no transfer over vpc is published: nominal bandwidth, and a latency that is assumed (30 us)",
        ),
    ],
)
def test_what_nobody_published_is_told(name, arguments, argument, note):
    told = coverage_of(name, **arguments)
    assert (told["inside"], told["extrapolated"]) == (False, {argument: "unpublished"})
    assert note in told["notes"]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("decode", {"acceptance": 0.05}),
        ("decode", {"mtp": 0, "mtp_pipelined": "off"}),
        ("prefill", {"reuse": 0.0, "pool_plane": "none"}),
        ("prefill", {"reuse": 0.3, "pool_plane": "vpc"}),
        ("attention", {"requests_per_die": 1, "kv_len": 65536}),
        ("transfer", {"num_bytes": 10**13}),
    ],
)
def test_what_does_not_matter_raises_no_alarm(name, arguments):
    assert coverage_of(name, **arguments)["inside"]


SHIPPED = sorted(
    file.name.removesuffix(".yaml")
    for file in resources.files("configs").joinpath("hardware").iterdir()
    if file.name.endswith(".yaml")
)


@pytest.mark.parametrize("hardware", SHIPPED)
def test_every_shipped_machine_answers_or_says_why_not(hardware):
    """In place of an exception about an argument that matters in no row about it."""
    questions = [
        ("decode", {"mtp": mtp, "mtp_pipelined": pipelined, "microbatch": microbatch, "attention_aic": aic, "ep": 128})
        for mtp, pipelined, microbatch, aic in itertools.product((0, 1), ("on", "off"), ("on", "off"), (None, 12))
    ]
    questions += [
        ("prefill", {"reuse": reuse, "pool_plane": plane})
        for reuse, plane in itertools.product((0.0, 0.5), ("ub", "vpc", "none"))
    ]
    answered = set()
    for name, arguments in questions:
        try:
            estimate(name, hardware=hardware, **arguments)
        except ConfigError:
            continue
        answered.add(name)
    assert answered == {"decode", "prefill"}


@pytest.mark.parametrize(
    ("name", "arguments", "extrapolated", "note"),
    [
        ("decode", {"mtp": 1, "ep": 128}, {"mtp": "above", "mtp_pipelined": "unpublished"}, "mtp_pipelined on"),
        (
            "prefill",
            {"reuse": 0.5, "pool_plane": "vpc"},
            {"reuse": "above", "pool_plane": "unpublished"},
            "pool_plane vpc",
        ),
    ],
)
def test_an_argument_that_matters_in_no_row_is_unpublished(name, arguments, extrapolated, note):
    told = coverage_of(name, hardware="h800", **arguments)
    assert told["extrapolated"] | extrapolated == told["extrapolated"]
    assert f"{note}: no published figure" in told["notes"]


def test_reuse_without_a_pool_is_said_to_have_no_effect():
    told = coverage_of("prefill", reuse=0.95, pool_plane="none")
    assert told == {
        "inside": True,
        "extrapolated": {},
        "notes": ["pool_plane none: nothing is reused, reuse 0.95 has no effect"],
    }


def test_more_tokens_than_the_model_has_positions_are_noted():
    told = coverage_of("decode", kv_len=163_841, batch_per_npu=2)
    assert told["notes"][-1] == "model deepseek-r1 has 163840 positions, fewer than 163841"
    assert coverage_of("decode", kv_len=163_840, batch_per_npu=2)["notes"] == [
        "extrapolated: batch_per_npu 2 below 8",
        "extrapolated: kv_len 163840 above 4096",
    ]


def test_a_machine_without_figures(description):
    description["name"] = "mine"
    for name, arguments in (("decode", {}), ("gemm", GEMM), ("switches", {"npus": 192})):
        told = coverage_of(name, hardware=description, **arguments)
        assert (told["inside"], told["extrapolated"]) == (False, {"hardware": "unpublished"})
    assert coverage_of("gemm", hardware=description, **GEMM)["notes"] == ["hardware mine: no published figures of gemm"]


def test_a_changed_machine_is_not_the_published_one(description):
    assert coverage_of("decode", hardware=description)["notes"] == []
    description["fitted"]["gemm_utilization"]["value"] = 0.75
    told = coverage_of("gemm", hardware=description, **GEMM)
    assert told["inside"]
    assert told["notes"] == ["hardware cloudmatrix384: the fitted constants are not the shipped ones"]
    description["npu"]["die"]["hbm_bytes_per_s"] = 3.2e12
    for name, arguments in (("gemm", GEMM), ("load_model", {})):
        told = coverage_of(name, hardware=description, **arguments)
        assert (told["inside"], told["extrapolated"]) == (False, {"hardware": "unpublished"})
        assert told["notes"][0] == (
            "hardware cloudmatrix384: npu, fitted not as shipped, which the published figures are of"
        )


def test_a_file_may_change_between_two_questions(description, tmp_path):
    path = tmp_path / "mine.yaml"
    utilizations = []
    for share in (0.9, 0.6):
        description["fitted"]["gemm_utilization"]["value"] = share
        path.write_text(yaml.safe_dump(description))
        utilizations.append(estimate("gemm", hardware=str(path), **GEMM)["utilization"])
    assert utilizations[1] < 0.8 * utilizations[0]
    model = tmp_path / "model.yaml"
    rates = []
    for experts in (8, 4):
        model.write_text(yaml.safe_dump(load_part("model/deepseek-r1.yaml") | {"num_experts_per_tok": experts}))
        rates.append(estimate("dispatch", model=str(model))["latency_us"])
    assert rates[1] < 0.8 * rates[0]


def test_a_range_is_that_of_a_devices_own_rows(published_row, monkeypatch):
    def row(estimate, **changes):
        return published_row(ours={"estimate": estimate, "key": "tops"}, **changes)

    rows = [
        row("decode", arguments={"ep": 128, "mtp": 0, "mtp_pipelined": "off"}, role="comparison"),
        row("decode", arguments={"ep": 64, "balance": "none", "acceptance": 0.1}, role="comparison"),
        row("gemm", arguments=GEMM),
        row("gemm", arguments=GEMM | {"k": 64}, role="comparison"),
    ]
    monkeypatch.setattr(published_coverage, "_rows_about", lambda hardware: rows if hardware == "ruler" else [])
    ranges = published_coverage.published_ranges("ruler")
    assert ranges.keys() == {"decode", "gemm"}
    decode, gemm = ranges["decode"], ranges["gemm"]
    assert (decode.is_fitted, gemm.is_fitted) == (False, True)
    assert (decode.seen["ep"].low, decode.seen["ep"].high) == (64, 128)
    assert (decode.seen["mtp"].low, decode.seen["mtp"].high) == (0, 1)
    assert decode.seen["balance"].others == {"eplb", "none"}
    assert decode.seen["mtp_pipelined"].others == {"on"}  # without drafts there is nothing to wait for
    assert "acceptance" not in decode.seen
    assert (gemm.seen["k"].low, gemm.seen["k"].high) == (64, 4096)
    coverage = Coverage()
    published_coverage.compare_arguments(coverage, "decode", complete_arguments("decode", {"ep": 64}), hardware="ruler")
    assert coverage.notes == ["published figures of ruler leave settings open, and none was fitted"]
    assert published_coverage.published_ranges("abacus") == {}


def test_arguments_are_those_of_the_function():
    with pytest.raises(ConfigError, match="estimate: 'decod', there are decode, prefill, dispatch"):
        estimate("decod")
    with pytest.raises(ConfigError, match="gemm: no argument batch, it takes hardware, groups, m, n, k"):
        estimate("gemm", batch=3)
    with pytest.raises(ConfigError, match="gemm: n is not given"):
        estimate("gemm", m=1, k=1)


def test_only_the_coverage_is_added():
    for name, arguments in (("decode", {}), ("gemm", GEMM), ("switches", {"npus": 200})):
        plain = ESTIMATES[name](**arguments)
        told = estimate(name, **arguments)
        assert told.keys() == plain.keys() | {"coverage"}
        assert all(told[key] == plain[key] for key in plain)
