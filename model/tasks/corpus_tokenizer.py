"""The mini R1's vocabulary: byte-level BPE trained on generated problems.

Owns: how the vocabulary is trained and the order of its ids.
Must not know: the model.
Source: byte-level BPE as in DeepSeek-R1's tokenizer.json, with single digits as in DeepSeek-V3's predecessors.
"""

import json
from collections.abc import Iterator
from random import Random

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from model.tasks.generator import generate
from model.tokenizer import CONTROL_TOKENS, VISIBLE_CONTROL_TOKENS, Tokenizer

VOCAB_SIZE = 2048


def train_tokenizer(seed: int, *, num_problems: int = 20_000) -> Tokenizer:
    """A vocabulary of VOCAB_SIZE entries: control tokens, bytes, merges, and placeholders for what is left.

    A digit is a token of its own, so that a number's digits can be looked at one by one.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d|\n"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(_texts(seed, num_problems), trainer)
    missing = VOCAB_SIZE - backend.get_vocab_size()
    backend.add_tokens(
        [AddedToken(f"<｜place▁holder▁no▁{i}｜>", special=True, normalized=False) for i in range(missing)]
    )
    layout = json.loads(backend.to_str())
    for token in layout["added_tokens"]:
        token["special"] = token["content"] not in VISIBLE_CONTROL_TOKENS
        token["normalized"] = False
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(layout)))


def _texts(seed: int, count: int) -> Iterator[str]:
    rng = Random(seed)
    for _ in range(count):
        problem = generate(rng, "train")
        yield f"{problem.question}\n{problem.trace}\n{problem.answer}"
