"""The gate, dispatch and combine, and the mixture against a dense reference."""

import numpy as np
import pytest
import torch

from model.collectives import AllToAll, run_lockstep
from model.dispatch import ExpertExchange
from model.layout import make_layouts, uniform_placement
from model.moe import MixtureOfExperts, choose_experts, mlp
from model.parameters import MlpWeights, MoeWeights
from model.quant import dequantize_rows, quantize_rows
from model.weights import load_rank_weights

LAYER = 1  # the first mixture layer of the base configuration


def tokens(count, config, seed=0):
    return torch.randn(count, config.hidden_size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def whole(base_config, checkpoint_of) -> MoeWeights:
    """The mixture of one layer on a single rank: slot e holds expert e."""
    (layout,) = make_layouts(base_config, world_size=1, max_num_tokens=64)
    return load_rank_weights(checkpoint_of(base_config), base_config, layout).blocks[LAYER].mlp


def dense_mixture(x, weights, config):
    """Every expert on every token, weighted by a matrix of gate weights that is zero where an expert was not chosen."""
    experts, gate_weights = choose_experts(x, weights, config)
    matrix = torch.zeros(len(x), config.n_routed_experts).scatter_(1, experts, gate_weights)
    total = mlp(x, weights.shared)
    for expert in range(config.n_routed_experts):
        own = MlpWeights(gate_up=weights.experts_gate_up[expert], down=weights.experts_down[expert])
        total = total + matrix[:, expert : expert + 1] * mlp(x, own)
    return total


def choose_plainly(scores, bias, config):
    """The gate for one token in plain Python."""
    choice = scores + bias
    groups = choice.reshape(config.n_group, -1)
    group_scores = np.sort(groups, axis=1)[:, -2:].sum(axis=1)
    kept = np.argsort(-group_scores, kind="stable")[: config.topk_group]
    allowed = np.isin(np.arange(len(scores)) // groups.shape[1], kept)
    chosen = np.argsort(-np.where(allowed, choice, -np.inf), kind="stable")[: config.num_experts_per_tok]
    weights = scores[chosen]
    if config.norm_topk_prob:
        weights = weights / weights.sum()
    return chosen, weights * config.routed_scaling_factor


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm_topk_prob": False},
        {"n_group": 8, "topk_group": 4},
        {"n_group": 1, "topk_group": 1},
        {"topk_group": 4},
    ],
)
def test_the_gate_equals_its_definition_token_by_token(changes, make_config, whole):
    config = make_config(**changes)
    x = tokens(200, config)
    experts, weights = choose_experts(x, whole, config)
    scores = torch.sigmoid(x @ whole.gate.T).numpy()
    for token in range(len(x)):
        chosen, expected = choose_plainly(scores[token], whole.gate_bias.numpy(), config)
        assert experts[token].tolist() == chosen.tolist()
        np.testing.assert_allclose(weights[token].numpy(), expected, rtol=1e-5)


