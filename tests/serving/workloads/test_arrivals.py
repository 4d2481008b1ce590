"""Arrival processes are the processes that their names say: rate, variation, distribution, independence."""

import math

import numpy as np
import pytest

from serving.errors import ConfigError
from serving.workloads.arrivals import (
    ARRIVAL_KINDS,
    Arrivals,
    Bursts,
    RampUp,
    all_at_once,
    constant,
    gamma,
    generator_for,
    poisson,
    weibull,
)

COUNT = 20_000


def gaps_of(times):
    return np.diff(times, prepend=0.0)


@pytest.mark.parametrize(("burstiness", "rate"), [(1.0, 4.0), (0.25, 4.0), (4.0, 0.5), (0.5, 300.0)])
def test_gamma_arrivals_have_the_rate_and_the_variation_asked_for(burstiness, rate):
    gaps = gaps_of(gamma(generator_for(1, "gamma"), COUNT, rate_per_s=rate, burstiness=burstiness))
    variation = 1 / math.sqrt(burstiness)
    # The mean of n gaps has a relative standard error of variation / sqrt(n): 4 of them, with a fixed seed.
    assert gaps.mean() * rate == pytest.approx(1.0, abs=4 * variation / math.sqrt(COUNT))
    assert gaps.std() / gaps.mean() == pytest.approx(variation, rel=0.05)


@pytest.mark.parametrize(("burstiness", "rate"), [(1.0, 4.0), (0.25, 4.0), (4.0, 0.5)])
def test_weibull_arrivals_have_the_rate_and_the_variation_asked_for(burstiness, rate):
    gaps = gaps_of(weibull(generator_for(1, "weibull"), COUNT, rate_per_s=rate, burstiness=burstiness))
    variation = 1 / math.sqrt(burstiness)
    assert gaps.mean() * rate == pytest.approx(1.0, abs=4 * variation / math.sqrt(COUNT))
    assert gaps.std() / gaps.mean() == pytest.approx(variation, rel=0.06)


def test_weibull_gaps_are_those_of_the_shape_that_has_the_variation():
    """Shape 2 (Rayleigh) has the squared variation 4 / pi - 1 and the median sqrt(ln 2) of its scale."""
    gaps = gaps_of(weibull(generator_for(1, "weibull"), COUNT, rate_per_s=1.0, burstiness=1 / (4 / math.pi - 1)))
    assert np.median(gaps) == pytest.approx(math.sqrt(math.log(2)) / math.gamma(1.5), rel=0.02)


def test_bursts_come_at_the_end_of_every_period():
    bursts = Bursts(factor=5.0, period_s=60.0, duration_s=10.0)
    arrivals = Arrivals(kind="constant", rate_per_s=10.0, bursts=bursts)
    assert arrivals.expected_count(600.0) == pytest.approx(10 * (500 + 5 * 100))
    assert arrivals.expected_count(55.0) == pytest.approx(500 + 5 * 50)
    times = arrivals.times_before_s(generator_for(0, "x"), 600.0)
    assert np.histogram(times % 60, bins=[0, 25, 50, 60])[0].tolist() == pytest.approx([2500, 2500, 5000], abs=12)
    assert arrivals.times_s(generator_for(0, "x"), 3).tolist() == pytest.approx([0.1, 0.2, 0.3])


@pytest.mark.parametrize(
    "arrivals",
    [
        Arrivals(rate_per_s=50.0),
        Arrivals(kind="gamma", rate_per_s=50.0, burstiness=0.1),
        Arrivals(kind="weibull", rate_per_s=50.0, burstiness=0.2),
        Arrivals(rate_per_s=20.0, bursts=Bursts(factor=7.0, period_s=40.0, duration_s=10.0)),
        Arrivals(kind="constant", ramp_up=RampUp(strategy="linear", start_rps=10.0, end_rps=100.0)),
        Arrivals(kind="constant", ramp_up=RampUp(strategy="exponential", start_rps=100.0, end_rps=10.0)),
    ],
)
def test_times_before_an_instant_are_as_many_as_expected(arrivals):
    times = arrivals.times_before_s(generator_for(3, "x"), 400.0)
    variation = 1 / math.sqrt(arrivals.burstiness)
    assert len(times) == pytest.approx(arrivals.expected_count(400.0), rel=4 * variation / math.sqrt(len(times)))
    assert 380 < times[-1] < 400


def test_poisson_arrivals_have_exponential_gaps():
    gaps = np.sort(gaps_of(poisson(generator_for(2, "poisson"), COUNT, rate_per_s=3.0)))
    expected = 1 - np.exp(-3.0 * gaps)
    ranks = np.arange(COUNT)
    distance = max((expected - ranks / COUNT).max(), ((ranks + 1) / COUNT - expected).max())
    assert distance < 1.63 / math.sqrt(COUNT)  # Kolmogorov-Smirnov at the 1 % level


def test_poisson_arrivals_per_second_vary_as_much_as_their_mean():
    times = poisson(generator_for(3, "poisson"), COUNT, rate_per_s=5.0)
    per_second = np.bincount(times.astype(int))[:-1]
    assert per_second.var() / per_second.mean() == pytest.approx(1.0, abs=0.1)


def test_poisson_gaps_do_not_depend_on_the_gap_before():
    gaps = gaps_of(poisson(generator_for(4, "poisson"), COUNT, rate_per_s=5.0))
    assert abs(np.corrcoef(gaps[:-1], gaps[1:])[0, 1]) < 4 / math.sqrt(COUNT)


