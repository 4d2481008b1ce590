"""Workers: blocks that move between them arrive as they were, within a process and over sockets."""

from dataclasses import replace

import numpy as np
import pytest

from model.step import SamplingBatch, StepInput
from serving.build import host_plans, npu_worker_plans
from serving.errors import EngineFailure
from serving.worker import HostWorker, LocalPeers, NpuWorker, SocketPeers

KEY = b"secret"


class Workers:
    """The workers of a small cluster; `address[name]` is how one reaches another."""

    def __init__(self, config, checkpoint, folder):
        """`folder` None: all in this process, by plain calls."""
        self.peers = LocalPeers() if folder is None else None
        self.by_name = {}
        self.address = {}
        self.plans = [plan for plans in npu_worker_plans(config, checkpoint).values() for plan in plans]
        for plan in self.plans:
            self._add(plan.worker_id, lambda listen, plan=plan: NpuWorker(plan, peers=self.peers, **listen), folder)
        for plan in host_plans(config):
            self._add(plan.worker_id, lambda listen, plan=plan: HostWorker(plan, **listen), folder)

    def _add(self, name, make, folder):
        if folder is None:
            self.by_name[name] = self.peers.workers[name] = make({})
            self.address[name] = name
        else:
            self.by_name[name] = make({"listen": str(folder / f"{name}.sock"), "authkey": KEY})
            self.address[name] = self.by_name[name].address()

    def __getitem__(self, name):
        return self.by_name[name]

    def close(self):
        for worker in self.by_name.values():
            if worker._server is not None:
                worker._server.close()


@pytest.fixture(params=["local", "sockets"])
def workers(request, make_config, checkpoint, tmp_path):
    """Prefill of 2 NPUs and decode of 1 with two dies, 2 hosts."""
    config = make_config(
        "disaggregated",
        "instances.prefill={npus: 2, dies_per_npu: 1, num_blocks: 32, max_num_batched_tokens: 64, max_num_seqs: 8}",
        "instances.decode={npus: 1, dies_per_npu: 2, num_blocks: 32, max_num_batched_tokens: 64, max_num_seqs: 8}",
    )
    workers = Workers(config, checkpoint, tmp_path if request.param == "sockets" else None)
    yield workers
    workers.close()


def ids(*block_ids):
    return np.array(block_ids, np.int32)


def fill(worker, rank, block_ids, seed):
    """Write random latents into blocks of one rank; returns them."""
    npu, die = worker._place[rank]
    shape = npu.read_blocks(die, block_ids).shape
    blocks = np.random.default_rng(seed).standard_normal(shape, np.float32)
    npu.write_blocks(die, block_ids, blocks)
    return blocks


def test_pulled_blocks_are_equal_and_their_neighbors_untouched(workers):
    source, target = workers["prefill-0-npu-1"], workers["decode-0-npu-8"]
    blocks = fill(source, 1, ids(7, 2, 9), seed=1)
    assert blocks.shape == (3, 3, 4, 40)  # layers, blocks, tokens of a block, latents
    before = fill(target, 1, ids(0, 1, 2, 3, 4, 5), seed=2)
    target.pull_blocks(1, ids(4, 0, 5), workers.address["prefill-0-npu-1"], 1, ids(7, 2, 9))
    assert np.array_equal(target.read_blocks(1, ids(4, 0, 5)), blocks)
    assert np.array_equal(target.read_blocks(1, ids(1, 2, 3)), before[:, 1:4])
    assert not target.read_blocks(0, ids(4, 0, 5)).any()


