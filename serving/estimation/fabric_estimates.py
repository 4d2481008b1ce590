"""What-if questions to the fabric, to model loading and to the switches, answered with JSON-ready dictionaries.

Owns: the units and keys of the answers, the words of a user (npu, cpu), and what is said about an answer's reach.
Must not know: command lines, formulas (devices/transfer.py, devices/model_loading.py, devices/switches.py).
Source: arXiv 2506.12708v2, tables 1, 2 and 11, for what counts as published.

Every answer has `coverage`: `inside`, whether the arguments are within what published figures cover, and `notes`, which
say what is assumed and in which direction an answer is extrapolated. Arguments that make no sense raise ConfigError.
"""

from typing import Any, get_args

from devices.model_loading import ModelCache, load_model_time
from devices.spec import LATENCY_MESSAGE_BYTES, Op, Pair, PlaneName, SupernodeSpec
from devices.switches import plan_switches
from devices.transfer import TransferScope, plane_paths, transfer_time
from serving.errors import ConfigError, shown

PUBLISHED_MACHINE = "cloudmatrix384"  # `name` in configs/hardware/cloudmatrix384.yaml
ASSUMED_LATENCY_SHARE = 0.01  # of a transfer's time: published bandwidths have three digits, so less does not show
PUBLISHED_MODEL_BYTES = 671e9  # arXiv 2506.12708v2, table 2: DeepSeek 671B in INT8
PUBLISHED_LOADS = 8  # arXiv 2506.12708v2, table 2: instances, and models
PUBLISHED_NPUS = (192, 384)  # arXiv 2506.12708v2, table 11: smallest and largest supernode

_ENDS = ("npu", "cpu")
_PAIRS: dict[int, Pair] = {0: "npu_npu", 1: "npu_host", 2: "host_host"}  # by the number of CPUs at the ends
_PAIR_WORDS: dict[Pair, str] = {"npu_npu": "npu-npu", "npu_host": "npu-cpu", "host_host": "cpu-cpu"}


def estimate_transfer(
    *,
    hardware: SupernodeSpec,
    plane: PlaneName = "ub",
    source: str = "npu",
    target: str = "cpu",
    op: Op = "read",
    num_bytes: int,
    scope: TransferScope = "inter",
) -> dict[str, Any]:
    """One transfer alone between two dies or hosts. Keys: time_us, bandwidth_gb_per_s, coverage.

    `source` and `target` are "npu" or "cpu", in any order; `scope` is "inter" or "intra" nodes, or within a "package".
    """
    _choice("plane", plane, get_args(PlaneName))
    _choice("source", source, _ENDS)
    _choice("target", target, _ENDS)
    _choice("op", op, get_args(Op))
    _choice("scope", scope, get_args(TransferScope))
    pair = _PAIRS[(source, target).count("cpu")]
    paths = plane_paths(hardware, plane)
    if (pair, op, scope) not in paths:
        known = ", ".join(f"{_PAIR_WORDS[pair]} {op} {scope}" for pair, op, scope in paths)
        raise ConfigError(f"plane {plane} of {hardware.name} has no {_PAIR_WORDS[pair]} {op} {scope}; it has {known}")
    try:
        time = transfer_time(hardware, plane=plane, pair=pair, op=op, scope=scope, num_bytes=num_bytes)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    latency_s = paths[pair, op, scope].latency_ns * 1e-9
    notes, outside = ["one transfer alone; no contention and no cost of submitting it"], []
    if num_bytes < LATENCY_MESSAGE_BYTES:
        outside.append(
            f"num_bytes {num_bytes}: extrapolated downwards, {LATENCY_MESSAGE_BYTES} is the smallest published"
        )
    if plane != "ub":
        text = f"the latency of {plane} is assumed ({latency_s * 1e6:g} us), not published"
        (notes if latency_s <= ASSUMED_LATENCY_SHARE * time.seconds else outside).append(text)
    elif scope == "package":
        notes.append("latency from arXiv 2607.26444, which measures 210 GB/s; 270 GB/s is published")
    if num_bytes > LATENCY_MESSAGE_BYTES:
        notes.append(f"a straight line joins the latency of {LATENCY_MESSAGE_BYTES} bytes and the bulk bandwidth")
    return {
        "time_us": time.seconds * 1e6,
        "bandwidth_gb_per_s": time.bytes_per_s * 1e-9,
        "coverage": _coverage(hardware, notes, outside),
    }


