"""What a configuration can contradict only once its parts are loaded: models, hardware.

Owns: the checks of a run against the shapes and the machine that it includes.
Must not know: YAML, single sections' ranges (serving/config.py).
"""

from typing import TYPE_CHECKING

from serving.errors import ConfigError

if TYPE_CHECKING:  # which calls this module
    from serving.config import RunConfig


def check_parts(config: "RunConfig") -> None:
    """Raise ConfigError, with field, value and limit, unless models and machine can do what the run asks for."""
    shape, num_dies = config.shape, config.hardware.npu.num_dies
    if config.model.max_model_len > config.shape.max_position_embeddings:
        raise ConfigError(
            f"model.max_model_len: {config.model.max_model_len} exceeds max_position_embeddings "
            f"{config.shape.max_position_embeddings} of {config.model.shape_source}"
        )
    for role, section in config.instances.items():
        if config.dies_per_npu(role) > num_dies:
            raise ConfigError(
                f"instances.{role}.dies_per_npu: {section.dies_per_npu}, "
                f"an NPU of {config.hardware.name} has {num_dies}"
            )
        world, heads, slots = config.world_size(role), shape.num_attention_heads, config.num_physical_experts(role)
        if section.shared_expert == "dispatched" and shape.n_shared_experts != 1:
            raise ConfigError(
                f"instances.{role}.shared_expert: dispatched needs n_shared_experts 1, "
                f"{config.model.shape_source} has {shape.n_shared_experts}"
            )
        if slots % world:
            raise ConfigError(
                f"instances.{role}.num_redundant_experts: {section.num_redundant_experts} makes {slots} physical "
                f"experts, which do not divide by {world} ranks"
            )
        if role == "prefill" and heads % world:
            raise ConfigError(f"instances.prefill.npus: {heads} attention heads do not divide by {world} ranks")
    if config.timing.balance == "measured" and config.expert_load is None:
        raise ConfigError("timing.balance: measured needs model.expert_load, the load that was measured")
    _check_speculation(config)
    workload = config.workload
    if workload.name is not None:  # a generator's lengths are cut to the context
        return
    widest = int((workload.input_len + workload.output_len) * (1 + workload.range_ratio))
    if widest > config.model.max_model_len:
        raise ConfigError(
            f"workload.input_len: {workload.input_len} + output_len {workload.output_len}, up to {widest} tokens "
            f"with range_ratio {workload.range_ratio:g}, exceeds model.max_model_len {config.model.max_model_len}"
        )


def _check_speculation(config: "RunConfig") -> None:
    if not config.is_speculative:
        return
    for source, parts in (
        (config.model.shape_source, config.shape),
        (f"timing.model {config.timing.model}", config.charged_shape),
    ):
        if not parts.num_nextn_predict_layers or not parts.num_moe_layers:
            raise ConfigError(
                f"speculative.num_speculative_tokens: {config.speculative.num_speculative_tokens} needs an MTP "
                f"module behind a mixture layer; {source} has num_nextn_predict_layers "
                f"{parts.num_nextn_predict_layers} and {parts.num_moe_layers} mixture layers"
            )
