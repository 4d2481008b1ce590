"""The shipped machine against the shipped published rows: the bars, and the size of the fit."""

import pytest

from serving.config_file import load_part
from serving.estimation.calibration import MAX_CONSTANTS
from serving.estimation.estimates import ESTIMATES, decode, prefill
from serving.estimation.evaluation import evaluate_rows, summarize
from serving.estimation.fitted_section import read_fitted
from serving.estimation.published import load_published, published_of


@pytest.fixture(scope="module")
def rows():
    told = load_published(published_of("cloudmatrix384"))
    return evaluate_rows(told.rows, ESTIMATES, hardware=told.hardware)


def test_the_bars_hold(rows):
    """Calibration: median 2 %, worst 6 %. Validation, which the fit never sees: median 4 %, worst 10 %."""
    bars = summarize(rows).bars
    assert {(bar.role, bar.statistic) for bar in bars} == {
        (role, statistic) for role in ("calibration", "validation") for statistic in ("median", "worst")
    }
    assert [bar for bar in bars if not bar.passed] == []


def test_what_enters_the_description_comes_out_again(rows):
    """Transfers, switches, operator tables: within the rounding of what was printed, and a launch."""
    assert max(abs(row.error) for row in rows if row.row.role == "input" and not row.row.hardware) < 0.02


def test_few_constants_are_fitted_and_each_within_its_range():
    fitted = read_fitted(load_part("hardware/cloudmatrix384.yaml"))
    assert len(fitted) <= MAX_CONSTANTS
    for name, bounds in fitted.items():
        margin = 0.01 * (bounds.high - bounds.low)
        assert bounds.low + margin < bounds.start < bounds.high - margin, name


def test_published_streams_are_nearly_even():
    """arXiv 2506.12708v2, section 4.2.3: both streams take about 600 us with 16 cube cores for attention."""
    tuned = decode()
    assert tuned["attention_aic"] in (15, 16)
    assert tuned["attention_stream_us"] == pytest.approx(tuned["moe_stream_us"], rel=0.1)


def test_modes_of_balance_are_ordered():
    for estimate in (decode, prefill):
        seconds = [1 / estimate(balance=mode)["tokens_per_s_per_npu"] for mode in ("balanced", "eplb", "none")]
        assert seconds == sorted(seconds)
        assert len(set(seconds)) == 3
