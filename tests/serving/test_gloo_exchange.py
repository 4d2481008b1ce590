"""The raw gloo group: what it says of a peer that is gone. What it shares with windows is in test_exchange.py."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import serving
from model.collectives import AllGather
from serving.exchange import GroupUnusable, RanksLost
from serving.gloo_exchange import GlooExchange, GlooGroupSpec, start_store

MEMBER = """
import sys
import torch
from model.collectives import AllGather
from serving.gloo_exchange import GlooExchange, GlooGroupSpec
spec = GlooGroupSpec(
    store_host="127.0.0.1", store_port=int(sys.argv[1]), world_size=2, ranks_by_process=((0,), (1,)),
    timeout_s=20.0, epoch=0,
)
exchange = GlooExchange(spec, 1)
while True:
    exchange.exchange([AllGather(torch.zeros(1, 1))])
"""


def make_spec(port: int, epoch: int) -> GlooGroupSpec:
    return GlooGroupSpec(
        store_host="127.0.0.1",
        store_port=port,
        world_size=2,
        ranks_by_process=((0,), (1,)),
        timeout_s=20.0,
        epoch=epoch,
    )


def exchange_often(exchange: GlooExchange, times: int) -> None:
    for _ in range(times):
        exchange.exchange([AllGather(torch.zeros(1, 1))])


def test_a_killed_member_is_named_and_a_new_epoch_works_on_the_same_store() -> None:
    store = start_store("127.0.0.1")
    environment = {**os.environ, "PYTHONPATH": str(Path(serving.__path__[0]).parent), "OMP_NUM_THREADS": "1"}
    member = subprocess.Popen([sys.executable, "-c", MEMBER, str(store.port)], env=environment)
    try:
        exchange = GlooExchange(make_spec(store.port, 0), 0)
        exchange_often(exchange, 1)
        os.kill(member.pid, signal.SIGKILL)
        start = time.monotonic()
        with pytest.raises(RanksLost, match=r"no word from rank 1 since gloo reported: .*onnection") as caught:
            exchange_often(exchange, 10)
        assert caught.value.ranks == (1,)
        assert time.monotonic() - start < 5
        with pytest.raises(GroupUnusable, match=r"was given up: .*no word from rank 1"):
            exchange_often(exchange, 1)
        exchange.close()
    finally:
        member.kill()
        member.wait()
    with ThreadPoolExecutor(2) as pool:
        members = list(pool.map(lambda process: GlooExchange(make_spec(store.port, 1), process), (0, 1)))
        list(pool.map(lambda exchange: exchange_often(exchange, 1), members))
        for exchange in members:
            exchange.close()


def test_a_store_that_is_not_there_is_named() -> None:
    port = start_store("127.0.0.1").port  # free again at once
    spec = make_spec(port, 0)
    with pytest.raises(GroupUnusable, match=f"no store at 127.0.0.1:{port}"):
        GlooExchange(GlooGroupSpec(**{**{f: getattr(spec, f) for f in spec.__slots__}, "timeout_s": 0.5}), 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"timeout_s": 0.0}, "timeout_s: got 0.0"), ({"world_size": 3}, "ranks_by_process: ")],
)
def test_a_wrong_specification_names_the_field(change: dict[str, float], message: str) -> None:
    spec = make_spec(1, 0)
    fields = {field: getattr(spec, field) for field in spec.__slots__}
    with pytest.raises(ValueError, match=message):
        GlooGroupSpec(**{**fields, **change})
