"""The shipped generator against the published figures that it was fitted to, and some that are not in the fit."""

import numpy as np
import pytest

from serving.core.expert_load_model import ExpertSlots, hottest_rank_load
from serving.errors import ConfigError
from serving.published_load import read_published_load

NUM_SEEDS = 8  # sets of 58 layers that a figure is the mean of


@pytest.fixture(scope="module")
def load():
    return read_published_load()


def drawn(load, *, num_ranks, num_slots, balance):
    slots = ExpertSlots(
        num_layers=load.num_layers,
        num_experts=load.num_experts,
        top_k=load.top_k,
        num_ranks=num_ranks,
        num_router_slots=num_slots,
    )
    return [
        hottest_rank_load(load.model, slots, num_tokens=load.tokens_per_iteration, balance=balance, seed=seed)
        for seed in range(NUM_SEEDS)
    ]


def test_the_file_holds_what_was_published(load):
    """NVIDIA TensorRT-LLM tech blog 4, table 1."""
    assert (load.model.sigma_low, load.model.sigma_high, load.model.drift) == (0.4, 1.6, 0.1)
    assert (load.num_layers, load.num_experts, load.top_k, load.tokens_per_iteration) == (58, 256, 8, 4096)
    assert [(row.num_ranks, row.num_slots, row.rank_imbalance, row.slot_imbalance) for row in load.published] == [
        (32, 256, 1.564, 10.948),
        (32, 288, 0.109, 1.792),
        (36, 288, 0.115, 1.791),
    ]
    assert [row.rank_std_tokens for row in load.published] == [491.6, 52.0, 53.9]
    assert [row.slot_std_tokens for row in load.published] == [164.1, 77.8, 87.5]


@pytest.mark.parametrize(
    ("row", "figure", "tolerance"),
    [
        # The first two rows were fitted. The tolerance is that of the fit, whose own draw gave 1.55, 479, 11.6, 172
        # and 0.106, 49.7, 2.0, 84; and of the mean of a few sets of layers.
        (0, "rank_imbalance", 0.06),
        (0, "rank_std_tokens", 0.06),
        (0, "slot_imbalance", 0.06),
        (0, "slot_std_tokens", 0.06),
        (1, "rank_imbalance", 0.06),
        (1, "rank_std_tokens", 0.06),
        (1, "slot_imbalance", 0.15),
        (1, "slot_std_tokens", 0.10),
        # The fit tells nothing of the third.
        (2, "rank_imbalance", 0.06),
        (2, "rank_std_tokens", 0.13),
        (2, "slot_imbalance", 0.15),
        (2, "slot_std_tokens", 0.06),
    ],
)
def test_published_balance_before_and_after(load, row, figure, tolerance):
    published = load.published[row]
    sets = drawn(load, num_ranks=published.num_ranks, num_slots=published.num_slots, balance=published.balance)
    if figure.endswith("_imbalance"):
        ours = np.mean([getattr(one, figure.removesuffix("_imbalance")).mean() for one in sets]) - 1
    else:
        ours = np.mean([getattr(one, figure).mean() for one in sets])
    assert ours == pytest.approx(getattr(published, figure), rel=tolerance)


@pytest.mark.parametrize(
    ("layers", "num_ranks", "num_slots", "balance"),
    [("static_ep32", 32, 256, "none"), ("eplb_ep36", 36, 288, "eplb")],
)
def test_single_published_layers_lie_among_the_drawn_ones(load, layers, num_ranks, num_slots, balance):
    """Not fitted: none is below all drawn layers, nor above 99 % of them."""
    by_layer = np.concatenate(
        [one.rank.mean(axis=0) for one in drawn(load, num_ranks=num_ranks, num_slots=num_slots, balance=balance)]
    )
    low, high = np.percentile(by_layer - 1, [0, 99])
    values = load.published_layers[layers]
    assert len(values) == 6
    assert low < min(values)
    assert max(values) < high


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: {sigma_low: 1, sigma_high: 0, drift: 0}", "sigma_low: 1 must be in"),
        ("model: {sigma_low: 1, sigma_high: 2}", "model.drift: missing"),
        ("model: {sigma_low: 1, sigma_high: 2, drift: 0, mu: 0}", "model.mu: unknown key"),
        ("model: 3", "model: 3 is not a mapping"),
        ("model: {sigma_low: 1, sigma_high: 2, drift: 0}\npublished: [{name: a}]", "published[0].balance: missing"),
        ("model: {sigma_low: 1, sigma_high: 2, drift: 0}\npublished: []", "num_layers: missing"),
        ("model: {sigma_low: 1, sigma_high: 2, drift: 0}\npublished_layers: 3", "published_layers: 3 is not a mapping"),
    ],
)
def test_a_mistake_in_the_file_is_named(tmp_path, text, words):
    file = tmp_path / "load.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        read_published_load(str(file))
    assert str(error.value).startswith(f"{file}: ")
    assert words in str(error.value)
