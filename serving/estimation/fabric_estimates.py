"""What-if questions to the fabric, to model loading and to the switches, answered with JSON-ready dictionaries.

Owns: the units and keys of the answers, the words of a user (npu, cpu), and what is said about an answer's reach.
Must not know: command lines, formulas (devices/transfer.py, devices/model_loading.py, devices/switches.py), who sends
to whom when several do (serving/estimation/incast.py).
Source: arXiv 2506.12708v2, tables 1, 2 and 11, for what counts as published.

Every answer has its own `coverage` (serving/estimation/coverage.py), since what bounds it is not the sizes of the rows:
a bulk bandwidth holds for more bytes too. Arguments that make no sense raise ConfigError.
"""

from typing import Any, get_args

from devices.model_loading import ModelCache, load_model_time
from devices.spec import LATENCY_MESSAGE_BYTES, Op, Pair, PlaneName, SupernodeSpec
from devices.switches import plan_switches
from devices.transfer import TransferScope, plane_paths, transfer_time
from serving.errors import ConfigError
from serving.estimation.coverage import Coverage, compare_machine
from serving.estimation.estimate_inputs import Hardware, check_choice, check_counts, check_size, hardware_of
from serving.estimation.incast import End, incast_seconds

PUBLISHED_MACHINE = "cloudmatrix384"  # `name` in configs/hardware/cloudmatrix384.yaml
PUBLISHED_MODEL_BYTES = 671e9  # arXiv 2506.12708v2, table 2: DeepSeek 671B in INT8
PUBLISHED_LOADS = 8  # arXiv 2506.12708v2, table 2: instances, and models
PUBLISHED_NPUS = (192, 384)  # arXiv 2506.12708v2, table 11: smallest and largest supernode

_PAIRS: dict[int, Pair] = {0: "npu_npu", 1: "npu_host", 2: "host_host"}  # by the number of CPUs at the ends
_PAIR_WORDS: dict[Pair, str] = {"npu_npu": "npu-npu", "npu_host": "npu-cpu", "host_host": "cpu-cpu"}


def estimate_transfer(
    *,
    hardware: Hardware = "cloudmatrix384",
    plane: PlaneName = "ub",
    source: End = "npu",
    target: End = "cpu",
    op: Op = "read",
    num_bytes: int,
    scope: TransferScope = "inter",
    flows: int = 1,
) -> dict[str, Any]:
    """One transfer alone between two dies or hosts, or `flows` equal ones into one.

    Keys: time_us, bandwidth_gb_per_s, coverage. Several flows start at once from as many sources and share links
    max-min fairly; time_us is then that of the last, and bandwidth_gb_per_s that of each over this time.
    `source` and `target` are "npu" or "cpu", in any order; `scope` is "inter" or "intra" nodes, or within a "package".
    """
    spec = hardware_of(hardware)
    check_choice("plane", plane, get_args(PlaneName))
    check_choice("source", source, get_args(End))
    check_choice("target", target, get_args(End))
    check_choice("op", op, get_args(Op))
    check_choice("scope", scope, get_args(TransferScope))
    check_counts(0, num_bytes=num_bytes)
    check_counts(1, flows=flows)
    pair = _PAIRS[(source, target).count("cpu")]
    paths = plane_paths(spec, plane)
    if (pair, op, scope) not in paths:
        known = ", ".join(f"{_PAIR_WORDS[pair]} {op} {scope}" for pair, op, scope in paths)
        raise ConfigError(f"plane {plane} of {spec.name} has no {_PAIR_WORDS[pair]} {op} {scope}; it has {known}")
    alone = transfer_time(spec, plane=plane, pair=pair, op=op, scope=scope, num_bytes=num_bytes)
    seconds = alone.seconds
    if flows > 1:
        shared_s = incast_seconds(
            spec,
            plane=plane,
            source=source,
            target=target,
            op=op,
            scope=scope,
            num_bytes=num_bytes,
            flows=flows,
        )
        seconds = max(seconds, shared_s)  # without bytes there is nothing to share, but a latency
    latency_s = paths[pair, op, scope].latency_ns * 1e-9
    coverage = _coverage_on(spec)
    if num_bytes < LATENCY_MESSAGE_BYTES:
        coverage.compare("num_bytes", num_bytes, LATENCY_MESSAGE_BYTES, LATENCY_MESSAGE_BYTES)
    if flows == 1:
        coverage.notes.append("one transfer alone; no contention and no cost of submitting it")
    else:
        coverage.leave("flows", "unpublished", f"flows {flows}: no published figure; ports are shared max-min fairly")
    if plane != "ub":
        told = f"no transfer over {plane} is published: nominal bandwidth, and a latency that is assumed"
        coverage.leave("plane", "unpublished", f"{told} ({latency_s * 1e6:g} us)")
    elif scope == "package":
        coverage.notes.append("latency from arXiv 2607.26444, which measures 210 GB/s; 270 GB/s is published")
    if num_bytes > LATENCY_MESSAGE_BYTES:
        coverage.notes.append(
            f"a straight line joins the latency of {LATENCY_MESSAGE_BYTES} bytes and the bulk bandwidth"
        )
    return {
        "time_us": seconds * 1e6,
        "bandwidth_gb_per_s": num_bytes / seconds * 1e-9 if seconds > 0 else 0.0,
        "coverage": coverage.as_json(),
    }


