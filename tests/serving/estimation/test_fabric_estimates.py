"""Answers about transfers, model loading and switches: the published rows, and what is said about their reach."""

import json
from dataclasses import replace

import pytest

from devices.spec import SupernodeSpec
from serving.config_file import load_part
from serving.errors import ConfigError
from serving.estimation.fabric_estimates import estimate_load_model, estimate_switches, estimate_transfer


@pytest.fixture(scope="module")
def hardware():
    return SupernodeSpec.from_dict(load_part("hardware/cloudmatrix384.yaml"))


@pytest.mark.parametrize(
    ("source", "target", "op", "scope", "gb_per_s", "latency_us"),
    [  # arXiv 2506.12708v2, table 1
        ("npu", "npu", "read", "inter", 164, 1.9),
        ("npu", "npu", "read", "intra", 167, 1.2),
        ("npu", "npu", "write", "inter", 135, 2.1),
        ("npu", "npu", "write", "intra", 137, 1.3),
        ("npu", "cpu", "read", "inter", 147, 1.7),
        ("cpu", "npu", "read", "intra", 151, 1.0),
        ("cpu", "npu", "write", "inter", 107, 1.9),
        ("npu", "cpu", "write", "intra", 110, 1.1),
    ],
)
def test_table_1(hardware, source, target, op, scope, gb_per_s, latency_us):
    def estimate(num_bytes):
        return estimate_transfer(
            hardware=hardware, plane="ub", source=source, target=target, op=op, num_bytes=num_bytes, scope=scope
        )

    small, bulk = estimate(512), estimate(1_000_000_000)
    assert small["time_us"] == pytest.approx(latency_us, rel=1e-12)
    assert bulk["bandwidth_gb_per_s"] == pytest.approx(gb_per_s, rel=0.001)
    assert small["coverage"]["inside"]
    assert bulk["coverage"]["inside"]
    assert bulk["coverage"]["notes"][-1] == "a straight line joins the latency of 512 bytes and the bulk bandwidth"


def test_a_transfer_defaults_to_reading_a_hosts_memory_over_ub(hardware):
    ours = estimate_transfer(hardware=hardware, num_bytes=147_512)
    assert ours["time_us"] == pytest.approx(2.7)
    assert ours["bandwidth_gb_per_s"] == pytest.approx(147.512 / 2.7)
    assert list(ours) == ["time_us", "bandwidth_gb_per_s", "coverage"]


@pytest.mark.parametrize(
    ("arguments", "is_inside", "note"),
    [
        ({"num_bytes": 511}, False, "extrapolated: num_bytes 511 below 512"),
        ({"num_bytes": 0}, False, "extrapolated: num_bytes 0 below 512"),
        ({"num_bytes": 10**12}, True, "one transfer alone; no contention and no cost of submitting it"),
        (
            {"plane": "vpc", "num_bytes": 10**6},
            False,
            "no transfer over vpc is published: nominal bandwidth, and a latency that is assumed (30 us)",
        ),
        (
            {"plane": "vpc", "num_bytes": 10**9},
            False,
            "no transfer over vpc is published: nominal bandwidth, and a latency that is assumed (30 us)",
        ),
        (
            {"plane": "rdma", "target": "npu", "num_bytes": 288 * 10**6},
            False,
            "no transfer over rdma is published: nominal bandwidth, and a latency that is assumed (5 us)",
        ),
        (
            {"target": "npu", "scope": "package", "num_bytes": 10**6},
            True,
            "latency from arXiv 2607.26444, which measures 210 GB/s; 270 GB/s is published",
        ),
    ],
)
def test_the_reach_of_a_transfer(hardware, arguments, is_inside, note):
    coverage = estimate_transfer(hardware=hardware, **arguments)["coverage"]
    assert coverage["inside"] is is_inside
    assert note in coverage["notes"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"plane": "rdma"},
            "plane rdma of cloudmatrix384 has no npu-cpu read inter; it has npu-npu read inter, npu-npu",
        ),
        ({"source": "cpu"}, "plane ub of cloudmatrix384 has no cpu-cpu read inter; it has npu-npu read inter"),
        ({"scope": "package"}, "plane ub of cloudmatrix384 has no npu-cpu read package; it has .*npu-npu read package"),
        ({"plane": "vpc", "target": "npu", "scope": "package"}, "plane vpc of .* has no npu-npu read package"),
        ({"plane": "nvlink"}, "plane: 'nvlink' is not one of ub, rdma, vpc"),
        ({"source": "gpu"}, "source: 'gpu' is not one of npu, cpu"),
        ({"target": "host"}, "target: 'host' is not one of npu, cpu"),
        ({"op": "copy"}, "op: 'copy' is not one of read, write"),
        ({"scope": "rack"}, "scope: 'rack' is not one of inter, intra, package"),
        ({"num_bytes": -1}, "num_bytes: -1 must be at least 0"),
    ],
)
def test_a_transfer_that_there_is_not(hardware, arguments, message):
    with pytest.raises(ConfigError, match=message):
        estimate_transfer(hardware=hardware, **{"num_bytes": 512, **arguments})


