"""Answers are JSON-ready, in the stated units, and published rows stand beside ours as the documentation says."""

import json
from pathlib import Path

import pytest

from devices.measured_tables import MeasuredTables, OutOfGrid
from serving.errors import ConfigError
from serving.estimation.estimates import prefill
from serving.estimation.measured_estimates import (
    measured_combine,
    measured_decode,
    measured_dispatch,
    measured_gemm,
    measured_prefill,
)
from serving.estimation.measured_rows import measured_rows
from serving.estimation.what_if import estimate

ROOT = Path(__file__).parents[3]
DATA = ROOT.parent / "shared" / "data" / "aiconfigurator"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="the folder of measured tables is not beside the project")

DECODE = {"batch_per_npu": 128, "kv_len": 4096, "ep": 64, "acceptance": 0.7, "microbatch": "on", "balance": "eplb"}


@pytest.fixture(scope="module")
def h100():
    return MeasuredTables.from_directory(DATA, gpu="h100")


@pytest.mark.parametrize(("mtp", "tokens_per_step"), [(0, 1.0), (1, 1.7)])
def test_decode_throughput_is_batch_over_tpot(h100, mtp, tokens_per_step):
    answer = json.loads(json.dumps(measured_decode(h100, **DECODE, mtp=mtp)))
    assert answer["tokens_per_s_per_npu"] == pytest.approx(128 / answer["tpot_ms"] * 1e3)
    assert answer["tpot_ms"] * tokens_per_step == pytest.approx(answer["iteration_ms"])
    assert sum(answer["breakdown"].values()) == pytest.approx(answer["iteration_ms"])
    assert answer["layer_us"] * 58 < answer["iteration_ms"] * 1e3
    assert answer["coverage"]["inside"] is True


def test_prefill_throughput_is_tokens_over_the_step(h100):
    answer = measured_prefill(h100, prompt_len=4096, tokens_per_npu=16384, ep=32, microbatch="on", balance="balanced")
    assert answer["tokens_per_s_per_npu"] == pytest.approx(16384 / answer["ttft_ms"] * 1e3)
    assert sum(answer["breakdown"].values()) == pytest.approx(answer["ttft_ms"])


def test_gemm_of_a_measured_point(h100):
    """16,384 x 7,168 by 7,168 x 4,096 was measured at 0.80837 ms."""
    answer = measured_gemm(h100, groups=1, m=16384, n=4096, k=7168)
    num_bytes = 16384 * 7168 + 7168 * 4096 + 2 * 16384 * 4096
    assert answer["time_us"] == pytest.approx(808.37, rel=1e-5)
    assert answer["tops"] == pytest.approx(1190.1, rel=1e-4)
    assert answer["utilization"] == pytest.approx(0.6014, rel=1e-3)
    assert answer["bandwidth_gb_per_s"] == pytest.approx(num_bytes / 808.37e3, rel=1e-5)
    assert measured_gemm(h100, groups=4, m=16384, n=4096, k=7168)["time_us"] == pytest.approx(4 * answer["time_us"])


def test_dispatch_and_combine_of_a_measured_point(h100):
    """8 nodes, 128 tokens; the table states 45.04 and 47.7 GB/s with 10 of 1,024 copies masked."""
    dispatch, combine = (f(h100, ep=64, tokens=128) for f in (measured_dispatch, measured_combine))
    assert dispatch["latency_us"] == pytest.approx(166.77)
    assert combine["latency_us"] == pytest.approx(304.73)
    assert dispatch["bandwidth_gb_per_s"] == pytest.approx(45.04, rel=0.015)
    assert combine["bandwidth_gb_per_s"] == pytest.approx(47.7, rel=0.015)


def test_wrong_questions_are_refused(h100):
    with pytest.raises(ValueError, match=r"acceptance: 1\.1 must be from 0 to 1"):
        measured_decode(h100, **{**DECODE, "acceptance": 1.1}, mtp=1)
    with pytest.raises(ValueError, match="groups: 0 must be at least 1"):
        measured_gemm(h100, groups=0, m=1, n=512, k=512)
    with pytest.raises(OutOfGrid, match="dispatch_low_latency: nodes 40 is outside the measured 1 to 8"):
        measured_dispatch(h100, ep=320, tokens=128)


def test_the_erratic_eight_nodes_of_normal_deepep_are_said(h100):
    settings = {"prompt_len": 1024, "tokens_per_npu": 8192, "microbatch": "on", "balance": "balanced"}
    assert not any("8 nodes" in note for note in measured_prefill(h100, ep=32, **settings)["coverage"]["notes"])
    assert any("8 nodes" in note for note in measured_prefill(h100, ep=64, **settings)["coverage"]["notes"])


def test_published_rows_are_off_by_what_the_documentation_says(h100):
    documented = {}
    for line in (ROOT / "docs" / "timing_tables.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 5 and cells[-1][0] in "+-" and cells[-1].endswith(" %"):
            documented[cells[0]] = tuple(cells[2:])
    rows = measured_rows(h100)
    h200 = measured_rows(MeasuredTables.from_directory(DATA, gpu="h200"))
    assert documented == {
        row.row.row: (f"{row.ours:,.0f}", f"{other.ours:,.0f}", f"{row.error:+.1%}".replace("%", " %"))
        for row, other in zip(rows, h200, strict=True)
    }
    assert max(abs(row.error) for row in rows) < 0.25


def test_prefill_is_held_to_the_memory_of_a_gpu(h100):
    """8 GPUs of 80 GB each have 84 GB of weights and more; analytic and measured answers agree on that."""
    settings = {"prompt_len": 4096, "tokens_per_npu": 16384, "microbatch": "on", "balance": "balanced"}
    with pytest.raises(ConfigError, match=r"does not fit in HBM: .* a die of h100 has"):
        prefill(hardware="h100", ep=8, **settings)
    with pytest.raises(ConfigError, match=r"does not fit in HBM: .* a die of h100 has"):
        measured_prefill(h100, ep=8, **settings)


@pytest.mark.parametrize(("reuse", "plane"), [(0.0, "none"), (0.0, "vpc"), (0.5, "none")])
def test_a_pool_that_nothing_is_read_from_is_no_question(reuse, plane):
    asked = {"hardware": "h100", "tables": str(DATA)}
    plain = estimate("prefill", **asked)
    told = estimate("prefill", **asked, reuse=reuse, pool_plane=plane)
    notes = ["pool_plane none: nothing is reused, reuse 0.5 has no effect"] if reuse else []
    assert told["coverage"]["notes"] == plain["coverage"]["notes"] + notes
    assert told["ttft_ms"] == plain["ttft_ms"]


def test_reuse_from_a_pool_was_not_measured():
    for reuse, plane, message in (
        (0.5, "ub", "reuse: 0.5 was not"),
        (1.5, "none", "reuse: 1.5 must be"),
        (0.0, "x", "pool_plane: 'x'"),
    ):
        with pytest.raises(ConfigError, match=message):
            estimate("prefill", hardware="h100", tables=str(DATA), reuse=reuse, pool_plane=plane)
