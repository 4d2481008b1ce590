"""Transfers alone (table 1 of the paper) and under contention."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.fabric import Endpoint, Fabric
from devices.faults import LinkDown
from devices.spec import Op, PlaneName, SupernodeSpec

GB = 1_000_000_000


@pytest.fixture
def fabric(supernode: SupernodeSpec) -> Fabric:
    return Fabric(supernode)


@pytest.mark.parametrize(
    ("plane", "src", "dst", "op", "gb_per_s", "latency_ns"),
    [
        ("ub", ("die", 0), ("die", 8), "read", 164, 1900),
        ("ub", ("die", 0), ("die", 7), "read", 167, 1200),
        ("ub", ("die", 0), ("die", 8), "write", 135, 2100),
        ("ub", ("die", 0), ("die", 7), "write", 137, 1300),
        ("ub", ("host", 0), ("die", 8), "read", 147, 1700),
        ("ub", ("host", 0), ("die", 7), "read", 151, 1000),
        ("ub", ("die", 8), ("host", 0), "write", 107, 1900),
        ("ub", ("die", 7), ("host", 0), "write", 110, 1100),
        ("rdma", ("die", 0), ("die", 8), "read", 25, 5000),
        ("vpc", ("host", 0), ("die", 8), "read", 50, 30000),
    ],
)
def test_a_transfer_alone(
    fabric: Fabric,
    plane: PlaneName,
    src: tuple[str, int],
    dst: tuple[str, int],
    op: Op,
    gb_per_s: int,
    latency_ns: int,
) -> None:
    def endpoint(kind: str, device: int) -> Endpoint:
        return fabric.die(device) if kind == "die" else fabric.host(device)

    finish_ns = fabric.reserve(plane, endpoint(*src), endpoint(*dst), num_bytes=512, now_ns=1000, op=op)
    assert finish_ns == 1000 + latency_ns
    finish_ns = fabric.reserve(plane, endpoint(*src), endpoint(*dst), num_bytes=3 * GB, now_ns=GB, op=op)
    assert finish_ns == GB + latency_ns + round(3e9 / gb_per_s) - round(512 / gb_per_s)
    assert fabric.stats(plane).num_bytes == 3 * GB + 512


def test_the_dies_of_one_package_have_a_link_of_their_own(fabric: Fabric) -> None:
    assert fabric.reserve("ub", fabric.die(3, 0), fabric.die(3, 1), num_bytes=270_000, now_ns=0, op="write") == 1198


def test_a_prompt_of_4096_tokens_crosses_rdma_in_the_time_that_the_paper_implies(fabric: Fabric) -> None:
    num_bytes = 4096 * 576 * 61 * 2
    finish_ns = fabric.reserve("rdma", fabric.die(0), fabric.die(200), num_bytes=num_bytes, now_ns=0, op="read")
    assert finish_ns / 1e6 == pytest.approx(11.5, abs=0.05)


def test_ports_serve_in_order_and_independently(fabric: Fabric) -> None:
    zero_byte_ns = 2096  # 2,100 ns for 512 bytes, of which 4 on the wire
    a, b, c = fabric.die(0), fabric.die(8), fabric.die(16)

    def write(src: Endpoint, dst: Endpoint, now_ns: int) -> int:
        return fabric.reserve("ub", src, dst, num_bytes=135_000, now_ns=now_ns, op="write")  # 1 us on the wire

    assert write(a, b, 0) == 1000 + zero_byte_ns
    assert write(c, b, 0) == 2000 + zero_byte_ns  # waits for b's port in
    assert write(a, c, 0) == 2000 + zero_byte_ns  # waits for a's port out
    assert write(b, a, 0) == 1000 + zero_byte_ns  # the other direction is free
    assert write(c, a, 500) == 2000 + zero_byte_ns  # c's port out is free at 1000, a's in at 1000
    assert write(a, b, 10_000) == 11_000 + zero_byte_ns  # all idle again


def test_planes_do_not_disturb_each_other(fabric: Fabric) -> None:
    a, b = fabric.die(0), fabric.die(8)
    alone = fabric.reserve("rdma", a, b, num_bytes=GB, now_ns=0, op="read")
    fabric.reserve("ub", a, b, num_bytes=100 * GB, now_ns=0, op="read")
    fresh = fabric.reserve("rdma", fabric.die(1), fabric.die(9), num_bytes=GB, now_ns=0, op="read")
    assert alone == fresh


def test_a_node_shares_its_vpc_port(fabric: Fabric) -> None:
    first = fabric.reserve("vpc", fabric.host(0), fabric.die(8), num_bytes=50_000, now_ns=0, op="read")
    second = fabric.reserve("vpc", fabric.host(1), fabric.die(16), num_bytes=50_000, now_ns=0, op="read")
    assert (first, second) == (31_000 - 10, 32_000 - 10)  # 512 of the bytes are in the latency


def test_nothing_and_self_are_free(fabric: Fabric) -> None:
    a, b = fabric.die(0), fabric.die(8)
    assert fabric.reserve("ub", a, a, num_bytes=GB, now_ns=7, op="read") == 7
    assert fabric.reserve("ub", a, b, num_bytes=0, now_ns=7, op="read") == 7
    assert fabric.stats("ub").num_transfers == 0


def test_errors_change_nothing(fabric: Fabric) -> None:
    a, host = fabric.die(0), fabric.host(9)
    with pytest.raises(LinkDown, match="plane rdma: host 9 cannot reach npu 0 die 0: the plane has no read path"):
        fabric.reserve("rdma", host, a, num_bytes=1, now_ns=0, op="read")
    with pytest.raises(ValueError, match="negative"):
        fabric.reserve("ub", host, a, num_bytes=-1, now_ns=0, op="read")
    fabric.fail_link("ub", host)
    with pytest.raises(LinkDown, match="link down"):
        fabric.reserve("ub", host, a, num_bytes=1, now_ns=0, op="read")
    assert fabric.stats("ub").num_transfers == 0
    fabric.restore_link("ub", host)
    assert fabric.reserve("ub", host, a, num_bytes=147_000, now_ns=0, op="read") == 2700 - 3
    for call in (lambda: fabric.die(384), lambda: fabric.die(0, 2), lambda: fabric.host(192), lambda: fabric.host(-1)):
        with pytest.raises(ValueError, match=r"cloudmatrix384 has|an NPU has"):
            call()


def test_a_slow_link_is_slower_and_can_be_repaired(fabric: Fabric) -> None:
    a, b = fabric.die(0), fabric.die(8)
    fabric.slow_link("rdma", b, slowdown=4)
    assert fabric.reserve("rdma", a, b, num_bytes=25_000, now_ns=0, op="read") == 4000 + 4980
    assert fabric.reserve("rdma", b, a, num_bytes=25_000, now_ns=0, op="read") == 4000 + 4980
    fabric.restore_link("rdma", b)
    assert fabric.reserve("rdma", a, b, num_bytes=25_000, now_ns=4000, op="read") == 5000 + 4980
    with pytest.raises(ValueError, match="slowdown"):
        fabric.slow_link("rdma", b, slowdown=0.5)


Transfer = tuple[int, int, int, Op]  # source, target, bytes
transfers = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 10**7), st.sampled_from(["read", "write"])),
    max_size=25,
)


def reserve_all(supernode: SupernodeSpec, items: list[Transfer], now_ns: int = 0) -> tuple[Fabric, list[int]]:
    fabric = Fabric(supernode)
    ends = [fabric.die(0), fabric.die(0, 1), fabric.die(5), fabric.die(9), fabric.host(0), fabric.host(30)]
    finish: list[int] = []
    for src, dst, num_bytes, op in items:
        if ends[src].kind == ends[dst].kind == "host":
            continue
        finish.append(fabric.reserve("ub", ends[src], ends[dst], num_bytes=num_bytes, now_ns=now_ns, op=op))
    fabric.check_invariants()
    return fabric, finish


@settings(max_examples=60, deadline=None)
@given(items=transfers, extra=transfers)
def test_more_traffic_is_never_faster_and_bytes_are_conserved(
    supernode: SupernodeSpec, items: list[Transfer], extra: list[Transfer]
) -> None:
    fabric, alone = reserve_all(supernode, items)
    _, crowded = reserve_all(supernode, extra + items)
    behind = crowded[len(crowded) - len(alone) :]
    assert all(late >= early for early, late in zip(alone, behind, strict=True))
    moved = [(s, d, n) for s, d, n, _ in items if s != d and n and not (s >= 4 and d >= 4)]
    assert fabric.stats("ub").num_bytes == sum(n for _, _, n in moved)
    assert fabric.stats("ub").num_transfers == len(moved)


@settings(max_examples=60, deadline=None)
@given(items=transfers, order=st.randoms(use_true_random=False))
def test_the_total_does_not_depend_on_the_order(supernode: SupernodeSpec, items: list[Transfer], order: object) -> None:
    shuffled = list(items)
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    first, again = reserve_all(supernode, items)[0], reserve_all(supernode, shuffled)[0]
    assert first.stats("ub") == again.stats("ub")
    for a, b in ((first._planes["ub"].out_ports, again._planes["ub"].out_ports),
                 (first._planes["ub"].in_ports, again._planes["ub"].in_ports)):  # fmt: skip
        assert {k: p.busy_until_ns for k, p in a.items()} == {k: p.busy_until_ns for k, p in b.items()}


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(1, 10**7), min_size=1, max_size=15), now_ns=st.integers(0, 10**9))
def test_one_pair_is_fifo_and_never_faster_than_its_bandwidth(
    supernode: SupernodeSpec, sizes: list[int], now_ns: int
) -> None:
    fabric = Fabric(supernode)
    finish = [
        fabric.reserve("rdma", fabric.die(0), fabric.die(8), num_bytes=size, now_ns=now_ns, op="read") for size in sizes
    ]
    assert finish == sorted(finish)
    assert finish[-1] - now_ns - 4980 >= math.floor(sum(sizes) / 25) - len(sizes)


@settings(max_examples=150, deadline=None)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=25),
    earlier=transfers,
    num_bytes=st.integers(0, 10**7),
    op=st.sampled_from(["read", "write"]),
    slow=st.none() | st.integers(0, 5),
    down=st.none() | st.integers(0, 5),
)
def test_transfers_reserved_together_are_those_reserved_one_by_one(
    supernode: SupernodeSpec,
    pairs: list[tuple[int, int]],
    earlier: list[Transfer],
    num_bytes: int,
    op: Op,
    slow: int | None,
    down: int | None,
) -> None:
    """The last arrival and all ports; where a link is down or there is no path, the same error after the same part."""

    def run(together: bool) -> tuple[object, object]:
        fabric, _ = reserve_all(supernode, earlier)
        ends = [fabric.die(0), fabric.die(0, 1), fabric.die(5), fabric.die(9), fabric.host(0), fabric.host(30)]
        if slow is not None:
            fabric.slow_link("ub", ends[slow], slowdown=2.5)
        if down is not None:
            fabric.fail_link("ub", ends[down])
        result: object = 70
        try:
            if together:
                sources, targets = [ends[src] for src, _ in pairs], [ends[dst] for _, dst in pairs]
                result = fabric.reserve_all("ub", sources, targets, num_bytes=num_bytes, now_ns=70, op=op)
            else:
                arrivals = [
                    fabric.reserve("ub", ends[src], ends[dst], num_bytes=num_bytes, now_ns=70, op=op)
                    for src, dst in pairs
                ]
                result = max(arrivals, default=70)
        except LinkDown as error:
            result = str(error)
        fabric.check_invariants()
        plane = fabric._planes["ub"]
        ports = [(key, p.busy_ns, p.busy_until_ns) for key, p in [*plane.out_ports.items(), *plane.in_ports.items()]]
        return result, (sorted(port for port in ports if port[1]), fabric.stats("ub"))

    assert run(together=True) == run(together=False)


def test_sources_and_targets_come_in_pairs(fabric: Fabric) -> None:
    with pytest.raises(ValueError, match="shorter"):
        fabric.reserve_all("ub", [fabric.host(0)], [], num_bytes=1, now_ns=0, op="read")


def test_two_fabrics_agree(supernode: SupernodeSpec) -> None:
    items: list[Transfer] = [(i % 6, (i * 7 + 1) % 6, i * 1234 % 99_991, "read") for i in range(200)]
    assert reserve_all(supernode, items)[1] == reserve_all(supernode, items)[1]


def test_state_is_bounded_by_the_endpoints_and_not_by_the_traffic(fabric: Fabric) -> None:
    for i in range(3000):
        fabric.reserve("ub", fabric.die(i % 384), fabric.die((i + 1) % 384), num_bytes=1, now_ns=i, op="read")
    assert len(fabric._planes["ub"].out_ports) == len(fabric._planes["ub"].in_ports) == 384
