"""Router against a model that keeps every placement in a dictionary."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from serving.core.errors import IllegalCall
from serving.core.router import Room, Router

LAYOUTS = [
    (["p0", "p1"], {"d0": 1, "d1": 3}),
    (["p0"], {"d0": 2}),
    (["c0", "c1"], {"c0": 2, "c1": 1}),
]
NUM_SLOTS = 3


class RouterMachine(RuleBasedStateMachine):
    @initialize(
        layout=st.sampled_from(LAYOUTS),
        policy=st.sampled_from(["least_loaded", "round_robin", "power_of_two", "prefix_affinity"]),
    )
    def start(self, layout, policy):
        self.prefill, self.decode = layout
        self.is_colocated = self.prefill == list(self.decode)
        self.policy = policy
        self.router = Router(prefill=self.prefill, decode=self.decode, policy=policy, rng=np.random.default_rng(1))
        self.ranks = [(name, rank) for name, size in self.decode.items() for rank in range(size)]
        self.placed = {}  # request -> (placement, tokens queued)
        self.drained = set()
        self.num_created = 0

    def num_requests(self):
        places = [(placement.decode, placement.rank) for placement, _ in self.placed.values()]
        return [places.count(rank) for rank in self.ranks]

    def queued(self):
        queued = dict.fromkeys(self.prefill, 0)
        for placement, num_tokens in self.placed.values():
            queued[placement.prefill] += num_tokens
        return queued

    @rule(num_tokens=st.integers(1, 20000), num_blocks=st.integers(0, 4), data=st.data())
    def reserve(self, num_tokens, num_blocks, data):
        free_blocks = data.draw(st.lists(st.integers(0, 5), min_size=len(self.ranks), max_size=len(self.ranks)))
        free_slots = [NUM_SLOTS - n for n in self.num_requests()]
        num_prefixes = len(self.ranks) if self.is_colocated else len(self.prefill)
        prefixes = data.draw(
            st.none() | st.lists(st.integers(0, num_tokens), min_size=num_prefixes, max_size=num_prefixes)
        )
        fitting = [
            rank
            for rank, blocks, slots in zip(self.ranks, free_blocks, free_slots, strict=True)
            if blocks >= num_blocks and slots > 0 and rank[0] not in self.drained
        ]
        prefills = [name for name in self.prefill if name not in self.drained]
        requests_before, queued_before = self.num_requests(), self.queued()
        request_id = f"r{self.num_created}"
        self.num_created += 1
        placement = self.router.reserve(
            request_id=request_id,
            num_tokens=num_tokens,
            num_blocks=num_blocks,
            room=Room(free_blocks=np.array(free_blocks), free_slots=np.array(free_slots)),
            num_prefix_tokens=None if prefixes is None else np.array(prefixes),
        )
        if placement is None:
            assert not fitting or not prefills
            return
        assert (placement.decode, placement.rank) in fitting
        assert placement.prefill in prefills
        assert not self.is_colocated or placement.prefill == placement.decode
        if self.policy == "least_loaded":
            load = dict(zip(self.ranks, requests_before, strict=True))
            assert load[placement.decode, placement.rank] == min(load[rank] for rank in fitting)
            if not self.is_colocated:
                assert queued_before[placement.prefill] == min(queued_before[name] for name in prefills)
        self.placed[request_id] = (placement, num_tokens)

    @precondition(lambda self: self.placed)
    @rule(data=st.data())
    def prefill_done(self, data):
        request_id = data.draw(st.sampled_from(sorted(self.placed)))
        self.router.prefill_done(request_id)
        self.placed[request_id] = (self.placed[request_id][0], 0)

    @precondition(lambda self: self.placed)
    @rule(data=st.data())
    def release(self, data):
        request_id = data.draw(st.sampled_from(sorted(self.placed)))
        self.router.release(request_id)
        del self.placed[request_id]
        with pytest.raises(IllegalCall):
            self.router.release(request_id)

    @rule(data=st.data(), is_lost=st.booleans())
    def drain_or_remove(self, data, is_lost):
        instance_id = data.draw(st.sampled_from([*self.prefill, *self.decode]))
        if not is_lost:
            self.router.drain(instance_id)
        else:
            lost = [
                request_id
                for request_id, (placement, num_tokens) in self.placed.items()
                if placement.decode == instance_id or (placement.prefill == instance_id and num_tokens)
            ]
            assert list(self.router.remove(instance_id)) == lost
            for request_id in lost:
                del self.placed[request_id]
        self.drained.add(instance_id)

    @invariant()
    def agrees_with_the_model(self):
        self.router.check_invariants()
        assert self.router.num_placements == len(self.placed)
        assert self.router.num_requests.tolist() == self.num_requests()
        assert self.router.queued_tokens == self.queued()


TestRouter = RouterMachine.TestCase
TestRouter.settings = settings(derandomize=True, database=None, deadline=None, max_examples=150, stateful_step_count=30)
