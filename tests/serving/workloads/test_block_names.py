"""Names of blocks: equal exactly where the tokens up to the block's end are equal, whatever describes the prompts."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.errors import ConfigError
from serving.workloads.requests import Piece, RequestTable, WorkloadRequest
from serving.workloads.workload import Workload

WIDE = range(0, 2**40)  # so many token ids that different content never gives the same tokens by chance


def workload_of(*contents, hash_block_size=None):
    """Contents are tuples of pieces, or (number of tokens, hash ids)."""
    requests = []
    for i, content in enumerate(contents):
        if hash_block_size is None:
            pieces = tuple(Piece(*piece) for piece in content)
            fields = {"num_prompt_tokens": sum(p.num_tokens for p in pieces), "pieces": pieces}
        else:
            fields = {"num_prompt_tokens": content[0], "hash_ids": tuple(content[1])}
        requests.append(WorkloadRequest(request_id=f"r{i}", max_tokens=1, **fields))
    return Workload(name="w", requests=requests, vocabulary=WIDE, hash_block_size=hash_block_size)


def assert_names_follow_tokens(workload, block_size):
    """All names, by the tokens up to the end of their block: one to one."""
    tokens_of_name, name_of_tokens = {}, {}
    for i, request in enumerate(workload.requests):
        token_ids = workload.prompt_token_ids(request).tolist()
        names = workload.block_hashes(i, block_size)
        assert len(names) == len(token_ids) // block_size
        for k, name in enumerate(names):
            prefix = tuple(token_ids[: (k + 1) * block_size])
            assert tokens_of_name.setdefault(name, prefix) == prefix
            assert name_of_tokens.setdefault(prefix, name) == name


pieces = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 20)), min_size=1, max_size=5)


@settings(max_examples=150, deadline=None)
@given(st.lists(pieces, min_size=1, max_size=8), st.integers(1, 20))
def test_names_of_pieces_are_equal_exactly_where_tokens_are(contents, block_size):
    assert_names_follow_tokens(workload_of(*contents), block_size)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 40), st.lists(st.integers(0, 2), min_size=40, max_size=40)), min_size=1, max_size=8
    ),
    st.integers(1, 12),
    st.integers(1, 30),
)
def test_names_of_hash_ids_are_equal_exactly_where_tokens_are(contents, hash_block_size, block_size):
    """The block divides the hashed one, is a multiple of it, or neither."""
    cut = [(num_tokens, ids[: -(-num_tokens // hash_block_size)]) for num_tokens, ids in contents]
    assert_names_follow_tokens(workload_of(*cut, hash_block_size=hash_block_size), block_size)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=8), st.integers(1, 5))
def test_names_of_token_ids_are_equal_exactly_where_tokens_are(prompts, block_size):
    requests = [
        WorkloadRequest(request_id=f"r{i}", num_prompt_tokens=len(p), max_tokens=1, prompt_token_ids=tuple(p))
        for i, p in enumerate(prompts)
    ]
    assert_names_follow_tokens(Workload(name="w", requests=requests), block_size)


@pytest.mark.parametrize(
    ("first", "second", "num_equal"),
    [
        ([(7, 64)], [(7, 40)], 2),
        ([(7, 64)], [(8, 64)], 0),
        ([(1, 16), (7, 48)], [(1, 16), (8, 48)], 1),
        ([(1, 16), (7, 48)], [(1, 16), (7, 30)], 2),
        ([(1, 20), (7, 44)], [(1, 20), (8, 44)], 1),
        ([(1, 20), (7, 44)], [(1, 21), (7, 43)], 1),
        ([(1, 32), (7, 32)], [(1, 16), (1, 16), (7, 32)], 1),  # a stream that starts again is another content
    ],
)
def test_two_prompts_share_the_names_of_what_they_share(first, second, num_equal):
    workload = workload_of(first, second)
    a, b = workload.block_hashes(0, 16), workload.block_hashes(1, 16)
    assert [x == y for x, y in zip(a, b, strict=False)] == [k < num_equal for k in range(min(len(a), len(b)))]


def test_hash_ids_are_pieces_of_one_size():
    hashed = workload_of((40, [3, 9, 4]), hash_block_size=16)
    cut = workload_of([(3, 16), (9, 16), (4, 8)])
    assert hashed.block_hashes(0, 8) == cut.block_hashes(0, 8)


def test_names_are_the_same_on_every_machine_and_fit_in_64_bits():
    names = workload_of([(0, 4), (5, 100)]).block_hashes(0, 16)
    assert names[:2] == [183734293310922251, 4347052489516954327]
    assert all(type(name) is int and 0 <= name < 2**63 for name in names)


def test_names_do_not_depend_on_the_order_in_which_they_are_asked_for():
    lengths = np.random.default_rng(0).integers(1, 200, 600)
    table = RequestTable.of_pieces("w", num_prompt_tokens=lengths, max_tokens=lengths, arrival_ns=None)
    workload, other = (Workload(name="w", requests=table) for _ in range(2))
    in_order = [workload.block_hashes(i, 16) for i in range(600)]
    shuffled = np.random.default_rng(1).permutation(600)[:60].tolist()
    assert [other.block_hashes(i, 16) for i in shuffled] == [in_order[i] for i in shuffled]
    assert [len(names) for names in in_order] == (lengths // 16).tolist()
    assert len(set(itertools.chain(*in_order))) == int((lengths // 16).sum())
    assert other.block_hashes(3, 16) == in_order[3]
    assert len(other.block_hashes(3, 1)) == lengths[3]  # another size of block, same place


@pytest.mark.parametrize(
    ("index", "block_size", "error"), [(-1, 16, IndexError), (1, 16, IndexError), (0, 0, ConfigError)]
)
def test_what_cannot_be_named_is_refused(index, block_size, error):
    with pytest.raises(error):
        workload_of([(0, 4)]).block_hashes(index, block_size)
