"""Where an instance's experts live: placed by the measured load, or for a uniform one.

Owns: which load a configuration places its experts by, and how even the ranks' loads then are.
Must not know: how copies are balanced (serving/core/expert_placement.py), tensors.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serving.config import Role, RunConfig
from serving.core.expert_load_model import load_imbalance, slot_loads
from serving.core.expert_placement import ExpertPlacement, balanced_placement, uniform_load


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredImbalance:
    """Load of the busiest rank over the mean rank's, under the measured load; the mean of all layers. 1 is even."""

    uniform: float  # experts placed as if all were used alike
    measured: float  # experts placed by the measured load


def place_experts(config: RunConfig, role: Role) -> ExpertPlacement:
    """The placement in every instance of `role`: by `model.expert_load` if there is one."""
    load = config.expert_load
    return _place(config, role, _uniform(config) if load is None else load)


def rank_imbalance(config: RunConfig, role: Role) -> MeasuredImbalance | None:
    """What placing by the measured load changes; None without one."""
    load = config.expert_load
    if load is None:
        return None
    if _num_shared_copies(config, role):  # every token goes to the shared expert, and to top_k routed ones
        shared = load.sum(axis=1, keepdims=True) / config.shape.num_experts_per_tok
        with_shared = np.concatenate([load, shared], axis=1)
    else:
        with_shared = load
    uniform, measured = (
        float((1 / _place(config, role, by).balancedness(with_shared)).mean()) for by in (_uniform(config), load)
    )
    return MeasuredImbalance(uniform=uniform, measured=measured)


def measured_imbalance(config: RunConfig, role: Role) -> float:
    """Routed load of the hottest live rank over the mean of those with routed experts, under the measured load.

    The mean of all layers. Few live ranks are far more even than the many dies of the instance that they stand for.
    """
    load = config.expert_load
    assert load is not None  # checked with the configuration
    placement = place_experts(config, role)
    by_slot = slot_loads(load[np.newaxis], placement)
    return float(load_imbalance(by_slot, placement, num_experts=load.shape[1]).rank.mean())


def _uniform(config: RunConfig) -> NDArray[np.float64]:
    return uniform_load(config.shape.num_moe_layers, config.shape.n_routed_experts)


def _num_shared_copies(config: RunConfig, role: Role) -> int:
    section = config.instances[role]
    return section.num_shared_expert_copies if section.shared_expert == "dispatched" else 0


def _place(config: RunConfig, role: Role, load: NDArray[np.float64]) -> ExpertPlacement:
    return balanced_placement(
        load,
        num_physical=config.num_physical_experts(role),
        num_ranks=config.world_size(role),
        num_shared_copies=_num_shared_copies(config, role),
    )
