"""Placement of requests: a decode rank with room for the request, and the prefill instance that computes its prompt.

Owns: the policies, and the load of every instance as the router's own decisions make it.
Must not know: time, queues of instances, where cached bytes are.
Source: least-loaded, peer-to-peer placement of arXiv 2506.12708 section 4.1 (the pool is equally near to all, so
placement need not chase locality); connection mapping of section 4.3.3; cache-aware rule of the sgl gateway; choosing
and reserving in one call as in Ray Serve LLM's kv_token_tracker, so that requests at one instant do not herd.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from serving.core.errors import IllegalCall
from serving.core.ids import Counts, InstanceId, Mask, RequestId

RouterPolicy = Literal["least_loaded", "round_robin", "power_of_two", "prefix_affinity"]

# prefix_affinity gives way to the shortest queue when the queues differ by more than both (sgl gateway's defaults are
# 64 requests and 1.5; ours count tokens of queued prompts).
IMBALANCE_TOKENS = 8192
IMBALANCE_RATIO = 1.5
MIN_PREFIX_SHARE = 0.3  # of the prompt, to prefer an instance for it (sgl gateway's cache_threshold)

_REQUEST_SHIFT = 32  # of two ranks the one with fewer requests is less loaded, whatever blocks are free: < 2**32
_UNFIT = np.iinfo(np.int64).max


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where a request runs. Returned by `reserve`, held until `release`."""

    request_id: RequestId
    prefill: InstanceId
    decode: InstanceId  # the same as `prefill` on a colocated instance
    rank: int  # of `decode`


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What ranks have free now, shape (num_ranks,) each. The arrays may be live ones: nobody keeps what is in them."""

    free_blocks: Counts
    free_slots: Counts


class Router:
    """Chooses and reserves. Load is what was placed and not released: known here at once, never scraped.

    Ranks are counted over all decode instances in the order of `decode`, drained ones too, so that `Room` keeps its
    shape. An illegal call raises IllegalCall and changes nothing.
    """

    def __init__(
        self,
        *,
        prefill: Sequence[InstanceId],
        decode: Mapping[InstanceId, int],
        policy: RouterPolicy = "least_loaded",
        rng: np.random.Generator | None = None,
    ) -> None:
        """`decode` gives the number of ranks per instance. If the two name the same instances, these are colocated:
        each takes both parts of a request. `rng` is needed by power_of_two.
        """
        if policy not in get_args(RouterPolicy):
            raise IllegalCall(f"policy {policy!r} is not one of {', '.join(get_args(RouterPolicy))}")
        if policy == "power_of_two" and rng is None:
            raise IllegalCall("power_of_two needs a generator")
        if not prefill or len(set(prefill)) != len(prefill):
            raise IllegalCall(f"prefill instances {list(prefill)} must be distinct, and at least one")
        if not decode or min(decode.values()) < 1:
            raise IllegalCall(f"decode instances {dict(decode)} must be at least one, with at least one rank each")
        if set(prefill) & set(decode) and list(prefill) != list(decode):
            raise IllegalCall(
                f"prefill {list(prefill)} and decode {list(decode)} overlap: be the same, or have none in common"
            )
        self._policy = policy
        self._rng = rng
        self._prefill = list(prefill)
        self._decode = list(decode)
        self._is_colocated = self._prefill == self._decode
        self._place_of_rank = [(name, rank) for name, num_ranks in decode.items() for rank in range(num_ranks)]
        self._prefill_index = {name: index for index, name in enumerate(self._prefill)}
        self._num_requests = np.zeros(len(self._place_of_rank), np.int64)  # per decode rank
        self._queued_tokens = [0] * len(self._prefill)  # prompt tokens placed and not yet prefilled
        self._drained: set[InstanceId] = set()
        self._is_open: Mask | None = None  # decode ranks of instances that are not drained; None while all are
        self._open_prefill = list(range(len(self._prefill)))
        # With global rank, prefill index and queued tokens.
        self._placements: dict[RequestId, tuple[Placement, int, int, int]] = {}
        self._turn = 0

    @property
    def num_placements(self) -> int:
        """Requests that are placed and not released."""
        return len(self._placements)

    @property
    def queued_tokens(self) -> dict[InstanceId, int]:
        """Prompt tokens placed and not yet prefilled, per prefill instance."""
        return dict(zip(self._prefill, self._queued_tokens, strict=True))

    @property
    def num_requests(self) -> Counts:
        """Requests placed per decode rank, instance after instance."""
        return self._num_requests.copy()

    def reserve(
        self,
        *,
        request_id: RequestId,
        num_tokens: int,
        num_blocks: int,
        room: Room,
        num_prefix_tokens: Counts | None = None,
    ) -> Placement | None:
        """Choose where a request of `num_tokens` tokens runs and count it there; None if there is no room for it now.

        `room` and `num_blocks` say what is free and needed at the decode ranks, instance after instance.
        `num_prefix_tokens` (prefix_affinity) is the length of the prompt's prefix that each prefill instance, or each
        colocated rank, has in its own cache.
        """
        if request_id in self._placements:
            raise IllegalCall(f"request {request_id} is placed already")
        if num_tokens < 1 or num_blocks < 0:
            raise IllegalCall(f"request {request_id}: {num_tokens} tokens, {num_blocks} blocks")
        if room.free_blocks.shape != self._num_requests.shape or room.free_slots.shape != self._num_requests.shape:
            raise IllegalCall(
                f"room of {room.free_blocks.shape} blocks and {room.free_slots.shape} slots "
                f"for {len(self._num_requests)} decode ranks"
            )
        num_prefixes = len(self._num_requests) if self._is_colocated else len(self._prefill)
        if num_prefix_tokens is not None and num_prefix_tokens.shape != (num_prefixes,):
            raise IllegalCall(f"num_prefix_tokens of {num_prefix_tokens.shape}, must be ({num_prefixes},)")
        if not self._open_prefill:
            return None
        rank = self._choose_rank(room, num_tokens, num_blocks, num_prefix_tokens)
        if rank is None:
            return None
        decode, rank_of_decode = self._place_of_rank[rank]
        if self._is_colocated:
            index = self._prefill_index[decode]
        else:
            index = self._choose_prefill(num_tokens, num_prefix_tokens)
        self._turn += 1
        placement = Placement(request_id=request_id, prefill=self._prefill[index], decode=decode, rank=rank_of_decode)
        self._placements[request_id] = (placement, rank, index, num_tokens)
        self._num_requests[rank] += 1
        self._queued_tokens[index] += num_tokens
        return placement

    def drain(self, instance_id: InstanceId) -> None:
        """Place nothing more on an instance; what is placed stays."""
        if instance_id not in self._prefill and instance_id not in self._decode:
            raise IllegalCall(f"instance {instance_id} is not one of this router")
        self._drained.add(instance_id)
        self._is_open = np.array([name not in self._drained for name, _ in self._place_of_rank])
        self._open_prefill = [i for i, name in enumerate(self._prefill) if name not in self._drained]

    def remove(self, instance_id: InstanceId) -> tuple[RequestId, ...]:
        """The instance is lost: drain it and release every request that still needs it; returns those requests.

        A request whose prompt is computed does not need its prefill instance any more, unless that also decodes.
        """
        self.drain(instance_id)
        lost = tuple(
            request_id
            for request_id, (placement, _, _, queued) in self._placements.items()
            if placement.decode == instance_id or (placement.prefill == instance_id and queued)
        )
        for request_id in lost:
            self.release(request_id)
        return lost

    def prefill_done(self, request_id: RequestId) -> None:
        """The prompt is computed: it loads its prefill instance no longer."""
        placement, rank, prefill_index, queued = self._placed(request_id)
        self._queued_tokens[prefill_index] -= queued
        self._placements[request_id] = (placement, rank, prefill_index, 0)

    def release(self, request_id: RequestId) -> None:
        """The request has left. Raises IllegalCall if it is not placed."""
        _, rank, prefill_index, queued = self._placed(request_id)
        del self._placements[request_id]
        self._num_requests[rank] -= 1
        self._queued_tokens[prefill_index] -= queued

    def check_invariants(self) -> None:
        """Raise AssertionError unless the loads are the sums over the placements."""
        num_requests = np.zeros_like(self._num_requests)
        queued = [0] * len(self._prefill)
        for request_id, (placement, rank, prefill_index, num_tokens) in self._placements.items():
            num_requests[rank] += 1
            queued[prefill_index] += num_tokens
            assert placement.request_id == request_id
            assert placement.prefill == self._prefill[prefill_index]
            assert (placement.decode, placement.rank) == self._place_of_rank[rank]
        assert num_requests.tolist() == self._num_requests.tolist()
        assert queued == self._queued_tokens

    def _placed(self, request_id: RequestId) -> tuple[Placement, int, int, int]:
        if request_id not in self._placements:
            raise IllegalCall(f"request {request_id} is not placed")
        return self._placements[request_id]

    def _choose_rank(
        self, room: Room, num_tokens: int, num_blocks: int, num_prefix_tokens: Counts | None
    ) -> int | None:
        """A global rank with room; None if there is none."""
        # Fewest requests first; of equals the one with most room, which balances KV space too.
        load = (self._num_requests << _REQUEST_SHIFT) - room.free_blocks
        is_affine = self._policy == "prefix_affinity" and self._is_colocated and num_prefix_tokens is not None
        is_by_load = self._policy in ("least_loaded", "prefix_affinity") and not is_affine
        if is_by_load and self._is_open is None:
            rank = int(load.argmin())
            if room.free_blocks[rank] >= num_blocks and room.free_slots[rank] > 0:
                return rank  # the least loaded of all is that of those with room too
        fits = (room.free_blocks >= num_blocks) & (room.free_slots > 0)
        if self._is_open is not None:
            fits &= self._is_open
        if is_by_load:
            np.putmask(load, ~fits, _UNFIT)
            rank = int(load.argmin())
            return rank if fits[rank] else None
        ranks = fits.nonzero()[0]
        if not len(ranks):
            return None
        if is_affine:
            assert num_prefix_tokens is not None
            # A rank's queue in tokens, as if all its requests were like this one.
            queued_tokens = (self._num_requests[ranks] * num_tokens).tolist()
            return int(ranks[_by_affinity(queued_tokens, num_prefix_tokens[ranks].tolist(), num_tokens)])
        return int(ranks[self._choose(load[ranks])])

    def _choose_prefill(self, num_tokens: int, num_prefix_tokens: Counts | None) -> int:
        """Index of a prefill instance that is not drained."""
        indices = self._open_prefill
        if self._policy == "prefix_affinity" and num_prefix_tokens is not None:
            prefixes = num_prefix_tokens.tolist()
            queued_tokens = [self._queued_tokens[index] for index in indices]
            return indices[_by_affinity(queued_tokens, [prefixes[index] for index in indices], num_tokens)]
        if self._policy in ("least_loaded", "prefix_affinity"):
            return min(indices, key=self._queued_tokens.__getitem__)
        return indices[self._choose([self._queued_tokens[index] for index in indices])]

    def _choose(self, load: Sequence[int] | Counts) -> int:
        """Index by round_robin or power_of_two; the lowest index of equals."""
        if self._policy == "round_robin":
            return self._turn % len(load)
        if len(load) == 1:
            return 0
        assert self._rng is not None
        pair: list[int] = self._rng.choice(len(load), size=2, replace=False).tolist()
        first, second = sorted(pair)
        return second if load[second] < load[first] else first


def _by_affinity(load: list[int], num_prefix_tokens: list[int], num_tokens: int) -> int:
    """Index of the longest prefix, unless it is short or the loads are too different; the lowest index of equals."""
    low, high = min(load), max(load)
    is_imbalanced = high - low > IMBALANCE_TOKENS and high > IMBALANCE_RATIO * low
    best = max(num_prefix_tokens)
    if is_imbalanced or best < MIN_PREFIX_SHARE * num_tokens:
        return load.index(low)
    return min((i for i, tokens in enumerate(num_prefix_tokens) if tokens == best), key=load.__getitem__)


def source_prefill_rank(
    *, prefill_tp_size: int, decode_tp_size: int, decode_dp_size: int, decode_dp_rank: int, decode_tp_rank: int = 0
) -> int:
    """The prefill rank from which a decode rank gets its KV (arXiv 2506.12708 section 4.3.3).

    Any prefill rank could serve, since each holds the whole latent KV; the mapping spreads decode ranks over them:
    `ratio = prefill_tp / decode_tp`, `group_size = decode_dp / ratio`, `group = decode_dp_rank // group_size`,
    `rank = group * decode_tp + decode_tp_rank`.

    Sizes that do not divide: `ratio` is rounded down, which leaves the last prefill ranks unused, and the groups are as
    equal as possible, `group = decode_dp_rank * ratio // decode_dp`, which is the same where they divide. Where decode
    is split more than prefill, neighboring decode TP ranks share a source.
    """
    if min(prefill_tp_size, decode_tp_size, decode_dp_size) < 1:
        raise IllegalCall(f"sizes {prefill_tp_size}, {decode_tp_size}, {decode_dp_size} must be at least 1")
    if not 0 <= decode_dp_rank < decode_dp_size or not 0 <= decode_tp_rank < decode_tp_size:
        raise IllegalCall(f"decode rank ({decode_dp_rank}, {decode_tp_rank}) of {decode_dp_size} x {decode_tp_size}")
    if prefill_tp_size < decode_tp_size:
        return decode_tp_rank * prefill_tp_size // decode_tp_size
    ratio = prefill_tp_size // decode_tp_size
    group = decode_dp_rank * ratio // decode_dp_size
    return group * decode_tp_size + decode_tp_rank