def test_stored_blocks_come_back_in_order_from_several_hosts(workers):
    source = workers["prefill-0-npu-0"]
    hosts = [workers.address["host-0"], workers.address["host-1"]]
    blocks = fill(source, 0, ids(3, 1, 4, 15, 9), seed=3)
    parts = [(hosts[0], [10, 11], [0, 3]), (hosts[1], [12, 13, 14], [4, 1, 2])]
    source.store_blocks(0, ids(3, 1, 4, 15, 9), parts)
    for name, rank in (("prefill-0-npu-0", 0), ("prefill-0-npu-1", 1)):
        workers[name].load_blocks([rank], ids(20, 21, 22, 23, 24), parts)
        assert np.array_equal(workers[name].read_blocks(rank, ids(20, 21, 22, 23, 24)), blocks)
    workers["decode-0-npu-8"].load_blocks([0, 1], ids(5, 6), [(hosts[1], [12], [1]), (hosts[0], [11], [0])])
    for rank in (0, 1):
        assert np.array_equal(workers["decode-0-npu-8"].read_blocks(rank, ids(5, 6)), blocks[:, [3, 4]])
    assert [workers[f"host-{i}"].stats().num_blocks for i in range(2)] == [2, 3]


def test_freeing_drops_blocks_and_passes_over_what_was_never_written(workers):
    source, host = workers["prefill-0-npu-0"], workers["host-0"]
    source.store_blocks(0, ids(1, 2), [(workers.address["host-0"], [7, 8], [0, 1])])
    host.free([8, 9])
    assert host.stats().num_blocks == 1
    with pytest.raises(Exception, match="handle 8 holds no bytes"):
        source.load_blocks([0], ids(1, 2), [(workers.address["host-0"], [7, 8], [0, 1])])


def test_a_host_without_room_refuses_and_keeps_what_it_has(workers, make_config):
    small = host_plans(make_config("disaggregated"))[0]
    host = HostWorker(replace(small, dram_bytes=2 * small.block_bytes))
    block = np.zeros((3, 4, 40), np.float32)
    with pytest.raises(RuntimeError, match="host 0 DRAM: wanted 281088 bytes, 0 bytes are free"):
        host.write([1, 2, 3], [block] * 3)
    assert host.stats().num_blocks == 2


def test_a_worker_reports_its_devices(workers):
    (stats,) = workers["decode-0-npu-8"].stats()
    assert (stats.npu_id, stats.state, len(stats.hbm_used_bytes)) == (8, "ready", 2)
    assert 10**9 < stats.hbm_used_bytes[0] <= stats.hbm_capacity_bytes  # as charged, not as computed
    decode = next(plan for plan in workers.plans if plan.worker_id == "decode-0-npu-8")
    assert decode.ranks == (0, 1)
    step = StepInput(
        token_ids=[20, 21],
        positions=[0, 1],
        query_start=[0, 2],
        seq_lens=[2],
        block_tables=[[3]],
        sample_rows=[1],
        sampling=SamplingBatch.greedy(np.array([2])),
    )
    outputs = workers["decode-0-npu-8"].step([step, StepInput.idle()], 5_000)
    assert [len(output.token_ids) for output in outputs] == [1, 0]
    assert workers["decode-0-npu-8"].read_blocks(0, ids(3)).any()
    (stats,) = workers["decode-0-npu-8"].stats()
    assert (stats.num_steps, stats.busy_ns) == (1, 5_000)
    assert workers["decode-0-npu-8"].step_times().num_steps == 1


def test_peers_that_cannot_be_reached_are_named(tmp_path):
    peers = SocketPeers(KEY)
    with pytest.raises(EngineFailure, match=r"read: no worker answers at .*gone.sock"):
        peers.call(str(tmp_path / "gone.sock"), "read", [1])


def test_a_peer_that_comes_back_is_reached_again(tmp_path, make_config):
    peers, path = SocketPeers(KEY), str(tmp_path / "host.sock")
    plan = host_plans(make_config("disaggregated"))[0]
    for handle in (1, 2):
        host = HostWorker(plan, listen=path, authkey=KEY)
        peers.call(path, "write", [handle], [np.full((3, 4, 40), handle, np.float32)])
        assert peers.call(path, "read", [handle])[0].max() == handle
        with pytest.raises(EngineFailure, match="BlockNotStored: host 0: handle 99"):
            peers.call(path, "read", [99])
        host._server.close()
        with pytest.raises(EngineFailure):
            peers.call(path, "read", [handle])
