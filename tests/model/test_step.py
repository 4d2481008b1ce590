"""The arrays of a step check themselves."""

import numpy as np
import pytest

from model.step import SamplingBatch, StepInput


def make(**changes):
    fields = {
        "token_ids": [5, 6, 7, 8],
        "positions": [0, 1, 2, 9],
        "query_start": [0, 3, 4],
        "seq_lens": [3, 10],
        "block_tables": [[0, 0], [1, 2]],
        "sample_rows": [2, 3],
        "sampling": SamplingBatch.greedy(np.array([3, 10])),
    }
    return StepInput(**(fields | changes))


def test_arrays_get_their_declared_dtypes_and_counts():
    step = make()
    assert (step.num_tokens, step.num_seqs, step.num_samples) == (4, 2, 2)
    assert step.token_ids.dtype == np.int64
    assert step.block_tables.dtype == step.sample_rows.dtype == np.int32
    assert step.sampling.seed.dtype == np.uint64


def test_an_idle_step_is_empty():
    step = StepInput.idle()
    assert (step.num_tokens, step.num_seqs, step.num_samples) == (0, 0, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": [0, 1, 2]}, "positions differ"),
        ({"query_start": [0, 4]}, r"R \+ 1 entries"),
        ({"query_start": [0, 3, 5]}, "end behind the last row"),
        ({"query_start": [1, 3, 4]}, "begin at row 0"),
        ({"query_start": [0, 4, 4]}, "at least one row"),
        ({"seq_lens": [3, 11]}, "end its context"),
        ({"block_tables": [[0, 0]]}, "must have R rows"),
        ({"sample_rows": [3, 2]}, "must ascend"),
        ({"sample_rows": [2, 4]}, "rows of the step"),
        ({"sample_rows": [2]}, "one sampling entry"),
    ],
)
def test_arrays_that_contradict_each_other_are_a_defect(changes, message):
    with pytest.raises(AssertionError, match=message):
        make(**changes)


def test_sampling_arrays_must_have_one_length():
    batch = SamplingBatch.greedy(np.arange(3))
    assert len(batch.take(np.array([2, 0]))) == 2
    assert batch.take(np.array([2, 0])).position.tolist() == [2, 0]
    with pytest.raises(AssertionError, match="sampling shapes differ"):
        SamplingBatch(**{**{n: getattr(batch, n) for n in batch.__slots__}, "top_k": np.zeros(2)})
