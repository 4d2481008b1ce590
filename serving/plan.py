"""The plan of a run: instances, ranks, experts per rank, and what every die and host has to hold.

Owns: the memory of the charged model on one die of each role, and the check that it fits.
Must not know: Ray, clocks, tensors.
Source: placement of weights as in arXiv 2506.12708, sections 4.2.1 (buffers), 4.3.1 (heads split in prefill) and 5.1
(experts per die). Bytes are those of the charged model: INT8 products, BF16 elsewhere and in the cache.
"""

import math
from dataclasses import dataclass

from model import work
from model.layout import static_buffer_bytes
from serving.config import Role, RunConfig
from serving.errors import ConfigError
from serving.placement import rank_imbalance

GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class DiePlan:
    """What one die of a role holds, in bytes as charged."""

    role: Role
    weight_bytes: int
    buffer_bytes: int  # dispatch and combine, both static
    cache_bytes: int
    hbm_bytes: int
    experts_per_die: int

    @property
    def used_bytes(self) -> int:
        """All of it."""
        return self.weight_bytes + self.buffer_bytes + self.cache_bytes

    @property
    def ledger(self) -> dict[str, int]:
        """Entries of the die's memory ledger."""
        return {"weights": self.weight_bytes, "buffers": self.buffer_bytes, "latent cache": self.cache_bytes}


def block_bytes(config: RunConfig) -> int:
    """Bytes of one cache block of the charged model, in HBM and in the pool."""
    return config.cache.block_size * work.kv_bytes_per_token(config.charged_shape, include_mtp=config.is_speculative)


def die_plan(config: RunConfig, role: Role) -> DiePlan:
    """The plan of one die. Raises ConfigError, with the sum, if it does not fit in HBM."""
    shape, section, charged = config.charged_shape, config.instances[role], config.charged_instance(role)
    weights = work.weight_bytes(shape)
    local_shared = 0 if charged.num_shared_expert_copies else 1
    slots = shape.n_routed_experts + charged.num_redundant_experts + charged.num_shared_expert_copies
    experts_per_die = math.ceil(slots / charged.ep)
    attention = weights.attention_per_layer
    if role == "prefill":  # SP-TP-SP: the up-projections are split by heads
        flops = work.operator_flops(shape)
        split = (flops.q_b + flops.kv_b) / (flops.q_a + flops.kv_a + flops.q_b + flops.kv_b + flops.o_proj)
        attention *= 1 - split * (1 - 1 / charged.ep)
    weight_bytes = (
        weights.embedding
        + weights.lm_head
        + shape.num_hidden_layers * attention
        + shape.first_k_dense_replace * weights.dense_mlp_per_layer
        + shape.num_moe_layers
        * (
            weights.gate_per_layer
            + experts_per_die * weights.routed_expert
            + local_shared * weights.shared_expert_per_layer
        )
    )
    if config.is_speculative:  # its experts are divided like those of every layer
        all_experts = shape.n_routed_experts * weights.routed_expert + weights.shared_expert_per_layer
        own_experts = experts_per_die * weights.routed_expert + local_shared * weights.shared_expert_per_layer
        weight_bytes += weights.mtp_module - all_experts + own_experts - (weights.attention_per_layer - attention)
    local_batch = config.max_step_tokens(role)
    if role == "prefill":
        local_batch = math.ceil(local_batch / config.world_size(role))
    buffers = sum(
        static_buffer_bytes(
            rank_num=charged.ep,
            local_batch=local_batch,
            top_k=shape.num_experts_per_tok + (charged.num_shared_expert_copies > 0),  # a copy for the shared expert
            experts_per_rank=experts_per_die,
            message_bytes=message_bytes,
        )
        for message_bytes in (work.dispatch_message_bytes(shape), work.combine_message_bytes(shape))
    )
    plan = DiePlan(
        role=role,
        weight_bytes=round(weight_bytes),
        buffer_bytes=buffers,
        cache_bytes=section.num_blocks * block_bytes(config),
        hbm_bytes=config.hardware.npu.die.hbm_bytes,
        experts_per_die=experts_per_die,
    )
    if plan.used_bytes > plan.hbm_bytes:
        room = max(0, plan.hbm_bytes - plan.weight_bytes - plan.buffer_bytes) // block_bytes(config)
        raise ConfigError(
            f"instances.{role}.num_blocks: {section.num_blocks} blocks need {plan.cache_bytes / GIB:.1f} GiB; with "
            f"{plan.weight_bytes / GIB:.1f} GiB of weights and {plan.buffer_bytes / GIB:.1f} GiB of buffers that is "
            f"{plan.used_bytes / GIB:.1f} of {plan.hbm_bytes / GIB:.1f} GiB of HBM; {room} blocks fit"
        )
    return plan


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
            f"charged {plan.experts_per_die} per die",
            *_imbalance_line(config, role),
            f"  batch      {section.max_num_seqs} requests, {section.max_num_batched_tokens} tokens a step "
            + ("for the instance" if role == "prefill" else "per rank"),
            f"  KV space   {section.num_blocks} blocks of {config.cache.block_size} = {tokens} tokens "
            + ("for the instance (on every die)" if role == "prefill" else "per rank"),
            f"  HBM/die    {plan.used_bytes / GIB:.2f} of {plan.hbm_bytes / GIB:.1f} GiB: weights "
            f"{plan.weight_bytes / GIB:.2f}, buffers {plan.buffer_bytes / GIB:.2f}, cache {plan.cache_bytes / GIB:.2f}",
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
