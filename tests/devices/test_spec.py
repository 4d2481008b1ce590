"""The hardware file and the errors of a wrong one."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml

from devices.spec import PathSpec, SpecError, SupernodeSpec

Raw = dict[str, Any]


@pytest.fixture
def raw(hardware_file: str) -> Raw:
    content: Raw = yaml.safe_load(hardware_file)
    return content


def test_the_machine_of_the_paper(supernode: SupernodeSpec) -> None:
    assert (supernode.num_npus, supernode.num_dies, supernode.num_hosts) == (384, 768, 192)
    die = supernode.npu.die
    assert (die.num_aic, die.num_aiv, die.hbm_bytes) == (24, 48, 64_000_000_000)
    assert (die.int8_flops_per_s, die.bf16_flops_per_s, die.hbm_bytes_per_s) == (752e12, 376e12, 1.6e12)
    assert supernode.num_npus * supernode.npu.num_dies * die.hbm_bytes == 49_152_000_000_000  # 49.2 TB
    ub = supernode.planes["ub"]
    assert ub.paths["npu_npu", "read", "inter"] == PathSpec(bytes_per_s=164e9, latency_ns=1900)
    assert ub.paths["npu_host", "write", "intra"] == PathSpec(bytes_per_s=110e9, latency_ns=1100)
    assert supernode.planes["rdma"].paths["npu_npu", "write", "inter"].bytes_per_s == 25e9
    assert ("npu_host", "read", "inter") not in supernode.planes["rdma"].paths
    assert supernode.planes["vpc"].port_owner == "node"


def test_the_switches_of_the_paper(supernode: SupernodeSpec) -> None:
    ub = supernode.ub_topology
    assert ub is not None
    assert ub.l1_uplinks_per_chip * ub.link_bytes_per_s == 448e9
    assert ub.node_uplink_bytes_per_s == 3136e9 == 8 * 392e9  # no over-subscription for the NPUs
    assert ub.max_nodes == supernode.num_nodes == 48
    assert supernode.num_nodes * ub.l1_chips_per_node == 336
    assert ub.l1_chips_per_node * ub.l2_chips_per_sub_plane == 112
    die_port_bytes_per_s = ub.l1_chips_per_node * ub.link_bytes_per_s
    assert die_port_bytes_per_s == supernode.planes["ub"].die_port_bytes_per_s


def test_the_zero_byte_latency_is_what_the_wire_leaves_of_the_published_one() -> None:
    assert PathSpec(bytes_per_s=135e9, latency_ns=2100).zero_byte_latency_ns == 2096
    assert PathSpec(bytes_per_s=1e6, latency_ns=2100).zero_byte_latency_ns == 0  # 512 bytes take 512 us


def test_every_number_names_its_source(hardware_file: str) -> None:
    for number, line in enumerate(hardware_file.splitlines(), start=1):
        text, _, comment = line.partition("#")
        value = text.partition(":")[2].strip()
        if value and not value.startswith("{") and value not in ("cloudmatrix384", "endpoint", "node"):
            assert comment.strip(), f"line {number}: {text}"


def leaves(raw: Raw, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in raw.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        yield (*path, key)


def without(raw: Raw, path: tuple[str, ...]) -> Raw:
    return edited(raw, path, lambda parent, key: parent.pop(key))


def edited(raw: Raw, path: tuple[str, ...], edit: Callable[[Raw, str], object]) -> Raw:
    result = copy.deepcopy(raw)
    parent = result
    for key in path[:-1]:
        parent = parent[key]
    edit(parent, path[-1])
    return result


def test_a_misspelt_key_is_refused_wherever_it_is(raw: Raw) -> None:
    for path in leaves(raw):
        wrong = edited(raw, path, lambda parent, key: parent.update({key + "x": parent.pop(key)}))
        with pytest.raises(SpecError, match=r"unknown key|missing") as caught:
            SupernodeSpec.from_dict(wrong)
        assert path[-1] in str(caught.value)


def test_a_missing_key_is_refused_except_a_path_that_a_plane_need_not_have_and_what_is_optional(raw: Raw) -> None:
    for path in leaves(raw):
        if "paths" in path[:-1] and path[-1] not in ("bytes_per_s", "latency_ns"):
            continue
        if path in (("ub_topology",), ("storage",)):
            assert getattr(SupernodeSpec.from_dict(without(raw, path)), path[0]) is None
            continue
        with pytest.raises(SpecError, match=rf"{path[-1]}: missing"):
            SupernodeSpec.from_dict(without(raw, path))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("num_nodes", 0, "num_nodes: 0 must be finite and above 0"),
        ("num_nodes", 1.5, "num_nodes: 1.5 is not an integer"),
        ("num_nodes", True, "num_nodes: True is not an integer"),
        ("npu.die.hbm_bytes_per_s", "fast", "npu.die.hbm_bytes_per_s: 'fast' is not a number"),
        ("npu.die.num_aic", -1, "npu.die.num_aic: -1 must be finite and above 0"),
        ("npu.die_to_die.latency_ns", -1, "latency_ns: -1 must be finite and at least 0"),
        ("host.dram_bytes", float("inf"), "host.dram_bytes: inf is not an integer"),
        ("host.dram_bytes", float("nan"), "host.dram_bytes: nan is not an integer"),
        ("num_nodes", 49, "num_nodes: 49 exceeds the 48 of ub_topology"),
        ("ub_topology.link_bytes_per_s", 0, "ub_topology.link_bytes_per_s: 0.0 must be finite and above 0"),
        ("ub_topology.l2_chips_per_logical_switch", 3, "l2_chips_per_sub_plane: 16 is not a multiple of .* 3"),
        ("ub_topology", None, "ub_topology: None is not a mapping"),
        ("storage.bucket_bytes_per_s", -1, "storage.bucket_bytes_per_s: -1.0 must be finite and above 0"),
        ("planes.ub.port_owner", "rack", "port_owner: 'rack' is neither"),
        ("planes.ub.paths", 3, "planes.ub.paths: 3 is not a mapping"),
        ("planes.vpc", None, "planes.vpc: None is not a mapping"),
        ("npu", [], r"npu: \[\] is not a mapping"),
    ],
)
def test_a_wrong_value_is_named(raw: Raw, path: str, value: object, message: str) -> None:
    wrong = edited(raw, tuple(path.split(".")), lambda parent, key: parent.update({key: value}))
    with pytest.raises(SpecError, match=message):
        SupernodeSpec.from_dict(wrong)
