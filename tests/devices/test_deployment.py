"""Layouts of experts, and imbalance as a function of tokens."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices.deployment import BALANCED, ExpertDeployment, Imbalance
from model.config import ModelConfig


def test_the_published_deployments(deepseek_r1: ModelConfig) -> None:
    """arXiv 2506.12708v2, section 5.1: 32 shared + 256 + 32 redundant; 1 shared + 8 + 1 redundant per die."""
    decode = ExpertDeployment.published(deepseek_r1, ep=320)
    assert (decode.num_router_slots, decode.num_shared_slots, decode.router_slots_per_die) == (288, 32, 1)
    prefill = ExpertDeployment.published(deepseek_r1, ep=32)
    assert (prefill.num_router_slots, prefill.num_shared_slots, prefill.router_slots_per_die) == (288, 0, 9)
    alone = ExpertDeployment.published(deepseek_r1, ep=1, imbalance=Imbalance.constant(2.0))
    assert (alone.num_router_slots, alone.imbalance) == (256, BALANCED)


@pytest.mark.parametrize("ep", range(250, 400))
def test_no_shared_copy_is_much_hotter_than_a_routed_expert(deepseek_r1: ModelConfig, ep: int) -> None:
    """At the published EP320 it gets 10 copies for 8.9 of a routed expert; never more."""
    layout = ExpertDeployment.published(deepseek_r1, ep=ep)
    slots = layout.num_router_slots + layout.num_shared_slots
    assert slots % ep == 0
    assert layout.num_router_slots >= 256
    if layout.is_shared_dispatched:
        assert ep / layout.num_shared_slots <= 10


def test_imbalance_is_interpolated_by_the_logarithm_of_tokens() -> None:
    curve = Imbalance(tokens=(4, 16), values=(3.0, 2.0))
    assert [curve.at(tokens) for tokens in (0, 1, 4, 8, 16, 1000)] == [3, 3, 3, 2.5, 2, 2]
    deployment = ExpertDeployment(ep=320, num_router_slots=288, num_shared_slots=32, imbalance=curve)
    assert deployment.hottest_copies(8, 8) == pytest.approx(8 * 8 * 320 / 288 * 2.5)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="rising numbers of tokens"):
        Imbalance(tokens=(2, 1), values=(1, 1))
    with pytest.raises(ValueError, match="at least 1"):
        Imbalance(tokens=(1,), values=(0.9,))
    with pytest.raises(ValueError, match=r"falls from 9\.0 at 1 tokens to 1\.0 at 2, too fast"):
        Imbalance(tokens=(1, 2), values=(9.0, 1.0))
    with pytest.raises(ValueError, match="shared slots must leave dies of 8"):
        ExpertDeployment(ep=8, num_router_slots=8, num_shared_slots=8)


@given(low=st.floats(1, 9), high=st.floats(1, 9), ratio=st.floats(1.01, 1000), a=st.floats(0, 1), b=st.floats(0, 1))
def test_more_tokens_never_load_the_hottest_die_less(low: float, high: float, ratio: float, a: float, b: float) -> None:
    tokens = (1.0, ratio)
    if high < (low - high) / math.log(ratio):
        with pytest.raises(ValueError, match="too fast"):
            Imbalance(tokens=tokens, values=(low, high))
        return
    curve = Imbalance(tokens=tokens, values=(low, high))
    few, many = sorted(ratio**share for share in (a, b))
    assert few * curve.at(few) <= many * curve.at(many) * (1 + 1e-9)
