"""Router: literal placements by every policy, and the paper's connection mapping."""

import numpy as np
import pytest

from serving.core.errors import IllegalCall
from serving.core.router import Room, Router, source_prefill_rank

ALL_FREE = 100


def make_router(policy="least_loaded", *, prefill=("p0", "p1", "p2"), decode=None, seed=0):
    decode = {"d0": 2, "d1": 2} if decode is None else decode
    return Router(prefill=prefill, decode=decode, policy=policy, rng=np.random.default_rng(seed))


def room(free_blocks=(ALL_FREE,) * 4, free_slots=(9,) * 4):
    return Room(free_blocks=np.array(free_blocks), free_slots=np.array(free_slots))


def place(router, request_id, *, num_tokens=100, num_blocks=5, prefixes=None, free=None):
    prefixes = None if prefixes is None else np.array(prefixes)
    placement = router.reserve(
        request_id=request_id,
        num_tokens=num_tokens,
        num_blocks=num_blocks,
        room=free or room(),
        num_prefix_tokens=prefixes,
    )
    router.check_invariants()
    return None if placement is None else (placement.prefill, placement.decode, placement.rank)


def test_requests_that_come_at_one_instant_spread_because_choosing_reserves():
    router = make_router()
    placed = [place(router, f"r{i}", num_tokens=10 * (i + 1)) for i in range(5)]
    assert placed == [
        ("p0", "d0", 0),
        ("p1", "d0", 1),
        ("p2", "d1", 0),
        ("p0", "d1", 1),  # p0 has the fewest prompt tokens queued
        ("p1", "d0", 0),
    ]
    assert router.queued_tokens == {"p0": 50, "p1": 70, "p2": 30}
    assert router.num_requests.tolist() == [2, 1, 1, 1]


def test_of_ranks_with_equally_many_requests_the_one_with_most_free_blocks_is_chosen():
    assert place(make_router(), "r0", free=room([10, 40, 40, 20])) == ("p0", "d0", 1)


def test_a_rank_without_a_slot_or_without_enough_blocks_is_not_chosen():
    router = make_router()
    assert place(router, "r0", free=room([4, 9, 5, 5], [9, 0, 1, 9])) == ("p0", "d1", 0)
    assert place(router, "r1", free=room([4, 9, 4, 4], [9, 0, 1, 9])) is None
    assert router.num_placements == 1


def test_the_prompt_is_computed_and_the_request_leaves():
    router = make_router()
    place(router, "r0")
    router.prefill_done("r0")
    assert router.queued_tokens["p0"] == 0
    assert router.num_requests[0] == 1
    router.release("r0")
    assert (router.num_placements, router.num_requests.tolist()) == (0, [0, 0, 0, 0])
    place(router, "r0")  # an id may come again
    router.release("r0")  # before its prompt is computed
    assert router.queued_tokens["p0"] == 0
    router.check_invariants()


def test_round_robin_takes_turns():
    router = make_router("round_robin")
    assert [place(router, f"r{i}") for i in range(4)] == [
        ("p0", "d0", 0),
        ("p1", "d0", 1),
        ("p2", "d1", 0),
        ("p0", "d1", 1),
    ]


def test_power_of_two_takes_the_less_loaded_of_a_pair_and_repeats_with_its_seed():
    first, second = (make_router("power_of_two", seed=7) for _ in range(2))
    placed = [place(first, f"r{i}") for i in range(40)]
    assert placed == [place(second, f"r{i}") for i in range(40)]
    assert max(first.num_requests) - min(first.num_requests) <= 4
    only = make_router("power_of_two", prefill=["p0"], decode={"d0": 1})
    assert place(only, "r0", free=room([9], [9])) == ("p0", "d0", 0)


def test_prefix_affinity_follows_the_longest_prefix_that_is_worth_it():
    router = make_router("prefix_affinity")
    assert place(router, "r0", prefixes=[0, 20, 40])[0] == "p2"
    assert place(router, "r1", prefixes=[0, 0, 29])[0] == "p0"  # less than 30 % of the prompt: by load
    assert place(router, "r2", prefixes=[50, 50, 0])[0] == "p1"  # of equals the less loaded
    assert place(router, "r3")[0] == "p0"  # nothing known: by load


def test_prefix_affinity_gives_way_when_the_queues_differ_too_much():
    router = make_router("prefix_affinity")
    place(router, "r0", num_tokens=9000, prefixes=[9000, 0, 0])
    assert place(router, "r1", prefixes=[100, 0, 0])[0] == "p1"
    router.prefill_done("r0")
    assert place(router, "r2", prefixes=[100, 0, 0])[0] == "p0"


def test_a_colocated_instance_takes_both_parts():
    router = make_router(prefill=["c0", "c1"], decode={"c0": 2, "c1": 2})
    assert [place(router, f"r{i}")[0::2] for i in range(4)] == [("c0", 0), ("c0", 1), ("c1", 0), ("c1", 1)]
    affine = make_router("prefix_affinity", prefill=["c0", "c1"], decode={"c0": 2, "c1": 2})
    assert place(affine, "r0", prefixes=[0, 0, 0, 64]) == ("c1", "c1", 1)
    assert place(affine, "r1", prefixes=[0, 0, 0, 64]) == ("c1", "c1", 1)


