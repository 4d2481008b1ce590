"""Time of a transfer alone: the published figures, and what lies between them."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices.fabric import Fabric
from devices.spec import Op, Pair, PathSpec, PlaneName, SupernodeSpec
from devices.transfer import TransferScope, path_seconds, transfer_time

MIB = 1 << 20
Row = tuple[PlaneName, Pair, Op, TransferScope]

PUBLISHED: list[tuple[Row, int, int]] = [  # GB/s, and ns of 512 bytes
    (("ub", "npu_npu", "read", "inter"), 164, 1900),  # arXiv 2506.12708v2, table 1, this row and the next seven
    (("ub", "npu_npu", "read", "intra"), 167, 1200),
    (("ub", "npu_npu", "write", "inter"), 135, 2100),
    (("ub", "npu_npu", "write", "intra"), 137, 1300),
    (("ub", "npu_host", "read", "inter"), 147, 1700),
    (("ub", "npu_host", "read", "intra"), 151, 1000),
    (("ub", "npu_host", "write", "inter"), 107, 1900),
    (("ub", "npu_host", "write", "intra"), 110, 1100),
    (("ub", "npu_npu", "read", "package"), 270, 200),  # section 3.3.1; latency: arXiv 2607.26444
    (("ub", "npu_npu", "write", "package"), 270, 200),
    (("rdma", "npu_npu", "read", "inter"), 25, 5000),  # section 3.2; latency assumed
    (("vpc", "host_host", "write", "inter"), 50, 30_000),  # section 3.2; latency assumed
]


def time_of(supernode: SupernodeSpec, row: Row, num_bytes: int) -> tuple[float, float]:
    plane, pair, op, scope = row
    time = transfer_time(supernode, plane=plane, pair=pair, op=op, scope=scope, num_bytes=num_bytes)
    return time.seconds, time.bytes_per_s


@pytest.mark.parametrize(("row", "gb_per_s", "latency_ns"), PUBLISHED, ids=lambda value: str(value))
def test_both_published_figures_come_out(supernode: SupernodeSpec, row: Row, gb_per_s: int, latency_ns: int) -> None:
    assert time_of(supernode, row, 512)[0] == latency_ns * 1e-9
    in_bulk = time_of(supernode, row, 1 << 40)[1]
    assert gb_per_s * 1e9 * 0.9999 < in_bulk < gb_per_s * 1e9
    zero_byte_s, nothing_per_s = time_of(supernode, row, 0)
    assert zero_byte_s == pytest.approx((latency_ns - 512 / gb_per_s) * 1e-9, abs=1e-15)
    assert nothing_per_s == 0


@pytest.mark.parametrize(("row", "gb_per_s", "latency_ns"), PUBLISHED, ids=lambda value: str(value))
def test_64_mib_are_bulk_except_over_vpc(supernode: SupernodeSpec, row: Row, gb_per_s: int, latency_ns: int) -> None:
    """Half a percent below the published bandwidth; over VPC, with its assumed 30 us, only from 285 MiB."""
    num_bytes = 285 * MIB if row[0] == "vpc" else 64 * MIB
    missing = 1 - time_of(supernode, row, num_bytes)[1] / (gb_per_s * 1e9)
    assert 0 < missing <= 0.005


def test_64_mib_over_vpc_are_2_percent_below_its_bandwidth(supernode: SupernodeSpec) -> None:
    assert time_of(supernode, ("vpc", "npu_host", "read", "inter"), 64 * MIB)[1] == pytest.approx(48.91e9, rel=1e-3)


def test_a_worked_size_between_the_figures(supernode: SupernodeSpec) -> None:
    seconds, bytes_per_s = time_of(supernode, ("ub", "npu_host", "read", "inter"), 147_512)
    assert seconds == pytest.approx(1.7e-6 + 1e-6)  # 1 us on the wire beyond the 512 bytes
    assert bytes_per_s == pytest.approx(147_512 / 2.7e-6)


def test_a_megabyte_takes_less_than_what_two_vector_cores_take_for_it(supernode: SupernodeSpec) -> None:
    """arXiv 2508.02520: send and receive below 1 MB in less than 20 us; a path alone may not be slower."""
    assert time_of(supernode, ("ub", "npu_npu", "write", "inter"), 1_000_000)[0] == pytest.approx(9.5e-6, rel=0.01)


ROWS = [row for row, _, _ in PUBLISHED]


@given(row=st.sampled_from(ROWS), sizes=st.tuples(st.integers(0, 10**10), st.integers(0, 10**10)))
def test_neither_time_nor_bandwidth_falls_with_size(supernode: SupernodeSpec, row: Row, sizes: tuple[int, int]) -> None:
    small, large = (time_of(supernode, row, size) for size in sorted(sizes))
    assert small[0] <= large[0]
    assert small[1] <= large[1] * (1 + 1e-12)


@given(
    bytes_per_s=st.floats(1e3, 1e12),
    latency_ns=st.integers(0, 10**6),
    num_bytes=st.integers(512, 10**9),
    faster=st.floats(1, 100),
)
def test_a_faster_path_is_never_slower(bytes_per_s: float, latency_ns: int, num_bytes: int, faster: float) -> None:
    path = PathSpec(bytes_per_s=bytes_per_s, latency_ns=latency_ns)
    seconds = path_seconds(path, num_bytes)
    assert seconds >= num_bytes / bytes_per_s * (1 - 1e-12)
    better = PathSpec(bytes_per_s=bytes_per_s * faster, latency_ns=latency_ns)
    assert path_seconds(better, num_bytes) <= seconds * (1 + 1e-12)
    assert path_seconds(replace(path, latency_ns=latency_ns // 2), num_bytes) <= seconds


@given(num_bytes=st.integers(1, 10**9), op=st.sampled_from(["read", "write"]), dst=st.sampled_from([1, 7, 8, 383]))
def test_the_fabric_takes_the_same_time_up_to_its_two_roundings(
    supernode: SupernodeSpec, num_bytes: int, op: Op, dst: int
) -> None:
    fabric = Fabric(supernode)
    finish_ns = fabric.reserve("ub", fabric.die(0), fabric.die(dst), num_bytes=num_bytes, now_ns=0, op=op)
    row: Row = ("ub", "npu_npu", op, "intra" if dst < 8 else "inter")
    assert finish_ns == pytest.approx(time_of(supernode, row, num_bytes)[0] * 1e9, abs=1.5)


def impossible() -> Iterator[tuple[Row, str]]:
    yield ("rdma", "npu_host", "read", "inter"), "plane rdma of cloudmatrix384 has no path npu_host read inter"
    yield ("rdma", "npu_host", "read", "inter"), "it has npu_npu read inter, npu_npu read intra, npu_npu write inter"
    yield ("ub", "host_host", "write", "intra"), "plane ub of .* has no path host_host write intra; it has npu_npu read"
    yield ("ub", "npu_host", "read", "package"), "no path npu_host read package; it has .*, npu_npu write package"
    yield ("vpc", "npu_npu", "read", "package"), "no path npu_npu read package"


@pytest.mark.parametrize(("row", "message"), list(impossible()))
def test_a_path_that_there_is_not_is_refused_with_those_that_there_are(
    supernode: SupernodeSpec, row: Row, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        time_of(supernode, row, 512)


def test_a_negative_size_is_refused(supernode: SupernodeSpec) -> None:
    with pytest.raises(ValueError, match="num_bytes: -1 must be at least 0"):
        time_of(supernode, ROWS[0], -1)
