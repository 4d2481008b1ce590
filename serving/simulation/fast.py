"""The fast way through a run in virtual time: counts and callbacks, for disaggregated configurations.

Owns: how the keys of a configuration become the driver's parts, and the columns of the whole run.
Must not know: asyncio, tensors, how the parts decide.
"""

import gc
from collections.abc import Callable

import numpy as np

from devices.fabric import Fabric
from devices.pipeline import StepTimeModel
from devices.spec import PlaneName
from devices.step_load import StepLoad
from devices.step_work import StepTime
from serving.build import (
    build_pool_index,
    build_router,
    die_endpoints,
    hidden_state_bytes,
    host_endpoints,
    instance_places,
    kv_bytes_per_token,
)
from serving.charge import step_time_model
from serving.config import RunConfig
from serving.core.acceptance import acceptance_table
from serving.core.decode_ranks import DecodeRanks
from serving.core.decode_run import DecodePlanner, RunStep
from serving.core.event_log import EventLog, NullLog
from serving.core.prompt_batcher import PromptBatcher
from serving.core.router import Room
from serving.plan import block_bytes
from serving.pool_moves import PoolMoves
from serving.simulation.admission import Admission
from serving.simulation.columns import PlaneTotals, RunColumns
from serving.simulation.decode_instance import ChargeDecode, DecodeInstance
from serving.simulation.driver import Driver
from serving.simulation.event_loop import EventLoop
from serving.simulation.life import LifeNotes
from serving.simulation.move_notes import MoveNotes
from serving.simulation.prefill_instance import ChargePrompts, PrefillInstance
from serving.simulation.stages import Stages
from serving.simulation.step_notes import StepNotes
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
    try:
        return _run_fast(config, workload, moves, digest, max_run_steps, on_progress)
    finally:
        if was_enabled:
            gc.enable()