def test_the_bias_chooses_but_does_not_weigh(base_config, whole):
    x = tokens(32, base_config)
    bias = torch.zeros(16)
    bias[[3, 12]] = 10.0  # two groups win every time, one expert in each
    biased = MoeWeights(
        gate=whole.gate,
        gate_bias=bias,
        experts_gate_up=whole.experts_gate_up,
        experts_down=whole.experts_down,
        shared=whole.shared,
    )
    experts, weights = choose_experts(x, biased, base_config)
    assert all({3, 12} <= set(row) and {e // 4 for e in row} <= {0, 3} for row in experts.tolist())
    scores = torch.sigmoid(x @ whole.gate.T).gather(1, experts)
    torch.testing.assert_close(weights, scores / scores.sum(1, keepdim=True) * 2.5)


def make_mixtures(config, checkpoint, world_size, *, num_redundant=0, num_shared=0, dispatch_dtype="float32", size=64):
    layouts = make_layouts(
        config,
        world_size=world_size,
        physical_to_logical=uniform_placement(
            config, world_size=world_size, num_redundant=num_redundant, num_shared=num_shared
        ),
        shared_expert="dispatched" if num_shared else "local",
        dispatch_dtype=dispatch_dtype,
        max_num_tokens=size,
    )
    return [
        MixtureOfExperts(config, layout, load_rank_weights(checkpoint, config, layout).blocks[LAYER].mlp, moe_layer=0)
        for layout in layouts
    ]


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize(("num_redundant", "num_shared"), [(0, 0), (8, 0), (0, 8), (16, 8)])
def test_dispatch_and_combine_equal_a_dense_mixture(
    world_size, num_redundant, num_shared, base_config, checkpoint_of, whole
):
    mixtures = make_mixtures(
        base_config, checkpoint_of(base_config), world_size, num_redundant=num_redundant, num_shared=num_shared
    )
    batches = [tokens(count, base_config, seed=count) for count in (7, 0, 1, 23, 0, 2, 5, 11)[:world_size]]
    results = run_lockstep([mixture.forward(x) for mixture, x in zip(mixtures, batches, strict=True)])
    for x, (output, experts) in zip(batches, results, strict=True):
        torch.testing.assert_close(output, dense_mixture(x, whole, base_config), rtol=0, atol=1e-4)
        assert experts.shape == (len(x), base_config.num_experts_per_tok)


def test_the_sum_does_not_depend_on_where_experts_are_to_the_last_bit(base_config, checkpoint_of):
    # One token per expert product on either side, so that the products themselves round equally.
    x = tokens(1, base_config)
    outputs = []
    for world_size in (1, 4, 16):
        mixtures = make_mixtures(base_config, checkpoint_of(base_config), world_size)
        batches = [x] + [x[:0]] * (world_size - 1)
        results = run_lockstep([mixture.forward(batch) for mixture, batch in zip(mixtures, batches, strict=True)])
        outputs.append(results[0][0])
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def int8_bound(x, weights, config):
    """Elementwise bound on what INT8 dispatch may change, from the first product to the sum.

    A value is off by at most half a step, e = absmax / 254. Then |dg| <= e |W_g|_1 and |du| <= e |W_u|_1 per row of
    the matrices; silu has slope at most 1.1, so |d(silu(g) u)| <= 1.1 |dg| (|u| + |du|) + |silu(g)| |du|; and the down
    projection adds up at most |W_d| times that. The gate and a local shared expert see the unquantized token.
    """
    experts, gate_weights = choose_experts(x, weights, config)
    step = x.abs().amax(1, keepdim=True) / 254
    bound = torch.zeros_like(x)
    for k in range(config.num_experts_per_tok):
        gate_up, down = weights.experts_gate_up[experts[:, k]], weights.experts_down[experts[:, k]]
        gate, up = (gate_up @ x.unsqueeze(-1)).squeeze(-1).chunk(2, dim=-1)
        d_gate, d_up = (gate_up.abs().sum(-1) * step).chunk(2, dim=-1)
        d_hidden = 1.1 * d_gate * (up.abs() + d_up) + torch.nn.functional.silu(gate).abs() * d_up
        bound += gate_weights[:, k : k + 1] * (down.abs() @ d_hidden.unsqueeze(-1)).squeeze(-1)
    return bound + 1e-5


@pytest.mark.parametrize("world_size", [1, 4])
def test_int8_dispatch_stays_within_its_derived_bound(world_size, base_config, checkpoint_of, whole):
    mixtures = make_mixtures(base_config, checkpoint_of(base_config), world_size, dispatch_dtype="int8")
    batches = [tokens(count, base_config, seed=count) for count in (9, 3, 0, 14)[:world_size]]
    results = run_lockstep([mixture.forward(x) for mixture, x in zip(mixtures, batches, strict=True)])
    for x, (output, _) in zip(batches, results, strict=True):
        exact = dense_mixture(x, whole, base_config)
        error = (output - exact).abs()
        assert bool((error <= int8_bound(x, whole, base_config)).all())
        if len(x):
            assert 0 < float(error.mean() / exact.abs().mean()) < 0.02


def test_quantized_rows_are_within_half_a_step_and_zeros_stay_zero():
    x = tokens(50, type("Shape", (), {"hidden_size": 33})) * torch.logspace(-6, 6, 50).unsqueeze(1)
    x[7] = 0
    values, scale = quantize_rows(x)
    assert values.dtype == torch.int8
    assert int(values.abs().max()) == 127
    error = (dequantize_rows(values, scale) - x).abs()
    assert bool((error <= x.abs().amax(1, keepdim=True) / 254 * (1 + 1e-5)).all())
    assert not values[7].any()


@pytest.mark.parametrize("count", [1, 2, 16, 17, 64])
def test_few_and_many_tokens_go_through_the_same_experts(count, base_config, checkpoint_of, whole):
    x = tokens(count, base_config, seed=3)
    ((output, _),) = run_lockstep([make_mixtures(base_config, checkpoint_of(base_config), 1)[0].forward(x)])
    torch.testing.assert_close(output, dense_mixture(x, whole, base_config), rtol=0, atol=1e-4)


def test_the_copy_rule_is_rank_plus_token_modulo_copies(base_config):
    placement = np.tile(np.r_[np.arange(16), 3, 3, 7, 0], (2, 1))  # expert 3 has three copies, 7 and 0 have two
    layouts = make_layouts(base_config, world_size=4, physical_to_logical=placement, max_num_tokens=8)
    expected = {
        0: [(3, 7, 0, 1), (16, 18, 19, 1), (17, 7, 0, 1), (3, 18, 19, 1)],
        1: [(16, 18, 19, 1), (17, 7, 0, 1), (3, 18, 19, 1), (16, 7, 0, 1)],
    }
    x = torch.arange(4.0).unsqueeze(1).expand(4, 64).contiguous()  # a row's payload is its token's index
    for rank, slots_by_token in expected.items():
        exchange = ExpertExchange(base_config, layouts[rank], placement[0])
        call = next(exchange.dispatch(x, torch.tensor([[3, 7, 0, 1]] * 4)))
        sent = []
        for rows in call.rows:
            sent += zip(rows[:, 0].view(torch.float32).tolist(), rows[:, -1].tolist(), strict=True)
        assert sorted(sent) == sorted((token, slot) for token, slots in enumerate(slots_by_token) for slot in slots)
        assert [slot for _, slot in sent] == sorted(slot for _, slot in sent), "rows travel in order of slot"


@pytest.mark.parametrize(("dispatch_dtype", "width", "dtype"), [("float32", 65, torch.int32), ("int8", 72, torch.int8)])
def test_message_rows_have_the_documented_width_and_respect_the_static_buffer(
    dispatch_dtype, width, dtype, base_config
):
    layouts = make_layouts(base_config, world_size=8, dispatch_dtype=dispatch_dtype, max_num_tokens=6)
    exchange = ExpertExchange(base_config, layouts[0], layouts[0].physical_to_logical[0])
    x = tokens(6, base_config)
    # Every token wants both experts of rank 0 (0 and 8) and of rank 1: the fullest a pair of ranks can get.
    experts = torch.tensor([[0, 8, 1, 9]] * 6)
    call = next(exchange.dispatch(x, experts))
    assert isinstance(call, AllToAll)
    assert [tuple(rows.shape) for rows in call.rows] == [(12, width), (12, width)] + [(0, width)] * 6
    assert {rows.dtype for rows in call.rows} == {dtype}
    assert all(rows.is_contiguous() for rows in call.rows)
    assert layouts[0].max_rows_per_peer(base_config) == 12
    with pytest.raises(AssertionError, match="7 tokens exceed the buffers' 6"):
        next(exchange.dispatch(tokens(7, base_config), torch.tensor([[0, 8, 1, 9]] * 7)))
