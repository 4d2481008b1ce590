"""Router against its rules written down without regard to speed: the same choice, request after request."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.core.router import IMBALANCE_RATIO, IMBALANCE_TOKENS, MIN_PREFIX_SHARE, Room, Router

LAYOUTS = [
    (["p0", "p1", "p2"], {"d0": 3, "d1": 4, "d2": 1}),
    (["p0"], {"d0": 1}),
    (["c0", "c1", "c2"], {"c0": 2, "c1": 1, "c2": 3}),
]


class Oracle:
    """All ranks that fit, all prefill instances that are not drained, and the policy over those alone."""

    def __init__(self, prefill, decode, policy, rng):
        self.prefill, self.policy, self.rng = prefill, policy, rng
        self.ranks = [(name, rank) for name, num_ranks in decode.items() for rank in range(num_ranks)]
        self.is_colocated = prefill == list(decode)
        self.drained, self.turn = set(), 0
        self.num_requests = np.zeros(len(self.ranks), np.int64)
        self.queued = dict.fromkeys(prefill, 0)

    def reserve(self, num_tokens, num_blocks, room, prefixes):
        fits = (room.free_blocks >= num_blocks) & (room.free_slots > 0)
        ranks = np.array([r for r in np.flatnonzero(fits) if self.ranks[r][0] not in self.drained], np.int64)
        prefills = np.array([i for i, name in enumerate(self.prefill) if name not in self.drained], np.int64)
        if not len(ranks) or not len(prefills):
            return None
        if self.is_colocated and prefixes is not None and self.policy == "prefix_affinity":
            rank = ranks[self.by_affinity(self.num_requests[ranks] * num_tokens, prefixes[ranks], num_tokens)]
        else:
            load = self.num_requests[ranks] * (room.free_blocks.max() + 1) - room.free_blocks[ranks]
            rank = ranks[self.choose(load)]
        decode, rank_of_decode = self.ranks[rank]
        prefill = decode
        if not self.is_colocated:
            load = np.array([self.queued[self.prefill[i]] for i in prefills], np.int64)
            if self.policy == "prefix_affinity" and prefixes is not None:
                prefill = self.prefill[prefills[self.by_affinity(load, prefixes[prefills], num_tokens)]]
            else:
                prefill = self.prefill[prefills[self.choose(load)]]
        self.turn += 1
        self.num_requests[rank] += 1
        self.queued[prefill] += num_tokens
        return prefill, decode, rank_of_decode

    def choose(self, load):
        if self.policy == "round_robin":
            return self.turn % len(load)
        if self.policy == "power_of_two" and len(load) > 1:
            pair = np.sort(self.rng.choice(len(load), size=2, replace=False))
            return pair[np.argmin(load[pair])]
        return np.argmin(load)

    def by_affinity(self, load, prefixes, num_tokens):
        low, high = load.min(), load.max()
        is_imbalanced = high - low > IMBALANCE_TOKENS and high > IMBALANCE_RATIO * low
        if is_imbalanced or prefixes.max() < MIN_PREFIX_SHARE * num_tokens:
            return np.argmin(load)
        candidates = np.flatnonzero(prefixes == prefixes.max())
        return candidates[np.argmin(load[candidates])]


@pytest.mark.parametrize("policy", ["least_loaded", "round_robin", "power_of_two", "prefix_affinity"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["disaggregated", "single", "colocated"])
@settings(max_examples=40, derandomize=True, deadline=None)
@given(seed=st.integers(0, 2**32), num_calls=st.integers(1, 25))
def test_every_choice_is_that_of_the_plain_rule(layout, policy, seed, num_calls):
    prefill, decode = layout
    router = Router(prefill=prefill, decode=decode, policy=policy, rng=np.random.default_rng(3))
    oracle = Oracle(prefill, decode, policy, np.random.default_rng(3))
    num_ranks, num_prefixes = len(oracle.ranks), len(oracle.ranks) if oracle.is_colocated else len(prefill)
    draw = np.random.default_rng(seed)
    placed = []
    for i in range(num_calls):
        call = draw.choice(["reserve", "prefill_done", "release", "drain"], p=[0.7, 0.1, 0.15, 0.05])
        if call == "reserve":
            room = Room(free_blocks=draw.integers(0, 7, num_ranks), free_slots=draw.integers(-1, 3, num_ranks))
            num_tokens, num_blocks = int(draw.integers(1, 9000)), int(draw.integers(0, 6))
            prefixes = draw.choice([0, 1, 4000], num_prefixes) if draw.random() < 0.7 else None
            placement = router.reserve(
                request_id=f"r{i}", num_tokens=num_tokens, num_blocks=num_blocks, room=room, num_prefix_tokens=prefixes
            )
            expected = oracle.reserve(num_tokens, num_blocks, room, prefixes)
            assert (placement and (placement.prefill, placement.decode, placement.rank)) == expected
            if placement is not None:
                placed.append([placement, num_tokens])
        elif call == "drain":
            name = draw.choice([*prefill, *decode])
            router.drain(name)
            oracle.drained.add(name)
        elif placed:
            entry = placed[draw.integers(len(placed))]
            placement, queued = entry
            oracle.queued[placement.prefill] -= queued
            entry[1] = 0
            if call == "release":
                router.release(placement.request_id)
                placed.remove(entry)
                oracle.num_requests[oracle.ranks.index((placement.decode, placement.rank))] -= 1
            else:
                router.prefill_done(placement.request_id)
        router.check_invariants()
    assert router.num_requests.tolist() == oracle.num_requests.tolist()
    assert router.queued_tokens == oracle.queued
