"""A picture of a run: losses, held-out accuracy and the balance of the experts over the steps.

Owns: the drawing.
Must not know: how the figures came about.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

# Steps that one point of a smoothed line averages over.
_WINDOW = 25


def draw_loss_curve(history: Sequence[Mapping[str, Any]], accuracies: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the picture of `history` (one StepReport as a dict per step) and `accuracies` (Accuracy as dicts)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    tokens = np.cumsum([report["num_tokens"] for report in history]) / 1e6
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    for key, label in (("loss", "next token"), ("mtp_loss", "MTP (the token after it)")):
        left.plot(tokens, _smooth([report[key] for report in history]), label=label)
    left.set(title="Loss", xlabel="million tokens", ylabel="nats per learned token", yscale="log")
    left.legend()
    if accuracies:
        steps = [entry["step"] for entry in accuracies]
        at = tokens[np.array(steps) - 1]
        for kind in accuracies[0]["by_kind"]:
            middle.plot(at, [100 * entry["by_kind"][kind] for entry in accuracies], linewidth=0.9, label=kind)
        middle.plot(at, [100 * entry["mean"] for entry in accuracies], color="black", linewidth=2.2, label="mean")
        middle.legend(fontsize=7, ncols=2)
    middle.set(title="Held-out problems reproduced exactly", xlabel="million tokens", ylabel="%", ylim=(0, 101))
    right.plot(tokens, _smooth([report["max_load"] for report in history]))
    right.set(title="Busiest expert of the worst layer", xlabel="million tokens", ylabel="load / mean load")
    right.set_ylim(bottom=1)
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _smooth(values: Sequence[float]) -> Any:
    """Means over a trailing window, shorter at the start."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(total))
    starts = np.maximum(ends - _WINDOW, 0)
    return (total[ends] - total[starts]) / (ends - starts)
