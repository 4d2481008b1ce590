"""Synthetic prompts: random ones, with shared prefixes if wanted; and the words that stand for token ids.

Owns: the workload of random prompts, and texts of about as many tokens as asked for.
Must not know: traces, what is fitted to them (serving/workloads/generators.py).
Source: `vllm bench serve` random and prefix_repetition data sets for the parameters.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from serving.errors import ConfigError
from serving.workloads.arrivals import Arrivals, generator_for
from serving.workloads.requests import RequestTable
from serving.workloads.workload import DEFAULT_VOCABULARY, Workload


def synthetic_workload(
    *,
    num_requests: int,
    input_len: int,
    output_len: int,
    range_ratio: float = 0.0,
    num_prefixes: int = 0,
    prefix_len: int = 0,
    seed: int = 0,
    arrivals: Arrivals | None = None,
    vocabulary: range = DEFAULT_VOCABULARY,
    name: str = "synthetic",
) -> Workload:
    """Random prompts, each after one of `num_prefixes` shared prefixes of `prefix_len` tokens.

    `input_len` counts the whole prompt, the prefix included. Lengths are uniform in [len * (1 - range_ratio),
    len * (1 + range_ratio)], and a prompt has at least one token of its own. Every prefix is used equally
    often (give or take one), in random order. With `arrivals` None the workload is a closed loop.
    """
    for field, value, least in (
        ("num_requests", num_requests, 1),
        ("input_len", input_len, 1),
        ("output_len", output_len, 1),
        ("num_prefixes", num_prefixes, 0),
        ("prefix_len", prefix_len, 0),
    ):
        if value < least:
            raise ConfigError(f"{field}: {value} is below the limit {least}")
    if not 0.0 <= range_ratio < 1.0:
        raise ConfigError(f"range_ratio: {range_ratio} is not in [0, 1)")
    shared_len = prefix_len if num_prefixes else 0
    if shared_len >= input_len:
        raise ConfigError(f"prefix_len: {prefix_len} must be below input_len {input_len}")
    input_lens = _lengths(generator_for(seed, "input_len"), num_requests, input_len, range_ratio)
    output_lens = _lengths(generator_for(seed, "output_len"), num_requests, output_len, range_ratio)
    seeds = generator_for(seed, "sampling").integers(2**31, size=num_requests)
    prefixes = np.arange(num_requests) % max(num_prefixes, 1)
    generator_for(seed, "prefixes").shuffle(prefixes)
    num_own = np.maximum(input_lens - shared_len, 1)
    # Even streams are prefixes and odd ones are requests' own, so neither shifts the other.
    streams, stream_tokens = 2 * np.arange(num_requests) + 1, num_own
    if shared_len:
        streams = np.stack([2 * prefixes, streams], axis=1).ravel()
        stream_tokens = np.stack([np.full(num_requests, shared_len), num_own], axis=1).ravel()
    table = RequestTable.of_pieces(
        name,
        num_prompt_tokens=shared_len + num_own,
        max_tokens=output_lens,
        arrival_ns=None,
        seeds=seeds,
        offsets=np.arange(num_requests + 1) * (2 if shared_len else 1),
        streams=streams,
        stream_tokens=stream_tokens,
    )
    workload = Workload(name=name, requests=table, seed=seed, vocabulary=vocabulary)
    return workload if arrivals is None else workload.with_arrivals(arrivals)


# Short words that common vocabularies hold as one token when a space precedes them.
_WORDS = tuple(
    word
    for line in (
        "the of and to in is that it for was on are as with his they at be this from have or by one had not",
        "but what all were when we there can an your which their said if do will each about how up out them",
        "then she many some so these would other into has more her two like him see time could no make than",
    )
    for word in line.split()
)


def words_from_token_ids(token_ids: Sequence[int] | NDArray[np.int64]) -> str:
    """A text with one common word per token id, for endpoints that take only text; equal ids, equal words.

    Its length in the endpoint's own tokens is about right, and exact only in what the endpoint reports.
    """
    return " ".join(_WORDS[int(token_id) % len(_WORDS)] for token_id in token_ids)


def _lengths(rng: np.random.Generator, count: int, mean: int, range_ratio: float) -> NDArray[np.int64]:
    low = max(int(np.ceil(mean * (1 - range_ratio))), 1)
    high = max(int(mean * (1 + range_ratio)), low)
    return rng.integers(low, high + 1, size=count)
