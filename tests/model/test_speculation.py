"""Verifying drafts and making new ones, on ranks that a test drives by hand: tokens are those of plain generation."""

import dataclasses

import numpy as np
import pytest
import torch

from model.collectives import run_lockstep
from model.latent_cache import LatentCache
from model.layout import make_layouts
from model.mtp import MtpModule
from model.reference import ReferenceModel, Sampling
from model.sampling import filtered_probabilities
from model.speculation import SpeculativeTransformer, module_rows
from model.step import DraftingBatch, SamplingBatch, StepInput
from model.transformer import Transformer
from model.weights import load_rank_weights
from tests.drafted import write_drafted_checkpoint

GAINS = {"right": 0.0, "mixed": 0.03, "wrong": None}  # of the context; None: random weights


@pytest.fixture(scope="module")
def drafted(tmp_path_factory, base_config, checkpoint_of):
    """A function: directory of a checkpoint whose drafts are right, mixed or wrong."""
    directories = {}

    def write(kind):
        if GAINS[kind] is None:
            return checkpoint_of(base_config)
        if kind not in directories:
            directories[kind] = tmp_path_factory.mktemp(kind)
            write_drafted_checkpoint(directories[kind], base_config, context_gain=GAINS[kind])
        return directories[kind]

    return write


def make_ranks(config, directory, world_size, attention="data_parallel"):
    ranks = []
    for layout in make_layouts(config, world_size=world_size, attention=attention, max_num_tokens=64):
        weights = load_rank_weights(directory, config, layout, with_mtp=True)
        cache = LatentCache(config, 16, 4, with_mtp=True)
        main, module = Transformer(config, layout, weights, cache), MtpModule(config, layout, weights, cache)
        ranks.append((SpeculativeTransformer(config, layout, main, module), cache))
    return ranks


@dataclasses.dataclass
class Generation:
    """One request on rank 0, stepped by hand. `draftless` steps make no draft, so that the next one is behind."""

    ranks: list
    prompt: list
    sampling: Sampling
    chunk: int = 64
    draftless: tuple = ()

    def __post_init__(self):
        self.tokens = list(self.prompt)
        self.computed = self.num_steps = self.num_accepted = self.num_drafts = 0
        self.draft = self.carried = None
        self.logprobs = []

    def run(self, num_tokens):
        total = len(self.prompt) + num_tokens
        while len(self.tokens) < total:
            self.step(total)
        return self.tokens[len(self.prompt) :]

    def step(self, total):
        end = min(len(self.tokens), self.computed + self.chunk)
        is_last = end == len(self.tokens)
        draft = [] if self.draft is None or total - len(self.tokens) < 2 else [self.draft]
        makes = is_last and self.num_steps not in self.draftless
        inputs = self.tokens[self.computed : end] + draft
        size, num_samples = len(inputs), (1 + len(draft)) * is_last
        step = StepInput(
            token_ids=inputs,
            positions=np.arange(self.computed, self.computed + size),
            query_start=[0, size],
            seq_lens=[self.computed + size],
            block_tables=[[5, 1, 7, 2, 9, 4, 11, 3, 0, 12]],
            sample_rows=np.arange(size)[size - num_samples :],
            sampling=self.samplings(num_samples),
            drafting=DraftingBatch(
                num_drafts=[len(draft)],
                is_behind=[self.draft is None],
                makes_draft=[makes],
                eos_position=[len(self.prompt) + self.sampling.min_tokens],
                carried_ids=[] if self.carried is None else [0],
                carried=np.zeros((0, 64)) if self.carried is None else self.carried,
            ),
        )
        idle = StepInput.idle(DraftingBatch.idle(64))
        steps = [step, *[idle] * (len(self.ranks) - 1)]
        output, *_ = run_lockstep([rank.forward(s) for (rank, _), s in zip(self.ranks, steps, strict=True)])
        self.num_steps += 1
        new = output.token_ids.tolist()
        self.num_drafts += len(draft)
        if draft and new[0] == draft[0]:
            self.num_accepted += 1
        else:
            new = new[:1]
        self.tokens += new
        self.logprobs += output.logprobs[: len(new)]
        self.computed = len(self.tokens) - 1 if is_last else end
        self.draft = output.drafts.token_ids[0] if makes else None
        self.carried = None if makes else output.drafts.hidden

    def samplings(self, count):
        s = self.sampling
        positions = len(self.tokens) + np.arange(count)
        return SamplingBatch(
            temperature=np.full(count, s.temperature),
            top_p=np.full(count, s.top_p),
            top_k=np.full(count, s.top_k),
            seed=np.full(count, s.seed),
            position=positions,
            suppress_eos=positions - len(self.prompt) < s.min_tokens,
            want_logprobs=np.full(count, s.num_logprobs is not None),
            num_logprobs=np.full(count, s.num_logprobs or 0),
        )


