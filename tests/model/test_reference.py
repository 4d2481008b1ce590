"""Plain generation: stopping, suppression of EOS, sampling, log-probabilities."""

import numpy as np
import pytest

from model.checkpoint import random_tensors, write_random_checkpoint
from model.reference import ReferenceModel, Sampling, generate

PROMPT = list(range(30, 42))


@pytest.fixture
def model(base_config, reference_of):
    return reference_of(base_config)


def test_loading_and_generating_in_one_call_is_the_same(model, base_config, checkpoint_of):
    expected = model.generate(PROMPT, 6).token_ids
    assert generate(base_config, checkpoint_of(base_config), PROMPT, 6).token_ids == expected
    assert len(expected) == 6


def test_a_longer_generation_begins_with_the_shorter_one(model):
    sampling = Sampling(temperature=1.2, seed=9)
    assert model.generate(PROMPT, 20, sampling).token_ids[:7] == model.generate(PROMPT, 7, sampling).token_ids


def test_a_recomputed_request_continues_with_the_same_tokens(model):
    sampling = Sampling(temperature=1.2, top_p=0.9, seed=9)
    whole = model.generate(PROMPT, 16, sampling).token_ids
    assert model.generate(PROMPT + whole[:5], 11, sampling).token_ids == whole[5:]


def test_seeds_differ_and_greedy_ignores_them(model):
    texts = {tuple(model.generate(PROMPT, 12, Sampling(temperature=3.0, seed=seed)).token_ids) for seed in range(4)}
    assert len(texts) == 4
    assert model.generate(PROMPT, 8, Sampling(seed=1)).token_ids == model.generate(PROMPT, 8).token_ids


def test_greedy_tokens_have_the_best_logprob(model):
    generation = model.generate(PROMPT, 5, Sampling(num_logprobs=3))
    for token, entry in zip(generation.token_ids, generation.logprobs, strict=True):
        assert entry.top[0] == (token, entry.logprob)
        assert entry.top[0][1] >= entry.top[1][1] >= entry.top[2][1]
    assert model.generate(PROMPT, 2).logprobs == [None, None]


def test_eos_stops_only_if_asked_and_not_before_min_tokens(base_config, tmp_path, monkeypatch):
    # A head that prefers EOS: its row points along the mean of the others, scaled up.
    tensors = random_tensors(base_config, 0)
    tensors["lm_head.weight"][1] = tensors["lm_head.weight"][2:].std(axis=0) * 6
    monkeypatch.setattr("model.checkpoint.random_tensors", lambda config, seed: tensors)
    write_random_checkpoint(tmp_path, base_config, 0)
    model = ReferenceModel(base_config, tmp_path)
    free = model.generate(PROMPT, 40).token_ids
    assert len(free) == 40
    assert 1 in free
    stopped = model.generate(PROMPT, 40, Sampling(stop_at_eos=True)).token_ids
    assert stopped == free[: free.index(1) + 1]
    late = model.generate(PROMPT, 40, Sampling(stop_at_eos=True, min_tokens=30)).token_ids
    assert 1 not in late[:30]
    assert np.flatnonzero(np.array(late) == 1).tolist() in ([], [len(late) - 1])
