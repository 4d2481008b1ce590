"""Communication as data: what a shard asks for, and the driver that advances shards in lockstep.

Owns: the two collectives of the model and the order in which ranks take part in them.
Must not know: layers, steps, processes, shared memory, time.
Source: generators as coroutines (PEP 342); the collectives are those of CloudMatrix-Infer, arXiv 2506.12708
sections 4.2-4.3.

A shard's forward is a generator. It yields an AllToAll or AllGather and is sent the reply: a list with one
tensor per source rank. The tensors of a reply may be views of a transport's window: they hold until the
generator yields again, not longer.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class AllToAll:
    """Send rows[d] to rank d. The reply's entry s is what rank s sent to this rank.

    Each rows[d] is 2-D and contiguous, (n_d, width), with n_d >= 0; dtype and width are the same on every
    rank.
    """

    rows: list[Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class AllGather:
    """Send `rows` (n, width) to every rank. The reply's entry s is the rows of rank s; n may differ between ranks."""

    rows: Tensor


Collective = AllToAll | AllGather
Reply = list[Tensor]
# Serves the collectives of all ranks of this process, in rank order; the ranks of other processes are its business.
Exchange = Callable[[Sequence[Collective]], Sequence[Reply]]

T = TypeVar("T")
ShardGenerator = Generator[Collective, Reply, T]


def exchange_in_process(calls: Sequence[Collective]) -> list[Reply]:
    """Exchange between ranks that all live in this process. Nothing is copied."""
    replies: list[Reply] = []
    for rank in range(len(calls)):
        reply = []
        for call in calls:
            if isinstance(call, AllToAll):
                assert len(call.rows) == len(calls), f"AllToAll of {len(call.rows)} rows among {len(calls)} ranks"
                reply.append(call.rows[rank])
            else:
                reply.append(call.rows)
        replies.append(reply)
    return replies


def run_lockstep(generators: Sequence[ShardGenerator[T]], *, exchange: Exchange = exchange_in_process) -> list[T]:
    """Run one forward per local rank to its end and return their results, in the order given.

    Every rank must yield the same kinds of collective in the same order and finish together; anything else is
    a defect of the shards and raises AssertionError with the position in the list.
    """
    results: list[T | None] = [None] * len(generators)
    # Nothing here is trained: without autograd's bookkeeping a decode step of a small model takes a fifth less time.
    with torch.inference_mode():
        calls = [_advance(generator, None, results, index) for index, generator in enumerate(generators)]
        while any(call is not None for call in calls):
            kinds = [type(call).__name__ for call in calls]
            assert len(set(kinds)) == 1, f"ranks are out of step: {kinds}"
            replies = exchange([call for call in calls if call is not None])
            calls = [
                _advance(generator, reply, results, index)
                for index, (generator, reply) in enumerate(zip(generators, replies, strict=True))
            ]
    return results  # type: ignore[return-value]  # every generator has returned


def _advance(
    generator: ShardGenerator[T], reply: Reply | None, results: list[T | None], index: int
) -> Collective | None:
    try:
        return next(generator) if reply is None else generator.send(reply)
    except StopIteration as stop:
        results[index] = stop.value
        return None
