"""A picture of what dispatch and combine put on the links, with EPLB off and on.

Owns: the drawing.
Must not know: how the traffic was found.
"""

from pathlib import Path
from typing import Any

import numpy as np

from serving.core.expert_placement import Loads
from serving.core.expert_traffic import between_nodes
from serving.expert_traffic import OPERATORS, TrafficComparison

MOST_RANKS = 64  # shown one by one; more are summed to nodes
_COLORS = ("#b2182b", "#2166ac")  # EPLB off and on, the ends of the color map of `expert-load`


def draw_expert_traffic(comparison: TrafficComparison, path: Path, *, layer: int, first_layer: int, title: str) -> None:
    """Write the picture of mixture layer `layer`, counted from 0; it is called `first_layer + layer`.

    Above, the matrices in one color scale; below, the bytes into each die, busiest first, and all layers' imbalance.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    sides = {"EPLB off": comparison.off, "EPLB on": comparison.on}
    num_ranks = comparison.counts.shape[1]
    unit = "rank" if num_ranks <= MOST_RANKS else "node"
    matrices = {
        (operator, name): _shown(comparison, comparison.matrix(side, layer, operator), unit)
        for operator in OPERATORS
        for name, side in sides.items()
    }
    highest = max(float(matrix.max()) for matrix in matrices.values())
    figure, grid = plt.subplots(3, 2, figsize=(12, 14.5), layout="constrained", height_ratios=(1, 1, 0.55))
    image: Any = None
    for axes, ((operator, name), matrix) in zip(grid[:2].flat, matrices.items(), strict=True):
        image = axes.imshow(matrix, cmap="viridis", vmin=0.0, vmax=highest, interpolation="nearest")
        column = matrix.sum(axis=0 if operator == "dispatch" else 1)
        axes.set_title(
            f"{operator}, {name}: busiest {unit} {column.max() / column.mean():.2f} x mean bytes", fontsize=11
        )
        axes.set_xlabel(f"receiving {unit}", fontsize=9)
        axes.set_ylabel(f"sending {unit}", fontsize=9)
        axes.tick_params(labelsize=8, length=2)
    bar = figure.colorbar(image, ax=grid[:2], shrink=0.9, pad=0.01, aspect=40)
    inside = "a rank's own copies cross no link" if unit == "rank" else "diagonal: inside the node"
    bar.set_label(f"MB from {unit} to {unit}, layer {first_layer + layer} ({inside})", fontsize=10)
    into_dies, by_layer = grid[2]
    marker = "." if unit == "rank" else None
    for color, (name, side) in zip(_COLORS, sides.items(), strict=True):
        matrix = comparison.matrix(side, layer, "dispatch")
        received = (matrix.sum(axis=0) - np.diagonal(matrix)) / 1e6
        into_dies.plot(np.arange(1, num_ranks + 1), np.sort(received)[::-1], color=color, label=name, marker=marker)
        layers = np.arange(first_layer, first_layer + len(side.rank_imbalance))
        by_layer.plot(layers, side.rank_imbalance, color=color, label=name, marker=".")
    into_dies.set_xlabel("die, busiest first", fontsize=9)
    into_dies.set_ylabel(f"MB into a die, dispatch, layer {first_layer + layer}", fontsize=9)
    by_layer.set_xlabel("layer", fontsize=9)
    by_layer.set_ylabel("hottest rank / mean rank, routed tokens", fontsize=9)
    by_layer.axvline(first_layer + layer, color="#999999", linewidth=0.8, linestyle=":")
    for axes in (into_dies, by_layer):
        axes.set_ylim(0, 1.15 * axes.get_ylim()[1])
        axes.tick_params(labelsize=8, length=2)
        axes.legend(fontsize=9, frameon=False, ncols=2, loc="upper right")
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    for axes in grid.flat:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in grid[:2].flat:
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(title, fontsize=12)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _shown(comparison: TrafficComparison, matrix: Loads, unit: str) -> Loads:
    """MB between what the picture's rows stand for, without what a rank keeps for itself."""
    sent = matrix - np.diag(np.diagonal(matrix))
    megabytes: Loads = (sent if unit == "rank" else between_nodes(sent, comparison.groups)) / 1e6
    return megabytes
