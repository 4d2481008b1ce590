"""Reading a checkpoint: from the hub's safetensors to the tensors of one rank, and back.

Owns: what slice of each tensor a rank needs, and what is fused and stacked.
Must not know: forward passes, where experts should go (the layout says), files (model/tensor_files.py).
Source: tensor names of deepseek-ai/DeepSeek-R1.
"""

from collections.abc import Mapping
from pathlib import Path
from stat import S_IMODE

import torch
from safetensors.torch import save_file
from torch import Tensor

from model.checkpoint_check import WeightsError, h_proj_name
from model.config import ModelConfig
from model.layout import RankLayout
from model.matrix import Weight, join
from model.parameters import (
    AttentionWeights,
    BlockWeights,
    MlpWeights,
    MoeWeights,
    MtpWeights,
    RankWeights,
)
from model.tensor_files import TensorFiles, TensorSource

__all__ = ["WeightsError", "load_rank_weights", "read_rank_weights", "save_weights", "write_tensors"]

_GATE_BIAS = "e_score_correction_bias"


def load_rank_weights(
    directory: str | Path, config: ModelConfig, layout: RankLayout, *, with_mtp: bool = False
) -> RankWeights:
    """Read what one rank needs: its experts, its heads in sequence_tensor mode, and the rest whole.

    Raises WeightsError, naming the tensor or field, unless the checkpoint is one of `config`, float or INT8.
    """
    layout.check(config)
    return read_rank_weights(TensorFiles(directory, config, with_mtp=with_mtp), config, layout, with_mtp=with_mtp)


def read_rank_weights(
    files: TensorSource, config: ModelConfig, layout: RankLayout, *, with_mtp: bool = False
) -> RankWeights:
    """load_rank_weights of any source of tensors."""
    embedding_shape = (config.vocab_size, config.hidden_size)
    embedding = files.read("model.embed_tokens.weight", embedding_shape)
    reader = _BlockReader(files, config, layout)
    assert config.num_moe_layers or not with_mtp, "an MTP module's placement is that of the last mixture layer"
    num_mtp = config.num_nextn_predict_layers if with_mtp else 0
    first_mtp = config.num_hidden_layers
    lm_head = embedding if config.tie_word_embeddings else files.read("lm_head.weight", embedding_shape)
    return RankWeights(
        embedding=embedding,
        blocks=tuple(reader.block(layer) for layer in range(config.num_hidden_layers)),
        final_norm=files.read("model.norm.weight", (config.hidden_size,)),
        lm_head=lm_head,
        mtp=tuple(reader.mtp(layer, lm_head) for layer in range(first_mtp, first_mtp + num_mtp)),
    )


