"""Problems as token ids: the conversation that asks, the reply that is learned, and packed batches of both.

Owns: the text around a problem, which tokens are learned, and how samples share a batch.
Must not know: weights, optimizers, how problems are made.
Source: DeepSeek-R1's chat template; masked prompts as in supervised fine-tuning.
"""

# Shapes: T tokens of the batch, G groups of samples, b samples of one group, L its longest sample

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from model.chat import Message
from model.tasks.generator import generate
from model.tasks.problem import Problem
from model.tokenizer import Tokenizer

# One sample in so many is a long conversation: it teaches positions up to the context length.
_LONG_ONE_IN = 300
_FEW_TURNS_ONE_IN = 20
# Longest over shortest sample of a group.
_GROUP_SPREAD = 1.35


@dataclass(frozen=True, slots=True)
class Sample:
    """One conversation. Tokens from `num_prompt_tokens` on are learned."""

    token_ids: list[int]
    num_prompt_tokens: int


def reply_text(problem: Problem) -> str:
    """What the assistant says behind the opening `<think>` tag and its line break, without the end of text."""
    return f"{problem.trace}\n</think>\n\n{problem.answer}"


def encode_sample(tokenizer: Tokenizer, problem: Problem, earlier: Sequence[Problem] = ()) -> Sample:
    """The conversation that asks `problem`, after the `earlier` ones with their answers."""
    messages: list[Message] = []
    for past in earlier:
        messages.append(Message(role="user", content=past.question))
        messages.append(Message(role="assistant", content=f"\n\n{past.answer}"))
    messages.append(Message(role="user", content=problem.question))
    prompt = tokenizer.encode_chat(messages)
    reply = tokenizer.encode(reply_text(problem), parse_control=True)
    return Sample([*prompt, *reply, tokenizer.eos_token_id], len(prompt))


def draw_sample(rng: Random, tokenizer: Tokenizer, max_tokens: int) -> Sample:
    """A training sample: mostly one question, sometimes a conversation, rarely one that fills `max_tokens`."""
    problem = generate(rng, "train")
    lot, earlier = rng.random(), []
    if lot < 1 / _LONG_ONE_IN:
        earlier = [generate(rng, "train") for _ in range(max_tokens // 32)]
    elif lot < 1 / _LONG_ONE_IN + 1 / _FEW_TURNS_ONE_IN:
        earlier = [generate(rng, "train") for _ in range(rng.randint(1, 3))]
    sample = encode_sample(tokenizer, problem, earlier)
    while len(sample.token_ids) > max_tokens:
        earlier = earlier[len(earlier) // 4 + 1 :]
        sample = encode_sample(tokenizer, problem, earlier)
    return sample


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Samples of similar length, for one padded attention: rows [start, stop) of the batch."""

    start: int
    stop: int
    num_samples: int
    length: int  # L
    places: Tensor  # (stop - start,) row of the padded (b L) that a token takes
    mask: Tensor  # (L, L) 0 where a query may look, -inf where the key comes later


@dataclass(frozen=True, slots=True, eq=False)
class PackedBatch:
    """Whole samples behind each other, shortest first; only attention sees the padding of its group."""

    token_ids: Tensor  # (T,)
    positions: Tensor  # (T,)
    groups: tuple[Group, ...]
    learned_rows: Tensor  # rows whose next token is learned
    targets: Tensor  # that next token


def pack(samples: Iterable[Sample]) -> PackedBatch:
    """Arrange samples into a batch. Attention is computed in groups of similar length."""
    ordered = sorted(samples, key=lambda sample: len(sample.token_ids))
    token_ids: list[int] = []
    positions: list[int] = []
    learned: list[int] = []
    groups = []
    while ordered:
        limit = int(len(ordered[0].token_ids) * _GROUP_SPREAD)
        members = [sample for sample in ordered if len(sample.token_ids) <= limit]
        ordered = ordered[len(members) :]
        start, length = len(token_ids), len(members[-1].token_ids)
        places: list[int] = []
        for index, sample in enumerate(members):
            row, count = len(token_ids), len(sample.token_ids)
            token_ids += sample.token_ids
            positions += range(count)
            places += range(index * length, index * length + count)
            learned += range(row + sample.num_prompt_tokens - 1, row + count - 1)
        mask = torch.full((length, length), -torch.inf).triu(1)
        groups.append(Group(start, len(token_ids), len(members), length, torch.tensor(places), mask))
    ids, rows = torch.tensor(token_ids), torch.tensor(learned)
    return PackedBatch(ids, torch.tensor(positions), tuple(groups), rows, ids[rows + 1])


def draw_batch(
    seed: int, step: int, shard: int, tokenizer: Tokenizer, *, num_tokens: int, max_tokens: int
) -> PackedBatch:
    """The batch of one data shard in one step: a pure function, so a resumed run continues with the same data."""
    rng = Random(f"{seed}/{step}/{shard}")
    samples, total = [], 0
    while total < num_tokens:
        samples.append(draw_sample(rng, tokenizer, max_tokens))
        total += len(samples[-1].token_ids)
    return pack(samples)
