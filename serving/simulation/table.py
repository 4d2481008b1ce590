"""What a simulated run adds to the load generator's table: instances, steps, throughput, traffic, pool.

Owns: the rows of these sections, as wide as the table.
Must not know: how figures are made, files, the terminal.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from serving.report import WIDTH, row
from serving.simulation.latencies import phase_label

MAX_INSTANCE_ROWS = 16  # above it a role's instances share one row
MAX_OPERATORS = 7  # of the breakdown of a step; the rest in one row

Figures = Mapping[str, Any]


def simulation_rows(figures: Figures) -> list[str]:
    """Sections for `format_table`, of the values of `serving.simulation.figures.figures`."""
    return [
        *_service_rows(figures),
        *_throughput_rows(figures["throughput"]),
        *_instance_rows(figures["instances"]),
        *_phase_rows(figures["phases_ms"]),
        *_step_rows(figures["instances"]),
        *_plane_rows(figures["planes"]),
        *_pool_rows(figures["pool"]),
        *_run_rows(figures),
    ]


def _service_rows(figures: Figures) -> list[str]:
    """What became of requests, beyond their outcomes."""
    rows: list[str] = []
    if figures["cache"]["hit_rate_blocks"] is not None:
        rows.append(row("Cache hit rate (% of prompt blocks):", 100 * figures["cache"]["hit_rate_blocks"]))
    rows.append(row("Preemptions:", figures["preemptions"]))
    rows.append(row("Queue for a place, mean:", figures["admission_queue"]["mean"]))
    rows.append(row("Queue for a place, most:", figures["admission_queue"]["max"]))
    for name in ("ttft", "tpot", "e2el"):
        slo = figures["slo"] or {}
        if f"{name}_ms" in slo and slo["attainment"] is not None:
            rows.append(row(f"Within {name.upper()} of {slo[f'{name}_ms']:g} ms (%):", 100 * slo[f"{name}_attainment"]))
    return rows


def _throughput_rows(throughput: Figures) -> list[str]:
    head = f"{'tok/s':<8}{'NPUs':>5}{'all':>11}{'per NPU':>9}{'busy':>8}{'/TFLOPS':>9}"
    rows = ["Throughput".center(WIDTH, "-"), head]
    for name, rates in throughput.items():
        busy = rates["busy_tokens_per_s_per_npu"]
        rows.append(
            f"{name:<8}{rates['num_npus']:>5}{rates['tokens_per_s']:>11.0f}{rates['tokens_per_s_per_npu']:>9.0f}"
            f"{'-' if busy is None else f'{busy:.0f}':>8}{rates['tokens_per_s_per_tflops']:>9.3f}"
        )
    return rows


def _instance_rows(instances: Sequence[Figures]) -> list[str]:
    """Busy is the share of the time that passes in steps, fill how much of the batch's cap they use meanwhile."""
    head = f"{'':<12}{'busy%':>6}{'steps':>8}{'batch':>8}{'fill%':>6}{'queue':>6}{'KV%':>4}"
    rows = ["Instances".center(WIDTH, "-"), head]
    groups = _by_role(instances) if len(instances) > MAX_INSTANCE_ROWS else {i["instance_id"]: [i] for i in instances}
    for name, group in groups.items():
        steps = [instance["steps"] for instance in group]
        batch = [instance["mean_batch"] for instance in group]
        queue, kv = (_mean(instance[key]["mean"] for instance in group) for key in ("queue", "kv_occupancy"))
        fills = [instance["batch_fill"]["mean"] for instance in group if instance["batch_fill"] is not None]
        label = name if len(group) == 1 else f"{name} x{len(group)}"
        rows.append(
            f"{label:<12}{100 * _mean(i['busy_share'] for i in group):>6.1f}{_mean(steps):>8.0f}{_mean(batch):>8.1f}"
            f"{f'{100 * _mean(fills):.1f}' if fills else '-':>6}{queue:>6.{0 if queue >= 100 else 1}f}{100 * kv:>4.0f}"
        )
        if len(group) > 1:
            busy = [100 * i["busy_share"] for i in group]
            rows.append(f"{'  busiest':<12}{max(busy):>6.1f}")
            rows.append(f"{'  idlest':<12}{min(busy):>6.1f}")
    return rows


