"""Training: its forward pass against the served one, packing, the update rules, exact resumption."""

import itertools
from dataclasses import replace
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from model.chat import ASSISTANT, BOS, USER
from model.collectives import run_lockstep
from model.latent_cache import LatentCache
from model.layout import make_layouts
from model.parameters import named_tensors
from model.tasks.generator import KINDS, generate
from model.training.held_out import held_out_accuracy
from model.training.network import Network, initial_weights
from model.training.optimizer import Optimizer, orthogonalize
from model.training.samples import draw_batch, draw_sample, encode_sample, pack
from model.training.settings import TrainingSettings
from model.training.trainer import ResumeError, Trainer
from model.transformer import Transformer
from tests.problem_content import content_of


@pytest.fixture
def lively(tiny_training_config):
    """Weights whose every tensor matters."""
    weights = initial_weights(tiny_training_config, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, tensor in named_tensors(weights):
            tensor += 0.15 * torch.randn(tensor.shape, generator=generator)
    return weights


@pytest.fixture
def problems():
    rng = Random(2)
    return [generate(rng, "train") for _ in range(9)]


def test_forward_pass_is_the_served_one(
    tiny_training_config, lively, corpus_tokenizer, problems, make_request, make_step
):
    config = tiny_training_config
    batch = pack([encode_sample(corpus_tokenizer, problem) for problem in problems])
    with torch.no_grad():
        hidden, counts = Network(config, lively).hidden_states(batch)
    (layout,) = make_layouts(config, world_size=1, max_num_tokens=1024)
    starts = [*np.flatnonzero(batch.positions.numpy() == 0).tolist(), len(batch.token_ids)]
    served_counts = 0
    for start, stop in itertools.pairwise(starts):
        model = Transformer(config, layout, lively, LatentCache(config, 64, 16))
        request = make_request(batch.token_ids[start:stop].tolist(), 1, blocks=list(range(64)))
        step = make_step([request], [stop - start])
        with torch.no_grad():
            ((expected, chosen),) = run_lockstep([model.hidden_states(step)])
        torch.testing.assert_close(hidden[start:stop], expected, rtol=1e-3, atol=1e-4)
        served_counts += torch.stack([torch.bincount(e.flatten(), minlength=config.n_routed_experts) for e in chosen])
    assert torch.equal(counts, served_counts)


def test_a_sample_does_not_see_its_neighbors(tiny_training_config, lively, corpus_tokenizer, problems):
    network = Network(tiny_training_config, lively)
    alone = pack([encode_sample(corpus_tokenizer, problems[0])])
    together = pack([encode_sample(corpus_tokenizer, problem) for problem in problems])
    rows = next(
        slice(start, start + len(alone.token_ids))
        for start in np.flatnonzero(together.positions.numpy() == 0).tolist()
        if torch.equal(together.token_ids[start : start + len(alone.token_ids)], alone.token_ids)
    )
    with torch.no_grad():
        expected, _ = network.hidden_states(alone)
        hidden, _ = network.hidden_states(together)
    torch.testing.assert_close(hidden[rows], expected, rtol=1e-4, atol=1e-5)


def test_only_the_reply_is_learned(corpus_tokenizer, problems):
    sample = encode_sample(corpus_tokenizer, problems[0])
    batch = pack([sample])
    assert batch.targets.tolist() == sample.token_ids[sample.num_prompt_tokens :]
    assert batch.targets[-1] == corpus_tokenizer.eos_token_id
    assert batch.learned_rows[0] == sample.num_prompt_tokens - 1


def test_mtp_row_takes_its_own_token_and_the_hidden_state_before(tiny_training_config, lively, corpus_tokenizer):
    network = Network(tiny_training_config, lively)
    sample = encode_sample(corpus_tokenizer, generate(Random(1), "train"))
    row = len(sample.token_ids) // 2
    with torch.no_grad():
        batch = pack([sample])
        hidden, _ = network.hidden_states(batch)
        base, _ = network.mtp_hidden_states(batch, hidden)
        later = hidden.clone()
        later[row:] += 1.0
        moved, _ = network.mtp_hidden_states(batch, later)
        sample.token_ids[row] += 1
        other, _ = network.mtp_hidden_states(pack([sample]), hidden)
    assert torch.equal(moved[: row + 1], base[: row + 1]), "row q does not see the hidden state of q or later"
    assert not torch.equal(moved[row + 1], base[row + 1]), "row q + 1 sees the hidden state of q"
    assert torch.equal(other[:row], base[:row])
    assert not torch.equal(other[row], base[row]), "row q sees the token at q"


def test_long_samples_stay_within_the_limit(corpus_tokenizer):
    rng = Random(0)
    lengths = [len(draw_sample(rng, corpus_tokenizer, 300).token_ids) for _ in range(700)]
    assert max(lengths) <= 300
    assert max(lengths) > 250, "some conversation fills the context"


def test_batches_are_a_function_of_seed_step_and_shard(corpus_tokenizer):
    def ids(*key: int) -> list[int]:
        return draw_batch(*key, corpus_tokenizer, num_tokens=300, max_tokens=256).token_ids.tolist()

    assert ids(0, 1, 0) == ids(0, 1, 0)
    assert ids(0, 1, 0) != ids(0, 1, 1)
    assert ids(0, 1, 0) != ids(0, 2, 0)
    assert ids(0, 1, 0) != ids(1, 1, 0)


def test_no_conversation_asks_a_held_out_problem(corpus_tokenizer):
    """Earlier turns included, and whatever the wording."""
    asked, num_samples = [], 0
    for step in range(12):
        batch = draw_batch(0, step, 0, corpus_tokenizer, num_tokens=4096, max_tokens=1024)
        text = corpus_tokenizer.decode(batch.token_ids.tolist(), skip_special_tokens=False)
        num_samples += text.count(BOS)
        asked += [turn.split(ASSISTANT)[0] for turn in text.split(USER)[1:]]
    contents = {content_of(question) for question in asked}
    assert len(asked) > 1.1 * num_samples, "earlier turns are among them"
    assert {content[0] for content in contents} == set(KINDS)
    rng = Random(5)
    held_out = {content_of(generate(rng, "test", levels=[level]).question) for level in (1, 2, 3) * 2000}
    assert contents.isdisjoint(held_out)


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (5, 16, 8)])
def test_orthogonalize_brings_singular_values_near_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrix))
    assert float(values.min()) > 0.5
    assert float(values.max()) < 1.35


