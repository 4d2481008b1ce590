"""The form of published rows, and the rows that are shipped."""

import math
from collections import Counter

import pytest
import yaml

from serving.errors import ConfigError
from serving.estimation.published import load_published, published_of

ROW = {
    "group": "gemm",
    "row": "small",
    "quantity": "time",
    "unit": "us",
    "published": 3,
    "role": "input",
    "source": "table 0",
    "ours": {"estimate": "gemm", "key": "time_us", "with": {"m": 1, "scope": "intra", "share": 0.5}},
}
# What the estimates take and give.
ARGUMENTS = {
    "decode": {"batch_per_npu", "kv_len", "ep", "mtp", "acceptance", "microbatch", "balance", "attention_aic"},
    "prefill": {"prompt_len", "tokens_per_npu", "ep", "microbatch", "balance", "reuse", "pool_plane"},
    "dispatch": {"ep", "tokens", "near"},
    "combine": {"ep", "tokens", "near"},
    "gemm": {"groups", "m", "n", "k"},
    "attention": {"requests_per_die", "kv_len", "query_tokens", "num_heads"},
    "transfer": {"plane", "source", "target", "op", "num_bytes", "scope"},
    "load_model": {"model_bytes", "instances", "models", "cache"},
    "switches": {"npus"},
}
THROUGHPUT = {"tokens_per_s_per_npu", "tokens_per_s_per_tflops", "layer_us"}
KEYS = {
    "decode": THROUGHPUT | {"tpot_ms", "iteration_ms", "attention_stream_us", "moe_stream_us"},
    "prefill": THROUGHPUT | {"ttft_ms"},
    "dispatch": {"latency_us", "bandwidth_gb_per_s"},
    "combine": {"latency_us", "bandwidth_gb_per_s"},
    "gemm": {"time_us", "tops", "utilization", "bandwidth_gb_per_s"},
    "attention": {"time_us", "tflops", "utilization", "bandwidth_gb_per_s", "memory_utilization"},
    "transfer": {"time_us", "bandwidth_gb_per_s"},
    "load_model": {"cold_start_s", "warm_start_s", "dram_copies", "hit_rate", "switch_s"},
    "switches": {"nodes", "logical_switches", "utilization"},
}


@pytest.fixture
def write(tmp_path):
    """A function: a file with ROW and another that has `changes`."""

    def make(**changes):
        path = tmp_path / "rows.yaml"
        other = {key: value for key, value in {**ROW, "row": "large", **changes}.items() if value is not None}
        path.write_text(yaml.safe_dump({"hardware": "h", "rows": [ROW, other]}))
        return str(path)

    return make


@pytest.fixture(scope="module")
def shipped():
    return load_published(published_of("cloudmatrix384"))


def test_a_file_is_read_with_its_defaults(write):
    rows = load_published(write(note="a note", ours={**ROW["ours"], "over": {"m": 2}, "factor": 100})).rows
    assert rows[0].label == "gemm / small / time"
    assert (rows[0].published, rows[0].hardware, rows[0].note) == (3.0, None, None)
    assert (rows[0].ours.factor, rows[0].ours.over, rows[0].ours.minus) == (1.0, None, None)
    assert rows[0].ours.arguments == {"m": 1, "scope": "intra", "share": 0.5}
    assert (rows[1].note, rows[1].ours.factor, rows[1].ours.over) == ("a note", 100.0, {"m": 2})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"sourc": "x"}, "row 2 (gemm / large / time): sourc: unknown key"),
        ({"source": None}, "row 2 (gemm / large / time): source: missing"),
        ({"source": ""}, "row 2 (gemm / large / time): source: string should have at least 1 character, got ''"),
        ({"role": "test"}, "row 2 (gemm / large / time): role: "),
        (
            {"published": "about 5"},
            "row 2 (gemm / large / time): published: input should be a valid number, got 'about",
        ),
        ({"published": math.inf}, "row 2 (gemm / large / time): published: input should be a finite number, got inf"),
        ({"group": "two words"}, "row 2 (two words / large / time): group: "),
        ({"ours": {"estimate": "gemm", "key": "k"}}, "row 2 (gemm / large / time): ours.with: missing"),
        ({"ours": {**ROW["ours"], "with": {"m": [1]}}}, "row 2 (gemm / large / time): ours.with.m: "),
        ({"row": "small"}, "gemm / small / time: given twice"),
    ],
)
def test_a_mistake_names_file_row_and_field(write, changes, told):
    path = write(**changes)
    with pytest.raises(ConfigError) as error:
        load_published(path)
    assert str(error.value).startswith(f"{path}: {told}")


def test_a_file_that_is_not_there_and_a_device_without_rows():
    with pytest.raises(ConfigError, match=r"nope\.yaml"):
        load_published("nope.yaml")
    with pytest.raises(ConfigError, match=r"--hardware: no published rows about 'abacus', only about .*cloudmatrix384"):
        published_of("abacus")


def test_rows_for_measured_tables_are_comparisons_and_no_device():
    rows = load_published("published/measured_tables.yaml").rows
    assert [row.published for row in rows] == [57674, 54543, 50302, 59337, 62713, 22282, 17373, 18598]
    assert {row.role for row in rows} == {"comparison"}
    with pytest.raises(ConfigError, match=r"no published rows about 'measured_tables', only about cloudmatrix384;"):
        published_of("measured_tables")


