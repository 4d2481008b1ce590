"""The fan-out of orders to workers: who is asked for what, and in which order."""

import asyncio

import numpy as np
import pytest

from model.step import StepInput
from serving.errors import EngineFailure
from serving.transport import PoolObject, RankRef, WorkerTransport


class Workers:
    """Notes every order; each ends when the test says so."""

    def __init__(self):
        self.orders = []
        self.futures = []

    def __call__(self, worker, lane, method, args):
        self.orders.append((worker, lane, method, args))
        self.futures.append(asyncio.get_running_loop().create_future())
        return self.futures[-1]

    def end(self, index, result=None):
        self.futures[index].set_result(result)


@pytest.fixture
def workers():
    return Workers()


@pytest.fixture
def transport(workers):
    return WorkerTransport(
        invoke=workers,
        ranks={"prefill-0": [("p0", (0, 1)), ("p1", (2, 3))], "decode-0": [("d0", (0,)), ("d1", (1,))]},
        hosts=["h0", "h1"],
        address_of={name: f"at {name}" for name in ("p0", "p1", "d0", "d1", "h0", "h1")},
    )


def ids(*block_ids):
    return np.array(block_ids, np.int32)


@pytest.mark.asyncio
async def test_a_step_goes_to_every_worker_at_once_and_comes_back_in_rank_order(transport, workers):
    inputs = [StepInput.idle() for _ in range(4)]
    stepping = asyncio.ensure_future(transport.step("prefill-0", inputs, charged_ns=7))
    assert [(w, lane, method) for w, lane, method, _ in workers.orders] == [
        ("p0", "step", "step"),
        ("p1", "step", "step"),
    ]
    assert [args for *_, args in workers.orders] == [(inputs[:2], 7), (inputs[2:], 7)]
    workers.end(1, ["two", "three"])
    workers.end(0, ["zero", "one"])
    assert await stepping == ["zero", "one", "two", "three"]


@pytest.mark.asyncio
async def test_the_first_lost_worker_ends_a_step(transport, workers):
    stepping = asyncio.ensure_future(transport.step("prefill-0", [StepInput.idle()] * 4, charged_ns=7))
    await asyncio.sleep(0)
    workers.futures[1].set_exception(EngineFailure("step: p1 is lost"))
    with pytest.raises(EngineFailure, match="p1 is lost"):
        await stepping
    workers.futures[0].set_exception(EngineFailure("step: timeout"))  # heard by nobody, and that is no error


@pytest.mark.asyncio
async def test_the_receiver_pulls_a_hand_over_from_the_sender(transport, workers):
    moving = transport.kv_transfer(
        RankRef(instance_id="prefill-0", rank=3), ids(5, 6), RankRef(instance_id="decode-0", rank=1), ids(0, 2)
    )
    ((worker, lane, method, args),) = workers.orders
    assert (worker, lane, method) == ("d1", "data", "pull_blocks")
    assert (args[0], args[1].tolist(), args[2], args[3], args[4].tolist()) == (1, [0, 2], "at p1", 3, [5, 6])
    workers.end(0)
    await moving


@pytest.mark.asyncio
async def test_a_load_goes_to_one_rank_or_to_all(transport, workers):
    objects = [PoolObject(host_id=1, handle=8), PoolObject(host_id=0, handle=9), PoolObject(host_id=1, handle=3)]
    parts = [("at h0", [9], [1]), ("at h1", [8, 3], [0, 2])]
    for target, expected in (
        ("prefill-0", [("p0", (0, 1)), ("p1", (2, 3))]),
        (RankRef(instance_id="prefill-0", rank=2), [("p1", (2,))]),
    ):
        workers.orders.clear()
        workers.futures.clear()
        loading = asyncio.ensure_future(transport.pool_load(target, objects, ids(4, 5, 6)))
        assert [(worker, args[0]) for worker, _, _, args in workers.orders] == expected
        assert all(args[2] == parts for *_, args in workers.orders)
        for index in range(len(expected)):
            workers.end(index)
        await loading


@pytest.mark.asyncio
async def test_a_store_waits_until_the_room_of_evicted_blocks_is_free(transport, workers, caplog):
    transport.pool_free([PoolObject(host_id=0, handle=1), PoolObject(host_id=1, handle=2)])
    assert [(worker, method, args) for worker, _, method, args in workers.orders] == [
        ("h0", "free", ([1],)),
        ("h1", "free", ([2],)),
    ]
    source, objects = RankRef(instance_id="prefill-0", rank=0), [PoolObject(host_id=0, handle=3)]
    storing = asyncio.ensure_future(transport.pool_store(source, ids(4), objects))
    await asyncio.sleep(0)
    assert len(workers.orders) == 2
    workers.end(0)
    workers.futures[1].set_exception(EngineFailure("free: h1 is lost"))
    for _ in range(3):
        await asyncio.sleep(0)
    assert [order[:3] for order in workers.orders[2:]] == [("p0", "data", "store_blocks")]
    assert "h1 is lost" in caplog.text
    workers.end(2)
    await storing