def test_adam_is_torchs_adam():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(7, 3, generator=generator)
    gradients = [torch.randn(7, 3, generator=generator) for _ in range(5)]
    ours, theirs = start.clone(), torch.nn.Parameter(start.clone())
    optimizer = Optimizer({"embedding": ours}, matrices=set(), weight_decay=0.0)
    oracle = torch.optim.Adam([theirs], lr=0.01, betas=(0.9, 0.95), eps=1e-10)
    for gradient in gradients:
        optimizer.step({"embedding": gradient}, muon_rate=0.0, adam_rate=0.01)
        theirs.grad = gradient.clone()
        oracle.step()
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-6)


def test_rates_warm_up_hold_and_fall_to_zero():
    settings = TrainingSettings(num_steps=100, warmup_steps=10, decay_fraction=0.4)
    assert [settings.rate(step) for step in (0, 9, 50, 80, 99)] == pytest.approx([0.1, 1.0, 1.0, 0.5, 0.025])


def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(
    tiny_training_config, tiny_settings, corpus_tokenizer, tmp_path
):
    whole = Trainer(tiny_training_config, tiny_settings, corpus_tokenizer)
    for _ in range(5):
        whole.run_step()
    first = Trainer(tiny_training_config, tiny_settings, corpus_tokenizer)
    for _ in range(3):
        first.run_step()
    first.save(tmp_path / "state.pt")
    second = Trainer(tiny_training_config, tiny_settings, corpus_tokenizer)
    second.resume(tmp_path / "state.pt")
    for _ in range(2):
        second.run_step()
    assert second.history == whole.history
    for (name, ours), (_, theirs) in zip(named_tensors(second.weights), named_tensors(whole.weights), strict=True):
        assert torch.equal(ours, theirs), name
    assert whole.history[-1]["loss"] < whole.history[0]["loss"]