def test_constant_arrivals_are_evenly_spaced_from_one_gap_on():
    assert constant(4, rate_per_s=2.0).tolist() == [0.5, 1.0, 1.5, 2.0]


def test_an_infinite_rate_sends_everything_at_once():
    assert all_at_once(3).tolist() == [0.0, 0.0, 0.0]
    assert Arrivals.from_request_rate(math.inf).times_s(generator_for(0, "x"), 3).tolist() == [0.0, 0.0, 0.0]


def test_a_linear_ramp_up_moves_the_rate_evenly_over_the_requests():
    ramp = RampUp(strategy="linear", start_rps=1.0, end_rps=5.0)
    assert ramp.rates_per_s(5).tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]
    arrivals = Arrivals(kind="constant", ramp_up=ramp)
    assert gaps_of(arrivals.times_s(generator_for(0, "x"), 5)) == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4, 1 / 5])


def test_an_exponential_ramp_up_multiplies_the_rate():
    ramp = RampUp(strategy="exponential", start_rps=1.0, end_rps=16.0)
    assert ramp.rates_per_s(5) == pytest.approx([1, 2, 4, 8, 16])
    assert ramp.rates_per_s(1).tolist() == [1.0]


def test_a_ramp_up_of_poisson_arrivals_keeps_their_variation():
    ramp = RampUp(strategy="linear", start_rps=1.0, end_rps=9.0)
    times = Arrivals(kind="poisson", ramp_up=ramp).times_s(generator_for(5, "x"), COUNT)
    gaps = gaps_of(times) * ramp.rates_per_s(COUNT)
    assert gaps.mean() == pytest.approx(1.0, abs=0.03)
    assert gaps.std() == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize("kind", ARRIVAL_KINDS)
def test_times_are_repeatable_and_never_decrease(kind):
    arrivals = Arrivals(kind=kind, rate_per_s=7.0, burstiness=0.3)
    times = arrivals.times_s(generator_for(6, "arrivals"), 200)
    assert times.shape == (200,)
    assert (np.diff(times) >= 0).all()
    assert times.tolist() == arrivals.times_s(generator_for(6, "arrivals"), 200).tolist()


def test_streams_of_one_seed_are_independent_of_each_other():
    a, b, c = (generator_for(*key).random(1000) for key in ((7, "a"), (7, "b"), (8, "a")))
    assert a.tolist() == generator_for(7, "a").random(1000).tolist()
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.13
    assert abs(np.corrcoef(a, c)[0, 1]) < 0.13


def test_streams_are_the_same_on_every_machine():
    assert generator_for(0, "arrivals").integers(1000, size=4).tolist() == [773, 863, 981, 467]


def test_request_rates_in_the_spelling_of_vllm_name_a_process():
    assert Arrivals.from_request_rate(2.0) == Arrivals(kind="poisson", rate_per_s=2.0)
    assert Arrivals.from_request_rate(2.0, burstiness=0.5) == Arrivals(kind="gamma", rate_per_s=2.0, burstiness=0.5)
    assert Arrivals.from_request_rate(2.0, burstiness=math.inf) == Arrivals(kind="constant", rate_per_s=2.0)
    assert Arrivals.from_request_rate(math.inf) == Arrivals(kind="inf")
    ramp = RampUp(strategy="linear", start_rps=1.0, end_rps=2.0)
    assert Arrivals.from_request_rate(math.inf, ramp_up=ramp) == Arrivals(kind="poisson", ramp_up=ramp)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Arrivals.from_request_rate(0.0), "request_rate: 0.0 must be above the limit 0"),
        (lambda: Arrivals.from_request_rate(math.nan), "request_rate: nan"),
        (lambda: Arrivals.from_request_rate(1.0, burstiness=-1.0), "burstiness: -1.0 must be above the limit 0"),
        (lambda: Arrivals(kind="uniform"), "arrivals.kind: 'uniform' is not one of"),
        (lambda: Arrivals(rate_per_s=math.inf), "arrivals.rate_per_s: inf must be finite"),
        (lambda: RampUp(strategy="cubic", start_rps=1, end_rps=2), "ramp_up.strategy: 'cubic'"),
        (lambda: RampUp(strategy="linear", start_rps=0, end_rps=2), "ramp_up.start_rps: 0"),
        (
            lambda: Arrivals(kind="inf", ramp_up=RampUp(strategy="linear", start_rps=1, end_rps=2)),
            "cannot have a ramp_up",
        ),
        (lambda: Bursts(factor=2, period_s=5, duration_s=6), "bursts.duration_s: 6 exceeds period_s 5"),
        (lambda: Bursts(factor=0, period_s=5, duration_s=1), "bursts.factor: 0 must be finite and above"),
        (
            lambda: Arrivals(kind="inf", bursts=Bursts(factor=2, period_s=5, duration_s=1)),
            "arrivals.bursts: needs a finite rate and no ramp_up",
        ),
        (lambda: Arrivals(kind="inf").expected_count(3.0), "duration_s: everything arrives at once"),
        (lambda: constant(-1, rate_per_s=1.0), "count: -1 is below the limit 0"),
        (lambda: generator_for(-1, "x"), "seed: -1 is below the limit 0"),
    ],
)
def test_values_out_of_range_are_named(make, message):
    with pytest.raises(ConfigError) as caught:
        make()
    assert message in str(caught.value)
