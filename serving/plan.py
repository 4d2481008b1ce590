"""The plan of a run: instances, ranks, experts per rank, and what every die and host has to hold.

Owns: the memory of the charged model on one die of each role, and the check that it fits.
Must not know: Ray, clocks, tensors.
Bytes are those of the charged model.
"""

import math
from dataclasses import dataclass

from model import work
from serving.config import Role, RunConfig
from serving.die_memory import DieMemory, die_memory
from serving.errors import ConfigError
from serving.placement import rank_imbalance

GIB = 2**30


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


def die_plan(config: RunConfig, role: Role) -> DiePlan:
    """The plan of one die. Raises ConfigError, with the sum, if it does not fit in HBM."""
    section = config.instances[role]
    step_tokens = config.max_step_tokens(role)
    if role == "prefill":
        step_tokens = math.ceil(step_tokens / config.world_size(role))
    memory = die_memory(
        config.charged_shape,
        config.charged_layout(role),
        config.hardware.rates,
        is_prefill=role == "prefill",
        step_tokens=step_tokens,
        cache_bytes=section.num_blocks * block_bytes(config),
        has_mtp=config.is_speculative,
    )
    hbm_bytes = config.hardware.npu.die.hbm_bytes
    if memory.used_bytes > hbm_bytes:
        room = max(0, hbm_bytes - memory.weight_bytes - memory.buffer_bytes) // block_bytes(config)
        raise ConfigError(
            f"instances.{role}.num_blocks: {section.num_blocks} blocks need {memory.cache_bytes / GIB:.1f} GiB; with "
            f"{memory.weight_bytes / GIB:.1f} GiB of weights and {memory.buffer_bytes / GIB:.1f} GiB of buffers that "
            f"is {memory.used_bytes / GIB:.1f} of {hbm_bytes / GIB:.1f} GiB of HBM; {room} blocks fit"
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


def check_plan(config: RunConfig) -> list[DiePlan]:
    """The plans of all roles. Raises ConfigError if HBM, DRAM or the number of devices does not suffice."""
    hardware = config.hardware
    if config.total_npus > hardware.num_npus:
        raise ConfigError(f"instances: {config.total_npus} NPUs, {hardware.name} has {hardware.num_npus}")
    per_node = hardware.npus_per_node
    nodes = sum(section.count * -(-section.npus // per_node) for section in config.instances.values())
    if nodes > hardware.num_npus // per_node:
        raise ConfigError(
            f"instances: {nodes} nodes of {per_node} NPUs, since each instance begins on a node of its own; "
            f"{hardware.name} has {hardware.num_npus // per_node}"
        )
    if config.ray.ranks == "batched":
        _check_batches(config)
    if config.kv_pool.enabled:
        if config.kv_pool.hosts > hardware.num_hosts:
            raise ConfigError(f"kv_pool.hosts: {config.kv_pool.hosts}, {hardware.name} has {hardware.num_hosts}")
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


def format_plan(config: RunConfig) -> str:
    """The plan as `supernode check` prints it."""
    lines = []
    computed, charged_shape = config.shape, config.charged_shape
    lines.append(
        f"computed  {config.model.shape_source}: {work.parameter_counts(computed).total / 1e6:.1f} M parameters, "
        f"{computed.num_hidden_layers} layers, {computed.n_routed_experts} routed experts, "
        f"top {computed.num_experts_per_tok}"
    )
    lines.append(
        f"charged   {config.timing.model} on {config.hardware.name}: "
        f"{work.parameter_counts(charged_shape).total / 1e9:.0f} G parameters, "
        f"{charged_shape.num_hidden_layers} layers, {charged_shape.n_routed_experts} routed experts, "
        f"top {charged_shape.num_experts_per_tok}"
    )
    for plan in check_plan(config):
        role, section = plan.role, config.instances[plan.role]
        world, charged = config.world_size(role), config.charged_instance(role)
        physical = config.num_physical_experts(role)
        tokens = section.num_blocks * config.cache.block_size
        shared = "on every rank" if section.shared_expert == "local" else f"{section.num_shared_expert_copies} copies"
        lines += [
            "",
            f"{role}: {section.count} x {section.npus} NPUs = {section.count} x {world} ranks (EP {world}), "
            f"each for a die of EP {charged.ep}",
            f"  experts    {physical // world} per rank: {computed.n_routed_experts} routed + "
            f"{section.num_redundant_experts} redundant over {world} ranks; shared expert {shared}; "
            f"charged {plan.memory.experts_per_die} per die",
            *_imbalance_line(config, role),
            f"  batch      {section.max_num_seqs} requests, {section.max_num_batched_tokens} tokens a step "
            + ("for the instance" if role == "prefill" else "per rank"),
            f"  KV space   {section.num_blocks} blocks of {config.cache.block_size} = {tokens} tokens "
            + ("for the instance (on every die)" if role == "prefill" else "per rank"),
            f"  HBM/die    {plan.memory.used_bytes / GIB:.2f} of {plan.hbm_bytes / GIB:.1f} GiB: weights "
            f"{plan.memory.weight_bytes / GIB:.2f}, buffers {plan.memory.buffer_bytes / GIB:.2f}, cache "
            f"{plan.memory.cache_bytes / GIB:.2f}",
        ]
    lines.append("")
    if config.kv_pool.enabled:
        pool = config.kv_pool
        blocks = pool.dram_bytes_per_host // block_bytes(config)
        lines.append(
            f"pool: {pool.hosts} hosts x {pool.dram_bytes_per_host / GIB:.1f} GiB = {pool.hosts * blocks} blocks, "
            f"{pool.hosts * blocks * config.cache.block_size} tokens"
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
