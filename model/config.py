"""Shape of a DeepSeek-V3/R1 model, under the names of the published config.json.

Owns: the hyper-parameters, their range checks, and reading and writing config.json.
Must not know: tensors, ranks, devices, time.
Source: config.json of deepseek-ai/DeepSeek-R1 and transformers' DeepseekV3Config.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

# Keys of published config.json files that do not change the forward pass and are dropped on reading.
_IGNORED_KEYS = frozenset(
    {
        "_name_or_path", "architectures", "attention_dropout", "auto_map", "aux_loss_alpha", "dtype", "ep_size",
        "head_dim", "initializer_range", "output_router_logits", "pad_token_id", "pretraining_tp", "qk_head_dim",
        "quantization_config", "seq_aux", "torch_dtype", "transformers_version", "use_cache",
    }
)  # fmt: skip

# Keys that would change the forward pass: only the value that this package computes is accepted.
_ONLY_SUPPORTED: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "hidden_act": "silu",
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "attention_bias": False,
    "rope_interleave": True,
}


class ModelConfigError(ValueError):
    """A hyper-parameter is missing, unknown or out of range. The message names field, value and limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """YaRN parameters: `rope_scaling` of config.json (type "yarn", the only one that R1 uses)."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    def __post_init__(self) -> None:
        _at_least("rope_scaling.factor", self.factor, 1.0)
        _at_least("rope_scaling.original_max_position_embeddings", self.original_max_position_embeddings, 1)
        if not self.beta_fast > self.beta_slow > 0:
            raise ModelConfigError(
                f"rope_scaling.beta_fast: {self.beta_fast} must exceed beta_slow {self.beta_slow}, both above 0"
            )

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "RopeScaling | None":
        """Read `rope_scaling` (or transformers 5's `rope_parameters`); None for plain RoPE."""
        kind = raw.get("type", raw.get("rope_type", "yarn"))
        if kind == "default":
            return None
        if kind != "yarn":
            raise ModelConfigError(f"rope_scaling.type: {kind!r} is not supported, only 'yarn'")
        values = {k: v for k, v in raw.items() if k not in ("type", "rope_type", "rope_theta")}
        return cls(**_known_fields(cls, values, "rope_scaling."))


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Hyper-parameters of one model. Every field has its name and meaning in config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    n_shared_experts: int
    n_routed_experts: int
    routed_scaling_factor: float
    kv_lora_rank: int
    q_lora_rank: int | None
    qk_rope_head_dim: int
    v_head_dim: int
    qk_nope_head_dim: int
    n_group: int
    topk_group: int
    num_experts_per_tok: int
    first_k_dense_replace: int
    norm_topk_prob: bool
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    num_nextn_predict_layers: int = 0
    bos_token_id: int = 0
    eos_token_id: int = 1
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
            "num_attention_heads", "n_shared_experts", "n_routed_experts", "kv_lora_rank", "qk_rope_head_dim",
            "v_head_dim", "qk_nope_head_dim", "n_group", "topk_group", "num_experts_per_tok", "max_position_embeddings",
        ):  # fmt: skip
            _at_least(name, getattr(self, name), 1)
        _at_least("first_k_dense_replace", self.first_k_dense_replace, 0)
        _at_least("num_nextn_predict_layers", self.num_nextn_predict_layers, 0)
        if self.q_lora_rank is not None:
            _at_least("q_lora_rank", self.q_lora_rank, 1)
        _positive("rms_norm_eps", self.rms_norm_eps)
        _positive("rope_theta", self.rope_theta)
        _positive("routed_scaling_factor", self.routed_scaling_factor)
        _at_most("first_k_dense_replace", self.first_k_dense_replace, "num_hidden_layers", self.num_hidden_layers)
        _at_most("topk_group", self.topk_group, "n_group", self.n_group)
        if self.qk_rope_head_dim % 2:
            raise ModelConfigError(f"qk_rope_head_dim: {self.qk_rope_head_dim} must be even, RoPE turns pairs")
        if self.n_routed_experts % self.n_group:
            raise ModelConfigError(
                f"n_routed_experts: {self.n_routed_experts} is not a multiple of n_group {self.n_group}"
            )
        if self.experts_per_group < 2:
            raise ModelConfigError(
                f"n_group: {self.n_group} leaves {self.experts_per_group} experts per group, a group's score needs 2"
            )
        reachable = self.topk_group * self.experts_per_group
        _at_most("num_experts_per_tok", self.num_experts_per_tok, "experts in topk_group groups", reachable)
        for name in ("bos_token_id", "eos_token_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise ModelConfigError(f"{name}: {getattr(self, name)} is outside [0, vocab_size {self.vocab_size})")

    @property
    def qk_head_dim(self) -> int:
        """Width of one head's query and key in the naive form."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Elements that the latent cache stores per token and layer: c_kv and k_pe."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def num_moe_layers(self) -> int:
        """Mixture-of-experts layers of the main model, MTP modules not counted."""
        return self.num_hidden_layers - self.first_k_dense_replace

    @property
    def experts_per_group(self) -> int:
        return self.n_routed_experts // self.n_group

    @property
    def softmax_scale(self) -> float:
        """Factor on attention scores: 1/sqrt(qk_head_dim), with YaRN's mscale_all_dim squared.

        Source: DeepSeek-V3 modeling code, `softmax_scale * mscale * mscale`.
        """
        scale = 1 / math.sqrt(self.qk_head_dim)
        if self.rope_scaling is not None and self.rope_scaling.mscale_all_dim:
            scale *= yarn_mscale(self.rope_scaling.factor, self.rope_scaling.mscale_all_dim) ** 2
        return scale

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "ModelConfig":
        """Read the contents of a config.json (or of configs/model/*.yaml).

        Raises ModelConfigError for an unknown key, and for a key whose value asks for other math than this
        package's.
        """
        values = {k: v for k, v in raw.items() if k not in _IGNORED_KEYS}
        for key, supported in _ONLY_SUPPORTED.items():
            if key in values and values.pop(key) != supported:
                raise ModelConfigError(f"{key}: {raw[key]!r} is not supported, only {supported!r}")
        kv_heads = values.pop("num_key_value_heads", None)
        if kv_heads is not None and kv_heads != values.get("num_attention_heads"):
            raise ModelConfigError(f"num_key_value_heads: {kv_heads} must equal num_attention_heads in MLA")
        if "num_mtp_layers" in values:  # transformers 5 spells the field this way
            values.setdefault("num_nextn_predict_layers", values["num_mtp_layers"])
            del values["num_mtp_layers"]
        rope = values.pop("rope_parameters", None)  # transformers 5 keeps theta and scaling together
        _check_mapping("rope_parameters", rope)
        if rope is not None:
            values.setdefault("rope_theta", rope.get("rope_theta", 10000.0))
            values.setdefault("rope_scaling", rope)
        scaling = values.get("rope_scaling")
        _check_mapping("rope_scaling", scaling)
        if scaling is not None:
            values["rope_scaling"] = RopeScaling.from_dict(scaling)
        return cls(**_known_fields(cls, values, ""))

    @classmethod
    def from_file(cls, path: str | Path) -> "ModelConfig":
        """Read a config.json."""
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))

    def to_dict(self) -> dict[str, Any]:
        """The contents of a config.json that transformers loads as DeepseekV3ForCausalLM."""
        raw = asdict(self)
        if self.rope_scaling is not None:
            raw["rope_scaling"]["type"] = "yarn"
        return {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            "hidden_act": "silu",
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "moe_layer_freq": 1,
            "attention_bias": False,
            "num_key_value_heads": self.num_attention_heads,
            "torch_dtype": "float32",
            **raw,
        }


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature for one context extension factor. Source: YaRN paper, eq. 22, as in DeepSeek-V3."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _known_fields(cls: type, values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """`values` as constructor arguments of the dataclass `cls`, numbers of the declared kind."""
    kinds = {f.name: f.type for f in fields(cls)}
    unknown = sorted(set(values) - set(kinds))
    if unknown:
        raise ModelConfigError(f"{prefix}{unknown[0]}: unknown key")
    required = [f.name for f in fields(cls) if f.default is f.default_factory]  # both MISSING
    missing = [name for name in required if name not in values]
    if missing:
        raise ModelConfigError(f"{prefix}{missing[0]}: missing")
    result: dict[str, Any] = {}
    for name, value in values.items():
        kind, is_bool = kinds[name], isinstance(value, bool)
        is_absent = value is None and kind == int | None
        if kind in (int, int | None) and not is_absent and (is_bool or not isinstance(value, int)):
            raise ModelConfigError(f"{prefix}{name}: {value!r} is not an integer")
        if kind is float:
            if is_bool or not isinstance(value, (int, float)):
                raise ModelConfigError(f"{prefix}{name}: {value!r} is not a number")
            value = float(value)
        if kind is bool and not is_bool:
            raise ModelConfigError(f"{prefix}{name}: {value!r} is not true or false")
        result[name] = value
    return result


def _check_mapping(name: str, value: object) -> None:
    if value is not None and not isinstance(value, Mapping):
        raise ModelConfigError(f"{name}: {value!r} is not a mapping")


def _at_least(name: str, value: float, limit: float) -> None:
    if not value >= limit:
        raise ModelConfigError(f"{name}: {value} is below {limit}")


def _at_most(name: str, value: float, limit_name: str, limit: float) -> None:
    if not value <= limit:
        raise ModelConfigError(f"{name}: {value} exceeds {limit_name} {limit}")


def _positive(name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ModelConfigError(f"{name}: {value} must be finite and above 0")
