"""Plots of a run's instances over time: what they did, how full they were, what waited for them.

Owns: throughput, utilization, queues, batches, steps, KV and pool occupancy by window, and what a step is made of.
Must not know: latencies, HTML.
"""

import numpy as np

from serving.records import OUTCOMES
from serving.simulation.columns import NEVER, InstanceColumns, RunColumns
from serving.simulation.plots import (
    GRAY,
    PLANE_COLORS,
    ROLE_COLORS,
    Plot,
    Trace,
    axis,
    by_instance,
    line,
    log_axis,
    numbers,
    operator_colors,
    time_axis,
)
from serving.simulation.windows import Windows

REJECTED = OUTCOMES.index("rejected")
LEAST_SHARE = 0.005  # of a step: a smaller operator is drawn with the others like it
LEAST_FILL = 0.3  # of the pool, at its fullest: below it the line of its capacity would flatten the fill
TERABYTE = 1e12
ARRIVED_COLOR, FINISHED_COLOR = "#0072b2", "#009e73"


def throughput_plots(run: RunColumns, windows: Windows) -> list[Plot]:
    """Tokens and requests per second."""
    requests, instances = run.requests, run.instances
    when, per_s = windows.middles_s, 1.0 / windows.width_s
    computed = requests.first_token_ns != NEVER
    prompts = windows.totals(requests.first_token_ns[computed], requests.num_prompt_tokens[computed])
    outputs = sum((windows.totals(_ends(i), i.num_sampled) for i in instances), np.zeros(windows.count))
    arrived = windows.totals(requests.arrival_ns)
    finished = windows.totals(requests.last_token_ns[requests.is_finished])
    tokens = [
        line(when, prompts * per_s, name="input (prompt computed)", color=ROLE_COLORS["prefill"]),
        line(when, outputs * per_s, name="output", color=ROLE_COLORS["decode"]),
    ]
    flow = [
        line(when, arrived * per_s, name="arrivals", color=ARRIVED_COLOR),
        line(when, finished * per_s, name="completions", color=FINISHED_COLOR),
    ]
    x = {"xaxis": time_axis(windows)}
    windowed = f"windows of {windows.width_s:g} s"
    return [
        Plot(
            key="tokens",
            title=f"Throughput of tokens, {windowed}",
            traces=tokens if prompts.any() or outputs.any() else [],
            layout=x | {"yaxis": axis("tokens per second [tok/s]")},
            empty="no token was computed",
        ),
        Plot(
            key="requests",
            title=f"Arrivals against completions, {windowed}",
            traces=flow if len(requests) else [],
            layout=x | {"yaxis": axis("requests per second [1/s]")},
            empty="no request arrived",
        ),
    ]


def queue_plots(run: RunColumns, windows: Windows) -> list[Plot]:
    """Requests that wait and that run; the queue of each instance."""
    requests, when = run.requests, windows.middles_s
    end_ns = round(run.simulated_s * 1e9)
    # A rejected request never waited; another one without a place waited until the run ended.
    waits = (requests.scheduled_ns != NEVER) | (requests.outcome != REJECTED)
    until = np.where(requests.scheduled_ns == NEVER, max(end_ns, 0), requests.scheduled_ns)[waits]
    placed = requests.scheduled_ns != NEVER
    left = np.where(requests.last_token_ns == NEVER, end_ns, requests.last_token_ns)[placed]
    admission = windows.levels(requests.arrival_ns[waits], until)
    running = windows.levels(requests.scheduled_ns[placed], left)
    # An instance without a step in a window had nothing to do.
    rows = [np.nan_to_num(windows.means(i.start_ns, i.charged_ns, i.num_waiting)) for i in run.instances]
    x = {"xaxis": time_axis(windows)}
    return [
        Plot(
            key="running",
            title="Requests in the system, mean of each window",
            traces=[
                line(when, admission, name="arrived, not placed", color=GRAY),
                line(when, running, name="placed, not finished", color=FINISHED_COLOR),
            ]
            if len(requests)
            else [],
            layout=x | {"yaxis": axis("requests")},
            empty="no request arrived",
        ),
        Plot(
            key="queue",
            title="Requests that wait at an instance for a step, mean of each window",
            traces=by_instance(run.instances, when, rows) if any(row.any() for row in rows) else [],
            layout=x | {"yaxis": axis("requests")},
            empty="nobody waited at an instance for a step",
        ),
    ]


def instance_plots(run: RunColumns, windows: Windows) -> list[Plot]:
    """Utilization, batch, step and fill of each instance; the pool; the operators of a step."""
    instances, when = run.instances, windows.middles_s
    x = {"xaxis": time_axis(windows)}
    decoding = tuple(i for i in instances if i.role != "prefill")
    prefilling = tuple(i for i in instances if i.role != "decode")
    rows = [windows.means(i.start_ns, i.charged_ns, i.num_seqs) for i in decoding]
    tokens = [windows.means(i.start_ns, i.charged_ns, i.num_tokens) for i in prefilling]
    steps = [windows.means(i.start_ns, i.charged_ns, i.charged_ns / 1e6) for i in instances]
    step_ms = [value for row in steps for value in numbers(row)]
    fill = [windows.means(i.start_ns, i.charged_ns, 100 * i.num_used_blocks / i.num_blocks) for i in instances]
    return [
        _utilization(instances, windows),
        Plot(
            key="rows",
            title=f"Requests in a step of {_roles(decoding)}, all ranks, mean over the steps' time",
            traces=by_instance(decoding, when, rows),
            layout=x | {"yaxis": axis("requests")},
        ),
        Plot(
            key="step-tokens",
            title=f"Tokens computed by a step of {_roles(prefilling)}, mean over the steps' time",
            traces=by_instance(prefilling, when, tokens, unit=" tok"),
            layout=x | {"yaxis": axis("tokens [tok]")},
        ),
        Plot(
            key="step",
            title="Time of a step, mean over the steps' time",
            traces=by_instance(instances, when, steps, unit=" ms"),
            layout=x | {"yaxis": log_axis("charged time [ms]", step_ms)},
        ),
        Plot(
            key="kv",
            title="KV space in use when steps begin, mean over the steps' time",
            traces=by_instance(instances, when, fill, unit=" %"),
            layout=x | {"yaxis": axis("blocks in use [%]", range=[0, 103])},
        ),
        _pool(run, windows),
        _breakdown(instances),
    ]


