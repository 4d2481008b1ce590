"""Events of the Chrome trace format, and tracks for them.

Owns: the shape of each event, the numbers of processes and threads, lanes for slices that overlap.
Must not know: what a track stands for.
Source: "Trace Event Format" of Chromium's tracing documentation: X complete, C counter, M metadata, s/t/f flow
events, the latter bound to the slice of their thread that encloses their instant; times in microseconds.
"""

import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

Event = dict[str, Any]
FIRST_TID = 100_000  # beyond every pid


class Tracks:
    """Names and numbers of processes and threads, in the order in which they are first asked for."""

    def __init__(self) -> None:
        self._pids: dict[str, int] = {}
        self._tids: dict[tuple[int, str], int] = {}

    def process(self, name: str) -> int:
        """Its pid, from 1 on."""
        return self._pids.setdefault(name, len(self._pids) + 1)

    def thread(self, process: str, name: str) -> tuple[int, int]:
        """Its pid and tid; tids are unique over all processes.

        The first thread of a process has its pid for tid: viewers take it for the main one, and show it first.
        """
        pid = self.process(process)
        has_main = any(known == pid for known, _ in self._tids)
        return pid, self._tids.setdefault((pid, name), FIRST_TID + len(self._tids) if has_main else pid)

    def metadata(self) -> Iterator[Event]:
        """Names of all of them, and the order to show them in."""
        for name, pid in self._pids.items():
            yield {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}}
            yield {"ph": "M", "name": "process_sort_index", "pid": pid, "args": {"sort_index": pid}}
        for (pid, name), tid in self._tids.items():
            yield {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": name}}
            yield {"ph": "M", "name": "thread_sort_index", "pid": pid, "tid": tid, "args": {"sort_index": tid}}


def to_us(ns: int) -> float:
    """Microseconds to the nanosecond."""
    return round(int(ns) / 1e3, 3)


def slice_event(
    track: tuple[int, int], name: str, start_ns: int, end_ns: int, args: Mapping[str, Any] | None = None
) -> Event:
    """A slice [start, end) of a thread."""
    event = {"ph": "X", "name": name, "ts": to_us(start_ns), "dur": to_us(int(end_ns) - int(start_ns))}
    return event | {"pid": track[0], "tid": track[1]} | ({"args": args} if args else {})


def counter_event(pid: int, name: str, at_ns: int, **values: float) -> Event:
    """A counter's values from an instant on; each name is a counter of the process."""
    return {"ph": "C", "name": name, "ts": to_us(at_ns), "pid": pid, "args": values}


def flow_events(flow_id: int, name: str, slices: Sequence[Event]) -> Iterator[Event]:
    """Arrows from slice to slice; there are none unless there are two slices.

    An event lies at the start of its slice: there its thread has that slice, or one nested in it, open.
    """
    if len(slices) < 2:
        return
    for i, part in enumerate(slices):
        phase = "s" if i == 0 else "f" if i == len(slices) - 1 else "t"
        event = {"ph": phase, "cat": "request", "name": name, "id": flow_id, "ts": part["ts"]}
        yield event | {"pid": part["pid"], "tid": part["tid"]} | ({"bp": "e"} if phase == "f" else {})


class Lanes:
    """Threads of one process for intervals that overlap: each takes the lane that has been free for longest."""

    def __init__(self, tracks: Tracks, process: str, name: str) -> None:
        self._tracks, self._process, self._name = tracks, process, name
        self._free_at: list[tuple[int, int]] = []  # heap of (end, lane)

    def take(self, start_ns: int, end_ns: int) -> tuple[int, int]:
        """A thread for [start, end); starts must not fall."""
        if self._free_at and self._free_at[0][0] <= start_ns:
            _, lane = heapq.heapreplace(self._free_at, (end_ns, self._free_at[0][1]))
        else:
            lane = len(self._free_at)
            heapq.heappush(self._free_at, (end_ns, lane))
        return self._tracks.thread(self._process, f"{self._name} #{lane + 1}" if lane else self._name)


def in_order(events: Iterable[Event]) -> list[Event]:
    """By time; of equal times the longer slice first, so that it encloses the other, and flows behind slices."""
    return sorted(events, key=lambda e: (e["ts"], e["ph"] in "stf", -e.get("dur", 0.0)))
