"""The links that transfers cross, and rates worked by hand on them."""

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from devices.flows import Flows, fair_rates, finish_times, joined
from devices.spec import SupernodeSpec
from devices.topology import Topology

GB = 1e9


def crossed(topology: Topology, flows: Flows) -> list[list[str]]:
    num_links = len(topology.link_bytes_per_s)
    return [[topology.link_name(int(link)) for link in row if link < num_links] for row in flows.links_FH]


def all_pairs(dies: npt.ArrayLike) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    ends = np.asarray(dies, dtype=np.int64)
    src, dst = np.repeat(ends, len(ends)), np.tile(ends, len(ends))
    return src[src != dst], dst[src != dst]


def test_the_links_of_each_way(topology: Topology) -> None:
    die, host = topology.die, topology.host
    flows = topology.flows(
        "ub", op="write", src=[die(0), die(0), die(0), die(0)], dst=[die(0, 1), die(7), die(8), host(191)], num_bytes=1
    )
    assert crossed(topology, flows) == [
        ["package 1"],
        ["ub out 0", "ub in 14"],
        ["ub out 0", "ub in 16", "uplink 0", "downlink 1"],
        ["ub out 0", "ub in 959", "uplink 0", "downlink 47"],
    ]
    assert list(flows.alone_bytes_per_s_F / GB) == [270, 137, 135, 107]
    rdma = topology.flows("rdma", op="read", src=[die(0, 1), die(0)], dst=[die(9), die(0, 1)], num_bytes=1)
    assert crossed(topology, rdma) == [["rdma out 1", "rdma in 18"], ["rdma out 0", "rdma in 1"]]
    vpc = topology.flows("vpc", op="read", src=[host(3)], dst=[die(9)], num_bytes=1)
    assert crossed(topology, vpc) == [["vpc out 0", "vpc in 1"]]


def test_the_capacities_of_the_links(topology: Topology) -> None:
    by_name = {topology.link_name(link): value for link, value in enumerate(topology.link_bytes_per_s)}
    assert len(by_name) == len(topology.link_bytes_per_s)
    expected = {"ub out 767": 196, "ub in 0": 196, "ub out 768": 160, "ub in 959": 160, "rdma in 5": 25}
    expected |= {"vpc out 47": 50, "uplink 0": 3136, "downlink 47": 3136, "package 3": 270}
    assert {name: by_name[name] / GB for name in expected} == expected


def test_two_writes_into_one_die_share_its_port(topology: Topology) -> None:
    src, dst = [topology.die(8), topology.die(16)], [topology.die(0)] * 2
    assert list(fair_rates(topology.flows("ub", op="write", src=src, dst=dst, num_bytes=1))) == [98 * GB, 98 * GB]


def test_an_incast_shares_the_port_and_leaves_the_rest_alone(topology: Topology) -> None:
    incast = topology.flows("ub", op="read", src=np.arange(32, 96), dst=[0] * 64, num_bytes=1)
    bystander = topology.flows("ub", op="read", src=[200], dst=[300], num_bytes=1)
    rates = fair_rates(joined(incast, bystander))
    assert rates[:64] == pytest.approx(196 * GB / 64)
    assert rates[64] == 164 * GB


def test_a_host_serves_readers_at_its_port(topology: Topology) -> None:
    src = [topology.host(0)] * 4
    flows = topology.flows("ub", op="read", src=src, dst=[topology.die(8 + i) for i in range(4)], num_bytes=1)
    assert fair_rates(flows) == pytest.approx(40 * GB)


def test_a_node_that_sends_all_it_can_fills_its_uplinks(topology: Topology) -> None:
    """16 dies read at 164 and 4 hosts at 147 GB/s would be 3,212 GB/s; the node has 3,136. The hosts keep theirs,
    since 147 is below an equal part (156.8), and the dies share the rest: (3,136 - 4 x 147) / 16 = 159.25.
    """
    dies = topology.flows("ub", op="read", src=np.arange(16), dst=np.arange(16, 32), num_bytes=1)
    hosts = topology.flows("ub", op="read", src=768 + np.arange(4), dst=np.arange(32, 36), num_bytes=1)
    rates = fair_rates(joined(dies, hosts))
    assert rates[:16] == pytest.approx(159.25 * GB)
    assert rates[16:] == pytest.approx(147 * GB)


def test_a_node_shares_its_vpc_port(topology: Topology) -> None:
    flows = topology.flows("vpc", op="read", src=[768, 769], dst=[16, 32], num_bytes=50_000)
    assert list(fair_rates(flows)) == [25 * GB, 25 * GB]


def test_all_to_all_of_the_decode_instance(topology: Topology) -> None:
    """320 dies: one flow of each leaves over the package link, 318 share its port. 102,080 flows."""
    src, dst = all_pairs(np.arange(320))
    flows = topology.flows("ub", op="write", src=src, dst=dst, num_bytes=100_000)
    rates, in_package = fair_rates(flows), src // 2 == dst // 2
    assert rates[in_package] == pytest.approx(270 * GB)
    assert rates[~in_package] == pytest.approx(196 * GB / 318)
    assert finish_times(flows).max() == pytest.approx(318 * 1e5 / (196 * GB) + 2.1e-6 - 512 / (135 * GB))


@pytest.mark.parametrize(("megabytes", "measured_us"), [(8.8, 679), (21.4, 1628), (40.0, 3080)])
def test_a_gather_in_a_node_is_within_8_percent_of_a_measured_one(
    topology: Topology, megabytes: float, measured_us: float
) -> None:
    """HCCL AllGather over 16 dies: Horacehxw/msModeling, comm_alignment_report_20260312.md (taken as one node).

    Shares of a full port are 6 to 8 % optimistic; one path's bandwidth for the whole port would be 14 % pessimistic.
    """
    src, dst = all_pairs(np.arange(16))
    ours_us = finish_times(topology.flows("ub", op="read", src=src, dst=dst, num_bytes=megabytes * 1e6)).max() * 1e6
    assert 0.92 < ours_us / measured_us < 0.95


def test_itself_and_nothing_are_free(topology: Topology) -> None:
    flows = topology.flows("ub", op="read", src=[3, 3], dst=[3, 20], num_bytes=[1e9, 0], start_s=[2.0, 3.0])
    assert list(finish_times(flows)) == [2.0, 3.0]
    assert np.isinf(fair_rates(flows)[0])


def test_what_there_is_not_is_refused(topology: Topology, supernode: SupernodeSpec) -> None:
    with pytest.raises(
        ValueError, match="plane rdma of cloudmatrix384 has no path npu_host read inter; it has npu_npu"
    ):
        topology.flows("rdma", op="read", src=[768], dst=[100], num_bytes=1)
    with pytest.raises(ValueError, match=r"endpoints are numbered in \[0, 960\), not 0..960"):
        topology.flows("ub", op="read", src=[0], dst=[960], num_bytes=1)
    with pytest.raises(ValueError, match=r"shapes \(1,\) and \(2,\)"):
        topology.flows("ub", op="read", src=[0], dst=[1, 2], num_bytes=1)
    with pytest.raises(ValueError, match="npu 384 die 0: cloudmatrix384 has 384 NPUs of 2 dies"):
        topology.die(384)
    with pytest.raises(ValueError, match="host 192: cloudmatrix384 has 192 hosts"):
        topology.host(192)
    with pytest.raises(ValueError, match="link -1: there are"):
        topology.link_name(-1)
    with pytest.raises(ValueError, match="ub_topology of cloudmatrix384: missing"):
        Topology(replace(supernode, ub_topology=None))
