"""Norm, activation and rotary positions against their formulas."""

import math

import pytest
import torch

from model.config import RopeScaling
from model.layers import (
    apply_rope,
    rms_norm,
    rope_inverse_frequencies,
    rope_magnitude,
    rope_turns,
    swiglu,
)


def test_rms_norm_divides_by_the_root_mean_square():
    x = torch.tensor([[3.0, 4.0]])
    expected = x / math.sqrt((9 + 16) / 2 + 0.5) * torch.tensor([1.0, 2.0])
    torch.testing.assert_close(rms_norm(x, torch.tensor([1.0, 2.0]), 0.5), expected)


def test_swiglu_gates_the_second_half_with_the_first():
    x = torch.tensor([[1.0, -2.0, 3.0, 4.0]])
    expected = torch.tensor([[1 / (1 + math.exp(-1)) * 3, -2 / (1 + math.exp(2)) * 4]])
    torch.testing.assert_close(swiglu(x), expected)


def test_rope_turns_interleaved_pairs_by_position_times_frequency(make_config):
    config = make_config(rope_scaling=None, qk_rope_head_dim=4, rope_theta=100.0)
    frequencies = rope_inverse_frequencies(config)
    assert frequencies.tolist() == pytest.approx([1.0, 0.1])
    x = torch.tensor([[1.0, 0.0, 0.0, 2.0]])
    turned = apply_rope(x, rope_turns(torch.tensor([3]), frequencies, rope_magnitude(config)))
    expected = [math.cos(3), math.sin(3), -2 * math.sin(0.3), 2 * math.cos(0.3)]
    assert turned[0].tolist() == pytest.approx(expected, abs=1e-6)
    per_head = apply_rope(x.repeat(1, 2).view(1, 2, 4), rope_turns(torch.tensor([3]), frequencies, 1.0))
    torch.testing.assert_close(per_head[0], turned.expand(2, 4))


def test_scores_depend_on_the_distance_of_positions_only(base_config):
    frequencies = rope_inverse_frequencies(base_config)
    query, key = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))

    def score(at, distance):
        turns = rope_turns(torch.tensor([at + distance, at]), frequencies, 1.0)
        turned = apply_rope(torch.stack([query, key]), turns)
        return float(turned[0] @ turned[1])

    assert score(0, 5) == pytest.approx(score(100, 5), abs=1e-4)
    assert score(0, 5) != pytest.approx(score(0, 6), abs=1e-2)


def test_yarn_keeps_fast_pairs_and_slows_slow_ones_by_the_factor(make_config):
    scaling = RopeScaling(factor=40.0, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0)
    config = make_config(qk_rope_head_dim=64, rope_scaling=scaling)
    plain = rope_inverse_frequencies(make_config(qk_rope_head_dim=64, rope_scaling=None))
    ratio = plain / rope_inverse_frequencies(config)
    # R1's own numbers: the ramp runs from pair 10 to pair 23
    torch.testing.assert_close(ratio[:11], torch.ones(11))
    torch.testing.assert_close(ratio[23:], torch.full((9,), 40.0))
    assert bool((ratio[10:24].diff() > 0).all())


def test_yarn_scales_the_rotated_vectors_only_if_its_two_temperatures_differ(make_config):
    def with_mscale(mscale, mscale_all_dim):
        return make_config(
            rope_scaling=RopeScaling(
                factor=8.0, original_max_position_embeddings=32, mscale=mscale, mscale_all_dim=mscale_all_dim
            )
        )

    assert rope_magnitude(with_mscale(1.0, 1.0)) == 1.0
    assert rope_magnitude(with_mscale(1.0, 0.0)) == pytest.approx(0.1 * math.log(8) + 1)
    assert with_mscale(1.0, 0.0).softmax_scale == pytest.approx(24**-0.5)
