"""Flows that share links fairly: the rate of each, and when each ends.

Owns: max-min fair rates of a set of flows on a set of links, and the fluid simulation of flows with starts and sizes.
Must not know: what the links are (devices/topology.py does), clocks, reservations.
Source: max-min fairness by progressive filling as in Bertsekas and Gallager, Data Networks, section 6.5.2.

A rate is max-min fair if it cannot be raised without lowering one that is not above it. Each flow then is held by
a bottleneck, a full link on which no other flow is faster, or by what it reaches alone.

Relation to `Fabric.reserve` (devices/fabric.py). The fabric serves every port in the order of reservations, in O(1),
and an end once told stays; the control plane needs that. Here the end of a flow depends on flows that start later, so
it is known only when all are: this module is for what-if questions about traffic that is known. Both give

- the same time for a transfer alone, up to the fabric's rounding to nanoseconds;
- the same end of the last of the flows that share one port, whatever their sizes and starts, if a path reaches what its
  port has (RDMA, VPC). In the fabric they end one after the other, here equal ones end together.

They differ in this:

- One UB path does not fill its port (reading 164 of 196 GB/s). Here several flows do; the fabric never gives more than
  the path's, so a UB port that many share is up to 196/164 (reading) or 196/135 (writing) slower there.
- The fabric has no links between nodes and switches, and sends transfers within a package through the dies' UB ports.
- The ports of the fabric do not wait for each other: what is reserved at one instant ends when the busiest port has
  served its bytes. Fair shares leave a port idle while its flows are held up elsewhere, so they never end sooner.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_SAME_INSTANT = 1e-9  # of a step's length: ends that differ by less are rounding, and are one event


# Shapes: F flows, L links of the network, H links that a flow crosses at most.
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Flows:
    """Flows over the links of one network. Places of `links_FH` that a flow does not need hold L.

    A flow begins to move at `start_s`, and its last byte arrives `latency_s` after it was sent. Raises ValueError where
    shapes do not agree or a number is out of range.
    """

    link_bytes_per_s_L: Floats
    links_FH: Ints
    alone_bytes_per_s_F: Floats  # what a flow reaches when it has all links to itself
    latency_s_F: Floats
    num_bytes_F: Floats
    start_s_F: Floats

    def __post_init__(self) -> None:
        num_flows, num_links = len(self.links_FH), len(self.link_bytes_per_s_L)
        for name in ("alone_bytes_per_s_F", "latency_s_F", "num_bytes_F", "start_s_F"):
            values = getattr(self, name)
            if values.shape != (num_flows,):
                raise ValueError(f"{name}: shape {values.shape} of {num_flows} flows")
            if not np.all(values >= 0):
                raise ValueError(f"{name}: {values.min()} must be at least 0")
        if self.links_FH.ndim != 2 or np.any((self.links_FH < 0) | (self.links_FH > num_links)):
            raise ValueError(f"links_FH: must be rows of numbers in [0, {num_links}]")
        if not (np.all(self.link_bytes_per_s_L > 0) and np.all(self.alone_bytes_per_s_F > 0)):
            raise ValueError("link_bytes_per_s_L, alone_bytes_per_s_F: must be above 0")

    def __len__(self) -> int:
        return len(self.links_FH)


def joined(first: Flows, *others: Flows) -> Flows:
    """Flows of one network as one set, in the order given."""
    parts = (first, *others)
    if any(not np.array_equal(part.link_bytes_per_s_L, first.link_bytes_per_s_L) for part in others):
        raise ValueError("flows of different networks cannot be joined")
    return Flows(
        link_bytes_per_s_L=first.link_bytes_per_s_L,
        links_FH=np.concatenate([part.links_FH for part in parts]),
        alone_bytes_per_s_F=np.concatenate([part.alone_bytes_per_s_F for part in parts]),
        latency_s_F=np.concatenate([part.latency_s_F for part in parts]),
        num_bytes_F=np.concatenate([part.num_bytes_F for part in parts]),
        start_s_F=np.concatenate([part.start_s_F for part in parts]),
    )


def fair_rates(flows: Flows) -> Floats:
    """Max-min fair rate of each flow (F,) in bytes/s if all are under way; their sizes and starts do not matter.

    A flow without links has what it reaches alone.
    """
    return _fill(flows, np.arange(len(flows)))


def finish_times(flows: Flows) -> Floats:
    """Arrival of each flow's last byte (F,), in seconds: between two events every flow moves at its fair rate.

    An event is a start or an end; each costs one progressive filling. A flow of 0 bytes has arrived when it starts, and
    so has one that nothing holds up.
    """
    remaining = flows.num_bytes_F.copy()
    finish_s = flows.start_s_F.copy()
    waiting = np.argsort(flows.start_s_F, kind="stable")
    is_held = np.isfinite(flows.alone_bytes_per_s_F) | np.any(flows.links_FH < len(flows.link_bytes_per_s_L), axis=1)
    waiting = waiting[(remaining > 0)[waiting] & is_held[waiting]]
    starts = flows.start_s_F[waiting]
    active = waiting[:0]
    num_started, now_s = 0, 0.0
    while len(active) or num_started < len(waiting):
        if not len(active):
            now_s = starts[num_started]
        num_now = int(np.searchsorted(starts, now_s, side="right"))
        active = np.concatenate([active, waiting[num_started:num_now]])
        num_started = num_now
        next_start_s = starts[num_started] if num_started < len(starts) else np.inf
        rates = _fill(flows, active)
        needed_s = remaining[active] / rates
        step_s = needed_s.min()
        if now_s + step_s * (1 + _SAME_INSTANT) < next_start_s:
            is_done = needed_s <= step_s * (1 + _SAME_INSTANT)
            finish_s[active[is_done]] = now_s + needed_s[is_done] + flows.latency_s_F[active[is_done]]
            now_s += step_s
        else:
            step_s = next_start_s - now_s
            is_done = np.zeros(len(active), dtype=bool)
            now_s = next_start_s
        remaining[active] = np.maximum(0.0, remaining[active] - rates * step_s)
        active = active[~is_done]
    return finish_s


def _fill(flows: Flows, which: Ints) -> Floats:
    """Fair rates of the flows `which`, as if there were no others.

    Progressive filling, but not one level at a time: a link is settled as soon as it allows each of its flows, by an
    equal share of what it has left, no more than their other links do. Settling the flows of one link never lowers the
    share of another, so every such link and every flow below its links' shares is final, and all of them are settled in
    one pass. The lowest share of all is always among them.
    """
    num_links = len(flows.link_bytes_per_s_L)
    free = np.append(flows.link_bytes_per_s_L, np.inf)  # the last one stands for "no link"
    links, alone = flows.links_FH[which], flows.alone_bytes_per_s_F[which]
    rates = np.empty(len(which))
    left = np.arange(len(which))
    while len(left):
        count = np.bincount(links.ravel(), minlength=num_links + 1)
        share = free / np.maximum(count, 1)
        shares = share[links]
        bound = np.minimum(alone, shares.min(axis=1, initial=np.inf))
        num_held = np.bincount(links[shares == bound[:, None]], minlength=num_links + 1)
        is_full = num_held == count
        is_full[num_links] = False
        settled = (alone == bound) | np.any(is_full[links], axis=1)
        rates[left[settled]] = bound[settled]
        taken = np.repeat(bound[settled], links.shape[1])
        taken[links[settled].ravel() == num_links] = 0.0
        free -= np.bincount(links[settled].ravel(), weights=taken, minlength=num_links + 1)
        np.maximum(free, 0.0, out=free)  # rounding only: no link gives more than it has
        left, links, alone = left[~settled], links[~settled], alone[~settled]
    return rates