def estimate_load_model(
    *,
    hardware: SupernodeSpec,
    model_bytes: float = PUBLISHED_MODEL_BYTES,
    instances: int = PUBLISHED_LOADS,
    models: int = PUBLISHED_LOADS,
    cache: ModelCache = "ems",
    cached_models: int | None = None,
) -> dict[str, Any]:
    """Loading one model on all instances, and switching one of them among several models.

    Keys: cold_start_s, warm_start_s (None without a cache), dram_copies, hit_rate (of 1), switch_s (mean), coverage.
    `cached_models` is what a cache holds: by default 1 in the local one of each instance, all in EMS.
    """
    _choice("cache", cache, get_args(ModelCache))
    if hardware.storage is None:
        raise ConfigError(f"storage of {hardware.name}: missing; how fast models load is not known")
    try:
        loading = load_model_time(
            hardware.storage,
            model_bytes=model_bytes,
            num_instances=instances,
            num_models=models,
            cache=cache,
            cached_models=cached_models,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    notes = ["the published latencies are illustrative; each is a size over one of two bandwidths that they imply"]
    outside = [
        f"{name} {value:g}: extrapolated {'upwards' if value > published else 'downwards'}, published for {published:g}"
        for name, value, published in (
            ("model_bytes", model_bytes, PUBLISHED_MODEL_BYTES),
            ("instances", instances, PUBLISHED_LOADS),
            ("models", models, PUBLISHED_LOADS),
        )
        if value != published
    ]
    default_held = {"none": None, "local": 1, "ems": models}[cache]
    if cached_models is not None and cached_models != default_held:
        outside.append(
            f"cached_models {cached_models}: published for {default_held}; hits are taken as cached over all"
        )
    return {
        "cold_start_s": loading.cold_start_s,
        "warm_start_s": loading.warm_start_s,
        "dram_copies": loading.dram_copies,
        "hit_rate": loading.hit_rate,
        "switch_s": loading.switch_s,
        "coverage": _coverage(hardware, notes, outside),
    }


def estimate_switches(*, hardware: SupernodeSpec, npus: int) -> dict[str, Any]:
    """Second-level switches of a supernode of `npus`. Keys: nodes, logical_switches, utilization (of 1), coverage."""
    try:
        plan = plan_switches(hardware, num_npus=npus)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    notes, outside = (
        ["switches are taken in steps of 14 as in all published rows, which steps of 7 would fit as well"],
        [],
    )
    if npus < PUBLISHED_NPUS[0]:
        outside.append(
            f"npus {npus}: extrapolated downwards, published from {PUBLISHED_NPUS[0]} to {PUBLISHED_NPUS[1]}"
        )
    if npus % hardware.npus_per_node:
        notes.append(f"npus {npus}: the last node is filled in part and brings all its uplinks")
    return {
        "nodes": plan.num_nodes,
        "logical_switches": plan.num_logical_switches,
        "utilization": plan.utilization,
        "coverage": _coverage(hardware, notes, outside),
    }


def _choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{name}: {shown(value)} is not one of {', '.join(known)}")


def _coverage(hardware: SupernodeSpec, notes: list[str], outside: list[str]) -> dict[str, Any]:
    if hardware.name != PUBLISHED_MACHINE:
        outside = [*outside, f"hardware {hardware.name}: what was published is of {PUBLISHED_MACHINE}"]
    return {"inside": not outside, "notes": [*outside, *notes]}