def _phase_rows(phases: Figures) -> list[str]:
    if not phases:
        return []
    rows = ["Time of a Request (ms)".center(WIDTH, "-"), f"{'':<18}{'mean':>8}{'P50':>8}{'P90':>8}{'P99':>8}"]
    for name, values in phases.items():
        rows.append(
            f"{phase_label(name):<18}" + "".join(f"{values[key]:>8.1f}" for key in ("mean", "p50", "p90", "p99"))
        )
    return rows


def _step_rows(instances: Sequence[Figures]) -> list[str]:
    """The operators of a mean step, by role; what two streams do at once is counted where it adds to the step."""
    rows = []
    for role, group in _by_role(instances).items():
        steps = sum(instance["steps"] for instance in group)
        if not steps:
            continue
        by_operator: dict[str, float] = {}
        for instance in group:
            for name, part in instance["breakdown"].items():
                by_operator[name] = by_operator.get(name, 0.0) + part["ms_per_step"] * instance["steps"] / steps
        ordered = sorted(by_operator.items(), key=lambda item: (-item[1], item[0]))
        step_ms = sum(by_operator.values())
        shown = ordered[:MAX_OPERATORS]
        if len(ordered) > MAX_OPERATORS:
            shown.append((f"{len(ordered) - MAX_OPERATORS} more", sum(ms for _, ms in ordered[MAX_OPERATORS:])))
        rows.append(f"Step of {role}: {step_ms:.2f} ms".center(WIDTH, "-"))
        rows += [f"{name:<30}{ms:>10.3f}{100 * ms / step_ms:>8.1f} %" for name, ms in shown]
    return rows


def _plane_rows(planes: Figures) -> list[str]:
    rows = ["Planes".center(WIDTH, "-"), f"{'':<6}{'GB':>12}{'transfers':>12}{'GB/s mean':>10}{'busy':>10}"]
    for name, plane in planes.items():
        if plane["transfers"]:
            rows.append(
                f"{name:<6}{plane['bytes'] / 1e9:>12.3f}{plane['transfers']:>12}"
                f"{plane['mean_bytes_per_s'] / 1e9:>10.2f}{plane['busy_bytes_per_s'] / 1e9:>10.1f}"
            )
    return rows if len(rows) > 2 else []


def _pool_rows(pool: Figures | None) -> list[str]:
    if pool is None:
        return []
    return [
        "Pool (blocks)".center(WIDTH, "-"),
        row("Capacity (GiB):", pool["capacity_bytes"] / 2**30),
        row("Occupancy, mean (%):", 100 * pool["occupancy"]["mean"]),
        row("Occupancy, most (%):", 100 * pool["occupancy"]["max"]),
        row("Hits of loads:", pool["hits"]),
        row("Misses of loads:", pool["misses"]),
        row("Loaded:", pool["loaded"]),
        row("Stored:", pool["stored"]),
        row("Evicted:", pool["evicted"]),
    ]


def _run_rows(figures: Figures) -> list[str]:
    machine = figures["machine"]
    rows = [
        "Simulation".center(WIDTH, "-"),
        row("Simulated time (s):", figures["simulated_s"]),
        row("Wall time (s):", machine["wall_s"]),
        row("Peak memory (MiB):", machine["peak_rss_bytes"] / 2**20),
    ]
    if machine["output_tokens_per_wall_s"] is not None:
        rows.append(row("Output tokens per wall second:", round(machine["output_tokens_per_wall_s"])))
    if figures["digest"] is not None:
        rows += ["Digest of the events:", figures["digest"][:32], figures["digest"][32:]]
    held = {name: count for name, count in (figures["held_at_rest"] or {}).items() if count}
    if figures["interrupted"]:  # then it is not at rest
        held = {}
    rows += [row(f"Still held, {name}:", count) for name, count in held.items()]
    return rows


def _by_role(instances: Sequence[Figures]) -> dict[str, list[Figures]]:
    groups: dict[str, list[Figures]] = {}
    for instance in instances:
        groups.setdefault(instance["role"], []).append(instance)
    return groups


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)
