"""Names of the full blocks of prompts, from the prompts' content: no token is made.

Owns: how content becomes names, for many requests at once.
Must not know: pools, what tokens the content stands for.
Source: the chained block hashes of vLLM v1, of which these have the meaning: a name stands for its block and for all
that precedes it. Sums of mixed 64-bit values in place of a chain, so that a batch of prompts is one vectorized pass.

The name of a block is that of the prompt's first tokens up to the block's end, so it does not matter how blocks and
pieces lie to each other. Two are equal exactly where the same streams give the same numbers of tokens in the same
order, but for chance: with n names two collide with a probability of about n**2 / 2**64.
"""

import numpy as np

from serving.core.splitmix64 import mix64
from serving.workloads.requests import TOKENS, Ints, RequestTable, offsets_of

_TOKEN_TAG = np.uint64(0x5851F42D4C957F2D)  # arbitrary: keeps a token apart from the stream of the same number


def block_names(table: RequestTable, requests: range, block_size: int) -> tuple[Ints, Ints]:
    """Names of the blocks of `requests`, one after the other, and where those of each start; a request more than there
    are gives the end. Names are in [0, 2**63): they fit in both kinds of 64-bit integers.
    """
    first, end = requests.start, requests.stop
    start, stop = int(table.offsets[first]), int(table.offsets[end])
    counts = np.diff(table.offsets[first : end + 1])
    first_element = table.offsets[first:end] - start
    lengths = table.stream_tokens[start:stop]
    ends = np.cumsum(lengths)
    request_starts = (ends - lengths)[first_element]
    starts = ends - lengths - np.repeat(request_starts, counts)  # of each element, in its prompt
    is_token = np.repeat(table.kinds[first:end] == TOKENS, counts)
    words = table.streams[start:stop].astype(np.uint64) ^ np.where(is_token, _TOKEN_TAG, np.uint64(0))
    heads = mix64(mix64(words) + starts.astype(np.uint64))  # an element and its place
    sums = np.zeros(len(heads) + 1, np.uint64)
    np.cumsum(mix64(heads + lengths.astype(np.uint64)), out=sums[1:])
    before = sums[:-1] - np.repeat(sums[first_element], counts)  # all whole elements that precede this one

    num_blocks = table.num_prompt_tokens[first:end] // block_size
    offsets = offsets_of(num_blocks)
    block_ends = (np.arange(1, offsets[-1] + 1) - np.repeat(offsets[:-1], num_blocks)) * block_size
    elements = np.searchsorted(ends, block_ends + np.repeat(request_starts, num_blocks))
    parts = (block_ends - starts[elements]).astype(np.uint64)
    names = mix64(before[elements] + mix64(heads[elements] + parts)) >> np.uint64(1)
    return names.astype(np.int64), offsets
