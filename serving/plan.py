"""The plan of a run: instances, ranks, experts per rank, and what every die and host has to hold.

Owns: the memory of the charged model on one die of each role, and the check that it fits.
Must not know: Ray, clocks, tensors.
Bytes are those of the charged model.
"""

import math
from dataclasses import dataclass

from devices.spec import Op
from model import work
from model.config import ModelConfig
from serving.config import Role, RunConfig
from serving.die_memory import DieMemory, die_memory
from serving.errors import ConfigError
from serving.placement import rank_imbalance

GIB, MIB = 2**30, 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class DiePlan:
    """What one die of a role holds, in bytes as charged."""

    role: Role
    memory: DieMemory
    hbm_bytes: int

    @property
    def ledger(self) -> dict[str, int]:
        """Entries of the die's memory ledger."""
        memory = self.memory
        return {"weights": memory.weight_bytes, "buffers": memory.buffer_bytes, "latent cache": memory.cache_bytes}


def block_bytes(config: RunConfig) -> int:
    """Bytes of one cache block of the charged model, in HBM and in the pool."""
    return config.cache.block_size * work.kv_bytes_per_token(config.charged_shape, include_mtp=config.is_speculative)


def _dies_per_copy(config: RunConfig, role: Role) -> int:
    """Dies among which one KV space is divided: all of an instance whose dies each prefill prompts of their own."""
    is_divided = role == "prefill" and config.hardware.rates.prefill_attention == "data_parallel"
    return config.world_size(role) if is_divided else 1


def die_plan(config: RunConfig, role: Role) -> DiePlan:
    """The plan of one die. Raises ConfigError, with the sum, if it does not fit in HBM."""
    section = config.instances[role]
    step_tokens = config.max_step_tokens(role)
    if role == "prefill":
        step_tokens = math.ceil(step_tokens / config.world_size(role))
    dies_per_copy = _dies_per_copy(config, role)
    blocks_per_die = math.ceil(section.num_blocks / dies_per_copy)
    memory = die_memory(
        config.charged_shape,
        config.charged_layout(role),
        config.hardware.rates,
        is_prefill=role == "prefill",
        step_tokens=step_tokens,
        cache_bytes=blocks_per_die * block_bytes(config),
        has_mtp=config.is_speculative,
    )
    hbm_bytes = config.hardware.npu.die.hbm_bytes
    if memory.used_bytes > hbm_bytes:
        room = max(0, hbm_bytes - memory.weight_bytes - memory.buffer_bytes) // block_bytes(config) * dies_per_copy
        over = "" if dies_per_copy == 1 else f" on each of {dies_per_copy} dies"
        raise ConfigError(
            f"instances.{role}.num_blocks: {section.num_blocks} blocks need {memory.cache_bytes / GIB:.1f} GiB{over}; "
            f"with "
            f"{memory.weight_bytes / GIB:.1f} GiB of weights and {memory.buffer_bytes / GIB:.1f} GiB of buffers that "
            f"is {memory.used_bytes / GIB:.1f} of {hbm_bytes / GIB:.1f} GiB of HBM; {room} blocks fit"
        )
    own_tokens = blocks_per_die * config.cache.block_size
    if own_tokens < config.model.max_model_len:
        raise ConfigError(
            f"instances.{role}.num_blocks: {section.num_blocks} blocks over {dies_per_copy} dies, each with prompts of "
            f"its own, leave one {own_tokens} tokens, less than model.max_model_len {config.model.max_model_len}"
        )
    return DiePlan(role=role, memory=memory, hbm_bytes=hbm_bytes)


def _check_batches(config: RunConfig) -> None:
    """Raise ConfigError unless the ranks of every actor can be merged, and some actor has more than one."""
    most = 0
    for role, section in config.instances.items():
        npus = min(section.npus, config.hardware.npus_per_node) if config.ray.pack == "node" else 1
        if section.npus % npus:
            raise ConfigError(f"ray.ranks: batched: instances.{role}.npus {section.npus} fill no whole nodes of {npus}")
        most = max(most, npus * config.dies_per_npu(role))
    if most == 1:
        raise ConfigError("ray.ranks: batched: every actor has one rank; needs ray.pack: node, or two dies per NPU")