@pytest.mark.parametrize(
    ("arguments", "port_gb_per_s", "alone_gb_per_s", "latency_us"),
    [  # arXiv 2506.12708v2: section 3.2 and 3.3 for ports, table 1 for one transfer
        ({"target": "npu"}, 196, 164, 1.9),
        ({"target": "npu", "scope": "intra", "op": "write"}, 196, 137, 1.3),
        ({"target": "cpu", "op": "write"}, 160, 107, 1.9),
        ({"target": "npu", "plane": "rdma"}, 25, 25, 5),
        ({"target": "cpu", "plane": "vpc"}, 50, 50, 30),
    ],
)
def test_transfers_into_one_port_share_it(hardware, arguments, port_gb_per_s, alone_gb_per_s, latency_us):
    """Each has an equal part of the port, but never more than it reaches alone."""

    def estimate(flows):
        return estimate_transfer(hardware=hardware, num_bytes=10**9, flows=flows, **arguments)

    alone = estimate(1)
    for flows in (2, 4, 8):
        ours = estimate(flows)
        share = min(port_gb_per_s / flows, alone_gb_per_s)
        assert ours["time_us"] == pytest.approx(1e6 / share + latency_us, rel=1e-4)
        assert ours["bandwidth_gb_per_s"] == pytest.approx(share, rel=3e-3)
        assert ours["time_us"] > alone["time_us"]
        assert ours["coverage"]["extrapolated"]["flows"] == "unpublished"
        assert not any("one transfer alone" in note for note in ours["coverage"]["notes"])


@pytest.mark.parametrize("num_bytes", [0, 1, 512, 10**6])
def test_flows_never_end_before_one_alone(hardware, num_bytes):
    times = [estimate_transfer(hardware=hardware, num_bytes=num_bytes, flows=flows)["time_us"] for flows in (1, 2, 700)]
    assert times == sorted(times)
    assert num_bytes or len(set(times)) == 1


def test_all_sources_can_send(hardware):
    """47 other nodes of 16 dies; 14 dies of other NPUs in a node, or all 16 into one of its 4 hosts."""
    for arguments, most in (
        ({"target": "npu", "scope": "inter"}, 752),
        ({"target": "npu", "scope": "intra"}, 14),
        ({"target": "cpu", "scope": "intra"}, 16),
        ({"source": "cpu", "target": "npu", "scope": "intra"}, 4),
    ):
        ours = estimate_transfer(hardware=hardware, num_bytes=10**9, flows=most, **arguments)
        port = 160 if arguments["target"] == "cpu" else 196
        assert ours["bandwidth_gb_per_s"] * most == pytest.approx(port, rel=0.01)
        with pytest.raises(ConfigError, match=f"flows: {most + 1}, cloudmatrix384 has {most} such sources"):
            estimate_transfer(hardware=hardware, num_bytes=1, flows=most + 1, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"flows": 0}, "flows: 0 must be at least 1"),
        ({"flows": 1.5}, "flows: 1.5 must be a whole number"),
        ({"flows": 2, "target": "npu", "scope": "package"}, "flows: 2, cloudmatrix384 has 1 such sources"),
        ({"flows": 2, "plane": "rdma"}, "plane rdma of cloudmatrix384 has no npu-cpu read inter"),
        (
            {"flows": 2, "hardware": "h100", "plane": "rdma", "target": "npu"},
            "flows: 2, but ub_topology of h100 is missing",
        ),
    ],
)
def test_flows_that_cannot_be_timed(hardware, arguments, message):
    with pytest.raises(ConfigError, match=message):
        estimate_transfer(**{"hardware": hardware, "num_bytes": 512, **arguments})


