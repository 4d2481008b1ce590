"""Making a cluster from a configuration: schedulers, engines, router, pool, fabric, and the plans of the devices.

Owns: how the keys of a configuration become constructor arguments.
Must not know: Ray, HTTP, torch.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from devices.clock import Clock
from devices.fabric import Endpoint, Fabric
from devices.pipeline import StepTime
from model import work
from model.layout import RankLayout, make_layouts
from serving.batched_ranks import merged_layout
from serving.charge import step_charge
from serving.cluster import Cluster
from serving.config import Role, RunConfig
from serving.core.batch_scheduler import BatchScheduler
from serving.core.event_log import EventLog
from serving.core.ids import InstanceId
from serving.core.pool_index import PoolIndex
from serving.core.request import Request
from serving.core.router import Router
from serving.core.scheduled_batch import ScheduledBatch
from serving.engine import Engine
from serving.engine_run import StepRecord
from serving.errors import ConfigError
from serving.kv_pool import KvPool
from serving.messages import SamplingParams
from serving.placement import place_experts
from serving.plan import block_bytes, die_plan
from serving.shard import Shard, TimingShard, TorchShard
from serving.transport import NullTransport, Transport
from serving.worker import HostPlan, NpuPlan, NpuWorkerPlan, RankPlan
from serving.workloads.arrivals import generator_for

ChargeFor = Callable[[RunConfig, Role], Callable[[ScheduledBatch], StepTime]]


@dataclass(frozen=True, slots=True, kw_only=True)
class InstancePlace:
    """One instance and its NPUs in the supernode."""

    instance_id: InstanceId
    role: Role
    npu_ids: tuple[int, ...]


def instance_places(config: RunConfig) -> list[InstancePlace]:
    """Instances and their NPUs. Each begins on a node of its own, so that hand-overs cross nodes as in production."""
    places, next_npu, per_node = [], 0, config.hardware.npus_per_node
    for role, section in config.instances.items():
        for index in range(section.count):
            npu_ids = tuple(range(next_npu, next_npu + section.npus))
            places.append(InstancePlace(instance_id=InstanceId(f"{role}-{index}"), role=role, npu_ids=npu_ids))
            next_npu += -(-section.npus // per_node) * per_node
    return places


def build_cluster(
    config: RunConfig,
    *,
    clock: Clock,
    log: EventLog,
    transport: Transport | None,
    on_step: Callable[[StepRecord], None] = lambda record: None,
    charge_for: ChargeFor | None = None,
) -> Cluster:
    """The cluster of a configuration; `transport` None gives timing shards, otherwise torch shards behind it.

    `charge_for` takes the place of the time model.
    """
    charge_for = charge_for or step_charge
    fabric = Fabric(config.hardware)
    moves = transport or NullTransport()
    dies: dict[InstanceId, list[Endpoint]] = {}
    engines: dict[Role, list[Engine]] = {}
    cluster: Cluster
    places = instance_places(config)
    for place in places:
        role = place.role
        dies[place.instance_id] = die_endpoints(config, place, fabric)
        section = config.instances[role]
        scheduler = BatchScheduler(
            num_ranks=config.num_scheduling_ranks(role),
            num_blocks=section.num_blocks,
            block_size=config.cache.block_size,
            max_num_seqs=section.max_num_seqs,
            max_num_batched_tokens=section.max_num_batched_tokens,
            max_model_len=config.model.max_model_len,
            enable_prefix_caching=section.prefix_caching,
            policy=config.scheduler.policy,
            preempt_to="caller" if role == "decode" else "self",
            # A prefill instance hands each request over after its first token: there is nothing to draft.
            num_speculative_tokens=0 if role == "prefill" else config.speculative.num_speculative_tokens,
        )
        shard: Shard = TimingShard(acceptance=config.speculative.acceptance)
        if transport is not None:
            shard = TorchShard(
                instance_id=place.instance_id,
                transport=transport,
                scheduler=scheduler,
                world_size=config.world_size(role),
                is_replicated=role == "prefill",
                hidden_size=config.shape.hidden_size if config.is_speculative else None,
            )
        engines.setdefault(role, []).append(
            Engine(
                instance_id=place.instance_id,
                scheduler=scheduler,
                max_num_seqs=section.max_num_seqs,
                requeues_preempted=role != "decode",
                shard=shard,
                charge=charge_for(config, role),
                stops=_stops(config.shape.eos_token_id),
                clock=clock,
                log=log,
                on_step=on_step,
                on_capacity=lambda: cluster.on_capacity(),
            )
        )
    pool = None
    if config.kv_pool.enabled:
        hosts = host_endpoints(config, fabric)
        pool = KvPool(
            index=build_pool_index(config),
            hosts=hosts,
            fabric=fabric,
            transport=moves,
            clock=clock,
            log=log,
            block_bytes=block_bytes(config),
            block_size=config.cache.block_size,
            read_bytes_per_s=config.hardware.rates.pool_read_bytes_per_s,
        )
    cluster = Cluster(
        config=config,
        clock=clock,
        log=log,
        engines=engines,
        router=build_router(config),
        pool=pool,
        fabric=fabric,
        transport=moves,
        dies=dies,
        kv_bytes_per_token=kv_bytes_per_token(config),
        hidden_state_bytes=hidden_state_bytes(config),
    )
    return cluster


def build_router(config: RunConfig) -> Router:
    """The router over all instances."""
    places = instance_places(config)
    prefilling, decoding = ("prefill", "decode") if config.disaggregated else ("colocated", "colocated")
    return Router(
        prefill=[place.instance_id for place in places if place.role == prefilling],
        decode={place.instance_id: config.num_scheduling_ranks(decoding) for place in places if place.role == decoding},
        policy=config.router.policy,
        rng=generator_for(config.seed, "router"),
    )


def build_pool_index(config: RunConfig) -> PoolIndex:
    """The index of the shared pool, hosts numbered from 0 as in `host_endpoints`."""
    return PoolIndex(
        hosts=dict.fromkeys(range(config.kv_pool.hosts), config.kv_pool.dram_bytes_per_host),
        lease_ns=round(config.kv_pool.lease_s * 1e9),
    )


def kv_bytes_per_token(config: RunConfig) -> int:
    """Latent cache of the charged model, the MTP module's too where it runs."""
    return work.kv_bytes_per_token(config.charged_shape, include_mtp=config.is_speculative)