def estimate_load_model(
    *,
    hardware: Hardware = "cloudmatrix384",
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
    spec = hardware_of(hardware)
    check_choice("cache", cache, get_args(ModelCache))
    check_size(model_bytes=model_bytes)
    check_counts(1, instances=instances, models=models, cached_models=cached_models)
    if spec.storage is None:
        raise ConfigError(f"storage of {spec.name}: missing; how fast models load is not known")
    try:
        loading = load_model_time(
            spec.storage,
            model_bytes=model_bytes,
            num_instances=instances,
            num_models=models,
            cache=cache,
            cached_models=cached_models,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    coverage = _coverage_on(spec)
    for name, value, published in (
        ("model_bytes", model_bytes, PUBLISHED_MODEL_BYTES),
        ("instances", instances, PUBLISHED_LOADS),
        ("models", models, PUBLISHED_LOADS),
    ):
        coverage.compare(name, value, published, published)
    default_held = {"none": None, "local": 1, "ems": models}[cache]
    if cached_models is not None and cached_models != default_held:
        told = f"cached_models {cached_models}: published for {default_held}; hits are taken as cached over all"
        coverage.leave("cached_models", "unpublished", told)
    coverage.notes.append(
        "the published latencies are illustrative; each is a size over one of two bandwidths that they imply"
    )
    return {
        "cold_start_s": loading.cold_start_s,
        "warm_start_s": loading.warm_start_s,
        "dram_copies": loading.dram_copies,
        "hit_rate": loading.hit_rate,
        "switch_s": loading.switch_s,
        "coverage": coverage.as_json(),
    }


def estimate_switches(*, hardware: Hardware = "cloudmatrix384", npus: int) -> dict[str, Any]:
    """Second-level switches of a supernode of `npus`. Keys: nodes, logical_switches, utilization (of 1), coverage."""
    spec = hardware_of(hardware)
    check_counts(1, npus=npus)
    try:
        plan = plan_switches(spec, num_npus=npus)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    coverage = _coverage_on(spec)
    coverage.compare("npus", npus, *PUBLISHED_NPUS)
    coverage.notes.append(
        "switches are taken in steps of 14 as in all published rows, which steps of 7 would fit as well"
    )
    if npus % spec.npus_per_node:
        coverage.notes.append(f"npus {npus}: the last node is filled in part and brings all its uplinks")
    return {
        "nodes": plan.num_nodes,
        "logical_switches": plan.num_logical_switches,
        "utilization": plan.utilization,
        "coverage": coverage.as_json(),
    }


def _coverage_on(spec: SupernodeSpec) -> Coverage:
    coverage = Coverage()
    compare_machine(coverage, spec)
    if spec.name != PUBLISHED_MACHINE:
        told = f"hardware {spec.name}: what was published is of {PUBLISHED_MACHINE}"
        coverage.leave("hardware", "unpublished", told)
    return coverage
