"""What imbalance an instance is charged for: modes of balance, roles, the measured load."""

import dataclasses
import json
from importlib import resources

import numpy as np
import pytest

from devices.deployment import BALANCED, ExpertDeployment
from serving.charge import deployment_of
from serving.config_file import load_config
from serving.errors import ConfigError
from serving.expert_balance import CURVES_FILE, with_imbalance
from serving.imbalance_curves import shipped_curves


def charged(mode, role="decode", *overrides):
    return deployment_of(load_config("laptop", (f"timing.balance={mode}", *overrides)), role)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_modes_are_ordered_at_every_number_of_tokens(role):
    balanced, eplb, none = (charged(mode, role).imbalance for mode in ("balanced", "eplb", "none"))
    assert balanced == BALANCED
    for tokens in (1, 7, 48, 96, 5000):
        assert 1 < eplb.at(tokens) < none.at(tokens)


def test_eplb_is_the_default():
    assert deployment_of(load_config("laptop"), "decode") == charged("eplb")


def test_prefill_drifts_as_fitted_and_decode_as_the_generator():
    config = load_config("laptop")
    shape, fitted = config.charged_shape, config.hardware.fitted
    layout = ExpertDeployment(ep=32, num_router_slots=288, num_shared_slots=0)

    def at_4096(role, **changes):
        changed = dataclasses.replace(fitted, **changes)
        return with_imbalance(layout, shape, changed, role=role, balance="eplb").imbalance.at(4096)

    assert at_4096("prefill", expert_load_drift=0.0) < at_4096("prefill", expert_load_drift=0.5)
    assert at_4096("decode", expert_load_drift=0.0) == at_4096("decode", expert_load_drift=0.5)
    assert at_4096("decode", expert_load_skew=0.1) < at_4096("decode", expert_load_skew=1.0)


def test_slots_that_do_not_fill_the_ranks_are_filled_up():
    config = load_config("laptop")
    layout = ExpertDeployment(ep=72, num_router_slots=256, num_shared_slots=0)
    told = with_imbalance(layout, config.charged_shape, config.hardware.fitted, role="decode", balance="eplb")
    assert (told.ep, told.num_router_slots) == (72, 256)
    assert told.imbalance.at(64) > 1


@pytest.mark.parametrize(
    ("role", "num_hot", "imbalance"),
    [("prefill", 16, 1.0), ("prefill", 1, 4 / 3), ("decode", 16, 1.0), ("decode", 1, 1.6), ("decode", 2, 4 / 3)],
)
def test_measured_is_the_recorded_load_on_the_live_ranks(tmp_path, role, num_hot, imbalance):
    """Laptop has 2 prefill ranks and 2 redundant experts, 4 decode ranks and 4.

    One expert with all the load has 3 copies in prefill, two of them on one of the two ranks: 2/3 over a mean of 1/2.
    In decode 5 on four ranks: 2/5 over 1/4; two such experts have 3 each: 2 of 6 over 1/4.
    """
    shape = load_config("laptop").shape
    load = np.zeros((shape.num_moe_layers, shape.n_routed_experts), np.int64)
    load[:, :num_hot] = 1000
    path = tmp_path / "load.json"
    path.write_text(json.dumps({"total": load.tolist()}))
    assert charged("measured", role, f"model.expert_load={path}").imbalance.at(1) == pytest.approx(imbalance)


def test_measured_without_a_load_is_refused():
    with pytest.raises(ConfigError, match=r"timing\.balance: measured needs model\.expert_load"):
        load_config("laptop", ("timing.balance=measured",))
    with pytest.raises(ConfigError, match=r"timing\.balance"):
        load_config("laptop", ("timing.balance=perfect",))


def test_shipped_curves_are_what_would_be_drawn():
    """All of them, so none is missing for a preset, and none is out of date."""
    shipped = json.loads(resources.files("configs").joinpath(CURVES_FILE).read_text(encoding="utf-8"))
    assert shipped_curves() == shipped
