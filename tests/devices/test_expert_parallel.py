"""Dispatch and combine: the published table, the hottest die, fewer vector cores, slower links."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices.deployment import ExpertDeployment, Imbalance
from devices.expert_parallel import ExpertParallel
from devices.spec import SupernodeSpec
from model.config import ModelConfig
from tests.machines import with_plane_scaled


def experts(
    model: ModelConfig, supernode: SupernodeSpec, ep: int, *, imbalance: float = 1.0, shared: int = 0
) -> ExpertParallel:
    deployment = ExpertDeployment(
        ep=ep,
        num_router_slots=model.n_routed_experts + ep,
        num_shared_slots=shared,
        imbalance=Imbalance.constant(imbalance),
    )
    return ExpertParallel(model, supernode, deployment)


@pytest.mark.parametrize(
    ("ep", "dispatch_us", "combine_us"), [(8, 116, 118), (32, 133, 146), (64, 141, 150), (256, 152, 149)]
)
def test_latency_of_table_7(
    supernode: SupernodeSpec, deepseek_r1: ModelConfig, ep: int, dispatch_us: float, combine_us: float
) -> None:
    """arXiv 2506.12708v2, table 7, CANN EP, 128 tokens per die."""
    pair = experts(deepseek_r1, supernode, ep)
    assert pair.dispatch(128, aiv=48) * 1e6 == pytest.approx(dispatch_us, rel=0.03)
    assert pair.combine(128, aiv=48) * 1e6 == pytest.approx(combine_us, rel=0.03)


def test_one_die_sends_nothing(supernode: SupernodeSpec, deepseek_r1: ModelConfig) -> None:
    alone = experts(deepseek_r1, supernode, 1)
    assert alone.dispatch(128, aiv=48) == alone.combine(128, aiv=48) == alone.bulk_dispatch(8192) == 0


def test_combine_waits_for_the_hottest_die(supernode: SupernodeSpec, deepseek_r1: ModelConfig) -> None:
    even, uneven = experts(deepseek_r1, supernode, 64), experts(deepseek_r1, supernode, 64, imbalance=2.0)
    empty = even.combine(0, aiv=48)
    assert uneven.combine(96, aiv=48) - empty == pytest.approx(2 * (even.combine(96, aiv=48) - empty))
    # Senders pace dispatch, until the hottest receiver's port takes longer than they do.
    assert uneven.dispatch(96, aiv=48) == even.dispatch(96, aiv=48)
    assert experts(deepseek_r1, supernode, 64, imbalance=9.0).dispatch(96, aiv=48) > even.dispatch(96, aiv=48)


def test_uneven_ranks(supernode: SupernodeSpec, deepseek_r1: ModelConfig) -> None:
    """The fullest rank paces what it sends; the hottest die has copies of the mean rank's tokens."""
    pair = experts(deepseek_r1, supernode, 64)
    full, none = 96, 0.0
    assert pair.dispatch(full, mean_tokens=full / 64, aiv=48) == pair.dispatch(full, aiv=48)
    alone = pair.combine(full, mean_tokens=full / 64, aiv=48)
    assert pair.combine(none, aiv=48) < alone < pair.combine(full, aiv=48)
    # What it had sent comes back through one port: 96 tokens x 8 copies x 14,336 bytes, 62 of 64 from other packages.
    wire_s = 96 * 8 * 14336 * 62 / 64 / 196e9
    assert alone - pair.combine(none, aiv=48) == pytest.approx(wire_s)
    even = pair.bulk_combine(512)
    assert pair.bulk_combine(512, mean_tokens=256) == even == pair.bulk_combine(512, mean_tokens=512)


def test_shared_copies_receive_every_token(supernode: SupernodeSpec, deepseek_r1: ModelConfig) -> None:
    """EP320: 320 dies send each token to 8 of 288 routed slots and to one of 32 shared ones."""
    pair = experts(deepseek_r1, supernode, 320, shared=32)
    assert pair.num_copies(96) == 9 * 96
    assert pair.hottest_copies(96) == max(8 * 320 / 288, 320 / 32) * 96


@given(
    tokens=st.floats(0, 10_000),
    more=st.floats(0, 1000),
    aiv=st.integers(1, 47),
    ep=st.sampled_from([2, 4, 8, 16, 32, 64, 128, 256]),
    factor=st.floats(0.05, 1.0),
    imbalance=st.floats(1, 12),
)
def test_never_faster(
    machine: SupernodeSpec,
    deepseek_r1: ModelConfig,
    tokens: float,
    more: float,
    aiv: int,
    ep: int,
    factor: float,
    imbalance: float,
) -> None:
    """More tokens, fewer cores, a larger degree, a slower plane, more imbalance."""
    pair = experts(deepseek_r1, machine, ep, imbalance=imbalance)
    slower = with_plane_scaled(machine, machine.rates.ep_plane, factor)
    others = [
        (experts(deepseek_r1, machine, ep, imbalance=imbalance), tokens + more, aiv),
        (experts(deepseek_r1, machine, 2 * ep, imbalance=imbalance), tokens, aiv),
        (experts(deepseek_r1, slower, ep, imbalance=imbalance), tokens, aiv),
        (experts(deepseek_r1, machine, ep, imbalance=imbalance + more), tokens, aiv),
    ]
    for other, other_tokens, other_aiv in others:
        assert pair.dispatch(tokens, aiv=aiv + 1) <= other.dispatch(other_tokens, aiv=other_aiv)
        assert pair.combine(tokens, aiv=aiv + 1) <= other.combine(other_tokens, aiv=other_aiv)
        assert pair.bulk_dispatch(tokens) <= other.bulk_dispatch(other_tokens)
        assert pair.bulk_combine(tokens) <= other.bulk_combine(other_tokens)