def _num_nodes(config: RunConfig) -> int:
    """Nodes that hold instances; each instance begins on one of its own."""
    per_node = config.hardware.npus_per_node
    return sum(section.count * math.ceil(section.npus / per_node) for section in config.instances.values())


def check_plan(config: RunConfig) -> list[DiePlan]:
    """The plans of all roles. Raises ConfigError if HBM, DRAM or the number of devices does not suffice."""
    hardware = config.hardware
    if config.total_npus > hardware.num_npus:
        raise ConfigError(f"instances: {config.total_npus} NPUs, {hardware.name} has {hardware.num_npus}")
    nodes = _num_nodes(config)
    if nodes > hardware.num_nodes:
        raise ConfigError(
            f"instances: {nodes} nodes of {hardware.npus_per_node} NPUs, since each instance begins on a node of its "
            f"own; {hardware.name} has {hardware.num_nodes}"
        )
    if config.ray.ranks == "batched":
        _check_batches(config)
    if config.kv_pool.enabled:
        if config.kv_pool.hosts > hardware.num_hosts:
            raise ConfigError(f"kv_pool.hosts: {config.kv_pool.hosts}, {hardware.name} has {hardware.num_hosts}")
        ops: tuple[Op, Op] = ("read", "write")
        if nodes > 1 and any(("npu_host", op, "inter") not in hardware.planes["ub"].paths for op in ops):
            raise ConfigError(
                f"kv_pool.enabled: true, but plane ub of {hardware.name} does not reach the hosts of other nodes"
            )
        if config.kv_pool.dram_bytes_per_host > hardware.host.dram_bytes:
            raise ConfigError(
                f"kv_pool.dram_bytes_per_host: {config.kv_pool.dram_bytes_per_host} exceeds the host's DRAM of "
                f"{hardware.host.dram_bytes}"
            )
        if config.kv_pool.dram_bytes_per_host < block_bytes(config):
            raise ConfigError(
                f"kv_pool.dram_bytes_per_host: {config.kv_pool.dram_bytes_per_host} holds not one block of "
                f"{block_bytes(config)} bytes"
            )
    return [die_plan(config, role) for role in config.instances]


def _imbalance_line(config: RunConfig, role: Role) -> list[str]:
    imbalance = rank_imbalance(config, role)
    if imbalance is None:
        return []
    return [
        f"  imbalance  busiest rank {imbalance.uniform:.2f} x the mean under the measured expert load with a uniform "
        f"placement, {imbalance.measured:.2f} x with this one"
    ]


def _num_parameters(shape: ModelConfig) -> str:
    count = work.parameter_counts(shape).total
    return f"{count / 1e9:.0f} G" if count >= 1e9 else f"{count / 1e6:.1f} M"


def _model_line(shape: ModelConfig) -> str:
    return (
        f"{_num_parameters(shape)} parameters, {shape.num_hidden_layers} layers, {shape.n_routed_experts} routed "
        f"experts, top {shape.num_experts_per_tok}"
    )


