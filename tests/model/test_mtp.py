"""The multi-token-prediction module against its mathematics written out for one sequence."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from model.collectives import run_lockstep
from model.latent_cache import LatentCache
from model.layers import rope_inverse_frequencies, rope_magnitude
from model.layout import make_layouts
from model.mtp import MtpModule
from model.transformer import Transformer
from model.weights import load_rank_weights

LENGTH = 21


class PlainMtp:
    """One MTP module on a whole sequence, from the hub's tensors: no cache, no fusing, loops over tokens and heads."""

    def __init__(self, config, tensors):
        self.config = config
        self.main = tensors
        prefix = f"model.layers.{config.num_hidden_layers}."
        self.own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

    def norm(self, x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * self.own[f"{name}.weight"]

    def product(self, x, name):
        return x @ self.own[f"{name}.weight"].T

    def mlp(self, x, name):
        return self.product(
            F.silu(self.product(x, f"{name}.gate_proj")) * self.product(x, f"{name}.up_proj"), f"{name}.down_proj"
        )

    def rotate(self, x):
        angles = torch.arange(len(x)).float()[:, None] * rope_inverse_frequencies(self.config)
        cos, sin = angles.cos() * rope_magnitude(self.config), angles.sin() * rope_magnitude(self.config)
        even, odd = x[:, 0::2], x[:, 1::2]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(1)

    def attention(self, x):
        c = self.config
        query = self.product(
            self.norm(self.product(x, "self_attn.q_a_proj"), "self_attn.q_a_layernorm"), "self_attn.q_b_proj"
        )
        latent, k_pe = self.product(x, "self_attn.kv_a_proj_with_mqa").split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        expanded = self.product(self.norm(latent, "self_attn.kv_a_layernorm"), "self_attn.kv_b_proj")
        causal = torch.full((len(x), len(x)), float("-inf")).triu(1)
        heads = []
        for q, kv in zip(
            query.chunk(c.num_attention_heads, -1), expanded.chunk(c.num_attention_heads, -1), strict=True
        ):
            q = torch.cat([q[:, : c.qk_nope_head_dim], self.rotate(q[:, c.qk_nope_head_dim :])], -1)
            k = torch.cat([kv[:, : c.qk_nope_head_dim], self.rotate(k_pe)], -1)
            heads.append(torch.softmax(q @ k.T * c.softmax_scale + causal, -1) @ kv[:, c.qk_nope_head_dim :])
        return self.product(torch.cat(heads, -1), "self_attn.o_proj")

    def mixture(self, x):
        c, outputs = self.config, []
        for token in x:
            scores = torch.sigmoid(self.product(token, "mlp.gate"))
            choice = scores + self.own["mlp.gate.e_score_correction_bias"]
            groups = choice.view(c.n_group, -1)
            kept = groups.topk(2).values.sum(-1).topk(c.topk_group).indices.tolist()
            allowed = [e if e // groups.shape[1] in kept else None for e in range(c.n_routed_experts)]
            ranked = sorted((e for e in allowed if e is not None), key=lambda e: -float(choice[e]))
            chosen = ranked[: c.num_experts_per_tok]
            total = sum(scores[e] for e in chosen)
            routed = sum(scores[e] / total * self.mlp(token, f"mlp.experts.{e}") for e in chosen)
            outputs.append(routed * c.routed_scaling_factor + self.mlp(token, "mlp.shared_experts"))
        return torch.stack(outputs)

    def logits(self, tokens, hidden):
        """After each of `tokens`; `hidden` are the main model's states of the same positions."""
        embedded = self.main["model.embed_tokens.weight"][tokens]
        previous = torch.cat([torch.zeros(1, hidden.shape[1]), hidden[:-1]])
        x = self.product(torch.cat([self.norm(embedded, "enorm"), self.norm(previous, "hnorm")], -1), "eh_proj")
        x = x + self.attention(self.norm(x, "input_layernorm"))
        x = x + self.mixture(self.norm(x, "post_attention_layernorm"))
        return self.norm(x, "shared_head.norm") @ self.main["lm_head.weight"].T


@pytest.fixture
def tokens(random_prompt):
    return random_prompt(LENGTH)


def build(config, directory, world_size, attention="data_parallel"):
    layouts = make_layouts(config, world_size=world_size, attention=attention, max_num_tokens=64)
    ranks = []
    for layout in layouts:
        weights = load_rank_weights(directory, config, layout, with_mtp=True)
        cache = LatentCache(config, 16, 4, with_mtp=True)
        ranks.append((Transformer(config, layout, weights, cache), MtpModule(config, layout, weights, cache)))
    return ranks


def draft_logits(ranks, make_step, make_request, tokens, chunks):
    """Logits of the MTP module on rank 0 while the other ranks idle."""
    request = make_request(tokens, 1, blocks=[5, 1, 7, 2, 9, 4])
    idle = make_step([], [])
    collected, last = [], torch.zeros(1, 64)
    for count in chunks:
        step = make_step([request], [count])
        states = run_lockstep([m.hidden_states(step if r == 0 else idle) for r, (m, _) in enumerate(ranks)])
        shifted = [torch.cat([last, states[0][0]])[:-1], *(state for state, _ in states[1:])]
        last = states[0][0][-1:]
        outputs = run_lockstep([mtp.forward(step if r == 0 else idle, shifted[r]) for r, (_, mtp) in enumerate(ranks)])
        collected.append(ranks[0][1].logits(outputs[0]))
        request.num_computed += count
    return torch.cat(collected)


def plain_logits(config, directory, make_step, make_request, tokens):
    """The module written out, on the hidden states of one rank."""
    (main,) = build(config, directory, 1)
    step = make_step([make_request(tokens, 1, blocks=list(range(6)))], [LENGTH])
    ((hidden, _),) = run_lockstep([main[0].hidden_states(step)])
    return PlainMtp(config, load_file(directory / "model.safetensors")).logits(torch.tensor(tokens), hidden)


@pytest.mark.parametrize("world_size", [1, 4])
@pytest.mark.parametrize("chunks", [[LENGTH], [8, 7, 1, 1, 4]], ids=["one_shot", "chunked"])
def test_the_module_equals_its_mathematics_written_out(
    world_size, chunks, tokens, base_config, checkpoint_of, make_step, make_request
):
    directory = checkpoint_of(base_config)
    logits = draft_logits(build(base_config, directory, world_size), make_step, make_request, tokens, chunks)
    expected = plain_logits(base_config, directory, make_step, make_request, tokens)
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_that_split_the_sequence_equal_the_module_on_one(
    world_size, tokens, base_config, checkpoint_of, make_step, make_request
):
    directory = checkpoint_of(base_config)
    ranks = build(base_config, directory, world_size, attention="sequence_tensor")
    step = make_step([make_request(tokens, 1, blocks=[5, 1, 7, 2, 9, 4])], [LENGTH])
    states = [hidden for hidden, _ in run_lockstep([main.hidden_states(step) for main, _ in ranks])]
    shifted = torch.cat([torch.zeros(1, 64), *states])[:-1].split([len(state) for state in states])
    outputs = run_lockstep([mtp.forward(step, rows) for (_, mtp), rows in zip(ranks, shifted, strict=True)])
    expected = plain_logits(base_config, directory, make_step, make_request, tokens)
    torch.testing.assert_close(ranks[0][1].logits(torch.cat(outputs)), expected, rtol=0, atol=2e-4)


def test_drafting_leaves_the_main_models_cache_alone(base_config, checkpoint_of, make_step, make_request, tokens):
    (main,) = build(base_config, checkpoint_of(base_config), 1)
    draft_logits([main], make_step, make_request, tokens, [LENGTH])
    with_draft = main[0].cache.read_blocks(range(16))
    (fresh,) = build(base_config, checkpoint_of(base_config), 1)
    step = make_step([make_request(tokens, 1, blocks=[5, 1, 7, 2, 9, 4])], [LENGTH])
    run_lockstep([fresh[0].hidden_states(step)])
    without = fresh[0].cache.read_blocks(range(16))
    assert (with_draft[:3] == without[:3]).all()
    assert with_draft[3].any()
    assert not without[3].any()


def test_a_module_needs_its_weights_and_its_cache_layer(base_config, checkpoint_of):
    (layout,) = make_layouts(base_config, world_size=1, max_num_tokens=8)
    without = load_rank_weights(checkpoint_of(base_config), base_config, layout)
    with pytest.raises(AssertionError, match="weights were loaded without this MTP module"):
        MtpModule(base_config, layout, without, LatentCache(base_config, 4, 4, with_mtp=True))
    loaded = load_rank_weights(checkpoint_of(base_config), base_config, layout, with_mtp=True)
    with pytest.raises(AssertionError, match="the cache was made without MTP layers"):
        MtpModule(base_config, layout, loaded, LatentCache(base_config, 4, 4))
