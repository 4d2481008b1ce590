"""Reading a checkpoint: from the hub's safetensors to the tensors of one rank, and back.

Owns: the hub's tensor names, what slice of each a rank needs, and checks of shape, dtype and finiteness.
Must not know: forward passes, where experts should go (the layout says).
Source: tensor names of deepseek-ai/DeepSeek-R1; safetensors' index of sharded files.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.config import ModelConfig
from model.layout import RankLayout
from model.parameters import (
    AttentionWeights,
    BlockWeights,
    MlpWeights,
    MoeWeights,
    MtpWeights,
    RankWeights,
)

_READABLE_DTYPES = ("F32", "F16", "BF16")
_GATE_BIAS = "e_score_correction_bias"


class WeightsError(ValueError):
    """A checkpoint does not fit the model. The message names the tensor or file and what is wrong with it."""


class TensorFiles:
    """The tensors of a checkpoint directory: one model.safetensors, or shards with an index."""

    def __init__(self, directory: str | Path) -> None:
        directory = Path(directory)
        index = directory / "model.safetensors.index.json"
        single = directory / "model.safetensors"
        if index.exists():
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            paths = sorted({directory / file for file in weight_map.values()})
        elif single.exists():
            paths = [single]
        else:
            raise WeightsError(f"{directory}: neither {single.name} nor {index.name} is there")
        self._directory = directory
        self._file_by_name = {name: file for file in map(_open, paths) for name in file.keys()}  # type: ignore[no-untyped-call]  # noqa: SIM118

    def read(self, name: str, shape: tuple[int, ...], *, rows: slice | None = None) -> Tensor:
        """One tensor as float32, or some rows of it. `shape` is that of the whole tensor.

        Raises WeightsError if it is missing, has another shape or an unreadable dtype, or is not finite.
        """
        if name not in self._file_by_name:
            raise WeightsError(f"{name}: missing from {self._directory}")
        stored = self._file_by_name[name].get_slice(name)  # type: ignore[no-untyped-call]
        if tuple(stored.get_shape()) != shape:
            raise WeightsError(f"{name}: shape {tuple(stored.get_shape())} is not {shape}")
        if stored.get_dtype() not in _READABLE_DTYPES:
            raise WeightsError(f"{name}: dtype {stored.get_dtype()} is not one of {', '.join(_READABLE_DTYPES)}")
        raw: Tensor = stored[:] if rows is None else stored[rows.start : rows.stop]
        values = raw.to(torch.float32)
        if not bool(torch.isfinite(values).all()):
            raise WeightsError(f"{name}: holds NaN or infinity")
        return values


def load_rank_weights(
    directory: str | Path, config: ModelConfig, layout: RankLayout, *, with_mtp: bool = False
) -> RankWeights:
    """Read what one rank needs: its experts, its heads in sequence_tensor mode, and the rest whole."""
    layout.check(config)
    files = TensorFiles(directory)
    embedding_shape = (config.vocab_size, config.hidden_size)
    embedding = files.read("model.embed_tokens.weight", embedding_shape)
    reader = _BlockReader(files, config, layout)
    assert config.num_moe_layers or not with_mtp, "an MTP module's placement is that of the last mixture layer"
    num_mtp = config.num_nextn_predict_layers if with_mtp else 0
    first_mtp = config.num_hidden_layers
    return RankWeights(
        embedding=embedding,
        blocks=tuple(reader.block(layer) for layer in range(config.num_hidden_layers)),
        final_norm=files.read("model.norm.weight", (config.hidden_size,)),
        lm_head=embedding if config.tie_word_embeddings else files.read("lm_head.weight", embedding_shape),
        mtp=tuple(reader.mtp(layer) for layer in range(first_mtp, first_mtp + num_mtp)),
    )


def save_weights(
    directory: str | Path, config: ModelConfig, weights: RankWeights, *, dtype: torch.dtype = torch.float32
) -> None:
    """Write model.safetensors under the hub's names. `weights` must be whole: one rank, each expert in its
    slot.

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
        tensors[f"{prefix}eh_proj.weight"] = mtp.eh_proj
        tensors[f"{prefix}shared_head.norm.weight"] = mtp.head_norm
        tensors[f"{prefix}shared_head.head.weight"] = weights.lm_head
        tensors |= _block_to_hub(config, layer, mtp.block)
    # safetensors refuses views of one storage: every tensor gets its own.
    own = {
        name: tensor.detach().to(torch.float32 if name.endswith(_GATE_BIAS) else dtype, copy=True).contiguous()
        for name, tensor in tensors.items()
    }
    save_file(own, Path(directory) / "model.safetensors", metadata={"format": "pt"})


