"""A picture of how much each expert is used: one heat map per kind of problem.

Owns: the drawing.
Must not know: how the load was measured.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_NUM_COLUMNS = 3


def draw_expert_load(loads: Mapping[str, NDArray[np.int64]], path: Path, *, first_layer: int, title: str) -> None:
    """Write the picture of `loads`, per name (num_moe_layers, n_routed_experts) tokens, in one color scale.

    A cell is an expert's load over the mean of its layer: 1 is white. `first_layer` is the number of the first mixture
    layer in the model.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.colors import TwoSlopeNorm

    shares = {name: relative_load(load) for name, load in loads.items()}
    highest = max(1.5, *(float(share.max()) for share in shares.values()))
    num_rows = -(-len(shares) // _NUM_COLUMNS)
    figure, grid = plt.subplots(
        num_rows, _NUM_COLUMNS, figsize=(14, 1.9 * num_rows + 1.0), layout="constrained", squeeze=False
    )
    image: Any = None
    for index, axes in enumerate(grid.flat):
        if index >= len(shares):
            axes.set_axis_off()
            continue
        name, share = list(shares.items())[index]
        image = axes.imshow(
            share, aspect="auto", cmap="RdBu_r", norm=TwoSlopeNorm(1.0, 0.0, highest), interpolation="nearest"
        )
        axes.set_title(f"{name}: busiest expert {share.max():.1f} x mean", fontsize=10)
        num_layers, num_experts = share.shape
        rows, columns = _ticks(num_layers), _ticks(num_experts)
        axes.set_yticks(rows, [str(first_layer + row) for row in rows])
        axes.set_xticks(columns, [str(column) for column in columns])
        axes.tick_params(labelsize=8, length=2)
        if index % _NUM_COLUMNS == 0:
            axes.set_ylabel("layer", fontsize=9)
        if index + _NUM_COLUMNS >= len(shares):
            axes.set_xlabel("expert", fontsize=9)
    bar = figure.colorbar(image, ax=grid, shrink=0.9, pad=0.01, aspect=40)
    bar.set_label("tokens of an expert / mean of its layer", fontsize=9)
    figure.suptitle(title, fontsize=12)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def relative_load(load: NDArray[np.int64]) -> NDArray[np.float64]:
    """Each expert's load over the mean of its layer; 0 in a layer without load."""
    mean = load.mean(axis=1, keepdims=True)
    relative: NDArray[np.float64] = load / np.where(mean > 0, mean, 1.0)
    return relative


def _ticks(count: int) -> list[int]:
    """All of few, about eight of many."""
    return list(range(0, count, 1 if count <= 20 else -(-count // 8)))
