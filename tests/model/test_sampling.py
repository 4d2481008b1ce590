"""The keyed random number, the filters, and log-probabilities."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from model.sampling import filtered_probabilities, keyed_uniform, sample
from model.step import SamplingBatch

EOS_ID = 1


def batch(size, **changes):
    fields = {
        "temperature": np.ones(size),
        "top_p": np.ones(size),
        "top_k": np.zeros(size),
        "seed": np.arange(size, dtype=np.uint64),
        "position": np.arange(size) * 3,
        "suppress_eos": np.zeros(size, np.bool_),
        "want_logprobs": np.zeros(size, np.bool_),
        "num_logprobs": np.zeros(size),
    }
    return SamplingBatch(**(fields | {name: np.broadcast_to(value, size) for name, value in changes.items()}))


def random_logits(rows, vocabulary, seed=0, spread=2.0):
    return (np.random.default_rng(seed).standard_normal((rows, vocabulary)) * spread).astype(np.float32)


def plain_filter(logits, temperature, top_k, top_p):
    """The filters for one row, token by token."""
    weights = np.exp((logits - logits.max()) / temperature)
    order = sorted(range(len(logits)), key=lambda token: (-weights[token], token))
    order = order[: top_k or None]
    total, mass, kept = sum(weights[token] for token in order), 0.0, []
    for token in order:
        if kept and top_p < 1 and mass >= top_p * total:
            break
        kept.append(token)
        mass += weights[token]
    return kept, {token: weights[token] / mass for token in kept}


def is_border(logits, temperature, top_k, top_p):
    """Whether rounding of the sums could decide which tokens top-p keeps."""
    kept = [plain_filter(logits, temperature, top_k, top_p * (1 + nudge))[0] for nudge in (-1e-9, 1e-9)]
    return top_p < 1 and kept[0] != kept[1]


def test_the_keyed_uniform_is_pinned():
    # Literal values: a change of the hash would change every sampled text.
    values = keyed_uniform(np.array([0, 0, 1, 2**64 - 1], np.uint64), np.array([0, 1, 0, 163839]))
    assert values.tolist() == [0.6524484863740322, 0.7012121095215252, 0.36818951565166946, 0.886428688756519]


@pytest.mark.parametrize("vary", ["position", "seed"])
def test_the_keyed_uniform_is_uniform_and_uncorrelated_over_either_argument(vary):
    size = 200_000
    moving, fixed = np.arange(size), np.full(size, 12345)
    seed, position = (moving, fixed) if vary == "seed" else (fixed, moving)
    values = keyed_uniform(seed.astype(np.uint64), position)
    assert values.min() >= 0
    assert values.max() < 1
    assert abs(values.mean() - 0.5) < 4 / np.sqrt(12 * size)
    counts = np.bincount((values * 100).astype(int), minlength=100)
    chi_square = ((counts - size / 100) ** 2 / (size / 100)).sum()
    assert 50 < chi_square < 160  # 99 degrees of freedom: beyond either end is less likely than 1 in 10,000
    for lag in (1, 2, 7):
        assert abs(np.corrcoef(values[:-lag], values[lag:])[0, 1]) < 4.5 / np.sqrt(size)


def test_seeds_do_not_share_their_streams():
    # A counter hash that only adds would give seed s at position p + 1 what another seed has at p.
    positions = np.arange(1000)
    streams = [keyed_uniform(np.full(1000, seed, np.uint64), positions) for seed in range(20)]
    golden = 0x9E3779B97F4A7C15
    streams += [keyed_uniform(np.full(1000, (golden * k) % 2**64, np.uint64), positions) for k in range(1, 20)]
    assert len(np.unique(np.concatenate(streams))) == len(streams) * 1000


def test_temperature_zero_takes_the_best_token_and_the_lowest_id_on_ties():
    logits = np.array([[0, 3, 3, 1], [5, 4, 5, 5]], np.float32)
    token_ids, logprobs = sample(logits, batch(2, temperature=0), eos_token_id=EOS_ID)
    assert token_ids.tolist() == [1, 0]
    assert logprobs == (None, None)


def test_no_rows_give_no_tokens():
    token_ids, logprobs = sample(np.zeros((0, 9), np.float32), batch(0), eos_token_id=EOS_ID)
    assert token_ids.shape == (0,)
    assert token_ids.dtype == np.int64
    assert logprobs == ()


@settings(max_examples=150, deadline=None)
@given(
    hnp.arrays(np.float32, 12, elements=st.floats(-6, 6, width=32)),
    st.floats(0.1, 3.0),
    st.integers(0, 14),
    st.floats(0.01, 1.0),
)
def test_the_filters_keep_what_their_definition_keeps(logits, temperature, top_k, top_p):
    row = batch(1, temperature=temperature, top_k=top_k, top_p=top_p)
    temperature, top_p = float(row.temperature[0]), float(row.top_p[0])
    logits = np.round(logits * 4).astype(np.float64) / 4  # exact in float32, and with many ties
    assume(not is_border(logits, temperature, top_k, top_p))
    kept, expected = plain_filter(logits, temperature, top_k, top_p)
    probabilities = filtered_probabilities(logits[None].astype(np.float32), row)[0]
    assert sorted(kept) == np.flatnonzero(probabilities).tolist()
    np.testing.assert_allclose([probabilities[token] for token in kept], [expected[token] for token in kept], rtol=1e-9)


def test_top_p_keeps_the_fewest_tokens_that_reach_p():
    logits = np.log(np.array([[0.5, 0.25, 0.15, 0.1]], np.float32))
    kept = {
        p: np.flatnonzero(filtered_probabilities(logits, batch(1, top_p=p))[0]).tolist() for p in (0.01, 0.6, 0.8, 1)
    }
    assert kept == {0.01: [0], 0.6: [0, 1], 0.8: [0, 1, 2], 1: [0, 1, 2, 3]}
    # Two of four equal tokens reach one half exactly; the lower ids are kept.
    assert filtered_probabilities(np.zeros((1, 4), np.float32), batch(1, top_p=0.5))[0].tolist() == [0.5, 0.5, 0, 0]


def test_top_p_counts_within_what_top_k_left():
    # Of {0.5, 0.25} renormalized, 0.5 is two thirds: enough for p = 0.6.
    logits = np.log(np.array([[0.5, 0.25, 0.15, 0.1]], np.float32))
    probabilities = filtered_probabilities(logits, batch(1, top_k=2, top_p=0.6))
    assert probabilities[0].tolist() == [1, 0, 0, 0]


def test_sampled_frequencies_follow_the_filtered_distribution():
    size = 40_000
    logits = np.repeat(random_logits(1, 30, seed=4), size, axis=0)
    rows = batch(size, temperature=0.8, top_k=12, top_p=0.9, seed=7, position=np.arange(size))
    token_ids, _ = sample(logits, rows, eos_token_id=EOS_ID)
    expected = filtered_probabilities(logits[:1], rows.take(np.array([0])))[0] * size
    counts = np.bincount(token_ids, minlength=30)
    assert not counts[expected == 0].any()
    possible = expected > 0
    chi_square = ((counts[possible] - expected[possible]) ** 2 / expected[possible]).sum()
    assert chi_square < possible.sum() - 1 + 5 * np.sqrt(2 * possible.sum())


def test_a_row_gives_the_same_token_alone_reordered_and_among_others():
    logits = random_logits(40, 50)
    rows = batch(
        40, temperature=np.tile([0, 0.7, 1.3, 2.0], 10), top_k=np.tile([0, 5], 20), top_p=np.tile([0.9, 1], 20)
    )
    together, _ = sample(logits, rows, eos_token_id=EOS_ID)
    alone = [
        int(sample(logits[i : i + 1], rows.take(np.array([i])), eos_token_id=EOS_ID)[0][0]) for i in range(len(logits))
    ]
    assert together.tolist() == alone
    order = np.random.default_rng(1).permutation(40)
    assert sample(logits[order], rows.take(order), eos_token_id=EOS_ID)[0].tolist() == together[order].tolist()


def test_a_rounding_difference_in_the_logits_rarely_changes_a_token():
    logits = random_logits(5000, 60)
    noise = np.random.default_rng(2).standard_normal(logits.shape).astype(np.float32) * 1e-5
    rows = batch(5000)
    changed = sample(logits, rows, eos_token_id=EOS_ID)[0] != sample(logits + noise, rows, eos_token_id=EOS_ID)[0]
    assert changed.mean() < 0.002


def test_eos_is_suppressed_only_where_asked_and_not_in_the_logprobs():
    logits = np.zeros((2, 4), np.float32)
    logits[:, EOS_ID] = 9
    for temperature in (0, 1):
        rows = batch(
            2, temperature=temperature, suppress_eos=np.array([True, False]), want_logprobs=True, num_logprobs=1
        )
        token_ids, logprobs = sample(logits, rows, eos_token_id=EOS_ID)
        assert token_ids[0] != EOS_ID
        assert token_ids[1] == EOS_ID
        assert logprobs[0].top[0][0] == EOS_ID
    assert logits[0, EOS_ID] == 9, "the caller's logits are left alone"


def test_logprobs_are_those_of_the_raw_distribution():
    logits = random_logits(3, 20)
    rows = batch(
        3, temperature=0.5, top_k=2, want_logprobs=np.array([True, False, True]), num_logprobs=np.array([3, 3, 0])
    )
    token_ids, logprobs = sample(logits, rows, eos_token_id=EOS_ID)
    raw = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum(axis=1, keepdims=True))
    assert logprobs[1] is None
    assert logprobs[0].logprob == pytest.approx(raw[0, token_ids[0]])
    assert [token for token, _ in logprobs[0].top] == np.argsort(-raw[0])[:3].tolist()
    assert [value for _, value in logprobs[0].top] == pytest.approx(np.sort(raw[0])[::-1][:3].tolist())
    assert logprobs[2].top == ()


def test_a_tiny_temperature_is_greedy_and_a_huge_one_uniform():
    logits = random_logits(200, 10)
    cold, _ = sample(logits, batch(200, temperature=1e-6), eos_token_id=EOS_ID)
    assert cold.tolist() == logits.argmax(axis=1).tolist()
    hot = filtered_probabilities(logits, batch(200, temperature=1e6))
    np.testing.assert_allclose(hot, 0.1, atol=1e-5)


def test_logits_that_are_not_finite_are_a_defect():
    logits = random_logits(1, 4)
    logits[0, 2] = np.nan
    with pytest.raises(AssertionError, match="logits hold NaN or infinity"):
        sample(logits, batch(1), eos_token_id=EOS_ID)
