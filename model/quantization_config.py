"""Which matrices of a checkpoint are INT8: `quantization_config` of config.json.

Owns: the fields, and the rule which modules are quantized.
Must not know: tensors, how scales were found.
Source: compressed-tensors' W8A8 "int-quantized" scheme for the fields and for `X.weight` beside `X.weight_scale`.
The method has a name of its own, since kv_b_proj stays in high precision and a rotated MTP module has an extra
matrix.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model.config import ModelConfig, ModelConfigError

QUANT_METHOD = "supernode-int8"
_FORMAT = "int-quantized"
_TARGETS = ["Linear"]
_INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
_GROUP = {
    "weights": {**_INT8, "strategy": "channel", "dynamic": False},
    "input_activations": {**_INT8, "strategy": "token", "dynamic": True},
}
# The products that are large and not sensitive. Embedding, head, norms, gate and attention itself are not here.
_PRODUCTS = frozenset(
    {
        "q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj",
        "gate_proj", "up_proj", "down_proj", "eh_proj",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationConfig:
    """`quantization_config` of an INT8 checkpoint."""

    ignore: tuple[str, ...] = ()  # modules in high precision
    techniques: Mapping[str, Any] = field(default_factory=dict)  # how the scales were found; for people

    def is_quantized(self, module: str) -> bool:
        """Whether `module`, such as model.layers.3.self_attn.o_proj, has an INT8 matrix."""
        return module.rpartition(".")[2] in _PRODUCTS and module not in self.ignore

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "QuantizationConfig":
        """Read the field. Raises ModelConfigError for any scheme but this one, fp8 among them."""
        prefix = "quantization_config"
        if not isinstance(raw, Mapping):
            raise ModelConfigError(f"{prefix}: {raw!r} is not an object")
        if raw.get("quant_method") != QUANT_METHOD:
            raise ModelConfigError(
                f"{prefix}.quant_method: {raw.get('quant_method')!r} is not supported, only {QUANT_METHOD!r}"
            )
        if raw.get("format") != _FORMAT:
            raise ModelConfigError(f"{prefix}.format: {raw.get('format')!r} is not supported, only {_FORMAT!r}")
        groups = raw.get("config_groups")
        if not isinstance(groups, Mapping) or len(groups) != 1:
            raise ModelConfigError(f"{prefix}.config_groups: must be an object with one group")
        ((name, group),) = groups.items()
        for part, wanted in _GROUP.items():
            values = group.get(part) if isinstance(group, Mapping) else None
            for key, value in wanted.items():
                found = values.get(key) if isinstance(values, Mapping) else None
                if found != value:
                    raise ModelConfigError(
                        f"{prefix}.config_groups.{name}.{part}.{key}: {found!r} is not supported, only {value!r}"
                    )
        ignore = raw.get("ignore", [])
        if not isinstance(ignore, list) or not all(isinstance(module, str) for module in ignore):
            raise ModelConfigError(f"{prefix}.ignore: must be a list of module names")
        techniques = raw.get("techniques", {})
        if not isinstance(techniques, Mapping):
            raise ModelConfigError(f"{prefix}.techniques: must be an object")
        return cls(ignore=tuple(ignore), techniques=dict(techniques))

    def to_dict(self) -> dict[str, Any]:
        """The field as `from_dict` reads it."""
        return {
            "quant_method": QUANT_METHOD,
            "format": _FORMAT,
            "quantization_status": "compressed",
            "config_groups": {"group_0": {"targets": _TARGETS, **_GROUP}},
            "ignore": list(self.ignore),
            "techniques": dict(self.techniques),
        }


def read_config(directory: str | Path) -> tuple[ModelConfig, QuantizationConfig | None]:
    """Shape and quantization of a checkpoint directory. Raises ModelConfigError naming the file or field."""
    path = Path(directory) / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelConfigError(f"{path}: {error}") from None
    if not isinstance(raw, dict):
        raise ModelConfigError(f"{path}: must hold an object")
    quantization = raw.get("quantization_config")
    return ModelConfig.from_dict(raw), None if quantization is None else QuantizationConfig.from_dict(quantization)
