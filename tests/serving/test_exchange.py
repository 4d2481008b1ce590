"""What every exchange between processes promises. Members are threads here: they share nothing but the transport."""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.faults import CollectiveTimeout
from model.collectives import AllGather, AllToAll, exchange_in_process, run_lockstep
from serving.exchange import CollectiveError, GroupUnusable, RanksOutOfStep, failure_of, failure_text
from serving.gloo_exchange import GlooExchange, GlooGroupSpec, start_store
from serving.shared_memory import SharedMemoryExchange, WindowGroupSpec

RANKS_BY_PROCESS = ((0, 2), (3,), (1,))
WORLD_SIZE = 4
WINDOW_BYTES = 4096


@dataclass
class Members:
    """Makes groups of one transport and runs a function in all members at once."""

    kind: str
    folder: Path
    pool: ThreadPoolExecutor
    store: Any

    def __post_init__(self) -> None:
        self._epochs = itertools.count()
        self._made: list[Any] = []

    def make(self, process: int, epoch: int, ranks_by_process: tuple[tuple[int, ...], ...], timeout_s: float) -> Any:
        world_size = sum(map(len, ranks_by_process))
        common: dict[str, Any] = {"world_size": world_size, "ranks_by_process": ranks_by_process}
        common |= {"timeout_s": timeout_s, "epoch": epoch}
        if self.kind == "gloo":
            gloo = GlooGroupSpec(store_host="127.0.0.1", store_port=self.store.port, **common)
            return GlooExchange(gloo, process)
        windows = WindowGroupSpec(path=str(self.folder / f"group-{epoch}"), window_bytes=WINDOW_BYTES, **common)
        return SharedMemoryExchange(windows, process, from_array=torch.from_numpy, borrow=self.kind == "borrowed")

    def join(
        self, ranks_by_process: tuple[tuple[int, ...], ...] = RANKS_BY_PROCESS, *, timeout_s: float = 20.0
    ) -> list[Any]:
        epoch = next(self._epochs)
        exchanges = self.run(
            [lambda p=p: self.make(p, epoch, ranks_by_process, timeout_s) for p in range(len(ranks_by_process))]
        )
        self._made += exchanges
        return exchanges

    def close(self) -> None:
        """Close what the last test made, so that none holds descriptors or windows until the end."""
        while self._made:
            self._made.pop().close()

    def run(self, functions: Sequence[Callable[[], Any]]) -> list[Any]:
        """The results of all; what one raises is its result."""

        def caught(function: Callable[[], Any]) -> Any:
            try:
                return function()
            except (CollectiveError, CollectiveTimeout, ValueError) as error:
                return error

        return [future.result() for future in [self.pool.submit(caught, function) for function in functions]]


@pytest.fixture(scope="module", params=["shared_memory", "borrowed", "gloo"])
def transport(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Members]:
    store = start_store("127.0.0.1") if request.param == "gloo" else None
    with ThreadPoolExecutor(4) as pool:
        yield Members(request.param, tmp_path_factory.mktemp("windows"), pool, store)


@pytest.fixture
def members(transport: Members) -> Iterator[Members]:
    yield transport
    transport.close()


def random_rows(generator: np.random.Generator, num_rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    values = torch.from_numpy(generator.integers(0, 100, size=(num_rows, width)))
    return values.to(dtype)


@pytest.fixture(scope="module")
def group(transport: Members) -> Iterator[list[Any]]:
    """One group for all examples of a property."""
    exchanges = transport.run([lambda p=p: transport.make(p, 2000, RANKS_BY_PROCESS, 20.0) for p in range(3)])
    yield exchanges
    for exchange in exchanges:
        exchange.close()


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 6), min_size=WORLD_SIZE**2, max_size=WORLD_SIZE**2),
    width=st.integers(1, 20),
    dtype=st.sampled_from([torch.float32, torch.int8, torch.int64, torch.bool, torch.float16]),
    is_gather=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_every_rank_receives_what_every_rank_sent_to_it(
    transport: Members,
    group: list[Any],
    counts: list[int],
    width: int,
    dtype: torch.dtype,
    is_gather: bool,
    seed: int,
) -> None:
    generator = np.random.default_rng(seed)
    sent = [
        [random_rows(generator, counts[WORLD_SIZE * s + d], width, dtype) for d in range(WORLD_SIZE)]
        for s in range(WORLD_SIZE)
    ]
    calls = [AllGather(rows[0]) if is_gather else AllToAll(rows) for rows in sent]
    expected = exchange_in_process(calls)
    replies = transport.run(
        [
            lambda exchange=exchange, ranks=ranks: exchange.exchange([calls[rank] for rank in ranks])
            for exchange, ranks in zip(group, RANKS_BY_PROCESS, strict=True)
        ]
    )
    for process, ranks in enumerate(RANKS_BY_PROCESS):
        assert len(replies[process]) == len(ranks)
        for rank, reply in zip(ranks, replies[process], strict=True):
            assert [tensor.dtype for tensor in reply] == [dtype] * WORLD_SIZE
            for received, wanted in zip(reply, expected[rank], strict=True):
                assert received.shape == wanted.shape
                assert torch.equal(received, wanted)


