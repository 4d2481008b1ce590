"""A run as a trace that ui.perfetto.dev opens: steps, operators, movements and requests on tracks, with arrows.

Owns: which tracks there are, what is on them, and what part of a long run is written.
Must not know: how a run is driven; the report (serving/simulation/report.py).

A process per instance: its steps; a thread per stream of operators; counters of its rows, queue and KV space. A process
for the planes, with lanes of movements, and for the pool's fill. A process of requests with lanes, each request a slice
with its phases inside: slices of threads, because arrows cannot end at asynchronous ones.

Columns keep operators only as sums over an instance's steps. So every step is divided by the instance's mean shares of
the time that operators add, one after the other, which each such slice says. What is hidden is not drawn.

A run has far more steps than a viewer takes. What begins in [start, end) is written; end follows from the number of
events, and stands in `otherData` and in the message that write_trace returns.
"""

import gzip
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from devices.spec import PlaneName
from serving.config import RunConfig
from serving.pool_moves import MOVE_KINDS, MoveKind
from serving.simulation.columns import NEVER, InstanceColumns, RunColumns
from serving.simulation.latencies import PHASES, phase_instants, phase_label
from serving.simulation.plots import stream_of
from serving.simulation.trace_events import Event, Lanes, Tracks, counter_event, flow_events, in_order, slice_event

