"""Making the fast driver from a configuration: instances, places, stages, and what is written down of each.

Owns: how the keys of a configuration become the driver's parts.
Must not know: asyncio, tensors, how the parts decide.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from devices.fabric import Fabric
from devices.pipeline import StepTimeModel
from devices.step_load import StepLoad
from devices.step_work import StepTime
from serving.build import (
    InstancePlace,
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
from serving.core.router import Room, Router
from serving.plan import block_bytes
from serving.pool_moves import PoolMoves
from serving.simulation.admission import Admission
from serving.simulation.decode_instance import ChargeDecode, DecodeInstance
from serving.simulation.driver import Driver
from serving.simulation.event_loop import EventLoop
from serving.simulation.life import LifeNotes
from serving.simulation.move_notes import MoveNotes
from serving.simulation.prefill_instance import ChargePrompts, PrefillInstance
from serving.simulation.stages import Stages
from serving.simulation.step_notes import StepNotes
from serving.workloads.workload import Workload


@dataclass(slots=True, kw_only=True)
class Assembly:
    """All that takes part in one run."""

    loop: EventLoop
    log: EventLog | None
    fabric: Fabric
    pool: PoolMoves | None
    router: Router
    admission: Admission
    driver: Driver
    prefills: list[PrefillInstance]
    decodes: list[DecodeInstance]
    step_notes: list[StepNotes]  # in the order of the instances
    life_notes: LifeNotes
    move_notes: MoveNotes
    stages: Stages

    def close(self) -> None:
        """The run is over: no cycle is left that would keep all of it until a garbage collection."""
        self.admission.close()
        self.stages.close()


def assemble(
    config: RunConfig,
    workload: Workload,
    *,
    moves: bool,
    digest: bool,
    max_run_steps: int,
    on_progress: Callable[[int], None],
) -> Assembly:
    """The driver of a disaggregated configuration, ready to start; arguments as of `run_fast`."""
    loop, fabric, log = EventLoop(), Fabric(config.hardware), EventLog() if digest else None
    pool, router = _pool(config, fabric, loop, log), build_router(config)
    life_notes, move_notes = LifeNotes(workload), MoveNotes(pool, keep=moves)
    section = config.instances["decode"]
    free_blocks = np.zeros(section.count * config.num_scheduling_ranks("decode"), np.int64)
    room = Room(free_blocks=free_blocks, free_slots=np.full_like(free_blocks, section.max_num_seqs))
    prefills: list[PrefillInstance] = []
    decodes: list[DecodeInstance] = []
    step_notes: list[StepNotes] = []
    # A place leads to stages, and stages lead back to places.
    admission = Admission(
        config=config,
        loop=loop,
        log=log,
        router=router,
        room=room,
        prefills=prefills,
        decodes=decodes,
        on_placed=lambda life: stages.start_prefill(life),
    )
    stages = Stages(
        loop=loop,
        log=log,
        admission=admission,
        pool=pool,
        fabric=fabric,
        moves=move_notes,
        block_size=config.cache.block_size,
        kv_bytes_per_token=kv_bytes_per_token(config),
        hidden_state_bytes=hidden_state_bytes(config),
        on_finished=lambda life: driver.on_finished(life),
    )
    driver = Driver(
        config=config,
        workload=workload,
        loop=loop,
        log=log,
        admission=admission,
        stages=stages,
        notes=life_notes,
        on_progress=on_progress,
    )
    charge_prompts = _prompt_charge(step_time_model(config, "prefill"), config.world_size("prefill"))
    charge_decode = _decode_charge(step_time_model(config, "decode"), config.num_scheduling_ranks("decode"))
    for index, place in enumerate(instance_places(config)):
        notes = StepNotes(config, place, log)
        step_notes.append(notes)
        if place.role == "prefill":
            prefills.append(_prefill(config, place, index, fabric, loop, notes, stages, charge_prompts))
        else:
            first_rank = len(decodes) * config.num_scheduling_ranks("decode")
            ranks = _decode_ranks(config, room, first_rank)
            planner = DecodePlanner(ranks, max_steps=max_run_steps)
            decodes.append(
                DecodeInstance(
                    index=index,
                    first_rank=first_rank,
                    ranks=ranks,
                    planner=planner,
                    charge=charge_decode,
                    dies=die_endpoints(config, place, fabric),
                    loop=loop,
                    notes=notes,
                    on_preempted=stages.on_preempted,
                    on_ended=stages.on_ended,
                    last_token_ns=stages.last_token_ns,
                )
            )
    return Assembly(
        loop=loop,
        log=log,
        fabric=fabric,
        pool=pool,
        router=router,
        admission=admission,
        driver=driver,
        prefills=prefills,
        decodes=decodes,
        step_notes=step_notes,
        life_notes=life_notes,
        move_notes=move_notes,
        stages=stages,
    )


def _pool(config: RunConfig, fabric: Fabric, loop: EventLoop, log: EventLog | None) -> PoolMoves | None:
    if not config.kv_pool.enabled:
        return None
    return PoolMoves(
        index=build_pool_index(config),
        hosts=host_endpoints(config, fabric),
        fabric=fabric,
        now_ns=lambda: loop.now_ns,
        log=log or NullLog(),
        block_bytes=block_bytes(config),
        block_size=config.cache.block_size,
        read_bytes_per_s=config.hardware.rates.pool_read_bytes_per_s,
    )


def _prefill(
    config: RunConfig,
    place: InstancePlace,
    index: int,
    fabric: Fabric,
    loop: EventLoop,
    notes: StepNotes,
    stages: Stages,
    charge: ChargePrompts,
) -> PrefillInstance:
    section = config.instances["prefill"]
    batcher = PromptBatcher(
        num_blocks=section.num_blocks,
        block_size=config.cache.block_size,
        max_num_seqs=section.max_num_seqs,
        max_num_batched_tokens=section.max_num_batched_tokens,
        enable_prefix_caching=section.prefix_caching,
    )
    return PrefillInstance(
        index=index,
        batcher=batcher,
        charge=charge,
        dies=die_endpoints(config, place, fabric),
        loop=loop,
        notes=notes,
        find_external=stages.find_external if config.kv_pool.enabled else None,
        on_admit=stages.on_admit,
        on_computed=stages.on_computed,
    )


def _decode_ranks(config: RunConfig, room: Room, first_rank: int) -> DecodeRanks:
    section, num_ranks = config.instances["decode"], config.num_scheduling_ranks("decode")
    return DecodeRanks(
        num_ranks=num_ranks,
        num_blocks=section.num_blocks,
        block_size=config.cache.block_size,
        max_num_seqs=section.max_num_seqs,
        acceptance=acceptance_table(config.speculative.acceptance) if config.is_speculative else None,
        free_blocks=room.free_blocks[first_rank : first_rank + num_ranks],
    )


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