def requests_that_fit(config: RunConfig, role: Role) -> dict[str, int]:
    """By what limits it, how many requests of the workload's mean lengths one KV space of `role` serves at once.

    A prefill instance holds prompts, the others prompts and outputs. In one step, where tokens are the limit.
    """
    section, workload, block_size = config.instances[role], config.workload, config.cache.block_size
    num_tokens = workload.input_len + (0 if role == "prefill" else workload.output_len)
    limits = {"num_blocks": section.num_blocks // math.ceil(num_tokens / block_size)}
    if role == "prefill":
        limits["max_num_batched_tokens"] = section.max_num_batched_tokens // num_tokens
    return limits | {"max_num_seqs": section.max_num_seqs}


def _requests_line(config: RunConfig, role: Role) -> str:
    limits, workload = requests_that_fit(config, role), config.workload
    binding = min(limits, key=lambda name: limits[name])
    others = ", ".join(f"{name} {limit}" for name, limit in limits.items() if name != binding)
    lengths = f"{workload.input_len}" + ("" if role == "prefill" else f" + {workload.output_len}")
    return (
        f"  requests   {limits[binding]} of {lengths} tokens {'a step' if role == 'prefill' else 'per rank'}, by "
        f"{binding} (others allow: {others})"
    )


def _role_lines(config: RunConfig, plan: DiePlan) -> list[str]:
    role, section, memory = plan.role, config.instances[plan.role], plan.memory
    world, charged = config.world_size(role), config.charged_layout(role)
    num_tokens = section.num_blocks * config.cache.block_size
    is_local = section.shared_expert == "local"
    per_rank = config.num_physical_experts(role) // world + is_local * config.shape.n_shared_experts
    per_die = memory.experts_per_die + (not charged.is_shared_dispatched) * config.charged_shape.n_shared_experts
    divided = "divided over the dies" if _dies_per_copy(config, role) > 1 else "on every die"
    where = f"for the instance ({divided})" if role == "prefill" else "per rank"
    free_blocks = (plan.hbm_bytes - memory.used_bytes) // block_bytes(config) * _dies_per_copy(config, role)
    return [
        "",
        f"{role}: {section.count} x {section.npus} NPUs = {section.count} x {world} ranks (EP {world}), "
        f"each for a die of EP {charged.ep}",
        f"  experts    {per_rank} per rank: {config.shape.n_routed_experts} routed + {section.num_redundant_experts} "
        f"redundant over {world} ranks, shared expert "
        + ("on every rank" if is_local else f"in {section.num_shared_expert_copies} copies")
        + f"; charged {per_die} per die",
        *_imbalance_line(config, role),
        f"  batch      {section.max_num_seqs} requests, {section.max_num_batched_tokens} tokens a step "
        + ("for the instance" if role == "prefill" else "per rank"),
        f"  KV space   {section.num_blocks} blocks of {config.cache.block_size} = {num_tokens} tokens {where}; "
        f"{free_blocks} more fit",
        _requests_line(config, role),
        f"  HBM/die    {memory.used_bytes / GIB:.2f} of {plan.hbm_bytes / GIB:.1f} GiB: weights "
        f"{memory.weight_bytes / GIB:.2f}, buffers {memory.buffer_bytes / GIB:.2f}, cache "
        f"{memory.cache_bytes / GIB:.2f}",
    ]


def format_plan(config: RunConfig) -> str:
    """The plan as `supernode check` prints it."""
    hardware, pool = config.hardware, config.kv_pool
    lines = [
        f"computed  {config.model.shape_source}: {_model_line(config.shape)}",
        f"charged   {config.timing.model} on {hardware.name}: {_model_line(config.charged_shape)}",
        f"machine   {config.total_npus} of {hardware.num_npus} NPUs, on {_num_nodes(config)} of "
        f"{hardware.num_nodes} nodes",
    ]
    for plan in check_plan(config):
        lines += _role_lines(config, plan)
    lines.append("")
    if pool.enabled:
        per_block = block_bytes(config)
        num_blocks = pool.hosts * (pool.dram_bytes_per_host // per_block)
        lines.append(
            f"pool: {pool.hosts} hosts x {pool.dram_bytes_per_host / GIB:.1f} GiB = {num_blocks} blocks of "
            f"{per_block / MIB:.2f} MiB, {num_blocks * config.cache.block_size} tokens, "
            f"{num_blocks * per_block / GIB:.1f} GiB"
        )
    else:
        lines.append("pool: none")
    if config.is_speculative:
        lines.append(f"drafts: {config.speculative.num_speculative_tokens} per step, by the model's MTP module")
    lines.append(
        f"router {config.router.policy}, queue {config.scheduler.policy} of {config.scheduler.max_queued_requests}, "
        f"context {config.model.max_model_len}, clock scale {config.clock.scale:g}"
    )
    return "\n".join(lines)