@pytest.mark.parametrize("kind", GAINS)
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize(
    "sampling", [Sampling(num_logprobs=2), Sampling(temperature=1.0, seed=7, top_p=0.9)], ids=["greedy", "sampled"]
)
def test_drafts_change_no_token(kind, world_size, sampling, drafted, base_config, random_prompt):
    directory, prompt = drafted(kind), random_prompt(9)
    expected = ReferenceModel(base_config, directory).generate(prompt, 21, sampling)
    generation = Generation(make_ranks(base_config, directory, world_size), prompt, sampling)
    assert generation.run(21) == expected.token_ids
    rate = generation.num_accepted / generation.num_drafts
    assert {"right": rate == 1, "mixed": 0.1 < rate < 1, "wrong": rate < 0.2}[kind], rate
    for got, wanted in zip(generation.logprobs, expected.logprobs, strict=True):
        assert (got is None) == (wanted is None)
        assert got is None or got.logprob == pytest.approx(wanted.logprob, abs=1e-4)


@pytest.mark.parametrize("kind", GAINS)
def test_chunks_and_steps_without_a_draft_change_neither_tokens_nor_the_modules_cache(
    kind, drafted, base_config, random_prompt
):
    """What is carried from chunk to chunk, or over a step that made no draft, is what one step would have had."""
    directory, prompt = drafted(kind), random_prompt(14)
    caches, tokens, accepted = [], [], []
    for chunk, draftless in ((64, ()), (5, ()), (1, ()), (64, (0, 3, 4)), (3, (4, 7))):
        ranks = make_ranks(base_config, directory, 1)
        generation = Generation(ranks, prompt, Sampling(), chunk=chunk, draftless=draftless)
        tokens.append(generation.run(13))
        accepted.append(generation.num_accepted)
        blocks = ranks[0][1].read_blocks([5, 1, 7, 2, 9, 4])
        caches.append(torch.from_numpy(blocks[3].reshape(24, -1)))  # the module's layer
    assert all(other == tokens[0] for other in tokens[1:])
    assert accepted[1] == accepted[0]
    for cache in caches[1:]:
        torch.testing.assert_close(cache, caches[0], rtol=0, atol=1e-4)


def test_a_split_prefill_leaves_the_same_latents_and_hidden_states_as_one_rank(base_config, checkpoint_of, make_step):
    """Three requests in chunks, the second step with carried states and one request of a single row."""
    directory, hidden_size = checkpoint_of(base_config), base_config.hidden_size
    lengths, blocks = [9, 5, 2], [[5, 1, 7], [2, 9, 4], [11, 3, 0]]
    prompts = [list(range(20 + 30 * i, 20 + 30 * i + length)) for i, length in enumerate(lengths)]

    def run(world_size):
        ranks = make_ranks(base_config, directory, world_size, "sequence_tensor")
        computed, carried, states = [0, 0, 0], None, []
        for counts in ([6, 4, 1], [3, 1, 1]):
            rows = [prompt[c : c + n] for prompt, c, n in zip(prompts, computed, counts, strict=True)]
            step = StepInput(
                token_ids=np.concatenate(rows),
                positions=np.concatenate([np.arange(c, c + n) for c, n in zip(computed, counts, strict=True)]),
                query_start=np.concatenate([[0], np.cumsum(counts)]),
                seq_lens=np.add(computed, counts),
                block_tables=blocks,
                sample_rows=[],
                sampling=SamplingBatch.greedy(np.zeros(0, np.int64)),
                drafting=DraftingBatch(
                    num_drafts=[0] * 3,
                    is_behind=[True] * 3,
                    makes_draft=[False] * 3,
                    eos_position=[0] * 3,
                    carried_ids=[] if carried is None else [0, 1, 2],
                    carried=np.zeros((0, hidden_size)) if carried is None else carried,
                ),
            )
            outputs = run_lockstep([rank.forward(step) for rank, _ in ranks])
            assert np.concatenate([o.drafts.hidden_ids for o in outputs]).tolist() == [0, 1, 2]
            carried = np.concatenate([o.drafts.hidden for o in outputs])
            states.append(carried)
            computed = np.add(computed, counts).tolist()
        return [cache.read_blocks(range(12)) for _, cache in ranks], states

    (single,), expected = run(1)
    for world_size in (2, 4, 8):
        caches, states = run(world_size)
        np.testing.assert_allclose(states, expected, atol=1e-4)
        for cache in caches:
            np.testing.assert_allclose(cache, single, atol=1e-4)


