"""Latent attention: both forms, chunks, cached prefixes, batches, and the bound on memory."""

import numpy as np
import pytest
import torch

from model.attention_batch import AttentionPlanner
from model.collectives import run_lockstep
from model.latent_cache import LatentCache
from model.layout import make_layouts
from model.mla import LatentAttention, attend_absorbed, attend_naive
from model.transformer import Transformer
from model.weights import load_rank_weights

CONTEXTS = (13, 1, 29, 8, 21)
CLOSE = {"rtol": 0, "atol": 2e-5}


@pytest.fixture(
    params=[{}, {"q_lora_rank": None, "rope_scaling": None, "num_attention_heads": 2}], ids=["lora", "full"]
)
def config(request, make_config):
    return make_config(**request.param)


@pytest.fixture
def weights(config, checkpoint_of):
    (layout,) = make_layouts(config, world_size=1, max_num_tokens=256)
    return load_rank_weights(checkpoint_of(config), config, layout)


@pytest.fixture
def make_model(config, weights):
    def make(form=None):
        (layout,) = make_layouts(config, world_size=1, max_num_tokens=256)
        return Transformer(config, layout, weights, LatentCache(config, 64, 4), form=form)

    return make


@pytest.fixture
def make_requests(make_request, random_prompt):
    """Requests with fixed prompts and scattered blocks."""
    prompts = [random_prompt(length) for length in CONTEXTS]
    order = np.random.default_rng(3).permutation(64).reshape(-1, 8).tolist()

    def make():
        return [make_request(prompt, 1, blocks=order[i]) for i, prompt in enumerate(prompts)]

    return make


def hidden_states(model, step):
    ((hidden, _),) = run_lockstep([model.hidden_states(step)])
    return hidden


def compute(model, make_step, requests, counts):
    """Hidden states of one step, split by request; the requests move on."""
    hidden = hidden_states(model, make_step(requests, counts))
    for request, count in zip(requests, counts, strict=True):
        request.num_computed += count
    return list(torch.split(hidden, counts))


@pytest.fixture
def one_shot(make_model, make_step, make_requests):
    """Hidden states of each request computed alone in one step, naive form."""
    states = []
    for index in range(len(CONTEXTS)):
        request = make_requests()[index]
        states += compute(make_model(attend_naive), make_step, [request], [len(request.prompt)])
    return states


@pytest.mark.parametrize("form", [attend_naive, attend_absorbed])
def test_a_batch_of_prompts_equals_each_prompt_alone_in_both_forms(
    form, make_model, make_step, make_requests, one_shot
):
    states = compute(make_model(form), make_step, make_requests(), list(CONTEXTS))
    for state, expected in zip(states, one_shot, strict=True):
        torch.testing.assert_close(state, expected, **CLOSE)


@pytest.mark.parametrize("form", [attend_naive, attend_absorbed])
def test_chunks_and_decodes_mixed_in_a_batch_equal_one_shot(form, make_model, make_step, make_requests, one_shot):
    model, requests = make_model(form), make_requests()
    collected = [[] for _ in requests]
    sizes = np.random.default_rng(1)
    while any(request.num_computed < len(request.prompt) for request in requests):
        active = [i for i, request in enumerate(requests) if request.num_computed < len(request.prompt)]
        batch = [requests[i] for i in active]
        counts = [int(min(sizes.integers(1, 8), len(r.prompt) - r.num_computed)) for r in batch]
        for i, state in zip(active, compute(model, make_step, batch, counts), strict=True):
            collected[i].append(state)
    for states, expected in zip(collected, one_shot, strict=True):
        torch.testing.assert_close(torch.cat(states), expected, **CLOSE)


def test_a_prefix_from_the_cache_equals_the_prefix_recomputed(make_model, make_step, make_requests, one_shot):
    first, second = make_requests()[2], make_requests()[2]
    source, target = make_model(), make_model()
    compute(source, make_step, [first], [16])
    second.blocks = [block ^ 1 for block in second.blocks]  # other blocks on the other side
    target.cache.write_blocks(second.blocks[:4], source.cache.read_blocks(first.blocks[:4]))
    second.num_computed = 16
    (state,) = compute(target, make_step, [second], [13])
    torch.testing.assert_close(state, one_shot[2][16:], **CLOSE)


def test_two_requests_can_share_the_blocks_of_a_prefix(make_model, make_step, make_requests, one_shot):
    model = make_model()
    first, second = make_requests()[2], make_requests()[2]
    compute(model, make_step, [first], [29])
    second.blocks = [*first.blocks[:5], 60, 61, 62]
    second.num_computed = 20
    (state,) = compute(model, make_step, [second], [9])
    torch.testing.assert_close(state, one_shot[2][20:], **CLOSE)


