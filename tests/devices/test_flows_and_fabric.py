"""Both models of contention side by side: where they agree, and how they differ."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.fabric import Fabric
from devices.flows import finish_times
from devices.spec import Op, PlaneName, SupernodeSpec
from devices.topology import Topology


def reserved_s(
    supernode: SupernodeSpec, plane: PlaneName, op: Op, items: list[tuple[int, int, int, float]]
) -> list[float]:
    """Ends in seconds of (source die, target die, bytes, start) reserved in the order of their starts."""
    fabric = Fabric(supernode)
    return [
        fabric.reserve(
            plane,
            fabric.die(src // 2, src % 2),
            fabric.die(dst // 2, dst % 2),
            num_bytes=n,
            now_ns=round(s * 1e9),
            op=op,
        )
        * 1e-9
        for src, dst, n, s in items
    ]


def shared_s(topology: Topology, plane: PlaneName, op: Op, items: list[tuple[int, int, int, float]]) -> list[float]:
    src, dst, num_bytes, start_s = zip(*items, strict=True)
    return list(finish_times(topology.flows(plane, op=op, src=src, dst=dst, num_bytes=num_bytes, start_s=start_s)))


@settings(max_examples=60, deadline=None)
@given(
    plane=st.sampled_from(["ub", "rdma", "vpc"]),
    op=st.sampled_from(["read", "write"]),
    src=st.integers(0, 767),
    dst=st.integers(0, 767),
    num_bytes=st.integers(1, 10**9),
)
def test_a_transfer_alone_takes_the_same_time_in_both(
    supernode: SupernodeSpec, topology: Topology, plane: PlaneName, op: Op, src: int, dst: int, num_bytes: int
) -> None:
    items = [(src, dst, num_bytes, 0.0)]
    assert reserved_s(supernode, plane, op, items) == pytest.approx(shared_s(topology, plane, op, items), abs=1.5e-9)


@settings(max_examples=60, deadline=None)
@given(
    items=st.lists(st.tuples(st.integers(1, 10**6), st.integers(0, 100)), min_size=1, max_size=12),
    outgoing=st.booleans(),
)
def test_the_last_one_on_a_shared_port_ends_at_the_same_time_in_both(
    supernode: SupernodeSpec, topology: Topology, items: list[tuple[int, int]], outgoing: bool
) -> None:
    others = range(16, 16 + 2 * len(items), 2)
    starts = sorted(start_us * 1e-6 for _, start_us in items)
    transfers = [
        (0, other, num_bytes, start) if outgoing else (other, 0, num_bytes, start)
        for other, (num_bytes, _), start in zip(others, items, starts, strict=True)
    ]
    fabric = reserved_s(supernode, "rdma", "read", transfers)
    fair = shared_s(topology, "rdma", "read", transfers)
    assert max(fabric) == pytest.approx(max(fair), abs=2e-9 * len(items))


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 10**6), min_size=1, max_size=12))
def test_on_a_shared_port_the_fabric_ends_none_later_if_the_smallest_was_reserved_first(
    supernode: SupernodeSpec, topology: Topology, sizes: list[int]
) -> None:
    transfers = [(0, 16 + 2 * i, num_bytes, 0.0) for i, num_bytes in enumerate(sorted(sizes))]
    fabric = reserved_s(supernode, "rdma", "read", transfers)
    fair = shared_s(topology, "rdma", "read", transfers)
    assert all(early <= late + 2e-9 * len(sizes) for early, late in zip(fabric, fair, strict=True))


@settings(max_examples=60, deadline=None)
@given(
    items=st.lists(
        st.tuples(st.integers(0, 4), st.integers(5, 9), st.integers(1, 10**6), st.just(0.0)), min_size=1, max_size=12
    )
)
def test_what_begins_at_one_instant_never_ends_sooner_with_fair_shares(
    supernode: SupernodeSpec, topology: Topology, items: list[tuple[int, int, int, float]]
) -> None:
    fabric = reserved_s(supernode, "rdma", "read", items)
    assert max(fabric) <= max(shared_s(topology, "rdma", "read", items)) + 2e-9 * len(items)


def test_fair_shares_leave_a_port_idle_that_the_fabric_keeps_busy(supernode: SupernodeSpec, topology: Topology) -> None:
    """Dies 0 and 2 each send 2 MB to die 10 and 1 MB to two others; each port of the three has 4 MB to move.

    The fabric needs 4 MB at 25 GB/s. Fair shares: a third of a port each until 120 us, when die 10 has got 2 of its 4
    MB; the rest then comes at its full port, until 200 us.
    """
    items = [(0, 10, 2, 0.0), (0, 12, 1, 0.0), (0, 14, 1, 0.0), (2, 10, 2, 0.0), (2, 16, 1, 0.0), (2, 18, 1, 0.0)]
    items = [(src, dst, megabytes * 1_000_000, start) for src, dst, megabytes, start in items]
    zero_byte_s = 5e-6 - 512 / 25e9
    assert max(reserved_s(supernode, "rdma", "read", items)) == pytest.approx(160e-6 + zero_byte_s, abs=2e-9)
    assert max(shared_s(topology, "rdma", "read", items)) == pytest.approx(200e-6 + zero_byte_s)


@pytest.mark.parametrize(("op", "ratio"), [("read", 196 / 164), ("write", 196 / 135)])
def test_a_ub_port_that_many_share_is_slower_in_the_fabric(
    supernode: SupernodeSpec, topology: Topology, op: Op, ratio: float
) -> None:
    items = [(0, other, 10_000_000, 0.0) for other in range(16, 48, 2)]
    fabric, fair = reserved_s(supernode, "ub", op, items), shared_s(topology, "ub", op, items)
    assert max(fabric) / max(fair) == pytest.approx(ratio, rel=0.002)