@pytest.mark.parametrize(
    ("cache", "cold_s", "warm_s", "copies", "hit_rate", "switch_s"),
    [("none", 2560, None, 0, 0, 320), ("local", 2560, 5, 8, 0.125, 281), ("ems", 320, 5, 1, 1, 5)],
)  # arXiv 2506.12708v2, table 2
def test_table_2(hardware, cache, cold_s, warm_s, copies, hit_rate, switch_s):
    ours = estimate_load_model(hardware=hardware, cache=cache)
    assert ours["coverage"]["inside"]
    assert (ours["dram_copies"], ours["hit_rate"]) == (copies, hit_rate)
    assert ours["cold_start_s"] == pytest.approx(cold_s, rel=0.001)
    assert ours["warm_start_s"] == (warm_s if warm_s is None else pytest.approx(warm_s))
    assert ours["switch_s"] == pytest.approx(switch_s, rel=0.002)


@pytest.mark.parametrize(
    ("arguments", "note"),
    [
        ({"instances": 16}, "extrapolated: instances 16 above 8"),
        ({"models": 4}, "extrapolated: models 4 below 8"),
        ({"model_bytes": 1.342e12}, "extrapolated: model_bytes 1.342e+12 above 6.71e+11"),
        ({"cached_models": 4}, "cached_models 4: published for 8; hits are taken as cached over all"),
    ],
)
def test_the_reach_of_model_loading(hardware, arguments, note):
    coverage = estimate_load_model(hardware=hardware, **arguments)["coverage"]
    assert not coverage["inside"]
    assert coverage["notes"][0] == note


def test_model_loading_refuses_what_makes_no_sense(hardware):
    with pytest.raises(ConfigError, match="cache: 'ssd' is not one of none, local, ems"):
        estimate_load_model(hardware=hardware, cache="ssd")
    with pytest.raises(ConfigError, match="instances: 0 must be at least 1"):
        estimate_load_model(hardware=hardware, instances=0)
    with pytest.raises(ConfigError, match="storage of cloudmatrix384: missing"):
        estimate_load_model(hardware=replace(hardware, storage=None))


@pytest.mark.parametrize(
    ("npus", "nodes", "logical_switches", "percent"),
    [(384, 48, 56, 100), (352, 44, 56, 92), (288, 36, 42, 100), (256, 32, 42, 89), (192, 24, 28, 100)],
)  # arXiv 2506.12708v2, table 11
def test_table_11(hardware, npus, nodes, logical_switches, percent):
    ours = estimate_switches(hardware=hardware, npus=npus)
    assert (ours["nodes"], ours["logical_switches"], round(100 * ours["utilization"])) == (
        nodes,
        logical_switches,
        percent,
    )
    assert ours["coverage"]["inside"]


def test_the_reach_of_switches(hardware):
    assert estimate_switches(hardware=hardware, npus=96)["coverage"]["notes"][0] == ("extrapolated: npus 96 below 192")
    partly = estimate_switches(hardware=hardware, npus=250)["coverage"]
    assert partly["inside"]
    assert partly["notes"][-1] == "npus 250: the last node is filled in part and brings all its uplinks"
    with pytest.raises(ConfigError, match=r"num_npus: 400 must be in \[1, 384\]"):
        estimate_switches(hardware=hardware, npus=400)


def test_another_machine_is_outside(hardware):
    other = replace(hardware, name="mine")
    for answer in (
        estimate_transfer(hardware=other, num_bytes=512),
        estimate_load_model(hardware=other),
        estimate_switches(hardware=other, npus=384),
    ):
        assert answer["coverage"]["notes"][0] == "hardware mine: what was published is of cloudmatrix384"
        assert not answer["coverage"]["inside"]
        assert json.loads(json.dumps(answer)) == answer