def _run_fast(
    config: RunConfig,
    workload: Workload,
    moves: bool,
    digest: bool,
    max_run_steps: int,
    on_progress: Callable[[int], None],
) -> RunColumns:
    loop, fabric, log = EventLoop(), Fabric(config.hardware), EventLog() if digest else None
    pool = None
    if config.kv_pool.enabled:
        pool = PoolMoves(
            index=build_pool_index(config),
            hosts=host_endpoints(config, fabric),
            fabric=fabric,
            now_ns=lambda: loop.now_ns,
            log=log or NullLog(),
            block_bytes=block_bytes(config),
            block_size=config.cache.block_size,
            read_bytes_per_s=config.hardware.rates.pool_read_bytes_per_s,
        )
    router = build_router(config)
    lives, move_notes = LifeNotes(workload), MoveNotes(pool, keep=moves)
    prefill_section, decode_section = config.instances["prefill"], config.instances["decode"]
    num_ranks = config.num_scheduling_ranks("decode")
    free_blocks = np.zeros(decode_section.count * num_ranks, np.int64)
    free_slots = np.full_like(free_blocks, decode_section.max_num_seqs)
    charge_prompts = _prompt_charge(step_time_model(config, "prefill"), config.world_size("prefill"))
    charge_decode = _decode_charge(step_time_model(config, "decode"), num_ranks)
    acceptance = acceptance_table(config.speculative.acceptance) if config.is_speculative else None
    notes: list[StepNotes] = []
    prefills: list[PrefillInstance] = []
    decodes: list[DecodeInstance] = []
    driver = Driver(config=config, workload=workload, loop=loop, log=log, notes=lives, on_progress=on_progress)
    stages = Stages(
        loop=loop,
        log=log,
        pool=pool,
        fabric=fabric,
        moves=move_notes,
        block_size=config.cache.block_size,
        kv_bytes_per_token=kv_bytes_per_token(config),
        hidden_state_bytes=hidden_state_bytes(config),
        on_finished=driver.on_finished,
    )
    for index, place in enumerate(instance_places(config)):
        notes.append(StepNotes(config, place, log))
        dies = die_endpoints(config, place, fabric)
        if place.role == "prefill":
            batcher = PromptBatcher(
                num_blocks=prefill_section.num_blocks,
                block_size=config.cache.block_size,
                max_num_seqs=prefill_section.max_num_seqs,
                max_num_batched_tokens=prefill_section.max_num_batched_tokens,
                enable_prefix_caching=prefill_section.prefix_caching,
            )
            prefills.append(
                PrefillInstance(
                    index=index,
                    batcher=batcher,
                    charge=charge_prompts,
                    dies=dies,
                    loop=loop,
                    notes=notes[-1],
                    find_external=None if pool is None else stages.find_external,
                    on_admit=stages.on_admit,
                    on_computed=stages.on_computed,
                )
            )
        else:
            own = slice(len(decodes) * num_ranks, (len(decodes) + 1) * num_ranks)
            ranks = DecodeRanks(
                num_ranks=num_ranks,
                num_blocks=decode_section.num_blocks,
                block_size=config.cache.block_size,
                max_num_seqs=decode_section.max_num_seqs,
                acceptance=acceptance,
                free_blocks=free_blocks[own],
            )
            decodes.append(
                DecodeInstance(
                    index=index,
                    first_rank=own.start,
                    ranks=ranks,
                    planner=DecodePlanner(ranks, max_steps=max_run_steps),
                    charge=charge_decode,
                    dies=dies,
                    loop=loop,
                    notes=notes[-1],
                    on_preempted=stages.on_preempted,
                    on_ended=stages.on_ended,
                    last_token_ns=stages.last_token_ns,
                )
            )
    admission = Admission(
        config=config,
        loop=loop,
        log=log,
        router=router,
        room=Room(free_blocks=free_blocks, free_slots=free_slots),
        prefills=prefills,
        decodes=decodes,
        on_placed=stages.start_prefill,
    )
    stages.connect(admission)
    driver.connect(admission, stages)
    interrupted = _run(loop, driver)
    held: dict[str, int] = {}
    if not interrupted:  # which may have come in the middle of anything
        held = {
            "requests": driver.num_lives,
            "queued": admission.num_queued,
            "blocks": sum(p.batcher.num_used_blocks for p in prefills) + sum(d.ranks.num_used_blocks for d in decodes),
            "runs": sum(p.num_runs for p in prefills) + sum(d.num_runs for d in decodes),
            "placements": router.num_placements,
            "leases": pool.index.num_leases if pool else 0,
            "puts": pool.index.num_pending_puts if pool else 0,
        }
        for decode in decodes:
            decode.ranks.check_invariants()
        router.check_invariants()
        fabric.check_invariants()
        if pool is not None and digest:
            pool.index.check_invariants()
    driver.disconnect()
    return RunColumns(
        requests=lives.columns(),
        instances=tuple(note.columns() for note in notes),
        planes={plane: _totals(fabric, plane) for plane in PLANES},
        pool=move_notes.pool_columns(),
        moves=move_notes.move_columns(),
        num_drafts=sum(decode.num_drafts for decode in decodes),
        num_accepted=sum(decode.num_accepted for decode in decodes),
        held_at_rest=held,
        simulated_s=driver.end_ns / 1e9,
        digest=None if log is None else log.digest(),
        num_not_arrived=len(workload) - lives.num_arrived,
        interrupted=interrupted,
    )


def _run(loop: EventLoop, driver: Driver) -> bool:
    """Until all is done; whether Ctrl-C came first."""
    driver.start()
    try:
        loop.run()
    except KeyboardInterrupt:
        driver.abort_all()
        return True
    return False


def _prompt_charge(model: StepTimeModel, world_size: int) -> ChargePrompts:
    def charge(
        num_tokens: int, num_context_tokens: int, num_kv_tokens: int, num_seqs: int, num_samples: int
    ) -> StepTime:
        return model.decided(
            StepLoad.of_sequence(
                world_size,
                num_tokens=num_tokens,
                num_context_tokens=num_context_tokens,
                num_kv_tokens=num_kv_tokens,
                num_seqs=num_seqs,
                num_samples=num_samples,
                is_split=model.is_split,
            )
        )

    return charge


def _decode_charge(model: StepTimeModel, num_ranks: int) -> ChargeDecode:
    def charge(step: RunStep) -> StepTime:
        return model.decided(
            StepLoad(
                num_ranks=num_ranks,
                max_tokens=step.max_tokens,
                total_tokens=step.num_tokens,
                max_samples=step.max_tokens,  # every row samples after each of its tokens
                total_samples=step.num_tokens,
                max_seqs=step.max_seqs,
                context=step.context,
                kv=step.kv,
            )
        )

    return charge


def _totals(fabric: Fabric, plane: PlaneName) -> PlaneTotals:
    stats = fabric.stats(plane)
    return PlaneTotals(num_bytes=stats.num_bytes, num_transfers=stats.num_transfers, busy_ns=stats.busy_ns)