@pytest.mark.parametrize("max_scores", [1, 100, 1000, 10_000])
@pytest.mark.parametrize("form", [attend_naive, attend_absorbed])
def test_a_small_score_budget_changes_nothing_but_the_groups(
    max_scores, form, config, weights, make_step, make_requests
):
    """One attention layer over random latents, planned with and without a bound."""
    step = make_step(make_requests(), [n // 2 + 1 for n in CONTEXTS])
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(step.num_tokens, config.hidden_size, generator=generator)
    latents = torch.randn(64 * 4, config.latent_dim, generator=generator)
    (layout,) = make_layouts(config, world_size=1, max_num_tokens=256)
    attention = LatentAttention(config, layout, weights.blocks[0].attention, form=form)
    outputs = []
    for budget in (2**23, max_scores):
        planner = AttentionPlanner(config, num_heads=config.num_attention_heads, block_size=4, max_scores=budget)
        batch = planner.plan(step)
        for group in batch.groups:
            size = group.mask.numel() * config.num_attention_heads
            assert size <= budget or group.mask.shape[:2] == (1, 1)  # one query can not be cut
        assert sorted(torch.cat([group.rows for group in batch.groups]).tolist()) == list(range(step.num_tokens))
        (output,) = run_lockstep([attention.forward(hidden, batch, latents.clone())])
        outputs.append(output)
    torch.testing.assert_close(outputs[1], outputs[0], **CLOSE)


def test_a_decode_step_with_similar_contexts_is_one_group(config, make_step, make_request):
    contexts = (70, 200, 60, 190, 8)
    requests = [make_request([9] * n, 1, blocks=list(range(50)), num_computed=n - 1) for n in contexts]
    planner = AttentionPlanner(config, num_heads=8, block_size=4)
    # 60 is too short beside 200 (2 x 60 + 64 < 200) and opens a group of its own, which 8 joins.
    groups = planner.plan(make_step(requests, [1] * 5)).groups
    assert [group.rows.tolist() for group in groups] == [[1, 3, 0], [2, 4]]


def test_padding_never_reads_memory_that_was_never_written(make_model, make_step, make_requests, one_shot):
    model, requests = make_model(), make_requests()
    for layer in range(model.cache.num_layers):
        model.cache.layer(layer).fill_(float("nan"))
    longer = [request for request in requests if len(request.prompt) > 1]
    compute(model, make_step, longer, [len(request.prompt) - 1 for request in longer])
    # One group of five contexts from 1 to 29 slots; a masked NaN would still be a NaN.
    for state, expected in zip(compute(model, make_step, requests, [1] * 5), one_shot, strict=True):
        torch.testing.assert_close(state, expected[-1:], **CLOSE)


@pytest.mark.parametrize("num_queries", [1, 2])
def test_the_absorbed_form_agrees_with_attention_written_out(num_queries, config, weights, make_step, make_request):
    """Softmax over explicit keys and values of one request, one query at a time."""
    request = make_request(list(range(20, 31)), 1, blocks=[3, 0, 2], num_computed=11 - num_queries)
    step = make_step([request], [num_queries])
    generator = torch.Generator().manual_seed(1)
    heads, nope, rope = config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim
    q_nope = torch.randn(num_queries, heads, nope, generator=generator)
    q_pe = torch.randn(num_queries, heads, rope, generator=generator)
    latents = torch.randn(16, config.latent_dim, generator=generator)
    own = weights.blocks[0].attention
    batch = AttentionPlanner(config, num_heads=heads, block_size=4).plan(step)
    result = attend_absorbed(q_nope, q_pe, latents, batch, own, scale=config.softmax_scale)
    slots = [request.blocks[p // 4] * 4 + p % 4 for p in range(11)]
    for query in range(num_queries):
        visible = latents[slots[: 11 - num_queries + query + 1]]
        for head in range(heads):
            keys = torch.cat(
                [visible[:, : config.kv_lora_rank] @ own.w_uk[head].T, visible[:, config.kv_lora_rank :]], 1
            )
            values = visible[:, : config.kv_lora_rank] @ own.w_uv[head].T
            scores = keys @ torch.cat([q_nope[query, head], q_pe[query, head]]) * config.softmax_scale
            torch.testing.assert_close(result[query, head], torch.softmax(scores, 0) @ values, **CLOSE)
