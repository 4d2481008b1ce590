"""Max-min fair rates against their definition and a textbook oracle, and the fluid simulation against sums."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.flows import Flows, fair_rates, finish_times, joined


def network(
    capacities: list[float],
    routes: list[tuple[int, ...]],
    *,
    alone: list[float] | None = None,
    num_bytes: list[float] | None = None,
    start_s: list[float] | None = None,
    latency_s: float = 0.0,
) -> Flows:
    """Flows over links given as tuples of link numbers."""
    width = max((len(route) for route in routes), default=0)
    padded = [[*route, *[len(capacities)] * (width - len(route))] for route in routes]
    return Flows(
        link_bytes_per_s_L=np.array(capacities, dtype=float),
        links_FH=np.array(padded, dtype=np.int64).reshape(len(routes), width),
        alone_bytes_per_s_F=np.array(alone if alone is not None else [math.inf] * len(routes), dtype=float),
        latency_s_F=np.full(len(routes), latency_s),
        num_bytes_F=np.array(num_bytes if num_bytes is not None else [1.0] * len(routes), dtype=float),
        start_s_F=np.array(start_s if start_s is not None else [0.0] * len(routes), dtype=float),
    )


@pytest.mark.parametrize(
    ("capacities", "routes", "alone", "rates"),
    [
        ([10], [(0,)], [4], [4]),  # alone
        ([10], [(0,), (0,)], [99, 99], [5, 5]),
        ([10], [(0,), (0,)], [2, 99], [2, 8]),  # what one cannot use the other gets
        ([10, 10], [(0,), (1,)], [99, 99], [10, 10]),  # disjoint
        ([12], [(0,)] * 4, [99] * 4, [3] * 4),  # incast
        ([1, 1], [(0, 1), (0,), (1,)], [99] * 3, [0.5] * 3),  # a long flow meets a short one on each link
        ([1, 2], [(0, 1), (0,), (1,)], [99] * 3, [0.5, 0.5, 1.5]),
        ([6, 10, 3], [(0, 1), (0,), (1,), (1, 2), (2,)], [99] * 5, [3, 3, 5.5, 1.5, 1.5]),
        ([5], [(0,), ()], [99, 7], [5, 7]),  # a flow without links has what it reaches alone
    ],
)
def test_rates_worked_by_hand(
    capacities: list[float], routes: list[tuple[int, ...]], alone: list[float], rates: list[float]
) -> None:
    assert fair_rates(network(capacities, routes, alone=alone)) == pytest.approx(rates, rel=1e-12)


def test_two_flows_on_a_port_worked_by_hand() -> None:
    """30 and 10 bytes at 5 each until 2 s, then 20 bytes at 10; a third one comes at 3 s and takes half."""
    two = network([10], [(0,), (0,)], num_bytes=[30, 10])
    assert finish_times(two) == pytest.approx([4, 2])
    three = network([10], [(0,)] * 3, num_bytes=[30, 10, 15], start_s=[0, 0, 3], latency_s=0.5)
    # at 3 s the first one has 10 left: both at 5 until 5 s, then the third one has 5 left at 10
    assert finish_times(three) == pytest.approx([5.5, 2.5, 6.0])


def test_nothing_to_send_has_arrived_at_its_start_and_disturbs_nobody() -> None:
    flows = network([10], [(0,), (0,), ()], num_bytes=[20, 0, 5], start_s=[1, 1.5, 2], latency_s=0.25)
    assert finish_times(flows) == pytest.approx([3.25, 1.5, 2])  # the third one has no link and no limit
    assert len(finish_times(network([10], []))) == 0


def test_a_gap_without_flows_is_skipped() -> None:
    assert finish_times(network([10], [(0,), (0,)], num_bytes=[10, 10], start_s=[0, 7])) == pytest.approx([1, 8])


def test_an_end_at_the_instant_of_a_start_is_one_event() -> None:
    flows = network([10], [(0,), (0,)], num_bytes=[10, 10], start_s=[0, 1])
    assert finish_times(flows) == pytest.approx([1, 2])


@st.composite
def networks(draw: st.DrawFn, *, starts: bool = False) -> Flows:
    num_links = draw(st.integers(1, 5))
    capacities = draw(st.lists(st.integers(1, 20), min_size=num_links, max_size=num_links))
    route = st.sets(st.integers(0, num_links - 1), min_size=1, max_size=3).map(lambda links: tuple(sorted(links)))
    routes = draw(st.lists(route, min_size=1, max_size=9))

    def numbers(low: int, high: int) -> list[float]:
        return [float(x) for x in draw(st.lists(st.integers(low, high), min_size=len(routes), max_size=len(routes)))]

    return network(
        [float(capacity) for capacity in capacities],
        routes,
        alone=numbers(1, 20),
        num_bytes=numbers(0, 50),
        start_s=numbers(0, 9) if starts else None,
    )


def routes_of(flows: Flows) -> list[list[int]]:
    return [[int(link) for link in row if link < len(flows.link_bytes_per_s_L)] for row in flows.links_FH]


def textbook_rates(flows: Flows) -> list[float]:
    """One level at a time: raise all rates together until a link is full or a flow at its limit, in exact numbers."""
    routes, limits = routes_of(flows), [Fraction(limit) for limit in flows.alone_bytes_per_s_F]
    free = [Fraction(capacity) for capacity in flows.link_bytes_per_s_L]
    rates, rising = [Fraction(0)] * len(routes), set(range(len(routes)))
    while rising:
        count = [sum(link in routes[flow] for flow in rising) for link in range(len(free))]
        steps = [free[link] / count[link] for link in range(len(free)) if count[link]]
        step = min([*steps, *(limits[flow] - rates[flow] for flow in rising)])
        for flow in rising:
            rates[flow] += step
        free = [free[link] - step * count[link] for link in range(len(free))]
        rising = {f for f in rising if rates[f] < limits[f] and all(free[link] for link in routes[f])}
    return [float(rate) for rate in rates]


@settings(max_examples=200, deadline=None)
@given(flows=networks())
def test_rates_are_those_of_the_textbook(flows: Flows) -> None:
    assert fair_rates(flows) == pytest.approx(textbook_rates(flows), rel=1e-9)


@settings(max_examples=200, deadline=None)
@given(flows=networks())
def test_no_link_gives_more_than_it_has_and_no_rate_can_be_raised_fairly(flows: Flows) -> None:
    """The definition: who is below its own limit crosses a full link on which nobody is faster."""
    rates, routes = fair_rates(flows), routes_of(flows)
    carried = [sum(rates[f] for f in range(len(flows)) if link in routes[f]) for link in range(5)]
    for link, capacity in enumerate(flows.link_bytes_per_s_L):
        assert carried[link] <= capacity * (1 + 1e-9)
    for flow, rate in enumerate(rates):
        assert rate <= flows.alone_bytes_per_s_F[flow] * (1 + 1e-9)
        is_held = rate >= flows.alone_bytes_per_s_F[flow] * (1 - 1e-9) or any(
            carried[link] >= flows.link_bytes_per_s_L[link] * (1 - 1e-9)
            and all(rates[other] <= rate * (1 + 1e-9) for other in range(len(flows)) if link in routes[other])
            for link in routes[flow]
        )
        assert is_held, (flow, rates)


@settings(max_examples=200, deadline=None)
@given(flows=networks())
def test_one_flow_more_cannot_make_the_others_fairer_off(flows: Flows) -> None:
    """Single rates may rise when a flow comes (it can slow a third one that held them up), but the slowest of the rest
    does not, and if it is as it was, then neither does the next slowest, and so on.
    """
    keep = np.arange(len(flows) - 1)
    fewer = network(
        list(flows.link_bytes_per_s_L),
        [tuple(route) for route in routes_of(flows)[:-1]],
        alone=list(flows.alone_bytes_per_s_F[:-1]),
    )
    before, after = np.sort(fair_rates(fewer)), np.sort(fair_rates(flows)[keep])
    changed = np.flatnonzero(np.abs(before - after) > 1e-9 * np.maximum(before, after))
    assert not len(changed) or after[changed[0]] < before[changed[0]]


def test_a_flow_can_speed_up_another_by_slowing_a_third() -> None:
    two = fair_rates(network([4, 10], [(0, 1), (1,)]))
    three = fair_rates(network([4, 10], [(0, 1), (1,), (0,)]))
    assert two == pytest.approx([4, 6])
    assert three == pytest.approx([2, 8, 2])


@settings(max_examples=100, deadline=None)
@given(flows=networks(starts=True), factor=st.sampled_from([2.0, 0.5, 3.0]))
def test_links_twice_as_fast_halve_every_time(flows: Flows, factor: float) -> None:
    faster = Flows(
        link_bytes_per_s_L=flows.link_bytes_per_s_L * factor,
        links_FH=flows.links_FH,
        alone_bytes_per_s_F=flows.alone_bytes_per_s_F * factor,
        latency_s_F=flows.latency_s_F,
        num_bytes_F=flows.num_bytes_F,
        start_s_F=flows.start_s_F / factor,
    )
    assert fair_rates(faster) == pytest.approx(fair_rates(flows) * factor, rel=1e-9)
    assert finish_times(faster) == pytest.approx(finish_times(flows) / factor, rel=1e-7, abs=1e-12)


@settings(max_examples=200, deadline=None)
@given(flows=networks(starts=True))
def test_bytes_are_conserved_in_the_bounds_of_every_end(flows: Flows) -> None:
    """No link has carried its flows' bytes sooner than it can; and at any instant a flow is at its own limit or on a
    full link, so it ends no later than after its bytes at that limit and all bytes of its links.
    """
    finish, routes, capacities = finish_times(flows), routes_of(flows), flows.link_bytes_per_s_L
    start, num_bytes = flows.start_s_F, flows.num_bytes_F
    on_link = [[f for f in range(len(flows)) if link in routes[f]] for link in range(len(capacities))]
    for link, members in enumerate(on_link):
        for begin in {start[f] for f in members}:  # whatever starts then or later, at full speed since then
            late = [f for f in members if start[f] >= begin and num_bytes[f] > 0]
            if late:
                assert finish[late].max() >= begin + num_bytes[late].sum() / capacities[link] * (1 - 1e-6)
    for flow in range(len(flows)):
        assert finish[flow] >= start[flow] + num_bytes[flow] / flows.alone_bytes_per_s_F[flow] * (1 - 1e-6)
        busy_s = sum(num_bytes[on_link[link]].sum() / capacities[link] for link in routes[flow])
        limit_s = num_bytes[flow] / flows.alone_bytes_per_s_F[flow]
        assert finish[flow] <= start[flow] + (limit_s + busy_s) * (1 + 1e-6)


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(st.integers(1, 10**6), min_size=1, max_size=12), capacity=st.integers(1, 1000))
def test_one_link_is_processor_sharing(sizes: list[int], capacity: int) -> None:
    finish = finish_times(network([capacity], [(0,)] * len(sizes), num_bytes=[float(size) for size in sizes]))
    expected = [sum(min(size, other) for other in sizes) / capacity for size in sizes]
    assert finish == pytest.approx(expected, rel=1e-6)


@settings(max_examples=100, deadline=None)
@given(flows=networks(starts=True), data=st.data())
def test_flows_on_other_links_change_nothing(flows: Flows, data: st.DataObject) -> None:
    other = data.draw(networks(starts=True))
    shift = len(flows.link_bytes_per_s_L)
    both = network(
        [*flows.link_bytes_per_s_L, *other.link_bytes_per_s_L],
        [*map(tuple, routes_of(flows)), *(tuple(link + shift for link in route) for route in routes_of(other))],
        alone=[*flows.alone_bytes_per_s_F, *other.alone_bytes_per_s_F],
        num_bytes=[*flows.num_bytes_F, *other.num_bytes_F],
        start_s=[*flows.start_s_F, *other.start_s_F],
    )
    assert finish_times(both)[: len(flows)] == pytest.approx(finish_times(flows), rel=1e-7)
    assert fair_rates(both)[: len(flows)] == pytest.approx(fair_rates(flows), rel=1e-9)


def test_joined_flows_share_what_they_share() -> None:
    first, second = network([10, 3], [(0,)]), network([10, 3], [(0,), (1,)])
    assert list(fair_rates(joined(first, second))) == [5, 5, 3]
    with pytest.raises(ValueError, match="different networks"):
        joined(first, network([10, 4], [(0,)]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_bytes": [-1.0]}, r"num_bytes_F: -1.0 must be at least 0"),
        ({"num_bytes": [1.0, 2.0]}, r"num_bytes_F: shape \(2,\) of 1 flows"),
        ({"start_s": [-1.0]}, r"start_s_F: -1.0 must be at least 0"),
        ({"alone": [0.0]}, r"alone_bytes_per_s_F: must be above 0"),
        ({"capacities": [0.0]}, r"link_bytes_per_s_L, alone_bytes_per_s_F: must be above 0"),
        ({"routes": [(2,)]}, r"links_FH: must be rows of numbers in \[0, 1\]"),
    ],
)
def test_wrong_flows_are_refused(change: dict[str, list[float]], message: str) -> None:
    arguments = {"capacities": [1.0], "routes": [(0,)], **change}
    with pytest.raises(ValueError, match=message):
        network(**arguments)  # type: ignore[arg-type]