def test_one_group_can_be_picked(shipped):
    assert {row.group for row in shipped.of_group("gemm").rows} == {"gemm"}
    with pytest.raises(ConfigError, match=r"--group: 'gem', there are ub, .*gemm"):
        shipped.of_group("gem")


def test_at_least_two_fifths_of_the_rows_that_are_held_to_bars_are_unseen(shipped):
    count = Counter(row.role for row in shipped.rows)
    assert count["validation"] >= 0.4 * (count["validation"] + count["calibration"])
    groups = {row.group for row in shipped.of_role("validation")}
    assert len(groups) >= 5


def test_rows_held_to_bars_are_about_the_machine_and_comparisons_about_others(shipped):
    for row in shipped.rows:
        roles = ("comparison", "input") if row.hardware else ("calibration", "validation", "input")
        assert row.hardware in (None, "h800", "h100"), row.label
        assert row.role in roles, row.label


def test_every_row_asks_for_what_an_estimate_takes_and_gives(shipped):
    for row in shipped.rows:
        name = row.ours.estimate
        assert row.ours.key in KEYS[name], row.label
        assert set(row.ours.arguments) <= ARGUMENTS[name], row.label
        for changed in (row.ours.minus, row.ours.over):
            assert changed is None or set(changed) <= set(row.ours.arguments), row.label
            assert changed != {}, row.label


def test_no_row_says_the_same_as_another(shipped):
    said = Counter((row.label, row.published, row.ours.model_dump_json(), row.hardware) for row in shipped.rows)
    assert max(said.values()) == 1


def test_twins_have_one_role(shipped):
    """Rows that take one value from one estimate, as throughput does from TPOT, are one figure in several units."""
    units_of_one = [
        {"tpot_ms", "tokens_per_s_per_npu", "tokens_per_s_per_tflops"},
        {"latency_us", "bandwidth_gb_per_s"},
        {"utilization", "bandwidth_gb_per_s"},
    ]
    roles = {}
    for row in shipped.rows:
        if row.ours.estimate in ("decode", "prefill", "dispatch", "combine", "gemm") and not row.ours.minus:
            for index, keys in enumerate(units_of_one):
                if row.ours.key in keys and row.ours.over is None:
                    call = (index, row.hardware, row.ours.estimate, tuple(row.ours.arguments.items()))
                    roles.setdefault(call, set()).add(row.role)
    assert sum(len(found) for found in roles.values()) == len(roles) > 20


def test_throughput_is_batch_over_tpot_within_rounding(shipped):
    """True of every row of CloudMatrix-Infer; the H800 and H100 rows mix settings (tables 4 and 5)."""
    by_call = {}
    for row in shipped.rows:
        if row.ours.estimate == "decode" and row.hardware is None and not row.ours.minus:
            by_call.setdefault((row.group, tuple(row.ours.arguments.items())), {})[row.ours.key] = row
    checked = 0
    for found in by_call.values():
        if {"tpot_ms", "tokens_per_s_per_npu"} <= set(found):
            tpot, throughput = found["tpot_ms"], found["tokens_per_s_per_npu"]
            batch = tpot.ours.arguments["batch_per_npu"]
            low, high = (1000 * batch / (tpot.published + half) for half in (0.05, -0.05))
            assert low - 0.5 <= throughput.published <= high + 0.5
            checked += 1
    assert checked == 4


def test_throughput_per_tflops_is_throughput_over_the_peak_within_rounding(shipped):
    """1,504 INT8 TOPS per NPU of two dies, 1,979 dense FP8 TFLOPS of an H800 or H100: tables 3 and 4."""
    by_row = {}
    for row in shipped.rows:
        by_row.setdefault((row.group, row.row), {})[row.ours.key] = row
    pairs = [found for found in by_row.values() if "tokens_per_s_per_tflops" in found]
    assert len(pairs) == 10
    for found in pairs:
        efficiency, throughput = found["tokens_per_s_per_tflops"], found["tokens_per_s_per_npu"]
        peak = 1504 if efficiency.hardware is None else 1979
        assert throughput.published / peak == pytest.approx(efficiency.published, rel=0.006), efficiency.label


def test_bandwidths_of_the_gemms_are_bytes_over_the_time_of_their_utilization(shipped):
    """Table 10: INT8 inputs, two bytes out, each matrix touched once; 752 TOPS of a die."""
    by_row = {}
    for row in shipped.of_group("gemm").rows:
        by_row.setdefault(row.row, {})[row.ours.key] = row
    assert len(by_row) == 4
    for found in by_row.values():
        groups, m, n, k = (found["utilization"].ours.arguments[name] for name in ("groups", "m", "n", "k"))
        seconds = 2 * groups * m * n * k / (found["utilization"].published / 100 * 752e12)
        moved = groups * (m * k + n * k + 2 * m * n)
        assert moved / seconds / 1e9 == pytest.approx(found["bandwidth_gb_per_s"].published, abs=0.6)
