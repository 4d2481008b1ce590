"""The fast way through a run in virtual time: counts and callbacks, for disaggregated configurations.

Owns: a whole run, what is held when it is over, and the columns of it.
Must not know: asyncio, tensors, what the run is made of (serving/simulation/assembly.py).
"""

import gc
from collections.abc import Callable

from devices.fabric import Fabric
from devices.spec import PlaneName
from serving.config import RunConfig
from serving.simulation.assembly import Assembly, assemble
from serving.simulation.columns import PlaneTotals, RunColumns
from serving.workloads.workload import Workload

PLANES: tuple[PlaneName, ...] = ("ub", "rdma", "vpc")
MAX_RUN_STEPS = 32  # decided at once; most runs are shorter, since somebody joins or ends


def run_fast(
    config: RunConfig,
    workload: Workload,
    *,
    moves: bool = False,
    digest: bool = False,
    max_run_steps: int = MAX_RUN_STEPS,
    on_progress: Callable[[int], None] = lambda num_over: None,
) -> RunColumns:
    """Run `workload`. `wall_s` and `peak_rss_bytes` are left at zero. Ctrl-C ends it early.

    `on_progress` is told now and then how many requests are over; `max_run_steps` changes no result. With `digest` the
    pool is checked block by block in the end, which takes as long as a tenth of the run.
    Raises AssertionError if the run contradicts itself in the end. `config` has prefill and decode instances.
    """
    was_enabled = gc.isenabled()
    gc.disable()  # millions of objects live until they are released one by one: to walk over them finds nothing
    parts = assemble(config, workload, moves=moves, digest=digest, max_run_steps=max_run_steps, on_progress=on_progress)
    try:
        interrupted = _run(parts)
        held = {} if interrupted else _held(parts, is_thorough=digest)  # it may have come in the middle of anything
        return _columns(parts, workload, held=held, interrupted=interrupted)
    finally:
        parts.close()
        if was_enabled:
            gc.enable()


def _run(parts: Assembly) -> bool:
    """Until all is done; whether Ctrl-C came first."""
    parts.driver.start()
    try:
        parts.loop.run()
    except KeyboardInterrupt:
        parts.driver.abort_all()
        return True
    return False


def _held(parts: Assembly, *, is_thorough: bool) -> dict[str, int]:
    """What is held when all is over. Raises AssertionError if a part contradicts itself."""
    for decode in parts.decodes:
        decode.ranks.check_invariants()
    parts.router.check_invariants()
    parts.fabric.check_invariants()
    index = None if parts.pool is None else parts.pool.index
    if index is not None and is_thorough:
        index.check_invariants()
    return {
        "requests": parts.driver.num_lives,
        "queued": parts.admission.num_queued,
        "blocks": sum(prefill.batcher.num_used_blocks for prefill in parts.prefills)
        + sum(decode.ranks.num_used_blocks for decode in parts.decodes),
        "runs": sum(prefill.num_runs for prefill in parts.prefills) + sum(decode.num_runs for decode in parts.decodes),
        "placements": parts.router.num_placements,
        "leases": 0 if index is None else index.num_leases,
        "puts": 0 if index is None else index.num_pending_puts,
    }


def _columns(parts: Assembly, workload: Workload, *, held: dict[str, int], interrupted: bool) -> RunColumns:
    return RunColumns(
        requests=parts.life_notes.columns(),
        instances=tuple(notes.columns() for notes in parts.step_notes),
        planes={plane: _totals(parts.fabric, plane) for plane in PLANES},
        pool=parts.move_notes.pool_columns(),
        moves=parts.move_notes.move_columns(),
        num_drafts=sum(decode.num_drafts for decode in parts.decodes),
        num_accepted=sum(decode.num_accepted for decode in parts.decodes),
        held_at_rest=held,
        simulated_s=parts.driver.end_ns / 1e9,
        digest=None if parts.log is None else parts.log.digest(),
        num_not_arrived=len(workload) - parts.life_notes.num_arrived,
        interrupted=interrupted,
    )


def _totals(fabric: Fabric, plane: PlaneName) -> PlaneTotals:
    stats = fabric.stats(plane)
    return PlaneTotals(num_bytes=stats.num_bytes, num_transfers=stats.num_transfers, busy_ns=stats.busy_ns)
