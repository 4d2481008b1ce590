"""The figures of a run against values worked out by hand or the long way round."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.errors import ConfigError
from serving.records import Goodput, RequestRecord, Timing, parse_goodput
from serving.summary import summarize
from serving.timings import distribution

MS = 1_000_000


def timing(start_ms, ttft_ms, *gaps_ms, **changes):
    return Timing(
        start_ns=start_ms * MS,
        ttft_ns=ttft_ms * MS,
        e2el_ns=(ttft_ms + sum(gaps_ms)) * MS,
        itl_ns=[gap * MS for gap in gaps_ms],
        **changes,
    )


def finished(request_id, wall, *, num_prompt_tokens=100, **changes):
    values = {"num_output_tokens": 1 + len(wall.itl_ns)} | changes
    return RequestRecord(
        request_id=request_id,
        outcome="finished",
        reason="length",
        num_prompt_tokens=num_prompt_tokens,
        wall=wall,
        **values,
    )


# Figures


def test_peaks_count_tokens_per_second_and_requests_in_flight():
    records = [
        finished("a", timing(0, 900, 50, 100)),  # tokens at 0.90, 0.95 and 1.05 s
        finished("b", timing(100, 900)),  # at 1.00 s, ends as c starts
        finished("c", timing(1000, 500, 100)),  # at 1.50 and 1.60 s
    ]
    summary = summarize(records, duration_s=2.0)
    assert summary.max_output_tokens_per_s == 4.0
    assert summary.max_concurrent_requests == 2


def test_a_chunk_of_several_tokens_counts_as_so_many():
    summary = summarize([finished("a", timing(0, 100, 100), num_output_tokens=8)], duration_s=1.0)
    assert summary.max_output_tokens_per_s == 8.0
    assert summary.wall["tpot"].mean_ms == pytest.approx(100 / 7)
    assert summary.wall["itl"].mean_ms == 100.0


def test_tokens_without_gaps_are_spread_evenly_in_time():
    # 21 tokens from 0.5 s to 2.5 s: 1 + 5 before 1 s, 10 in the next second; and 4 tokens at once at 1.25 s.
    records = [
        dataclasses.replace(
            finished("a", timing(0, 500), num_output_tokens=21),
            wall=Timing(start_ns=0, ttft_ns=500 * MS, e2el_ns=2500 * MS),
        ),
        finished("b", timing(1000, 250), num_output_tokens=4),
    ]
    summary = summarize(records, duration_s=3.0)
    assert summary.max_output_tokens_per_s == pytest.approx(14.0)


def test_a_request_of_one_token_has_no_tpot_and_meets_any_objective_for_it():
    records = [finished("a", timing(0, 100))]
    summary = summarize(records, duration_s=1.0, goodput=Goodput(tpot_ms=0.0))
    assert "tpot" not in summary.wall
    assert summary.request_goodput == 1.0


def test_a_tpot_that_the_server_reported_is_not_derived_again():
    simulated = Timing(ttft_ns=5 * MS, e2el_ns=9 * MS, tpot_ns=1.5 * MS)
    summary = summarize([finished("a", timing(0, 100, 10), simulated=simulated)], duration_s=1.0)
    assert summary.simulated["tpot"].mean_ms == 1.5


@given(
    st.lists(st.tuples(st.integers(0, 10**9), st.integers(1, 5)), min_size=1, max_size=30),
    st.sampled_from([0.0, 12.5, 50.0, 90.0, 99.0, 100.0]),
)
def test_weighted_gaps_give_the_figures_of_the_gaps_written_out(pairs, p):
    values, counts = np.array(pairs).T
    itl = distribution(values / 1e6, counts, (p,))
    written_out = np.repeat(values, counts) / 1e6
    assert distribution(written_out, None, (p,)).percentiles[p] == pytest.approx(itl.percentiles[p])
    assert itl.count == len(written_out)
    assert itl.mean_ms == pytest.approx(written_out.mean())
    assert itl.std_ms == pytest.approx(written_out.std(), abs=1e-6)
    assert itl.median_ms == pytest.approx(np.median(written_out))
    assert itl.percentiles[p] == pytest.approx(np.percentile(written_out, p))


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 50)), min_size=1, max_size=20))
def test_peak_concurrency_is_the_most_intervals_over_any_instant(intervals):
    records = [finished(str(i), timing(start, length)) for i, (start, length) in enumerate(intervals)]
    most = max(sum(start <= t < start + length for start, length in intervals) for t in range(101))
    assert summarize(records, duration_s=1.0).max_concurrent_requests == most


def test_millions_of_gaps_are_summarized_without_a_loop_over_tokens():
    gaps = np.full(500, 20 * MS)
    wall = Timing(start_ns=0, ttft_ns=MS, e2el_ns=MS + int(gaps.sum()), itl_ns=gaps)
    record = RequestRecord(
        request_id="r",
        outcome="finished",
        reason="length",
        num_prompt_tokens=10,
        num_output_tokens=501,
        wall=wall,
    )
    summary = summarize([record] * 10_000, duration_s=10.0)
    assert summary.total_output_tokens == 5_010_000
    assert summary.wall["itl"].count == 5_000_000
    assert summary.max_output_tokens_per_s == 500_000  # the first token at 1 ms, 49 more by 981 ms


# Objectives


def test_goodput_objectives_are_read_from_one_string_or_several():
    expected = Goodput(ttft_ms=200.0, tpot_ms=50.0)
    assert parse_goodput(["ttft:200", "tpot:50"]) == expected
    assert parse_goodput(["ttft:200 tpot:50"]) == expected
    assert parse_goodput(["ttft:200,tpot:50"]) == expected
    assert parse_goodput([]) is None


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("itl:3", "'itl:3' is not NAME:MILLISECONDS"),
        ("ttft", "'ttft' is not NAME:MILLISECONDS"),
        ("ttft:fast", "ttft: 'fast' is not a number of milliseconds"),
        ("ttft:-1", "ttft: '-1' is not a number of milliseconds, at least 0"),
        ("ttft:nan", "ttft: 'nan' is not a number of milliseconds"),
        ("ttft:1 ttft:2", "goodput: ttft: given twice"),
    ],
)
def test_bad_objectives_are_named(pair, message):
    with pytest.raises(ConfigError) as caught:
        parse_goodput([pair])
    assert message in str(caught.value)
