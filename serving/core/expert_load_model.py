"""How unevenly a model's tokens choose its experts, drawn from a fitted generator, and what that does to ranks.

Owns: the generator, the balance modes of a deployment, and how much busier than the mean its hottest rank and slot are.
Must not know: where the generator's parameters come from, time, tensors, how many bytes a token is.
Source: the generator was fitted to published means of DeepSeek-R1's load (NVIDIA TensorRT-LLM, tech blog 4, "Scaling
Expert Parallelism", table 1); the parameters are in configs/expert_load/. Placement by DeepSeek's EPLB.

    w(l, e) = exp(sigma(l) z)           sigma(l) ~ Uniform(sigma_low, sigma_high), z ~ Normal(0, 1); the statistics
    w(i, l, e) = w(l, e) exp(drift z)   what iteration i is routed by: it scatters around the statistics
    n(i, l, .) ~ Multinomial(tokens x top_k, w(i, l, .) / sum)

A token's experts are distinct, so none can get more than every token: what is drawn above that is drawn again among the
experts with room, which keeps the sum. Drift does not accumulate from iteration to iteration: it stands for how stale
the statistics are that the experts were placed by. Experts are independent of each other: no groups, no pairs.

Shapes: I iterations, L layers, E logical experts (routed), P physical slots, R ranks.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from serving.core.errors import UnfitRequest
from serving.core.expert_placement import ExpertPlacement, Ids, Loads, balanced_placement, static_placement

Balance = Literal["balanced", "eplb", "none"]
_MOST_DRIFT = 10.0  # far beyond any use, and weights still have a sum


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadModel:
    """Parameters of the generator, all of them spreads of a natural logarithm."""

    sigma_low: float  # of the experts' weights in the most even layer
    sigma_high: float  # in the most uneven one
    drift: float  # of an iteration's weights around the statistics

    def __post_init__(self) -> None:
        if not 0 <= self.sigma_low <= self.sigma_high < math.inf:
            raise UnfitRequest(f"sigma_low: {self.sigma_low} must be in [0, sigma_high {self.sigma_high}], both finite")
        _check_drift(self.drift)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSlots:
    """The mixture layers of a model and the slots that its experts get on the ranks of an instance."""

    num_layers: int
    num_experts: int
    top_k: int
    num_ranks: int
    num_router_slots: int  # of routed experts, redundant copies among them
    num_shared_copies: int = 0  # slots of the shared expert, if tokens are dispatched to it


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoadImbalance:
    """Router load of the hottest over the mean, and standard deviations; 1 is even. All have the shape (I, L).

    Only ranks and slots that hold routed experts count: a die with nothing but a shared copy has no router load.
    """

    rank: Loads
    slot: Loads
    rank_std_tokens: Loads
    slot_std_tokens: Loads


def shares(load: Loads) -> Loads:
    """`load` (..., E) over its layer's sum; a layer without load is taken as uniformly loaded."""
    loads = np.where(load.sum(axis=-1, keepdims=True) > 0, load, 1.0)
    normed: Loads = loads / loads.sum(axis=-1, keepdims=True)
    return normed


def draw_weights(model: LoadModel, *, num_layers: int, num_experts: int, rng: np.random.Generator) -> Loads:
    """Shares of the experts in a token's choices, as statistics would show them, shape (L, E); a layer's sum is 1."""
    sigmas = rng.uniform(model.sigma_low, model.sigma_high, (num_layers, 1))
    return shares(np.exp(sigmas * rng.standard_normal((num_layers, num_experts))))


def drifted(weights: Loads, drift: float, *, rng: np.random.Generator) -> Loads:
    """What one iteration is routed by: each of `weights` (..., E) off by a factor of its own; a layer's sum is 1."""
    _check_drift(drift)
    return shares(weights * np.exp(drift * rng.standard_normal(weights.shape)))


def draw_counts(weights: Loads, *, num_tokens: int, top_k: int, rng: np.random.Generator) -> Ids:
    """Tokens that choose each expert, shape of `weights` (..., E); a layer's sum is `num_tokens` x `top_k`.

    Raises UnfitRequest if there are fewer experts than a token chooses.
    """
    if weights.shape[-1] < top_k:
        raise UnfitRequest(f"top_k: {top_k} exceeds {weights.shape[-1]} experts")
    counts: Ids = rng.multinomial(num_tokens * top_k, weights)
    while (over := np.maximum(counts - num_tokens, 0)).any():
        counts = np.minimum(counts, num_tokens)
        # The least weight keeps a layer alive in which all experts with room have none.
        room = np.where(counts < num_tokens, np.maximum(weights, 1e-300), 0.0)
        counts = counts + rng.multinomial(over.sum(axis=-1), shares(room))
    return counts


