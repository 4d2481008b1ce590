"""Division of a model over ranks: placements, slices, buffers."""

import numpy as np
import pytest

from model.layout import (
    LayoutError,
    RankLayout,
    copy_table,
    make_layouts,
    static_buffer_bytes,
    uniform_placement,
)


def test_the_papers_example_needs_225_and_420_mib_of_buffers():
    shape = {"rank_num": 320, "local_batch": 96, "top_k": 8, "experts_per_rank": 1}
    dispatch = static_buffer_bytes(**shape, message_bytes=7680)
    combine = static_buffer_bytes(**shape, message_bytes=14 * 1024)
    assert dispatch == 225 * 2**20
    assert combine == 420 * 2**20


def test_buffers_grow_with_the_experts_of_a_rank_up_to_top_k(base_config):
    rows = [
        make_layouts(base_config, world_size=world_size, max_num_tokens=10)[0].max_rows_per_peer(base_config)
        for world_size in (1, 2, 4, 8, 16)
    ]
    assert rows == [40, 40, 40, 20, 10]  # 10 tokens x min(top 4, 16 experts / ranks)


def test_a_dispatched_shared_expert_is_one_copy_more_and_a_slice_bounds_sequence_tensor(base_config):
    (first, *_) = make_layouts(base_config, world_size=2, max_num_tokens=9, shared_expert="dispatched")
    assert first.copies_per_token(base_config) == 5
    assert first.max_rows_per_peer(base_config) == 45
    (first, *_) = make_layouts(base_config, world_size=2, max_num_tokens=9, attention="sequence_tensor")
    assert first.max_local_tokens == 5
    assert first.sequence_bounds(9) == [0, 4, 9]
    assert first.sequence_bounds(1) == [0, 0, 1]


def test_uniform_placement_deals_experts_round_robin_and_keeps_copies_apart(base_config):
    (row, *_) = uniform_placement(base_config, world_size=4, num_redundant=4)
    assert row.reshape(4, 5).tolist() == [[0, 4, 8, 12, 1], [1, 5, 9, 13, 0], [2, 6, 10, 14, 3], [3, 7, 11, 15, 2]]
    (row, *_) = uniform_placement(base_config, world_size=4, num_redundant=4, num_shared=4)
    by_rank = row.reshape(4, 6)
    assert all(len(set(held)) == 6 for held in by_rank.tolist())
    assert (by_rank == 16).sum(axis=1).tolist() == [1, 1, 1, 1]


def test_copy_table_lists_the_slots_of_each_expert_in_ascending_order():
    slots, num_copies = copy_table([2, 0, 1, 2, 0, 2], 3)
    assert num_copies.tolist() == [2, 1, 3]
    assert [slots[expert, :count].tolist() for expert, count in enumerate(num_copies)] == [[1, 4], [2], [0, 3, 5]]


def test_heads_and_experts_of_a_rank(base_config):
    layouts = make_layouts(base_config, world_size=4, max_num_tokens=8, attention="sequence_tensor")
    assert [layout.local_heads(base_config) for layout in layouts] == [slice(2 * r, 2 * r + 2) for r in range(4)]
    assert [layout.local_experts[0].tolist() for layout in layouts][1] == [1, 5, 9, 13]
    replicated = make_layouts(base_config, world_size=4, max_num_tokens=8)[3]
    assert replicated.local_heads(base_config) == slice(0, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 2}, r"rank: 2 is outside \[0, world_size 2\)"),
        ({"max_num_tokens": 0}, "max_num_tokens: 0 is below 1"),
        ({"physical_to_logical": np.arange(16)}, r"shape \(16,\) is not"),
        ({"physical_to_logical": np.zeros((2, 17))}, "17 slots do not divide over 2 ranks"),
        ({"physical_to_logical": np.tile(np.arange(16), (3, 1))}, "3 layers, the model has 2 MoE layers"),
        ({"physical_to_logical": np.tile(np.r_[0, 1:15, 14], (2, 1))}, "logical expert 15 has no slot"),
        ({"physical_to_logical": np.tile(np.arange(1, 17), (2, 1))}, r"ids must be in \[0, 16\)"),
        ({"world_size": 16, "rank": 0, "attention": "sequence_tensor"}, "16 does not divide num_attention_heads 8"),
        ({"shared_expert": "dispatched"}, "logical expert 16 has no slot"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(changes, message, base_config):
    fields = {
        "rank": 0,
        "world_size": 2,
        "attention": "data_parallel",
        "physical_to_logical": uniform_placement(base_config, world_size=2),
        "max_num_tokens": 8,
    }
    with pytest.raises(LayoutError, match=message):
        RankLayout(**(fields | changes)).check(base_config)


def test_several_shared_experts_cannot_be_dispatched(make_config):
    with pytest.raises(LayoutError, match="'dispatched' needs n_shared_experts 1, not 2"):
        make_layouts(make_config(n_shared_experts=2), world_size=2, max_num_tokens=8, shared_expert="dispatched")


def test_slots_that_do_not_divide_are_refused(base_config):
    with pytest.raises(LayoutError, match="17 physical experts do not divide over 2 ranks"):
        uniform_placement(base_config, world_size=2, num_redundant=1)
