"""EPLB off against on, link by link."""

import numpy as np
import pytest

from devices.spec import SupernodeSpec
from model.config import ModelConfig
from serving.config_file import load_part
from serving.core.expert_load_model import ExpertSlots, shares
from serving.expert_traffic import LINKS, OPERATORS, compare_traffic, default_slots

HOT = 5  # the expert that gets ten times the others' tokens
TOKENS = 40


@pytest.fixture(scope="module")
def compare():
    """A function that compares placements of 16 experts in two layers; sizes can be changed by name."""
    model = ModelConfig.from_dict(load_part("model/deepseek-r1.yaml"))
    hardware = SupernodeSpec.from_dict(load_part("hardware/cloudmatrix384.yaml"))
    load = np.ones((2, 16))
    load[:, HOT] = 10.0

    def run(*, num_ranks=16, num_router_slots=32, num_shared_copies=0, near=False):
        slots = ExpertSlots(
            num_layers=2,
            num_experts=16,
            top_k=4,
            num_ranks=num_ranks,
            num_router_slots=num_router_slots,
            num_shared_copies=num_shared_copies,
        )
        return compare_traffic(
            shares(load),
            slots,
            tokens_per_rank=TOKENS,
            drift=0.0,
            model=model,
            hardware=hardware,
            near=near,
            rng=np.random.default_rng(0),
        )

    return run


@pytest.mark.parametrize(
    ("num_experts", "num_ranks", "slots"),
    [
        (256, 32, (288, 0)),  # arXiv 2506.12708v2 section 5.1: 8 router experts and a redundant one per die
        (256, 320, (288, 32)),  # the same: 256 router, 32 redundant, 32 shared
        (256, 36, (288, 0)),  # TensorRT-LLM tech blog 4: 8 slots on 36 ranks
        (256, 144, (288, 0)),  # open-infra-index, day 6: 2 routed experts per GPU, 32 of them redundant
        (256, 72, (288, 0)),  # SGLang's blog on large-scale expert parallelism (2025-05-05)
        (256, 256, (512, 0)),
        (256, 257, (257, 0)),
        (16, 8, (24, 0)),
        (2, 1, (2, 0)),  # one rank has nobody to balance with
    ],
)
def test_the_slots_of_the_published_deployments(num_experts, num_ranks, slots):
    model = ModelConfig.from_dict(load_part("model/deepseek-r1.yaml"))
    assert default_slots(model, num_experts=num_experts, num_ranks=num_ranks) == slots


@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize("num_shared_copies", [0, 16])
def test_no_byte_is_lost(compare, num_shared_copies, near):
    comparison = compare(num_router_slots=32, num_shared_copies=num_shared_copies, near=near)
    num_copies = 16 * TOKENS * (4 + (num_shared_copies > 0))
    for side in (comparison.off, comparison.on):
        for layer in range(2):
            dispatch, combine = (comparison.matrix(side, layer, operator) for operator in OPERATORS)
            assert dispatch.sum() == pytest.approx(num_copies * 7680)  # 7.5 KiB, arXiv 2506.12708v2 section 4.2.1
            assert combine.sum() == pytest.approx(num_copies * 14336)  # 14 KiB, the same
            assert combine / 14336 == pytest.approx(dispatch.T / 7680)


def test_both_placements_get_the_same_tokens_and_the_busiest_port_is_less_busy_with_eplb(compare):
    comparison = compare()
    off, on = comparison.off, comparison.on
    assert (off.num_router_slots, on.num_router_slots) == (16, 32)
    assert off.placement.physical_to_logical.tolist() == [list(range(16))] * 2
    assert (on.placement.num_copies[:, HOT] > 1).all()
    assert (on.rank_imbalance < off.rank_imbalance).all()
    for operator, port in (("dispatch", "die_in"), ("combine", "die_out")):
        assert (on.uses[operator, port].busiest_bytes < off.uses[operator, port].busiest_bytes).all()
    received = comparison.matrix(off, 0, "dispatch").sum(axis=0)
    assert int(received.argmax()) == HOT
    assert off.rank_imbalance[0] == pytest.approx(received.max() / received.mean())


def test_what_goes_out_in_dispatch_comes_in_in_combine(compare):
    for side in (compare(num_ranks=32, num_router_slots=32).on, compare().off):
        for there, back in (("die_out", "die_in"), ("die_in", "die_out"), ("node_out", "node_in"), ("package",) * 2):
            dispatch, combine = side.uses["dispatch", there], side.uses["combine", back]
            for figure in ("busiest_bytes", "mean_bytes", "p99_bytes", "busiest_s"):
                assert getattr(combine, figure) == pytest.approx(getattr(dispatch, figure) * 14336 / 7680)


def test_figures_of_a_link_class_are_ordered_and_timed_by_the_hardware_file(compare):
    rates = {"die_out": 135e9, "die_in": 135e9, "package": 270e9, "node_out": 3136e9, "node_in": 3136e9}
    side = compare(num_ranks=32, num_router_slots=32).on  # two nodes
    for (_, link), use in side.uses.items():
        assert (use.mean_bytes <= use.busiest_bytes).all()
        assert (use.p99_bytes <= use.busiest_bytes).all()
        assert use.busiest_s == pytest.approx(use.busiest_bytes / rates[link])
        assert (use.busiest_s > 0).all()


def test_inside_one_node_nothing_uses_its_uplinks_and_ports_have_the_speed_inside(compare):
    comparison = compare()
    assert comparison.bytes_per_s["die_out"] == 137e9  # arXiv 2506.12708v2 table 1, write, intra
    for operator in OPERATORS:
        assert not comparison.on.uses[operator, "node_out"].busiest_bytes.any()
        assert not comparison.on.uses[operator, "node_in"].busiest_bytes.any()


def test_without_room_for_experts_in_order_both_placements_have_the_same_slots(compare):
    comparison = compare(num_ranks=20, num_router_slots=18, num_shared_copies=2)
    assert (comparison.off.num_router_slots, comparison.on.num_router_slots) == (18, 18)
    assert comparison.counts.shape == (2, 20, 17)
    assert (comparison.counts[:, :, 16] == TOKENS).all()
    assert set(comparison.on.uses) == {(operator, link) for operator in OPERATORS for link in LINKS}


def test_near_copies_save_the_uplinks(compare):
    anywhere, near = (compare(num_ranks=32, num_router_slots=32, near=is_near) for is_near in (False, True))
    assert (anywhere.counts == near.counts).all()
    for operator in OPERATORS:
        saved, before = near.on.uses[operator, "node_out"], anywhere.on.uses[operator, "node_out"]
        assert (saved.mean_bytes < before.mean_bytes).all()
