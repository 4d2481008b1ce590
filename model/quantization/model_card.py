"""The model card of an INT8 checkpoint.

Owns: what it says, and which license it names.
Must not know: tensors, how scales were found.
Source: model cards as the hub describes them.
"""

import re
from pathlib import Path

from model.quantization_config import QuantizationConfig

CARD_FILE = "README.md"
_TECHNIQUES = {
    "rotation": "rotation: orthogonal transforms against outliers, absorbed in the weights",
    "scale_search": "scale search: range moved from activations to weights, per input channel",
    "clipping": "clipping: a clip factor per output channel",
    "compensation": "compensation: rounding errors spread over the inputs still to round (GPTQ)",
}


def model_card(source: Path, target: Path, quantization: QuantizationConfig) -> str:
    """Text of the card of `target`, made from the float checkpoint `source`."""
    source_name, target_name = source.resolve().name, target.resolve().name
    license_name = _license(source)
    techniques = [text for name, text in _TECHNIQUES.items() if quantization.techniques.get(name)]
    kept = dict.fromkeys(re.sub(r"\.\d+\.", ".N.", module) for module in quantization.ignore)
    lines = [
        "---",
        *([] if license_name is None else [f"license: {license_name}"]),
        "library_name: supernode-infer",
        "pipeline_tag: text-generation",
        "tags:",
        "- deepseek_v3",
        "- int8",
        "---",
        "",
        f"# {source_name} in INT8",
        "",
        f"Made from the float checkpoint {source_name} by `supernode quantize`. What that one was trained on, and how",
        "well it does, its own card says; the figures there are not those of this checkpoint.",
        "",
        "## Numbers",
        "",
        "Matrices are INT8, symmetric, with one static scale per output channel; their inputs are rounded to INT8 in",
        "every step, with one scale per token. Beyond rounding to the nearest:",
        "",
        *(f"- {text}" for text in techniques or ["nothing"]),
        "",
        "In high precision are norms, the gates' biases, and these modules (N: any number):",
        "",
        *(f"- `{module}`" for module in kept),
        "",
        "## Serving",
        "",
        f"    supernode serve laptop --set model.checkpoint={target_name} --set model.quantization=int8",
        "",
        "Its `quant_method` is supernode-infer's own; other programs do not load it.",
        "",
        "## License",
        "",
        _license_text(license_name),
        "",
    ]
    return "\n".join(lines)


def _license(directory: Path) -> str | None:
    """What the card of a checkpoint names; None if it has none, or names none."""
    try:
        card = (directory / CARD_FILE).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    header = card.split("\n---\n")[0] if card.startswith("---\n") else ""
    found = re.search(r"^license:\s*(\S+)\s*$", header, re.MULTILINE)
    return None if found is None else found[1]


def _license_text(name: str | None) -> str:
    return (
        "That of the float checkpoint, whose card names none." if name is None else f"{name}, as the float checkpoint."
    )
