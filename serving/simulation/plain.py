"""The plain way through a run in virtual time: the live control plane on a virtual clock, and columns of what it did.

Owns: what is written down while the asyncio plane runs, and the columns made of it.
Must not know: how the plane decides, how figures are made of the columns.

It is the way of colocated instances, and what the fast driver is held against.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from devices.spec import PlaneName
from devices.step_work import BreakdownSum
from serving.build import InstancePlace, instance_places
from serving.cluster import Cluster
from serving.config import RunConfig
from serving.core.event_log import EventLog, NullLog
from serving.core.ids import RequestId
from serving.core.request import OutcomeReason, Request
from serving.core.router import Placement
from serving.engine_run import StepRecord
from serving.plan import block_bytes
from serving.pool_moves import MOVE_KINDS, BlockMove
from serving.records import OUTCOMES
from serving.simulation.columns import (
    NEVER,
    InstanceColumns,
    MoveColumns,
    PlaneTotals,
    PoolColumns,
    RequestColumns,
    RunColumns,
)
from serving.simulator import drive
from serving.workload_run import OUTCOME_OF_STATE
from serving.workloads.workload import Workload

PLANES: tuple[PlaneName, ...] = ("ub", "rdma", "vpc")
REASONS = tuple(str(reason) for reason in OutcomeReason)
_STEP_COLUMNS = (
    "start_ns", "charged_ns", "num_seqs", "num_tokens", "num_sampled", "num_joined", "num_waiting", "num_used_blocks",
    "max_kv_tokens",
)  # fmt: skip


def run_plain(
    config: RunConfig,
    workload: Workload,
    *,
    moves: bool = False,
    digest: bool = False,
    on_progress: Callable[[int], None] = lambda num_over: None,
) -> RunColumns:
    """Run `workload` on the asyncio plane with timing shards. `wall_s` and `peak_rss_bytes` are left at zero.

    Raises AssertionError if the plane contradicts itself in the end.
    """
    places = instance_places(config)
    notes = _Notes(config, places, keep_moves=moves)
    num_over = itertools.count(1)
    log = EventLog() if digest else NullLog()
    run = drive(
        config,
        workload,
        log=log,
        on_step=notes.on_step,
        on_outcome=lambda request: on_progress(next(num_over)),
        watch=notes.watch,
    )
    cluster, requests = run.cluster, run.workload_run.requests
    return RunColumns(
        requests=_request_columns(requests, notes.placements, places),
        instances=tuple(notes.instance_columns()),
        planes={plane: _plane_totals(cluster, plane) for plane in PLANES},
        pool=notes.pool_columns(),
        moves=notes.move_columns(requests),
        num_drafts=sum(engine.num_drafts for engine in cluster.all_engines),
        num_accepted=sum(engine.num_accepted for engine in cluster.all_engines),
        held_at_rest=run.held,
        simulated_s=run.simulated_s,
        digest=log.digest() if digest else None,
        num_not_arrived=len(workload) - len(requests),
        interrupted=run.interrupted,
    )


@dataclass(slots=True)
class _Steps:
    """The steps of one instance so far, one tuple each, in the order of _STEP_COLUMNS."""

    rows: list[tuple[int, ...]] = field(default_factory=list)
    breakdown: BreakdownSum = field(default_factory=BreakdownSum)
    first_gaps_ns: list[int] = field(default_factory=list)
    end_ns: int = NEVER  # of the last one
    request_ids: frozenset[RequestId] = frozenset()  # of the last one's rows


class _Notes:
    """What is written down while a cluster runs."""

    def __init__(self, config: RunConfig, places: list[InstancePlace], *, keep_moves: bool) -> None:
        self._config = config
        self._places = places
        self._keep_moves = keep_moves
        self._steps = {place.instance_id: _Steps() for place in places}
        self._moves: list[BlockMove] = []
        self._fill: dict[int, int] = {}  # instant to bytes in the pool
        self._cluster: Cluster | None = None
        self.placements: dict[RequestId, Placement] = {}  # the last of each request

    def watch(self, cluster: Cluster) -> None:
        """Hear of a cluster's placements and movements."""
        self._cluster = cluster
        cluster.on_place = self._on_place
        cluster.on_move = self._on_move

    def on_step(self, step: StepRecord) -> None:
        """Implements Engine's `on_step`."""
        steps, batch = self._steps[step.instance_id], step.batch
        num_followers = 0  # rows that have had a token of the step before
        for row, gap_ns in zip(step.itl_rows, step.simulated_itl_ns.astype(np.int64).tolist(), strict=True):
            if batch.request_ids[row] in steps.request_ids and gap_ns == step.end_ns - steps.end_ns:
                num_followers += 1
            else:
                steps.first_gaps_ns.append(gap_ns)
        (kv_tokens,) = batch.sums_by_rank(batch.num_computed_tokens + batch.num_scheduled_tokens)
        steps.rows.append(
            (
                step.start_ns,
                step.end_ns - step.start_ns,
                batch.num_rows,
                step.num_tokens,
                step.num_sampled,
                batch.num_rows - num_followers,
                step.num_waiting,
                step.num_used_blocks,
                int(kv_tokens.max()),
            )
        )
        steps.breakdown.add(step.time)
        steps.end_ns = step.end_ns
        steps.request_ids = frozenset(batch.request_ids.tolist())

    def _on_place(self, placement: Placement) -> None:
        self.placements[placement.request_id] = placement

    def _on_move(self, move: BlockMove) -> None:
        assert self._cluster is not None
        if self._cluster.pool is not None:
            self._fill[move.start_ns] = self._cluster.pool.index.used_bytes
        if self._keep_moves:
            self._moves.append(move)

    def instance_columns(self) -> list[InstanceColumns]:
        """One per instance, in the order of the configuration."""
        columns = []
        for place in self._places:
            section, steps = self._config.instances[place.role], self._steps[place.instance_id]
            num_ranks = self._config.num_scheduling_ranks(place.role)
            table = np.array(steps.rows, np.int64).reshape(-1, len(_STEP_COLUMNS))
            start_ns, charged_ns = table[:, 0].copy(), table[:, 1].copy()
            small = dict(zip(_STEP_COLUMNS[2:], table[:, 2:].astype(np.int32).T.copy(), strict=True))
            columns.append(
                InstanceColumns(
                    instance_id=place.instance_id,
                    role=place.role,
                    num_npus=section.npus,
                    num_ranks=num_ranks,
                    max_num_seqs=section.max_num_seqs,
                    num_blocks=section.num_blocks * num_ranks,
                    start_ns=start_ns,
                    charged_ns=charged_ns,
                    **small,
                    breakdown_ns=steps.breakdown.total,
                    first_gaps_ns=np.array(steps.first_gaps_ns, np.int64),
                )
            )
        return columns

    def pool_columns(self) -> PoolColumns | None:
        """Of the shared pool, if there is one."""
        assert self._cluster is not None
        pool = self._cluster.pool
        if pool is None:
            return None
        return PoolColumns(
            capacity_bytes=pool.index.capacity_bytes,
            block_bytes=block_bytes(self._config),
            num_hits=pool.index.num_hits,
            num_misses=pool.index.num_misses,
            num_evicted=pool.index.num_evicted,
            num_loaded_blocks=pool.num_loaded_blocks,
            num_stored_blocks=pool.num_stored_blocks,
            time_ns=np.array(list(self._fill), np.int64),
            used_bytes=np.array(list(self._fill.values()), np.int64),
            host_used_bytes=np.array(list(pool.index.host_used_bytes.values()), np.int64),
        )

    def move_columns(self, requests: list[Request]) -> MoveColumns | None:
        """Of all movements, if they were kept."""
        if not self._keep_moves:
            return None
        index = {request.request_id: i for i, request in enumerate(requests)}
        instance = {place.instance_id: i for i, place in enumerate(self._places)}

        def instance_of(move: BlockMove) -> int:
            placement = self.placements[move.request_id]
            return instance[placement.decode if move.kind == "kv_transfer" else placement.prefill]

        moves = self._moves
        return MoveColumns(
            kind=np.array([MOVE_KINDS.index(move.kind) for move in moves], np.int16),
            request=np.array([index[move.request_id] for move in moves], np.int32),
            start_ns=np.array([move.start_ns for move in moves], np.int64),
            end_ns=np.array([move.end_ns for move in moves], np.int64),
            num_bytes=np.array([move.num_bytes for move in moves], np.int64),
            instance=np.array([instance_of(move) for move in moves], np.int16),
        )