MAX_EVENTS = 200_000
LEAST_SHARE = 0.005  # of a step: a smaller operator gets no slice
REQUEST_EVENTS = 11  # at most: the request, six phases, four ends of arrows
STEP_EVENTS = 4  # at most: a slice and three counters, without operators
MAX_POOL_POINTS = 5_000
MAX_LANES = 150  # of requests, about: more at a time are sampled by stride
PLANE_OF_KIND: Mapping[MoveKind, PlaneName] = {"kv_transfer": "rdma", "pool_load": "ub", "pool_store": "ub"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """What part of a run is written."""

    start_ns: int
    end_ns: int
    request_stride: int  # every so many requests are drawn
    num_steps: int
    num_requests: int
    num_moves: int


def write_trace(
    config: RunConfig, run: RunColumns, path: Path, *, max_events: int = MAX_EVENTS, start_s: float = 0.0
) -> str:
    """Write the trace, compressed if `path` ends in .gz; what begins before `start_s` is left out.

    Returns a line that says what was left out, for people. `max_events` bounds the slices, counters and arrows; names
    of tracks come on top. ValueError if it is below 1,000 or the suffix is neither .json nor .gz.
    """
    if max_events < 1_000:
        raise ValueError(f"max_events: {max_events} is below the limit 1000")
    if path.suffix not in (".json", ".gz"):
        raise ValueError(f"trace {path.name}: the suffix must be .json or .json.gz")
    span = _span(run, max_events=max_events, start_ns=round(start_s * 1e9))
    tracks = Tracks()
    events = list(_Trace(run, span, tracks).events())
    message = _left_out(run, span)
    head = {
        "displayTimeUnit": "ms",
        "otherData": {
            "hardware": config.hardware.name,
            "npus": config.total_npus,
            "simulated_s": run.simulated_s,
            "start_s": span.start_ns / 1e9,
            "end_s": span.end_ns / 1e9,
            "written": message,
            "operators": "shares of an instance's whole run, not measured in each step",
        },
    }
    with gzip.open(path, "wt", encoding="utf-8") if path.suffix == ".gz" else path.open("w", encoding="utf-8") as file:
        _write(file, head, [*tracks.metadata(), *in_order(events)])
    return message


def _write(file: IO[Any], head: dict[str, Any], events: list[Event]) -> None:
    """One event a line, so that the file can be read with line tools."""
    file.write(json.dumps(head, allow_nan=False)[:-1] + ', "traceEvents": [\n')
    file.write(",\n".join(json.dumps(event, allow_nan=False, separators=(",", ":")) for event in events))
    file.write("\n]}\n")


def _span(run: RunColumns, *, max_events: int, start_ns: int) -> Span:
    """The longest span from `start_ns` on whose events are not too many."""
    stride = _request_stride(run)
    parts = [(run.requests.arrival_ns[::stride], REQUEST_EVENTS)]
    parts += [(i.start_ns, STEP_EVENTS + len(_operators(i))) for i in run.instances]
    if run.moves is not None:
        parts.append((run.moves.start_ns, 1))
    starts = np.concatenate([times for times, _ in parts])
    weights = np.concatenate([np.full(len(times), weight) for times, weight in parts])
    order = np.argsort(starts, kind="stable")
    order = order[np.searchsorted(starts[order], start_ns) :]
    upto = np.cumsum(weights[order])
    room = max_events - (0 if run.pool is None else min(len(run.pool.time_ns), max_events // 10, MAX_POOL_POINTS))
    num = int(np.searchsorted(upto, room, side="right"))
    # What begins together is written together, or left out together.
    end_ns = int(starts[order[num]]) if num < len(order) else max(int(starts.max(initial=0)), start_ns) + 1

    def inside(times: Any) -> int:
        return int(np.count_nonzero((times >= start_ns) & (times < end_ns)))

    return Span(
        start_ns=start_ns,
        end_ns=end_ns,
        request_stride=stride,
        num_steps=sum(inside(instance.start_ns) for instance in run.instances),
        num_requests=inside(run.requests.arrival_ns[::stride]),
        num_moves=0 if run.moves is None else inside(run.moves.start_ns),
    )


def _request_stride(run: RunColumns) -> int:
    """So that about MAX_LANES lanes hold the requests that are there at the same time."""
    requests = run.requests
    arrivals, ends = requests.arrival_ns, np.maximum(requests.last_token_ns, requests.first_token_ns)
    left = np.maximum(ends, arrivals)
    instants = np.concatenate([arrivals, left])
    changes = np.repeat([1, -1], len(arrivals))
    most = np.cumsum(changes[np.argsort(instants, kind="stable")]).max(initial=0)
    return max(-(-int(most) // MAX_LANES), 1)


def _left_out(run: RunColumns, span: Span) -> str:
    num_steps = sum(len(instance.start_ns) for instance in run.instances)
    moves = "movements were not kept"
    if run.moves is not None:
        moves = f"{span.num_moves:,} of {len(run.moves.kind):,} movements"
    return (
        f"trace: what begins in {span.start_ns / 1e9:.6g} to {span.end_ns / 1e9:.6g} s of {run.simulated_s:.6g} s: "
        f"{span.num_requests:,} of {len(run.requests):,} requests, {span.num_steps:,} of {num_steps:,} steps, {moves}"
    )


def _operators(instance: InstanceColumns) -> list[tuple[str, float]]:
    """Operators that are drawn, and where each ends, as a share of a step; the last end is at most 1."""
    whole = sum(instance.breakdown_ns.values())
    shares = [(name, ns / whole) for name, ns in instance.breakdown_ns.items() if whole and ns / whole >= LEAST_SHARE]
    return list(zip([name for name, _ in shares], np.cumsum([share for _, share in shares]).tolist(), strict=True))


class _Trace:
    """The events of a span, track by track."""

    def __init__(self, run: RunColumns, span: Span, tracks: Tracks) -> None:
        self._run, self._span, self._tracks = run, span, tracks
        self._steps: list[dict[int, Event]] = []  # by instance and place in its columns
        self._transfers: dict[int, Event] = {}  # by request

    def events(self) -> Iterator[Event]:
        for name in ("requests", *(i.instance_id for i in self._run.instances), "planes", "pool"):
            if name != "pool" or self._run.pool is not None:
                self._tracks.process(name)
        for instance in self._run.instances:
            yield from self._instance(instance)
        yield from self._moves()
        yield from self._pool()
        yield from self._requests()

    def _inside(self, times: Any) -> list[int]:
        found: list[int] = np.flatnonzero((times >= self._span.start_ns) & (times < self._span.end_ns)).tolist()
        return found

    def _instance(self, instance: InstanceColumns) -> Iterator[Event]:
        name = instance.instance_id
        pid, track = self._tracks.process(name), self._tracks.thread(name, "steps")
        operators = _operators(instance)
        streams = {op: self._tracks.thread(name, stream_of(op)) for op, _ in operators}
        kept: dict[int, Event] = {}
        for step in self._inside(instance.start_ns):
            start, length = int(instance.start_ns[step]), int(instance.charged_ns[step])
            args = {
                "rows": int(instance.num_seqs[step]),
                "tokens": int(instance.num_tokens[step]),
                "sampled": int(instance.num_sampled[step]),
                "joined": int(instance.num_joined[step]),
                "charged_us": length / 1e3,
                "max_kv_tokens_of_a_rank": int(instance.max_kv_tokens[step]),
            }
            kept[step] = slice_event(track, f"{instance.role} step", start, start + length, args)
            yield kept[step]
            waiting, used = int(instance.num_waiting[step]), int(instance.num_used_blocks[step])
            yield counter_event(pid, "requests", start, running=args["rows"], waiting=waiting)
            yield counter_event(pid, "KV", start, **{"blocks used": used})
            is_last = step + 1 == len(instance.start_ns)
            if is_last or int(instance.start_ns[step + 1]) > start + length:
                yield counter_event(pid, "requests", start + length, running=0, waiting=0)
            begin = start
            for op, upto in operators:
                end = min(start + round(length * upto), start + length)
                if end > begin:
                    yield slice_event(streams[op], op, begin, end, {"source": "mean share of the instance's steps"})
                begin = end
        self._steps.append(kept)

    def _moves(self) -> Iterator[Event]:
        moves = self._run.moves
        if moves is None:
            return
        lanes: dict[tuple[int, int], Lanes] = {}
        for i in self._inside(moves.start_ns):
            kind, request, start, end = (
                int(column[i]) for column in (moves.kind, moves.request, moves.start_ns, moves.end_ns)
            )
            place = int(moves.instance[i])
            if (kind, place) not in lanes:
                label = f"{PLANE_OF_KIND[MOVE_KINDS[kind]]} {MOVE_KINDS[kind]} {self._run.instances[place].instance_id}"
                lanes[kind, place] = Lanes(self._tracks, "planes", label)
            num_bytes = int(moves.num_bytes[i])
            args: dict[str, Any] = {"request": self._run.requests.request_ids[request], "bytes": num_bytes}
            if end > start:
                args["GB_per_s"] = round(num_bytes / (end - start), 3)
            event = slice_event(lanes[kind, place].take(start, end), MOVE_KINDS[kind], start, end, args)
            if MOVE_KINDS[kind] == "kv_transfer":
                self._transfers[request] = event
            yield event

    def _pool(self) -> Iterator[Event]:
        pool = self._run.pool
        if pool is None:
            return
        pid = self._tracks.process("pool")
        points = self._inside(pool.time_ns)
        stride = -(-len(points) // MAX_POOL_POINTS) or 1
        for i in points[::stride]:
            yield counter_event(
                pid, "pool", int(pool.time_ns[i]), **{"used GB": round(int(pool.used_bytes[i]) / 1e9, 6)}
            )

    def _requests(self) -> Iterator[Event]:
        requests, lanes = self._run.requests, Lanes(self._tracks, "requests", "requests")
        columns = phase_instants(requests)
        phases = [phase_label(name) for name in PHASES if name != "pool_load"]  # a load has a slice of its own
        for i in self._inside(requests.arrival_ns):
            if i % self._span.request_stride:
                continue
            instants = [int(column[i]) for column in columns]
            if max(instants) == instants[0]:
                continue  # rejected when it arrived, or cut off before anything happened
            for j in range(1, len(instants)):  # one that never came is passed at once
                instants[j] = max(instants[j], instants[j - 1])
            track = lanes.take(instants[0], instants[-1])
            args = {
                "prompt_tokens": int(requests.num_prompt_tokens[i]),
                "cached_tokens": int(requests.num_cached_tokens[i]),
                "output_tokens": int(requests.num_output_tokens[i]),
                "preemptions": int(requests.num_preemptions[i]),
            }
            whole = slice_event(track, requests.request_ids[i], instants[0], instants[-1], args)
            yield whole
            for phase, begin, end in zip(phases, instants, instants[1:], strict=False):
                if end > begin:
                    yield slice_event(track, phase, begin, end)
            yield from flow_events(i, "request", [whole, *self._path(i)])

    def _path(self, request: int) -> list[Event]:
        """Slices that the request went through: its first prefill step, its transfer, its first decode step.

        A step is the first one of its instance that begins when the request is there.
        """
        requests = self._run.requests
        steps = (
            self._first_step(int(requests.prefill_instance[request]), int(requests.prefill_start_ns[request])),
            self._transfers.get(request),
            self._first_step(int(requests.decode_instance[request]), int(requests.decode_start_ns[request])),
        )
        found = [step for step in steps if step is not None and step["dur"] > 0]
        return found if all(a["ts"] <= b["ts"] for a, b in itertools.pairwise(found)) else found[:1]

    def _first_step(self, instance: int, since_ns: int) -> Event | None:
        if NEVER in (instance, since_ns):
            return None
        step = int(np.searchsorted(self._run.instances[instance].start_ns, since_ns))
        return self._steps[instance].get(step)