class _BlockReader:
    """Reads one decoder block at a time into fused tensors."""

    def __init__(self, files: TensorFiles, config: ModelConfig, layout: RankLayout) -> None:
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

    def mtp(self, layer: int) -> MtpWeights:
        hidden, prefix = self._config.hidden_size, f"model.layers.{layer}."
        return MtpWeights(
            enorm=self._norm(f"{prefix}enorm.weight"),
            hnorm=self._norm(f"{prefix}hnorm.weight"),
            eh_proj=self._files.read(f"{prefix}eh_proj.weight", (hidden, 2 * hidden)),
            block=self.block(layer),
            head_norm=self._norm(f"{prefix}shared_head.norm.weight"),
        )

    def _attention(self, prefix: str) -> AttentionWeights:
        c, read = self._config, self._files.read
        heads = self._layout.local_heads(c)
        num_heads, qk, up = c.num_attention_heads, c.qk_head_dim, c.qk_nope_head_dim + c.v_head_dim
        query_rows = slice(heads.start * qk, heads.stop * qk)
        kv_a = read(f"{prefix}kv_a_proj_with_mqa.weight", (c.latent_dim, c.hidden_size))
        if c.q_lora_rank is None:
            qkv_a, q_a_norm = kv_a, None
            q_b = read(f"{prefix}q_proj.weight", (num_heads * qk, c.hidden_size), rows=query_rows)
        else:
            q_a = read(f"{prefix}q_a_proj.weight", (c.q_lora_rank, c.hidden_size))
            qkv_a = torch.cat([q_a, kv_a])
            q_a_norm = read(f"{prefix}q_a_layernorm.weight", (c.q_lora_rank,))
            q_b = read(f"{prefix}q_b_proj.weight", (num_heads * qk, c.q_lora_rank), rows=query_rows)
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
            o=read(f"{prefix}o_proj.weight", (c.hidden_size, num_heads * c.v_head_dim)),
        )

    def _moe(self, prefix: str, local_experts: list[int]) -> MoeWeights:
        c, read = self._config, self._files.read
        size = c.moe_intermediate_size
        experts_gate_up = torch.empty(len(local_experts), 2 * size, c.hidden_size)
        experts_down = torch.empty(len(local_experts), c.hidden_size, size)
        for slot, expert in enumerate(local_experts):
            is_shared = expert == c.n_routed_experts
            name = f"{prefix}shared_experts." if is_shared else f"{prefix}experts.{expert}."
            weights = self._mlp(name, size)
            experts_gate_up[slot] = weights.gate_up
            experts_down[slot] = weights.down
        is_local = self._layout.shared_expert == "local"
        return MoeWeights(
            gate=read(f"{prefix}gate.weight", (c.n_routed_experts, c.hidden_size)),
            gate_bias=read(f"{prefix}gate.e_score_correction_bias", (c.n_routed_experts,)),
            experts_gate_up=experts_gate_up,
            experts_down=experts_down,
            shared=self._mlp(f"{prefix}shared_experts.", size * c.n_shared_experts) if is_local else None,
        )

    def _mlp(self, prefix: str, size: int) -> MlpWeights:
        read, hidden = self._files.read, self._config.hidden_size
        gate = read(f"{prefix}gate_proj.weight", (size, hidden))
        up = read(f"{prefix}up_proj.weight", (size, hidden))
        return MlpWeights(
            gate_up=torch.cat([gate, up]),
            down=read(f"{prefix}down_proj.weight", (hidden, size)),
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
        f"{prefix}self_attn.o_proj.weight": attention.o,
    }
    if attention.q_a_norm is None:
        tensors[f"{prefix}self_attn.q_proj.weight"] = attention.q_b
        kv_a = attention.qkv_a
    else:
        q_a, kv_a = torch.split(attention.qkv_a, [len(attention.q_a_norm), config.latent_dim])
        tensors[f"{prefix}self_attn.q_a_proj.weight"] = q_a
        tensors[f"{prefix}self_attn.q_a_layernorm.weight"] = attention.q_a_norm
        tensors[f"{prefix}self_attn.q_b_proj.weight"] = attention.q_b
    tensors[f"{prefix}self_attn.kv_a_proj_with_mqa.weight"] = kv_a
    if isinstance(block.mlp, MlpWeights):
        return tensors | _mlp_to_hub(f"{prefix}mlp.", block.mlp)
    moe = block.mlp
    assert moe.shared is not None, "the shared expert is not in its place"
    assert len(moe.experts_down) == config.n_routed_experts, "weights are not whole"
    tensors[f"{prefix}mlp.gate.weight"] = moe.gate
    tensors[f"{prefix}mlp.gate.e_score_correction_bias"] = moe.gate_bias
    for expert in range(config.n_routed_experts):
        weights = MlpWeights(gate_up=moe.experts_gate_up[expert], down=moe.experts_down[expert])
        tensors |= _mlp_to_hub(f"{prefix}mlp.experts.{expert}.", weights)
    return tensors | _mlp_to_hub(f"{prefix}mlp.shared_experts.", moe.shared)


def _mlp_to_hub(prefix: str, weights: MlpWeights) -> dict[str, Tensor]:
    gate, up = weights.gate_up.chunk(2)
    return {
        f"{prefix}gate_proj.weight": gate,
        f"{prefix}up_proj.weight": up,
        f"{prefix}down_proj.weight": weights.down,
    }


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path}: {error}") from error