def test_a_state_of_another_run_is_refused(tiny_training_config, tiny_settings, corpus_tokenizer, tmp_path):
    Trainer(tiny_training_config, tiny_settings, corpus_tokenizer).save(tmp_path / "state.pt")
    other = Trainer(tiny_training_config, replace(tiny_settings, seed=1), corpus_tokenizer)
    with pytest.raises(ResumeError, match="seed was 0, now 1"):
        other.resume(tmp_path / "state.pt")
    wider = Trainer(replace(tiny_training_config, intermediate_size=80), tiny_settings, corpus_tokenizer)
    with pytest.raises(ResumeError, match="another shape"):
        wider.resume(tmp_path / "state.pt")


def test_the_bias_moves_toward_idle_experts(tiny_training_config, tiny_settings, corpus_tokenizer):
    trainer = Trainer(tiny_training_config, tiny_settings, corpus_tokenizer)
    biases = [tensor for name, tensor in named_tensors(trainer.weights) if name.endswith("gate_bias")]
    assert len(biases) == tiny_training_config.num_moe_layers + 1, "the MTP module's gate is balanced, too"
    s, network = tiny_settings, Network(tiny_training_config, initial_weights(tiny_training_config, tiny_settings.seed))
    counts = 0
    for shard in range(s.num_shards):
        batch = draw_batch(
            s.seed, 0, shard, corpus_tokenizer, num_tokens=s.tokens_per_shard, max_tokens=s.max_sample_tokens
        )
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            counts = counts + network.losses(batch).expert_counts
    trainer.run_step()
    for bias, chosen in zip(biases, counts.float(), strict=True):
        direction = torch.sign(chosen.mean() - chosen)
        assert {-1.0, 1.0} <= set(direction.tolist()), "some experts are idle, some busy"
        assert torch.equal(bias, s.balance_rate * direction)


def test_held_out_accuracy_counts_whole_replies(tiny_training_config, corpus_tokenizer):
    weights = initial_weights(tiny_training_config, 0)
    accuracy = held_out_accuracy(Network(tiny_training_config, weights), weights, corpus_tokenizer, per_kind=3)
    assert set(accuracy.by_kind.values()) == {0.0}, "an untrained model reproduces nothing"
    assert accuracy.mean == 0.0


class Clairvoyant:
    """A network whose hidden states tell the next token to `codes`, except at the `wrong` learned rows of one kind."""

    def __init__(self, codes, wrong, kind):
        self.codes, self.wrong, self.kind = codes, wrong, kind
        self.kinds = iter(KINDS)

    def hidden_states(self, batch):
        following = batch.token_ids.roll(-1)
        if next(self.kinds) == self.kind:
            following[torch.as_tensor(self.wrong(batch), dtype=torch.long)] += 1
        return self.codes[following], None


def replies_of(batch):
    """Learned rows of every sample."""
    starts = (batch.positions == 0).cumsum(0)[batch.learned_rows]
    return [batch.learned_rows[starts == sample] for sample in starts.unique()]


@pytest.mark.parametrize(
    ("wrong", "num_right"),
    [
        (lambda batch: [], 5),
        (lambda batch: [row for row in range(len(batch.positions)) if row not in set(batch.learned_rows.tolist())], 5),
        (lambda batch: replies_of(batch)[0][0], 4),
        (lambda batch: replies_of(batch)[2][9], 4),
        (lambda batch: replies_of(batch)[4][-1], 4),
        (lambda batch: replies_of(batch)[1], 4),
        (lambda batch: [replies_of(batch)[1][3], replies_of(batch)[3][3]], 3),
        (lambda batch: batch.learned_rows, 0),
    ],
    ids=["none", "all of the questions", "first token", "middle", "end of text", "whole reply", "two replies", "all"],
)
def test_one_wrong_token_makes_one_reply_wrong(tiny_training_config, corpus_tokenizer, wrong, num_right):
    ids = torch.arange(tiny_training_config.vocab_size)
    codes = (ids.unsqueeze(1) >> torch.arange(11)) % 2 * 2.0 - 1.0  # binary, so that each is most like itself
    network = Clairvoyant(codes, wrong, "sorting")
    accuracy = held_out_accuracy(network, SimpleNamespace(lm_head=codes), corpus_tokenizer, per_kind=5)
    assert accuracy.by_kind == pytest.approx(dict.fromkeys(KINDS, 1.0) | {"sorting": num_right / 5})
    assert accuracy.mean == pytest.approx((10 + num_right / 5) / 11)