def shard(rank: int, world_size: int, num_rounds: int) -> Any:
    """A shard that sends on, unchanged, half of what it received, beside rows of its own; returns a checksum."""
    total = torch.zeros(5)
    received = [torch.full((1, 5), float(rank))] * world_size
    for turn in range(num_rounds):
        if (rank + turn) % 5 == 0:
            time.sleep(0.0005)  # let the others run ahead
        mine = torch.full((1 + rank, 5), float(rank + 10 * turn))
        received = yield AllToAll([received[d] if (d + turn) % 2 else mine for d in range(world_size)])
        total = total + sum(tensor.sum(dim=0) for tensor in received)
        if turn % 3 == 2:
            received = yield AllGather(received[(rank + 1) % world_size])
            total = total + sum(tensor.sum(dim=0) for tensor in received)
    return total


def test_shards_in_many_processes_compute_what_they_compute_in_one(members: Members) -> None:
    """Also that a slow process's reply is not overwritten by a fast one's next rows, borrowed or not."""
    alone = run_lockstep([shard(rank, WORLD_SIZE, 60) for rank in range(WORLD_SIZE)])
    exchanges = members.join()
    results = members.run(
        [
            lambda exchange=exchange, ranks=ranks: run_lockstep(
                [shard(rank, WORLD_SIZE, 60) for rank in ranks], exchange=exchange.exchange
            )
            for exchange, ranks in zip(exchanges, RANKS_BY_PROCESS, strict=True)
        ]
    )
    for ranks, totals in zip(RANKS_BY_PROCESS, results, strict=True):
        for rank, total in zip(ranks, totals, strict=True):
            assert torch.equal(total, alone[rank])


def test_one_process_may_drive_every_rank(members: Members) -> None:
    (exchange,) = members.join(((0, 1),))
    with exchange:
        calls = [AllToAll([torch.full((1, 1), 10.0 * s + d) for d in range(2)]) for s in range(2)]
        exchange.barrier()
        assert exchange.exchange(calls) == exchange_in_process(calls)


def test_a_rank_that_does_not_come_is_named_and_the_group_is_unusable(members: Members) -> None:
    exchanges = members.join(((0,), (1, 2)), timeout_s=0.4)
    rows = torch.zeros(1, 1)
    (error,) = members.run([lambda: exchanges[0].exchange([AllGather(rows)])])
    assert isinstance(error, CollectiveTimeout)
    assert error.missing_ranks == (1, 2)
    assert "exchange 1: ranks 1, 2 missing after 0.4 s" in str(error)
    late, again = members.run(
        [lambda: exchanges[1].exchange([AllGather(rows)] * 2), lambda: exchanges[0].exchange([AllGather(rows)])]
    )
    assert isinstance(again, GroupUnusable)
    assert "was given up" in str(again)
    assert "ranks 1, 2 missing" in str(again)
    assert isinstance(late, GroupUnusable | CollectiveTimeout)
    assert "ranks 1, 2 missing" in str(late)


def test_a_missing_root_is_named_too(members: Members) -> None:
    exchanges = members.join(((0,), (1,), (2,)), timeout_s=0.4)
    errors = members.run([exchanges[1].barrier, exchanges[2].barrier])
    assert [type(error) for error in errors] == [CollectiveTimeout] * 2
    assert {error.missing_ranks for error in errors} == {(0,)}


