"""Choice of the next token from logits, keyed by (seed, position).

Owns: temperature, top-k, top-p, EOS suppression, log-probabilities, and the random number of a token.
Must not know: requests, batches beyond their rows, any generator with state.
Source: splitmix64 (Steele, Lea, Flood 2014) as a counter-based hash; filters in the order of vLLM's sampler.

A token depends on its row's logits, seed and position alone: not on the batch it is in, its rank, or what was
sampled before. So a request that is preempted, moved or recomputed continues with the same tokens.
"""

# Shapes: S rows, V vocabulary

import numpy as np
from numpy.typing import NDArray

from model.step import SamplingBatch, TokenLogprobs

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def keyed_uniform(seed: NDArray[np.uint64], position: NDArray[np.int64]) -> NDArray[np.float64]:
    """One number in [0, 1) per (seed, position), both (S,): a pure function, uniform over either argument."""
    counter = position.astype(np.uint64) + np.uint64(1)
    # The seed is mixed first, so that seeds that differ by a multiple of the counter's stride share no stream.
    bits = _splitmix(_splitmix(seed.astype(np.uint64) + _GOLDEN) + counter * _GOLDEN)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def sample(
    logits: NDArray[np.float32], sampling: SamplingBatch, *, eos_token_id: int
) -> tuple[NDArray[np.int64], tuple[TokenLogprobs | None, ...]]:
    """Token ids (S,) chosen from logits (S, V), and log-probabilities where they are wanted."""
    assert bool(np.isfinite(logits).all()), "logits hold NaN or infinity"
    allowed = logits
    if sampling.suppress_eos.any():
        allowed = logits.copy()
        allowed[sampling.suppress_eos, eos_token_id] = -np.inf
    token_ids = allowed.argmax(axis=1) if len(logits) else np.zeros(0, np.int64)
    random_rows = np.flatnonzero(sampling.temperature > 0)
    if len(random_rows):
        rows = sampling.take(random_rows)
        probabilities = filtered_probabilities(allowed[random_rows], rows)
        token_ids[random_rows] = _inverse_cdf(probabilities, keyed_uniform(rows.seed, rows.position))
    return token_ids, _logprobs(logits, token_ids, sampling)


def filtered_probabilities(logits: NDArray[np.float32], sampling: SamplingBatch) -> NDArray[np.float64]:
    """Probabilities (S, V) after temperature, then top-k, then top-p, normalized. Temperatures must be above
    0.

    top-k keeps the k most likely tokens, the lower id on ties. top-p keeps the fewest most likely tokens
    whose share of what top-k left reaches p; the most likely token always stays.
    """
    scaled = logits.astype(np.float64) / sampling.temperature.astype(np.float64)[:, None]
    probabilities: NDArray[np.float64] = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    needs_filter = (sampling.top_k > 0) | (sampling.top_p < 1)
    if needs_filter.any():
        order = np.argsort(-probabilities, axis=1, kind="stable")
        ranked = np.take_along_axis(probabilities, order, axis=1)
        limit = np.where(sampling.top_k > 0, sampling.top_k, logits.shape[1])
        ranked[np.arange(logits.shape[1]) >= limit[:, None]] = 0
        mass_before = np.cumsum(ranked, axis=1) - ranked
        top_p = sampling.top_p.astype(np.float64)[:, None]
        is_cut = (mass_before >= top_p * ranked.sum(axis=1, keepdims=True)) & (top_p < 1)
        is_cut[:, 0] = False
        ranked[is_cut] = 0
        np.put_along_axis(probabilities, order, ranked, axis=1)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    return probabilities


def _inverse_cdf(probabilities: NDArray[np.float64], uniform: NDArray[np.float64]) -> NDArray[np.int64]:
    """The token at which the cumulative probability passes `uniform`, tokens in order of id.

    In order of id, a rounding difference in the logits moves a border by that much and no more; in order of
    probability, two nearly equal tokens could change places and swap their whole ranges.
    """
    cumulative = np.cumsum(probabilities, axis=1)
    passed = cumulative > uniform[:, None] * cumulative[:, -1:]
    # The last column is never passed if the product rounds up to the total; then the last possible token is
    # meant.
    last = probabilities.shape[1] - 1 - np.argmax(probabilities[:, ::-1] > 0, axis=1)
    token_ids: NDArray[np.int64] = np.where(passed.any(axis=1), passed.argmax(axis=1), last)
    return token_ids


def _logprobs(
    logits: NDArray[np.float32], token_ids: NDArray[np.int64], sampling: SamplingBatch
) -> tuple[TokenLogprobs | None, ...]:
    results: list[TokenLogprobs | None] = [None] * len(token_ids)
    for row in np.flatnonzero(sampling.want_logprobs).tolist():
        raw = logits[row].astype(np.float64)
        raw -= raw.max()
        raw -= np.log(np.exp(raw).sum())
        count = int(sampling.num_logprobs[row])
        top = np.argsort(-raw, kind="stable")[:count].tolist() if count else []
        results[row] = TokenLogprobs(
            logprob=float(raw[token_ids[row]]), top=tuple((token, float(raw[token])) for token in top)
        )
    return tuple(results)


def _splitmix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The output function of splitmix64; arithmetic modulo 2^64."""
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    mixed: NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return mixed
