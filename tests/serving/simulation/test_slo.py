"""Which requests are measured, what a stable run is, and the words for a miss."""

import dataclasses

import numpy as np
import pytest

from serving.errors import ConfigError
from serving.simulation.columns import FINISHED, NEVER, RequestColumns, RunColumns
from serving.simulation.slo import Slo, attain

MS = 1_000_000
REASONS = ("length", "queue_full", "prompt_too_long")


def run_of(ttft_ms, *, outputs=11, tpot_ms=20, lost=(), reason="queue_full", place_ms=0.0):
    """A request every 10 ms, with the given TTFTs; the last ends the arrivals."""
    number = len(ttft_ms)
    arrival = np.arange(number, dtype=np.int64) * 10 * MS
    first = arrival + (np.asarray(ttft_ms) * MS).astype(np.int64)
    outcome, reasons = np.full(number, FINISHED, np.int16), np.zeros(number, np.int16)
    outcome[list(lost)], reasons[list(lost)] = 1, REASONS.index(reason)
    first[list(lost)] = NEVER
    zeros = np.zeros(number, np.int32)
    requests = RequestColumns(
        request_ids=[f"r{i}" for i in range(number)],
        outcome=outcome,
        reason=reasons,
        reasons=REASONS,
        arrival_ns=arrival,
        scheduled_ns=arrival + int(place_ms * MS),
        prefill_start_ns=arrival,
        first_token_ns=first,
        decode_start_ns=first,
        last_token_ns=first + (outputs - 1) * tpot_ms * MS,
        num_prompt_tokens=zeros + 1,
        max_tokens=zeros + outputs,
        num_output_tokens=zeros + outputs,
        num_cached_tokens=zeros,
        num_pool_tokens=zeros,
        num_preemptions=zeros,
        prefill_instance=np.zeros(number, np.int16),
        decode_instance=np.ones(number, np.int16),
        decode_rank=np.zeros(number, np.int16),
    )
    return RunColumns(requests=requests, instances=(), planes={}, pool=None)


SLO = Slo(ttft_ms=100.0, tpot_ms=25.0, percentile=100.0)


def test_only_the_middle_half_is_measured():
    ttft = [1000.0] * 25 + [50.0] * 50 + [1000.0] * 26
    attained = attain(run_of(ttft), SLO)
    assert (attained.ttft_ms, attained.tpot_ms, attained.num_measured, attained.num_lost) == (50.0, 20.0, 50, 0)


def test_percentiles_interpolate():
    ttft = [0.0] * 25 + [float(i) for i in range(50)] + [0.0] * 26
    assert attain(run_of(ttft), dataclasses.replace(SLO, percentile=99.0)).ttft_ms == pytest.approx(48.51)


def test_a_request_of_one_token_has_no_tpot():
    attained = attain(run_of([50.0] * 101, outputs=1), SLO)
    assert (attained.tpot_ms, attained.holds) == (0.0, True)


def test_a_queue_that_grows_with_the_arrivals_is_not_stable():
    """Every request waits 30 % longer than the one before came after it: 30 of 100 arrivals are behind."""
    attained = attain(run_of([3.0 * i for i in range(101)]), Slo(ttft_ms=1e6, tpot_ms=25.0))
    assert not attained.is_stable
    assert not attained.holds
    # Waiting requests are 0.3 / 1.3 of those that came; the middles of the two quarters are 50 arrivals apart.
    assert attained.queue_growth == pytest.approx(50 * 0.3 / 1.3, rel=0.05)
    assert attained.reasons()[0] == f"queue grows by {attained.queue_growth:,.0f} requests in half the run"


def test_a_long_but_steady_queue_is_stable():
    attained = attain(run_of([90.0] * 101), SLO)
    assert attained.holds
    assert attained.queue_growth == pytest.approx(0.0, abs=0.5)


@pytest.mark.parametrize(("reason", "num_lost"), [("queue_full", 2), ("prompt_too_long", 0)])
def test_lost_requests_are_a_miss_unless_nobody_could_serve_them(reason, num_lost):
    attained = attain(run_of([50.0] * 101, lost=(40, 60), reason=reason), SLO)
    assert (attained.num_lost, attained.holds) == (num_lost, num_lost == 0)
    assert attained.excess == (3.0 if num_lost else 0.0)


def test_the_wait_for_a_rank_is_decode_unless_prefill_holds_the_places():
    waiting = attain(run_of([150.0] * 101, place_ms=120.0), SLO)
    assert waiting.is_decode_bound
    assert waiting.reasons()[-1] == "decode full, P100 wait for a rank 120 ms"
    slow = attain(run_of([200.0] * 101, place_ms=150.0, tpot_ms=2), SLO)
    assert not slow.is_decode_bound
    assert slow.reasons() == ["P100 TTFT 200 ms > 100", "prefill 0 % busy"]


def test_the_peak_of_a_rank_counts_from_placement_to_the_last_token():
    # 250 ms each, one every 10 ms: 25, and one more that comes at the instant at which another goes.
    assert attain(run_of([50.0] * 101), SLO).peak_rank_seqs == 26


def test_too_few_requests_to_tell_are_refused():
    with pytest.raises(ConfigError, match=r"workload: 7 requests .* too few to plan with; the limit is 8"):
        attain(run_of([1.0] * 7), SLO)