def _request_columns(
    requests: list[Request], placements: dict[RequestId, Placement], places: list[InstancePlace]
) -> RequestColumns:
    index = {place.instance_id: i for i, place in enumerate(places)}
    placed = [placements.get(request.request_id) for request in requests]
    outcomes = [request.outcome for request in requests]
    assert all(outcome is not None for outcome in outcomes), "a request is left without an outcome"

    def counts(name: str) -> NDArray[np.int32]:
        return np.array([getattr(request, name) for request in requests], np.int32)

    def instants(name: str) -> NDArray[np.int64]:
        known = [getattr(request, name) for request in requests]
        return np.array([NEVER if when is None else when for when in known], np.int64)

    return RequestColumns(
        request_ids=[request.request_id for request in requests],
        outcome=np.array([OUTCOMES.index(OUTCOME_OF_STATE[o.state]) for o in outcomes if o is not None], np.int16),
        reason=np.array([REASONS.index(str(o.reason)) for o in outcomes if o is not None], np.int16),
        reasons=REASONS,
        arrival_ns=instants("arrival_ns"),
        scheduled_ns=instants("scheduled_ns"),
        prefill_start_ns=instants("prefill_start_ns"),
        first_token_ns=instants("first_token_ns"),
        decode_start_ns=instants("decode_start_ns"),
        last_token_ns=instants("last_token_ns"),
        num_prompt_tokens=counts("num_prompt_tokens"),
        max_tokens=counts("max_tokens"),
        num_output_tokens=counts("num_output_tokens"),
        num_cached_tokens=counts("num_cached_tokens"),
        num_pool_tokens=counts("num_pool_tokens"),
        num_preemptions=counts("num_preemptions"),
        prefill_instance=np.array([NEVER if p is None else index[p.prefill] for p in placed], np.int16),
        decode_instance=np.array([NEVER if p is None else index[p.decode] for p in placed], np.int16),
        decode_rank=np.array([NEVER if p is None else p.rank for p in placed], np.int16),
    )


def _plane_totals(cluster: Cluster, plane: PlaneName) -> PlaneTotals:
    stats = cluster.fabric.stats(plane)
    return PlaneTotals(num_bytes=stats.num_bytes, num_transfers=stats.num_transfers, busy_ns=stats.busy_ns)
