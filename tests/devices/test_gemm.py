"""Matrix products: the published table, tiles and waves by hand, monotonicity."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices.gemm import Gemm
from devices.spec import SupernodeSpec

INT8 = 752e12


@pytest.mark.parametrize(
    ("groups", "m", "n", "k", "utilization"),
    [
        (4, 7168, 4096, 4096, 0.794),
        (4, 2048, 7168, 4096, 0.774),
        (4, 7168, 4096, 8192, 0.827),
        (8, 2048, 7168, 4096, 0.779),
    ],
)
def test_utilization_of_table_10(
    supernode: SupernodeSpec, groups: int, m: int, n: int, k: int, utilization: float
) -> None:
    """arXiv 2506.12708v2, table 10."""
    seconds = Gemm(supernode).launched(m, n, k, groups=groups, aic=24)
    assert 2 * groups * m * n * k / seconds / INT8 == pytest.approx(utilization, rel=0.015)


def test_waves_by_hand(supernode: SupernodeSpec) -> None:
    """256 x 304 is 2 x 2 tiles: one wave on 4 cores, two on 3; INT8 and BF16 differ by the tile's inner part alone."""
    fitted = dataclasses.replace(supernode.fitted, gemm_utilization=0.5, gemm_tile_s=1e-6)
    gemm = Gemm(dataclasses.replace(supernode, fitted=fitted))
    k = 100_000
    inner = 2 * 128 * 152 * k / (INT8 / 24 * 0.5)
    assert gemm.product(256, 304, k).seconds(4) == pytest.approx(inner + 1e-6)
    assert gemm.product(256, 304, k).seconds(3) == pytest.approx(2 * (inner + 1e-6))
    assert gemm.product(256, 304, k, bf16=True).seconds(4) == pytest.approx(2 * inner + 1e-6)
    assert gemm.product(257, 304, k).seconds(6) == pytest.approx(inner + 1e-6)  # a third row of tiles
    assert (
        gemm.product(16, 304, k).seconds(2) < gemm.product(17, 304, k).seconds(2) == gemm.product(32, 304, k).seconds(2)
    )


def test_few_rows_are_bound_by_memory(supernode: SupernodeSpec) -> None:
    """One expert's gate and up projection, 4,096 x 7,168 INT8: 29.4 MB at 84.1 % of 1.6 TB/s."""
    seconds = Gemm(supernode).product(1, 4096, 7168).seconds(24)
    assert seconds == pytest.approx((4096 * 7168 + 7168 + 2 * 4096) / (1.6e12 * 0.841))


def test_nothing_to_do_takes_no_time(supernode: SupernodeSpec) -> None:
    gemm = Gemm(supernode)
    assert gemm.product(0, 128, 128).seconds(24) == gemm.product(128, 128, 128, groups=0).seconds(24) == 0
    assert gemm.launched(0, 128, 128, aic=24) == supernode.rates.launch_s


sizes = st.integers(1, 20_000)


@given(m=sizes, n=sizes, k=sizes, groups=st.integers(1, 40), aic=st.integers(1, 24), more=st.integers(1, 5000))
def test_more_work_or_fewer_cores_never_faster(
    machine: SupernodeSpec, m: int, n: int, k: int, groups: int, aic: int, more: int
) -> None:
    gemm = Gemm(machine)
    seconds = gemm.product(m, n, k, groups=groups).seconds(aic)
    assert seconds <= gemm.product(m + more, n, k, groups=groups).seconds(aic)
    assert seconds <= gemm.product(m, n + more, k, groups=groups).seconds(aic)
    assert seconds <= gemm.product(m, n, k + more, groups=groups).seconds(aic)
    assert seconds <= gemm.product(m, n, k, groups=groups + 1).seconds(aic)
    assert seconds >= gemm.product(m, n, k, groups=groups).seconds(aic + more)
    die = machine.npu.die
    assert seconds > 2 * groups * m * n * k / (die.int8_flops_per_s * min(aic, die.num_aic) / die.num_aic)
