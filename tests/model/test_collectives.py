"""The lockstep driver and the exchange within a process."""

import pytest
import torch

from model.collectives import AllGather, AllToAll, exchange_in_process, run_lockstep


def rows(*counts, value=0.0):
    return [torch.full((count, 2), value + index) for index, count in enumerate(counts)]


def test_all_to_all_delivers_row_d_of_rank_s_as_reply_s_of_rank_d():
    replies = exchange_in_process([AllToAll(rows(1, 2, value=10.0)), AllToAll(rows(0, 3, value=20.0))])
    assert [[tuple(part.shape) for part in reply] for reply in replies] == [[(1, 2), (0, 2)], [(2, 2), (3, 2)]]
    assert replies[1][0].unique().tolist() == [11.0]
    assert replies[1][1].unique().tolist() == [21.0]


def test_all_gather_delivers_every_ranks_rows_to_all_even_if_their_counts_differ():
    replies = exchange_in_process([AllGather(torch.zeros(1, 2)), AllGather(torch.ones(3, 2))])
    for reply in replies:
        assert [len(part) for part in reply] == [1, 3]


def test_lockstep_returns_each_ranks_result_in_order():
    def rank(index):
        gathered = yield AllGather(torch.tensor([[float(index)]]))
        reply = yield AllToAll([part + index for part in gathered])
        return [float(part) for part in reply]

    # Rank s sends gathered[d] + s = d + s to rank d.
    assert run_lockstep([rank(0), rank(1), rank(2)]) == [[0.0, 1.0, 2.0], [1.0, 2.0, 3.0], [2.0, 3.0, 4.0]]


def test_ranks_that_never_communicate_just_return():
    def rank(index):
        return index
        yield

    assert run_lockstep([rank(0), rank(1)]) == [0, 1]
    assert run_lockstep([]) == []


def test_ranks_out_of_step_are_a_defect():
    def gathers():
        yield AllGather(torch.zeros(0, 1))

    def exchanges():
        yield AllToAll([torch.zeros(0, 1)] * 2)

    def returns():
        return None
        yield

    with pytest.raises(AssertionError, match=r"\['AllGather', 'AllToAll'\]"):
        run_lockstep([gathers(), exchanges()])
    with pytest.raises(AssertionError, match=r"\['AllGather', 'NoneType'\]"):
        run_lockstep([gathers(), returns()])


def test_an_all_to_all_must_have_one_entry_per_rank():
    with pytest.raises(AssertionError, match="AllToAll of 3 rows among 2 ranks"):
        exchange_in_process([AllToAll(rows(1, 1)), AllToAll(rows(1, 1, 1))])


def test_one_ranks_process_can_serve_its_collectives_elsewhere():
    def rank():
        reply = yield AllGather(torch.ones(1, 1))
        return len(reply)

    def remote(calls):
        (call,) = calls
        return [[call.rows, torch.zeros(2, 1), torch.zeros(0, 1)]]

    assert run_lockstep([rank()], exchange=remote) == [3]
