"""How unevenly an instance's experts are charged: the load generator, placed and drifted, as imbalance by tokens.

Owns: from a balance mode to the deployment that the time model takes.
Must not know: how load is drawn or placed (serving/core/), seconds.
Source: generator and its parameters in configs/expert_load/; the skew of decode batches and the drift of prefill
batches are fitted, since the paper prints neither its load nor its balancer's results.
"""

import json
from dataclasses import astuple, replace
from functools import lru_cache
from importlib import resources

from devices.deployment import BALANCED, ExpertDeployment, Imbalance
from devices.pipeline import Role
from devices.rates import Fitted
from model.config import ModelConfig
from serving.core.expert_load_model import Balance, ExpertSlots, LoadModel, hottest_rank_load
from serving.published_load import read_published_load

CURVES_FILE = "expert_load/imbalance.json"  # written by `python -m serving.imbalance_curves`
SEED = 0  # of the drawn layers: every deployment is charged for the same ones
TOKENS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 512.0, 4096.0)  # per die, where imbalance is worked out


def with_imbalance(
    layout: ExpertDeployment,
    shape: ModelConfig,
    fitted: Fitted,
    *,
    role: Role,
    balance: Balance,
    skew: float | None = None,
) -> ExpertDeployment:
    """`layout` with the imbalance of its hottest die, mean over layers and iterations.

    The generator was fitted to one data set. A prefill batch is a few dozen prompts: as skewed as that, and further
    from the statistics, as fitted. A decode step serves thousands of requests of all kinds, whose skews average out: it
    has the fitted share of the generator's skew, and its drift. `skew` takes the place of either share.
    """
    if balance == "balanced" or layout.ep == 1 or not shape.num_moe_layers:
        return replace(layout, imbalance=BALANCED)
    slots, model = skewed_load(layout, shape, fitted, role=role, skew=skew)
    return replace(layout, imbalance=_imbalance(slots, model, balance))


def skewed_load(
    layout: ExpertDeployment, shape: ModelConfig, fitted: Fitted, *, role: Role, skew: float | None = None
) -> tuple[ExpertSlots, LoadModel]:
    """The slots of a deployment, and the generator of what they are asked for; arguments as of `with_imbalance`."""
    generator = read_published_load().model
    num_slots = layout.num_router_slots + layout.num_shared_slots
    slots = ExpertSlots(
        num_layers=shape.num_moe_layers,
        num_experts=shape.n_routed_experts,
        top_k=shape.num_experts_per_tok,
        num_ranks=layout.ep,
        num_router_slots=layout.num_router_slots + -num_slots % layout.ep,  # the last ranks' slots are filled up
        num_shared_copies=layout.num_shared_slots,
    )
    is_prefill = role == "prefill"
    if skew is None:
        skew = 1.0 if is_prefill else fitted.expert_load_skew
    return slots, LoadModel(
        sigma_low=generator.sigma_low * skew,
        sigma_high=generator.sigma_high * skew,
        drift=fitted.expert_load_drift if is_prefill else generator.drift,
    )


@lru_cache(maxsize=256)
def _imbalance(slots: ExpertSlots, model: LoadModel, balance: Balance) -> Imbalance:
    values = _shipped_curves().get(curve_key(slots, model, balance))
    return Imbalance(tokens=TOKENS, values=tuple(values or imbalance_values(slots, model, balance)))


def imbalance_values(slots: ExpertSlots, model: LoadModel, balance: Balance) -> list[float]:
    """The curve at TOKENS, drawn and placed: about 0.15 s."""

    def hottest(tokens: float) -> float:
        num_tokens = int(tokens) * slots.num_ranks
        return float(hottest_rank_load(model, slots, num_tokens=num_tokens, balance=balance, seed=SEED).rank.mean())

    return [hottest(tokens) for tokens in TOKENS]


def curve_key(slots: ExpertSlots, model: LoadModel, balance: Balance) -> str:
    """All that decides a curve; a constant that is fitted anew asks for a new one."""
    return " ".join(map(repr, (*astuple(slots), *astuple(model), balance, *TOKENS, SEED)))


@lru_cache(maxsize=1)
def _shipped_curves() -> dict[str, list[float]]:
    """Curves of the shipped configurations, so that the first result of a simulation does not wait for them."""
    text = resources.files("configs").joinpath(CURVES_FILE).read_text(encoding="utf-8")
    curves: dict[str, list[float]] = json.loads(text)
    return curves
