"""Which modules of a checkpoint read and write the same vectors.

Owns: the wiring of a decoder block under the hub's names.
Must not know: values.
Source: tensor names of deepseek-ai/DeepSeek-R1.
"""

from collections.abc import Iterator

from model.config import ModelConfig


def num_blocks(config: ModelConfig) -> int:
    """Decoder blocks, MTP modules' included."""
    return config.num_hidden_layers + config.num_nextn_predict_layers


def block_prefix(layer: int) -> str:
    """Of every name of one layer."""
    return f"model.layers.{layer}."


def is_moe(config: ModelConfig, layer: int) -> bool:
    """Whether a layer is a mixture; MTP modules' are."""
    return layer >= config.first_k_dense_replace


def mlp_modules(config: ModelConfig, layer: int) -> Iterator[str]:
    """The feed-forward parts of a layer: one, or the experts and the shared expert."""
    prefix = f"{block_prefix(layer)}mlp"
    if not is_moe(config, layer):
        yield prefix
        return
    yield from (f"{prefix}.experts.{expert}" for expert in range(config.n_routed_experts))
    yield f"{prefix}.shared_experts"


def attention_readers(config: ModelConfig, layer: int) -> list[str]:
    """Modules that read the output of input_layernorm."""
    prefix = f"{block_prefix(layer)}self_attn."
    query = "q_proj" if config.q_lora_rank is None else "q_a_proj"
    return [f"{prefix}{query}", f"{prefix}kv_a_proj_with_mqa"]


def mlp_readers(config: ModelConfig, layer: int) -> list[str]:
    """Modules that read the output of post_attention_layernorm, but for the gate."""
    return [f"{mlp}.{part}_proj" for mlp in mlp_modules(config, layer) for part in ("gate", "up")]


def mtp_layers(config: ModelConfig) -> range:
    """Layers of the MTP modules."""
    return range(config.num_hidden_layers, num_blocks(config))


def quantized_modules(config: ModelConfig) -> list[str]:
    """Every module with an INT8 matrix, in layer order."""
    modules = []
    for layer in range(num_blocks(config)):
        prefix = block_prefix(layer)
        if layer in mtp_layers(config):
            modules.append(f"{prefix}eh_proj")
        modules += attention_readers(config, layer)
        if config.q_lora_rank is not None:
            modules.append(f"{prefix}self_attn.q_b_proj")
        modules.append(f"{prefix}self_attn.o_proj")
        modules += mlp_readers(config, layer)
        modules += [f"{mlp}.down_proj" for mlp in mlp_modules(config, layer)]
    return modules


def kept_modules(config: ModelConfig) -> list[str]:
    """Modules with matrices that stay in high precision, norms aside."""
    modules = ["model.embed_tokens", "lm_head"]
    for layer in range(num_blocks(config)):
        prefix = block_prefix(layer)
        modules.append(f"{prefix}self_attn.kv_b_proj")
        if is_moe(config, layer):
            modules.append(f"{prefix}mlp.gate")
        if layer in mtp_layers(config):
            modules += [f"{prefix}embed_tokens", f"{prefix}h_proj", f"{prefix}shared_head.head"]
    return modules
