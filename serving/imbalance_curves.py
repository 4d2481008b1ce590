"""Writes the imbalance curves of the shipped configurations: `python -m serving.imbalance_curves [FILE]`.

Owns: which curves are shipped.
Must not know: how a curve is worked out (serving/expert_balance.py).
"""

import json
import sys
from importlib import resources
from pathlib import Path

from serving.config_file import load_config, presets
from serving.core.expert_load_model import Balance
from serving.expert_balance import CURVES_FILE, curve_key, imbalance_values, skewed_load

BALANCES: tuple[Balance, ...] = ("eplb", "none")


def shipped_curves() -> dict[str, list[float]]:
    """Curves of every role of every preset, by what decides them."""
    curves: dict[str, list[float]] = {}
    for name in presets():
        config = load_config(name)
        for role in config.instances:
            slots, model = skewed_load(
                config.charged_layout(role), config.charged_shape, config.hardware.fitted, role=role
            )
            for balance in BALANCES:
                key = curve_key(slots, model, balance)
                if key not in curves:
                    curves[key] = imbalance_values(slots, model, balance)
    return dict(sorted(curves.items()))


def main() -> None:
    """Write them into the file given, or into the shipped one."""
    shipped = resources.files("configs").joinpath(CURVES_FILE)
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(str(shipped))
    lines = (f"  {json.dumps(key)}: {json.dumps(values)}" for key, values in shipped_curves().items())
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