def test_rows_of_the_module_follow_from_what_was_accepted():
    """Four requests: a chunk that samples, an accepted draft, a rejected one, one that is behind and ends."""
    step = StepInput(
        token_ids=[50, 51, 52, 60, 61, 70, 71, 80],
        positions=[4, 5, 6, 9, 10, 3, 4, 8],
        query_start=[0, 3, 5, 7, 8],
        seq_lens=[7, 11, 5, 9],
        block_tables=np.arange(16).reshape(4, 4),
        sample_rows=[2, 3, 4, 5, 6, 7],
        sampling=SamplingBatch.greedy(np.array([7, 10, 11, 4, 5, 9])),
        drafting=DraftingBatch(
            num_drafts=[0, 1, 1, 0],
            is_behind=[True, False, False, True],
            makes_draft=[True, True, True, False],
            eos_position=[0, 13, 0, 0],
            carried_ids=[0],
            carried=np.zeros((1, 8)),
        ),
    )
    rows = module_rows(step, np.array([53, 61, 62, 99, 98, 81]))
    assert rows.owners.tolist() == [0, 0, 0, 0, 1, 1, 2, 3]
    assert rows.step.token_ids.tolist() == [50, 51, 52, 53, 61, 62, 99, 80]
    assert rows.step.positions.tolist() == [4, 5, 6, 7, 10, 11, 4, 8]
    assert rows.previous_rows.tolist() == [-1, 0, 1, 2, 3, 4, 5, -1]
    assert rows.step.seq_lens.tolist() == [8, 12, 5, 9]
    assert rows.step.sample_rows.tolist() == [3, 5, 6]
    assert rows.draft_ids.tolist() == [0, 1, 2]
    assert rows.step.sampling.position.tolist() == [8, 12, 5]
    assert rows.step.sampling.suppress_eos.tolist() == [False, True, False]
    assert rows.hidden_ids.tolist() == [3]
    assert rows.hidden_rows.tolist() == [7]


def test_tokens_after_drafts_follow_the_models_distribution(tmp_path, base_config):
    """Chi-square over 1,500 seeds: the third token, sampled after a draft or after its correction, against the
    probabilities of all paths to it."""
    write_drafted_checkpoint(tmp_path, base_config, context_gain=0.03)
    ranks = make_ranks(base_config, tmp_path, 1)
    sampling, num_seeds = Sampling(temperature=1.5, top_k=6), 1500
    observed: dict[int, int] = {}
    num_accepted = 0
    for seed in range(num_seeds):
        generation = Generation(ranks, [30, 31], dataclasses.replace(sampling, seed=seed))
        third = generation.run(3)[-1]
        observed[third] = observed.get(third, 0) + 1
        num_accepted += generation.num_accepted
    assert 0.2 < num_accepted / num_seeds < 0.95
    model = Transformer(base_config, *_single(base_config, tmp_path))
    paths = {(30, 31): 1.0}
    for _ in range(3):
        paths = {
            (*path, token): probability * share
            for path, probability in paths.items()
            for token, share in _probabilities(_logits(model, list(path)), sampling).items()
        }
    expected: dict[int, float] = {}
    for path, probability in paths.items():
        expected[path[-1]] = expected.get(path[-1], 0.0) + probability * num_seeds
    assert set(observed) <= set(expected)
    common = {token: count for token, count in expected.items() if count >= 5}
    statistic = sum((observed.get(token, 0) - count) ** 2 / count for token, count in common.items())
    assert len(common) >= 10
    assert statistic < len(common) + 4 * (2 * len(common)) ** 0.5  # four standard deviations above the mean


def _single(config, directory):
    (layout,) = make_layouts(config, world_size=1, max_num_tokens=64)
    return layout, load_rank_weights(directory, config, layout), LatentCache(config, 16, 4)


def _logits(model, tokens):
    step = StepInput(
        token_ids=tokens,
        positions=np.arange(len(tokens)),
        query_start=[0, len(tokens)],
        seq_lens=[len(tokens)],
        block_tables=[[0, 1]],
        sample_rows=[],
        sampling=SamplingBatch.greedy(np.zeros(0, np.int64)),
    )
    ((hidden, _),) = run_lockstep([model.hidden_states(step)])
    return model.logits(hidden[-1:]).numpy()


def _probabilities(logits, sampling):
    batch = SamplingBatch.greedy(np.zeros(1, np.int64))
    batch = dataclasses.replace(batch, temperature=[sampling.temperature], top_k=[sampling.top_k])
    (row,) = filtered_probabilities(logits, batch)
    return {int(token): float(row[token]) for token in np.flatnonzero(row)}