def place(statistics: Loads, slots: ExpertSlots, balance: Literal["eplb", "none"]) -> ExpertPlacement:
    """The placement by `statistics` (L, E), or the one without. Raises UnfitRequest if sizes do not divide."""
    num_physical = slots.num_router_slots + slots.num_shared_copies
    if balance == "eplb":
        return balanced_placement(
            statistics,
            num_physical=num_physical,
            num_ranks=slots.num_ranks,
            num_shared_copies=slots.num_shared_copies,
        )
    return static_placement(
        num_layers=slots.num_layers,
        num_experts=slots.num_experts,
        num_physical=num_physical,
        num_ranks=slots.num_ranks,
        num_shared_copies=slots.num_shared_copies,
    )


def hottest_rank_load(
    model: LoadModel,
    slots: ExpertSlots,
    *,
    num_tokens: int,
    balance: Balance,
    seed: int,
    num_iterations: int = 4,
    drift: float | None = None,
) -> LoadImbalance:
    """Imbalance per iteration and layer when `num_tokens` tokens of all ranks together go through each layer.

    balanced: an ideal balancer, every rank alike ("perfect EPLB"). eplb: placed by the statistics, before the drift.
    none: placed without knowing the load. `drift` takes the place of the model's own. A deployment's figure is the
    mean of `rank`; it follows from the arguments alone.
    """
    if num_tokens < 1 or num_iterations < 1:
        raise UnfitRequest(f"num_tokens: {num_tokens} and num_iterations: {num_iterations} must be at least 1")
    if balance == "balanced":
        shape = (num_iterations, slots.num_layers)
        even, no_spread = np.ones(shape), np.zeros(shape)
        return LoadImbalance(rank=even, slot=even, rank_std_tokens=no_spread, slot_std_tokens=no_spread)
    rng = np.random.default_rng(seed)
    statistics = draw_weights(model, num_layers=slots.num_layers, num_experts=slots.num_experts, rng=rng)
    placement = place(statistics, slots, balance)
    repeated = np.broadcast_to(statistics, (num_iterations, *statistics.shape))
    weights = drifted(repeated, model.drift if drift is None else drift, rng=rng)
    counts = draw_counts(weights, num_tokens=num_tokens, top_k=slots.top_k, rng=rng)
    return load_imbalance(slot_loads(counts, placement), placement, num_experts=slots.num_experts)


def slot_loads(counts: Loads | Ids, placement: ExpertPlacement) -> Loads:
    """Load of every slot, (I, L, P), if the routed tokens `counts` (I, L, E) divide evenly over an expert's copies.

    Shared copies have none.
    """
    num_iterations, _, num_experts = counts.shape
    is_routed = placement.physical_to_logical < num_experts
    experts = np.broadcast_to(np.where(is_routed, placement.physical_to_logical, 0), (num_iterations, *is_routed.shape))
    per_copy = counts / placement.num_copies[:, :num_experts]
    loads: Loads = np.where(is_routed, np.take_along_axis(per_copy, experts, axis=2), 0.0)
    return loads


def load_imbalance(by_slot: Loads, placement: ExpertPlacement, *, num_experts: int) -> LoadImbalance:
    """Imbalance under the loads `by_slot` (I, L, P), slots of shared copies (their id is `num_experts`) left out."""
    num_layers = len(placement.physical_to_logical)
    is_routed = placement.physical_to_logical < num_experts
    by_slot = np.where(is_routed, by_slot, 0.0)
    by_rank = by_slot.reshape(-1, num_layers, placement.num_ranks, by_slot.shape[2] // placement.num_ranks).sum(axis=3)
    has_routed = np.any(is_routed.reshape(num_layers, placement.num_ranks, -1), axis=2)
    slot, slot_std = _hottest_and_std(by_slot, is_routed)
    rank, rank_std = _hottest_and_std(by_rank, has_routed)
    return LoadImbalance(rank=rank, slot=slot, rank_std_tokens=rank_std, slot_std_tokens=slot_std)


def _hottest_and_std(loads: Loads, is_counted: NDArray[np.bool_]) -> tuple[Loads, Loads]:
    """Highest over mean and standard deviation of `loads` (I, L, n) where `is_counted` (L, n); the rest are 0."""
    number = is_counted.sum(axis=1)
    mean = loads.sum(axis=2) / number
    variance = (np.where(is_counted, loads - mean[..., None], 0.0) ** 2).sum(axis=2) / number
    hottest = np.where(mean > 0, loads.max(axis=2) / np.where(mean > 0, mean, 1.0), 1.0)
    return hottest, np.sqrt(variance)


def _check_drift(drift: float) -> None:
    if not 0 <= drift <= _MOST_DRIFT:
        raise UnfitRequest(f"drift: {drift} must be in [0, {_MOST_DRIFT:g}]")