def test_a_drained_instance_gets_nothing_more_and_keeps_what_it_has():
    router = make_router()
    place(router, "r0")
    router.drain("d0")
    router.drain("p0")
    router.drain("p0")  # draining again is no error
    assert [place(router, f"r{i}") for i in (1, 2, 3)] == [("p1", "d1", 0), ("p2", "d1", 1), ("p1", "d1", 0)]
    router.drain("d1")
    assert place(router, "r4") is None
    assert router.num_placements == 4
    router.release("r0")


def test_removing_an_instance_releases_the_requests_that_need_it():
    router = make_router()
    for i in range(4):
        place(router, f"r{i}")  # r0 and r3 on p0; r0 and r1 on d0
    router.prefill_done("r3")
    assert router.remove("p0") == ("r0",)  # r3 is past its prefill
    assert router.remove("d1") == ("r2", "r3")
    assert router.num_placements == 1
    assert place(router, "r0") == ("p2", "d0", 0)
    with pytest.raises(IllegalCall, match="r3 is not placed"):
        router.release("r3")
    router.check_invariants()


def test_without_a_prefill_instance_nothing_is_placed():
    router = make_router(prefill=["p0"])
    router.drain("p0")
    assert place(router, "r0") is None


@pytest.mark.parametrize(
    "call",
    [
        lambda r: place(r, "r0"),
        lambda r: place(r, "r1", num_tokens=0),
        lambda r: place(r, "r1", num_blocks=-1),
        lambda r: place(r, "r1", free=room([1, 2])),
        lambda r: place(r, "r1", free=room(free_slots=[1])),
        lambda r: place(r, "r1", prefixes=[1, 2]),
        lambda r: r.release("r1"),
        lambda r: r.prefill_done("r1"),
        lambda r: r.drain("p9"),
        lambda r: r.remove("p9"),
    ],
)
def test_an_illegal_call_raises_and_changes_nothing(call):
    router = make_router()
    place(router, "r0")
    with pytest.raises(IllegalCall):
        call(router)
    assert (router.num_placements, router.num_requests.tolist()) == (1, [1, 0, 0, 0])
    assert router.queued_tokens == {"p0": 100, "p1": 0, "p2": 0}
    assert place(router, "r2") == ("p1", "d0", 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy": "best"}, "policy 'best' is not one of least_loaded, round_robin"),
        ({"policy": "power_of_two", "rng": None}, "needs a generator"),
        ({"prefill": []}, "prefill instances"),
        ({"prefill": ["p0", "p0"]}, "distinct"),
        ({"decode": {}}, "decode instances"),
        ({"decode": {"d0": 0}}, "at least one rank"),
        ({"prefill": ["p0", "d0"]}, "overlap"),
    ],
)
def test_a_router_that_makes_no_sense_is_refused(changes, message):
    arguments = {"prefill": ["p0"], "decode": {"d0": 1}, "policy": "least_loaded", **changes}
    with pytest.raises(IllegalCall, match=message):
        Router(**arguments)


def sources(prefill_tp_size, decode_dp_size, decode_tp_size=1):
    return [
        source_prefill_rank(
            prefill_tp_size=prefill_tp_size,
            decode_tp_size=decode_tp_size,
            decode_dp_size=decode_dp_size,
            decode_dp_rank=dp_rank,
            decode_tp_rank=tp_rank,
        )
        for dp_rank in range(decode_dp_size)
        for tp_rank in range(decode_tp_size)
    ]


def test_the_paper_s_mapping_gives_each_of_32_prefill_ranks_ten_decode_ranks():
    assert sources(32, 320) == [rank // 10 for rank in range(320)]


def test_the_paper_s_mapping_with_tensor_parallel_decode():
    # ratio 4, groups of 2 decode DP ranks, each with 2 TP ranks
    assert sources(8, 8, decode_tp_size=2) == [0, 1, 0, 1, 2, 3, 2, 3, 4, 5, 4, 5, 6, 7, 6, 7]


def test_sizes_that_do_not_divide_give_groups_as_equal_as_possible():
    assert sources(4, 6) == [0, 0, 1, 2, 2, 3]
    assert sources(32, 4) == [0, 8, 16, 24]  # fewer decode ranks than sources: spread over them
    assert sources(5, 2, decode_tp_size=2) == [0, 1, 2, 3]  # the last prefill rank stays unused
    assert sources(2, 1, decode_tp_size=4) == [0, 0, 1, 1]


@pytest.mark.parametrize(
    "changes",
    [{"decode_dp_rank": 4}, {"decode_dp_rank": -1}, {"decode_tp_rank": 1}, {"prefill_tp_size": 0}],
)
def test_a_rank_outside_of_its_instance_is_refused(changes):
    arguments = {"prefill_tp_size": 8, "decode_tp_size": 1, "decode_dp_size": 4, "decode_dp_rank": 0}
    with pytest.raises(IllegalCall):
        source_prefill_rank(**{**arguments, **changes})