def _utilization(instances: tuple[InstanceColumns, ...], windows: Windows) -> Plot:
    """A heat map: instances from top to bottom, time from left to right."""
    rows = [windows.shares(i.start_ns, i.charged_ns) for i in instances]
    heat: Trace = {
        "type": "heatmap",
        "x": numbers(windows.middles_s),
        "y": [i.instance_id for i in instances],
        "z": [numbers(100 * row, digits=4) for row in rows],
        "zmin": 0,
        "zmax": 100,
        "colorscale": "Viridis",
        "colorbar": {"title": {"text": "busy [%]", "side": "right"}, "thickness": 12, "len": 1.0},
        "hovertemplate": "%{y}: %{z:.1f} % busy at %{x:.4g} s<extra></extra>",
    }
    return Plot(
        key="utilization",
        title=f"Share of time that an instance computes, windows of {windows.width_s:g} s",
        traces=[heat] if instances else [],
        layout={"xaxis": time_axis(windows), "yaxis": {"autorange": "reversed", "ticks": "", "type": "category"}},
        height_px=min(110 + 26 * len(instances), 640),
        is_wide=True,
    )


def _pool(run: RunColumns, windows: Windows) -> Plot:
    pool = run.pool
    traces: list[Trace] = []
    layout = {}
    if pool is not None and len(pool.time_ns):
        unit, factor = ("TB", 1e-12) if pool.capacity_bytes >= TERABYTE else ("GB", 1e-9)
        used, capacity = windows.held(pool.time_ns, pool.used_bytes) * factor, pool.capacity_bytes * factor
        color = PLANE_COLORS["ub"]
        traces = [
            line(windows.middles_s, used, name="used", color=color, fill="tozeroy"),
            line(
                windows.middles_s[[0, -1]],
                [capacity, capacity],
                name=f"capacity, {capacity:.4g} {unit}",
                color=GRAY,
                mode="lines",
                line={"dash": "dash", "width": 1},
                # Where it is hidden its legend says where it is.
                visible=True if used.max() > LEAST_FILL * capacity else "legendonly",
            ),
        ]
        layout = {"xaxis": time_axis(windows), "yaxis": axis(f"pool [{unit}]"), "showlegend": True}
    return Plot(
        key="pool",
        title="Shared pool, bytes of cached blocks",
        traces=traces,
        layout=layout,
        empty="this run has no pool" if pool is None else "nothing was stored in the pool",
    )


def _breakdown(instances: tuple[InstanceColumns, ...]) -> Plot:
    """By role, the share of each operator in the time of a step."""
    sums: dict[str, dict[str, int]] = {}
    num_steps: dict[str, int] = {}
    for instance in instances:
        parts = sums.setdefault(instance.role, {})
        num_steps[instance.role] = num_steps.get(instance.role, 0) + len(instance.start_ns)
        for operator, ns in instance.breakdown_ns.items():
            parts[operator] = parts.get(operator, 0) + ns
    roles = [role for role, parts in sums.items() if sum(parts.values())]
    totals = {role: sum(sums[role].values()) for role in roles}
    large = sorted(
        {op for role in roles for op, ns in sums[role].items() if ns >= LEAST_SHARE * totals[role]},
        key=lambda op: (op.rpartition(".")[0] or "~", -sum(sums[role].get(op, 0) / totals[role] for role in roles)),
    )
    rest = {role: totals[role] - sum(sums[role].get(op, 0) for op in large) for role in roles}
    columns = [(op, {role: sums[role].get(op, 0) for role in roles}) for op in large]
    if any(rest.values()):
        columns.append(("smaller ones", rest))
    colors = operator_colors([op for op, _ in columns])
    names = [f"{role}: {totals[role] / num_steps[role] / 1e6:.3g} ms" for role in roles]
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": op,
            "y": names,
            "x": numbers([100 * parts[role] / totals[role] for role in roles]),
            "customdata": numbers([parts[role] / num_steps[role] / 1e6 for role in roles]),
            "marker": {"color": colors[op], "line": {"color": "#fff", "width": 0.5}},
            "hovertemplate": "%{x:.1f} %, %{customdata:.4g} ms<extra>" + op + "</extra>",
        }
        for op, parts in columns
    ]
    return Plot(
        key="breakdown",
        title="What a step is made of: time that each operator adds to it, mean of all steps by role",
        note="Work that is hidden behind other work adds nothing and is not shown.",
        traces=traces,
        layout={
            "barmode": "stack",
            "xaxis": axis("share of the step [%]", range=[0, 100]),
            "yaxis": {"ticks": "", "autorange": "reversed"},
            "legend": {"orientation": "h", "x": 0, "y": 1.03, "yanchor": "bottom", "traceorder": "normal"},
        },
        height_px=220 + 50 * max(len(roles), 1),
        is_wide=True,
        empty="no step was taken",
    )


def _roles(instances: tuple[InstanceColumns, ...]) -> str:
    return ", ".join(dict.fromkeys(i.role for i in instances))


def _ends(instance: InstanceColumns) -> np.ndarray:
    return instance.start_ns + instance.charged_ns