def hidden_state_bytes(config: RunConfig) -> int:
    """Of the hidden state that is handed over with a request's KV for its first draft, FP32."""
    return 4 * config.charged_shape.hidden_size if config.is_speculative else 0


def die_endpoints(config: RunConfig, place: InstancePlace, fabric: Fabric) -> list[Endpoint]:
    """Dies of an instance, in rank order."""
    return [fabric.die(npu_id, die) for npu_id in place.npu_ids for die in range(config.dies_per_npu(place.role))]


def host_endpoints(config: RunConfig, fabric: Fabric) -> list[Endpoint]:
    """Hosts of the pool, dealt over the nodes that hold instances."""
    per_node = config.hardware.hosts_per_node
    nodes = sorted({npu // config.hardware.npus_per_node for p in instance_places(config) for npu in p.npu_ids})
    order = [node * per_node + socket for socket in range(per_node) for node in nodes]
    spare = [host for host in range(config.hardware.num_hosts) if host not in set(order)]
    return [fabric.host(host_id) for host_id in (order + spare)[: config.kv_pool.hosts]]


def _stops(eos_token_id: int) -> Callable[[Request, Sequence[int]], int | None]:
    def stops(request: Request, token_ids: Sequence[int]) -> int | None:
        params = request.sampling
        assert isinstance(params, SamplingParams)
        for num_new, token_id in enumerate(token_ids, start=1):
            if request.num_output_tokens + num_new < params.min_tokens:
                continue
            if (token_id == eos_token_id and not params.ignore_eos) or token_id in params.stop_token_ids:
                return num_new
        return None

    return stops


def npu_worker_plans(config: RunConfig, checkpoint: Path) -> dict[InstanceId, list[NpuWorkerPlan]]:
    """Workers of every instance: one NPU each, or a node's with `ray.pack: node`."""
    plans: dict[InstanceId, list[NpuWorkerPlan]] = {}
    for place in instance_places(config):
        role = place.role
        npus = []
        layouts = rank_layouts(config, role)
        dies = config.dies_per_npu(role)
        for index, npu_id in enumerate(place.npu_ids):
            ranks = tuple(
                RankPlan(
                    checkpoint=str(checkpoint),
                    config=config.shape,
                    layout=layout,
                    num_blocks=config.instances[role].num_blocks,
                    block_size=config.cache.block_size,
                    with_mtp=config.is_speculative,
                )
                for layout in layouts[index * dies : (index + 1) * dies]
            )
            npus.append(NpuPlan(npu_id=npu_id, ranks=ranks))
        size = config.hardware.npus_per_node if config.ray.pack == "node" else 1
        plans[place.instance_id] = [
            NpuWorkerPlan(
                worker_id=f"{place.instance_id}-npu-{npus[first].npu_id}",
                npus=tuple(npus[first : first + size]),
                spec=config.hardware.npu,
                reserved_bytes=die_plan(config, role).ledger,
                merged=_merged_rank(config, npus[first : first + size]) if config.ray.ranks == "batched" else None,
            )
            for first in range(0, len(npus), size)
        ]
    return plans


def _merged_rank(config: RunConfig, npus: Sequence[NpuPlan]) -> RankPlan | None:
    """The rank that stands for all of a worker's; None if it has but one. Raises ConfigError if nodes are uneven."""
    ranks = [rank for npu in npus for rank in npu.ranks]
    if len(ranks) == 1:
        return None
    try:
        layout = merged_layout([rank.layout for rank in ranks])
    except ValueError as error:
        raise ConfigError(f"ray.ranks: batched: {error}") from None
    num_parts = 1 if layout.attention == "sequence_tensor" else len(ranks)
    return dataclasses.replace(ranks[0], layout=layout, num_blocks=ranks[0].num_blocks * num_parts)


def host_plans(config: RunConfig) -> list[HostPlan]:
    """Workers of the pool's hosts."""
    if not config.kv_pool.enabled:
        return []
    return [
        HostPlan(
            worker_id=f"host-{host_id}",
            host_id=host_id,
            dram_bytes=config.kv_pool.dram_bytes_per_host,
            block_bytes=block_bytes(config),
        )
        for host_id in range(config.kv_pool.hosts)
    ]


def exchange_window_bytes(config: RunConfig, layout: RankLayout) -> int:
    """Most bytes that one live rank sends another in one collective: what its static windows have to hold."""
    shape = config.shape
    dispatch = layout.max_rows_per_peer(shape) * (
        4 * shape.hidden_size + 16
    )  # float32 payload, or less; slot and scale
    if layout.attention == "data_parallel":
        return dispatch
    latents = (shape.q_lora_rank or shape.hidden_size) + shape.latent_dim
    heads = shape.num_attention_heads // layout.world_size * shape.v_head_dim
    return max(dispatch, layout.max_local_tokens * 4 * max(latents, heads))


def rank_layouts(config: RunConfig, role: Role) -> Sequence[RankLayout]:
    """The layouts of one instance's ranks, experts placed by the measured load if there is one."""
    section = config.instances[role]
    return make_layouts(
        config.shape,
        world_size=config.world_size(role),
        attention="sequence_tensor" if role == "prefill" else "data_parallel",
        physical_to_logical=place_experts(config, role).physical_to_logical,
        shared_expert=section.shared_expert,
        dispatch_dtype=config.model.dispatch_dtype,
        max_num_tokens=config.max_step_tokens(role),
    )
