"""How many held-out problems the model would work out, measured without generating.

Owns: the measure and its problems.
Must not know: optimizers, processes, serving.

A problem counts when every token of its trace and answer is the most likely one after the right tokens before it. Then
greedy generation writes exactly that reply. A reply that differs and is right all the same is not counted: the measure
is a lower bound of greedy accuracy, at the price of one forward pass.
"""

from dataclasses import dataclass
from random import Random

import torch
import torch.nn.functional as F

from model.parameters import RankWeights
from model.tasks.generator import KINDS, generate
from model.tokenizer import Tokenizer
from model.training.network import Network
from model.training.samples import encode_sample, pack


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """Shares of exactly reproduced replies, by kind."""

    step: int
    by_kind: dict[str, float]

    @property
    def mean(self) -> float:
        return sum(self.by_kind.values()) / len(self.by_kind)

    def as_dict(self) -> dict[str, object]:
        return {"step": self.step, "mean": self.mean, "by_kind": self.by_kind}


def held_out_accuracy(
    network: Network, weights: RankWeights, tokenizer: Tokenizer, *, step: int = 0, per_kind: int = 48, seed: int = 0
) -> Accuracy:
    """Measure on `per_kind` held-out problems of every kind, all levels alike."""
    shares = {}
    for kind in KINDS:
        rng = Random(f"{seed}/{kind}")
        batch = pack([encode_sample(tokenizer, generate(rng, "test", kinds=[kind])) for _ in range(per_kind)])
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            hidden, _ = network.hidden_states(batch)
            likeliest = F.linear(hidden[batch.learned_rows], weights.lm_head).argmax(dim=-1)
        sample_of_row = (batch.positions == 0).cumsum(0) - 1
        wrong = torch.zeros(per_kind).index_add(
            0, sample_of_row[batch.learned_rows], (likeliest != batch.targets).float()
        )
        shares[kind] = float((wrong == 0).float().mean())
    return Accuracy(step=step, by_kind=shares)