def save_weights(
    directory: str | Path, config: ModelConfig, weights: RankWeights, *, dtype: torch.dtype = torch.float32
) -> None:
    """Write model.safetensors under the hub's names. `weights` must be whole (one rank, each expert in its slot)
    and float.

    Loading the file with a one-rank layout gives the same values bit for bit, as far as `dtype` holds them. The
    gates' correction biases stay float32, as DeepSeek publishes them.
    """
    tensors = {
        "model.embed_tokens.weight": weights.embedding,
        "model.norm.weight": weights.final_norm,
    }
    if not config.tie_word_embeddings:
        tensors["lm_head.weight"] = weights.lm_head
    for layer, block in enumerate(weights.blocks):
        tensors |= _block_to_hub(config, layer, block)
    for layer, mtp in enumerate(weights.mtp, start=config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        tensors[f"{prefix}embed_tokens.weight"] = weights.embedding
        tensors[f"{prefix}enorm.weight"] = mtp.enorm
        tensors[f"{prefix}hnorm.weight"] = mtp.hnorm
        tensors[f"{prefix}eh_proj.weight"] = _float(mtp.eh_proj)
        tensors[f"{prefix}shared_head.norm.weight"] = mtp.head_norm
        tensors[f"{prefix}shared_head.head.weight"] = weights.lm_head if mtp.head is None else mtp.head
        if mtp.h_proj is not None:
            tensors[h_proj_name(layer)] = mtp.h_proj
        tensors |= _block_to_hub(config, layer, mtp.block)
    # safetensors refuses views of one storage: every tensor gets its own.
    own = {
        name: tensor.detach().to(torch.float32 if name.endswith(_GATE_BIAS) else dtype, copy=True).contiguous()
        for name, tensor in tensors.items()
    }
    write_tensors(Path(directory) / "model.safetensors", own)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file that comes under its name when it is whole, with the rights that the umask leaves."""
    part = path.with_name(f"{path.name}.part")
    part.unlink(missing_ok=True)
    part.touch()
    mode = S_IMODE(part.stat().st_mode)
    try:
        save_file(tensors, part, metadata={"format": "pt"})
        part.chmod(mode)  # safetensors writes files that only their owner can read
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


class _BlockReader:
    """Reads one decoder block at a time into fused tensors."""

    def __init__(self, files: TensorSource, config: ModelConfig, layout: RankLayout) -> None:
        self._files = files
        self._config = config
        self._layout = layout

    def block(self, layer: int) -> BlockWeights:
        c, prefix = self._config, f"model.layers.{layer}."
        if layer < c.first_k_dense_replace:
            mlp: MlpWeights | MoeWeights = self._mlp(f"{prefix}mlp.", c.intermediate_size)
        else:
            # An MTP module places its experts as the last mixture layer does.
            moe_layer = min(layer - c.first_k_dense_replace, c.num_moe_layers - 1)
            mlp = self._moe(f"{prefix}mlp.", self._layout.local_experts[moe_layer].tolist())
        return BlockWeights(
            input_norm=self._norm(f"{prefix}input_layernorm.weight"),
            attention=self._attention(f"{prefix}self_attn."),
            post_attention_norm=self._norm(f"{prefix}post_attention_layernorm.weight"),
            mlp=mlp,
        )

    def mtp(self, layer: int, lm_head: Tensor) -> MtpWeights:
        """`lm_head` is shared, as in published checkpoints, unless the module's own copy differs (rotated models)."""
        files, hidden, prefix = self._files, self._config.hidden_size, f"model.layers.{layer}."
        head, name = None, f"{prefix}shared_head.head.weight"
        if name in files and not torch.equal(own := files.read(name, tuple(lm_head.shape)), lm_head):
            head = own
        has_h_proj = h_proj_name(layer) in files
        return MtpWeights(
            enorm=self._norm(f"{prefix}enorm.weight"),
            hnorm=self._norm(f"{prefix}hnorm.weight"),
            eh_proj=files.matrix(f"{prefix}eh_proj", (hidden, 2 * hidden)),
            block=self.block(layer),
            head_norm=self._norm(f"{prefix}shared_head.norm.weight"),
            head=head,
            h_proj=files.read(h_proj_name(layer), (hidden, hidden)) if has_h_proj else None,
        )

    def _attention(self, prefix: str) -> AttentionWeights:
        c, read, matrix = self._config, self._files.read, self._files.matrix
        heads = self._layout.local_heads(c)
        num_heads, qk, up = c.num_attention_heads, c.qk_head_dim, c.qk_nope_head_dim + c.v_head_dim
        query_rows = slice(heads.start * qk, heads.stop * qk)
        kv_a = matrix(f"{prefix}kv_a_proj_with_mqa", (c.latent_dim, c.hidden_size))
        if c.q_lora_rank is None:
            qkv_a, q_a_norm = kv_a, None
            q_b = matrix(f"{prefix}q_proj", (num_heads * qk, c.hidden_size), rows=query_rows)
        else:
            q_a = matrix(f"{prefix}q_a_proj", (c.q_lora_rank, c.hidden_size))
            qkv_a = _joined(f"{prefix}q_a_proj", [q_a, kv_a])
            q_a_norm = read(f"{prefix}q_a_layernorm.weight", (c.q_lora_rank,))
            q_b = matrix(f"{prefix}q_b_proj", (num_heads * qk, c.q_lora_rank), rows=query_rows)
        kv_rows = slice(heads.start * up, heads.stop * up)
        kv_b = read(f"{prefix}kv_b_proj.weight", (num_heads * up, c.kv_lora_rank), rows=kv_rows)
        kv_b = kv_b.view(-1, up, c.kv_lora_rank)
        return AttentionWeights(
            qkv_a=qkv_a,
            q_a_norm=q_a_norm,
            q_b=q_b,
            kv_a_norm=read(f"{prefix}kv_a_layernorm.weight", (c.kv_lora_rank,)),
            w_uk=kv_b[:, : c.qk_nope_head_dim].contiguous(),
            w_uv=kv_b[:, c.qk_nope_head_dim :].contiguous(),
            o=matrix(f"{prefix}o_proj", (c.hidden_size, num_heads * c.v_head_dim)),
        )

    def _moe(self, prefix: str, local_experts: list[int]) -> MoeWeights:
        c, read = self._config, self._files.read
        size = c.moe_intermediate_size
        experts = []
        for expert in local_experts:
            is_shared = expert == c.n_routed_experts
            experts.append(self._mlp(f"{prefix}shared_experts." if is_shared else f"{prefix}experts.{expert}.", size))
        is_local = self._layout.shared_expert == "local"
        return MoeWeights(
            gate=read(f"{prefix}gate.weight", (c.n_routed_experts, c.hidden_size)),
            gate_bias=read(f"{prefix}gate.e_score_correction_bias", (c.n_routed_experts,)),
            experts_gate_up=_joined(f"{prefix}experts", [expert.gate_up for expert in experts], stack=True),
            experts_down=_joined(f"{prefix}experts", [expert.down for expert in experts], stack=True),
            shared=self._mlp(f"{prefix}shared_experts.", size * c.n_shared_experts) if is_local else None,
        )

    def _mlp(self, prefix: str, size: int) -> MlpWeights:
        matrix, hidden = self._files.matrix, self._config.hidden_size
        gate = matrix(f"{prefix}gate_proj", (size, hidden))
        up = matrix(f"{prefix}up_proj", (size, hidden))
        return MlpWeights(
            gate_up=_joined(f"{prefix}gate_proj", [gate, up]),
            down=matrix(f"{prefix}down_proj", (hidden, size)),
        )

    def _norm(self, name: str) -> Tensor:
        return self._files.read(name, (self._config.hidden_size,))


def _block_to_hub(config: ModelConfig, layer: int, block: BlockWeights) -> Mapping[str, Tensor]:
    prefix, attention = f"model.layers.{layer}.", block.attention
    tensors = {
        f"{prefix}input_layernorm.weight": block.input_norm,
        f"{prefix}post_attention_layernorm.weight": block.post_attention_norm,
        f"{prefix}self_attn.kv_a_layernorm.weight": attention.kv_a_norm,
        f"{prefix}self_attn.kv_b_proj.weight": torch.cat([attention.w_uk, attention.w_uv], 1).flatten(0, 1),
        f"{prefix}self_attn.o_proj.weight": _float(attention.o),
    }
    if attention.q_a_norm is None:
        tensors[f"{prefix}self_attn.q_proj.weight"] = _float(attention.q_b)
        kv_a = _float(attention.qkv_a)
    else:
        q_a, kv_a = torch.split(_float(attention.qkv_a), [len(attention.q_a_norm), config.latent_dim])
        tensors[f"{prefix}self_attn.q_a_proj.weight"] = q_a
        tensors[f"{prefix}self_attn.q_a_layernorm.weight"] = attention.q_a_norm
        tensors[f"{prefix}self_attn.q_b_proj.weight"] = _float(attention.q_b)
    tensors[f"{prefix}self_attn.kv_a_proj_with_mqa.weight"] = kv_a
    if isinstance(block.mlp, MlpWeights):
        return tensors | _mlp_to_hub(f"{prefix}mlp.", block.mlp)
    moe = block.mlp
    assert moe.shared is not None, "the shared expert is not in its place"
    assert len(moe.experts_down) == config.n_routed_experts, "weights are not whole"
    tensors[f"{prefix}mlp.gate.weight"] = moe.gate
    tensors[f"{prefix}mlp.gate.e_score_correction_bias"] = moe.gate_bias
    gate_up, down = _float(moe.experts_gate_up), _float(moe.experts_down)
    for expert in range(config.n_routed_experts):
        weights = MlpWeights(gate_up=gate_up[expert], down=down[expert])
        tensors |= _mlp_to_hub(f"{prefix}mlp.experts.{expert}.", weights)
    return tensors | _mlp_to_hub(f"{prefix}mlp.shared_experts.", moe.shared)


def _mlp_to_hub(prefix: str, weights: MlpWeights) -> dict[str, Tensor]:
    gate, up = _float(weights.gate_up).chunk(2)
    return {
        f"{prefix}gate_proj.weight": gate,
        f"{prefix}up_proj.weight": up,
        f"{prefix}down_proj.weight": _float(weights.down),
    }


def _joined(module: str, parts: list[Weight], *, stack: bool = False) -> Weight:
    if len({type(part) for part in parts}) > 1:
        raise WeightsError(f"quantization_config.ignore: {module} and what it is multiplied with are not of one kind")
    return join(parts, stack=stack)


def _float(weight: Weight) -> Tensor:
    assert isinstance(weight, Tensor), "INT8 weights are written by model/quantization"
    return weight
