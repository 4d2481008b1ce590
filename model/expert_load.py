"""How much each expert is used: measured on held-out problems with their right replies.

Owns: which tokens are counted.
Must not know: placements, files, serving.

Teacher-forced: a problem's prompt and right reply pass through the model at once, as prefill would compute them. These
are the tokens that generation of that reply computes, for the price of one pass.
"""

from collections.abc import Sequence
from random import Random

import numpy as np
from numpy.typing import NDArray

from model.reference import ReferenceModel
from model.tasks.generator import generate
from model.tokenizer import Tokenizer
from model.training.samples import encode_sample


def measure_expert_load(
    model: ReferenceModel, tokenizer: Tokenizer, kind: str, *, num_problems: int, seed: int
) -> NDArray[np.int64]:
    """Tokens (num_moe_layers, n_routed_experts) that each expert got in `num_problems` held-out problems of a kind."""
    rng = Random(f"{seed}/{kind}")
    samples = [encode_sample(tokenizer, generate(rng, "test", kinds=[kind])) for _ in range(num_problems)]
    return sum_counts([model.expert_counts(sample.token_ids[:-1]) for sample in samples])  # the last is never fed


def sum_counts(counts: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Element by element."""
    total: NDArray[np.int64] = np.sum(counts, axis=0)
    return total