def test_a_rank_that_does_not_join_is_named(members: Members) -> None:
    parts = ((0,), (1,), (2, 3))
    errors = members.run([lambda p=p: members.make(p, 1000, parts, 0.4) for p in (0, 1)])
    assert [type(error) for error in errors] == [CollectiveTimeout] * 2
    assert {error.missing_ranks for error in errors} == {(2, 3)}
    assert "joining" in str(errors[0])


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (AllGather(torch.zeros(1, 3)), "all-gather of float32, width 3"),
        (AllToAll([torch.zeros(1, 4)] * 2), "all-to-all of float32, width 4"),
        (AllToAll([torch.zeros(1, 3, dtype=torch.int8)] * 2), "all-to-all of int8, width 3"),
        (AllToAll([torch.zeros(0, 2)] * 2), "all-to-all of float32, width 2"),
    ],
)
def test_ranks_that_disagree_are_named(members: Members, call: Any, expected: str) -> None:
    exchanges = members.join(((0,), (1,)))
    usual = AllToAll([torch.zeros(1, 3)] * 2)
    errors = members.run([lambda: exchanges[0].exchange([usual]), lambda: exchanges[1].exchange([call])])
    assert all(isinstance(error, CollectiveError) for error in errors)
    texts = [str(error) for error in errors if isinstance(error, RanksOutOfStep)]
    assert texts
    assert all(expected in text and "all-to-all of float32, width 3" in text for text in texts)
    assert any("rank 0" in text and "rank 1" in text for text in texts)


def test_a_barrier_does_not_pass_for_an_exchange(members: Members) -> None:
    exchanges = members.join(((0,), (1,)))
    errors = members.run([exchanges[0].barrier, lambda: exchanges[1].exchange([AllGather(torch.zeros(1, 1))])])
    assert any(isinstance(error, RanksOutOfStep) for error in errors)
    assert all(isinstance(error, CollectiveError) for error in errors)


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ([AllGather(torch.zeros(1, 1))] * 2, "2 collectives for 1 local ranks"),
        ([AllToAll([torch.zeros(1, 1)] * 3)], "all-to-all of 3 row blocks among 2 ranks"),
        ([AllGather(torch.zeros(3))], "rows must be 2-D"),
        ([AllToAll([torch.zeros(1, 1), torch.zeros(1, 2)])], "width 2 beside float32 and width 1"),
        ([AllGather(torch.zeros(1, 1, dtype=torch.complex64))], "rows of dtype complex64"),
    ],
)
def test_a_call_that_cannot_be_exchanged_is_refused_and_the_peers_hear_it(
    members: Members, calls: list[Any], message: str
) -> None:
    exchanges = members.join(((0,), (1,)))
    start = time.monotonic()
    refused, peer = members.run(
        [lambda: exchanges[0].exchange(calls), lambda: exchanges[1].exchange([AllGather(torch.zeros(1, 1))])]
    )
    assert time.monotonic() - start < 5
    assert isinstance(refused, ValueError)
    assert message in str(refused)
    assert isinstance(peer, GroupUnusable)
    assert "rank 0: " in str(peer)
    assert message in str(peer)


def test_a_closed_group_refuses_work_here_and_at_the_peers(members: Members) -> None:
    first, second = members.join(((0,), (1,)))
    first.close()
    first.close()
    with pytest.raises(GroupUnusable, match="is closed"):
        first.exchange([AllGather(torch.zeros(1, 1))])
    with pytest.raises(GroupUnusable, match="rank 0 closed the group"):
        second.barrier()
    assert first.num_open_windows == 0


def test_peers_may_close_right_after_the_last_exchange(members: Members) -> None:
    def run_and_close(exchange: Any) -> None:
        with exchange:
            for _ in range(3):
                exchange.exchange([AllGather(torch.zeros(1, 1))])

    for _ in range(3):
        exchanges = members.join(((0,), (1,), (2,)))
        assert members.run([lambda e=e: run_and_close(e) for e in exchanges]) == [None] * 3


def test_an_aborted_group_is_given_up_everywhere(members: Members) -> None:
    first, second = members.join(((0,), (1,)))
    first.abort("the launcher lost rank 1")
    for exchange in (first, second):
        with pytest.raises(GroupUnusable, match="rank 0: the launcher lost rank 1"):
            exchange.exchange([AllGather(torch.zeros(1, 1))])


def test_leaving_by_an_exception_breaks_the_group(members: Members) -> None:
    def fail(exchange: Any) -> None:
        with exchange:
            raise ValueError("the shard failed")

    exchanges = members.join(((0,), (1,)))
    _, peer = members.run([lambda: fail(exchanges[0]), exchanges[1].barrier])
    assert isinstance(peer, GroupUnusable)
    assert "rank 0: the shard failed" in str(peer)


def test_failures_keep_their_kind_from_process_to_process() -> None:
    timeout = CollectiveTimeout("exchange 7", (1, 5), 2.5)
    assert failure_of(failure_text(timeout, (0,))).args == timeout.args
    other = failure_of(failure_text(KeyError("x" * 2000), (3, 4)))
    assert isinstance(other, GroupUnusable)
    assert str(other).startswith("ranks 3, 4: ")
