"""Draw what one residual group owns: rows here, columns there, one number of channels everywhere.

    python examples/residual_group.py docs/images/residual_group.png

The picture is drawn from the groups that the pruner finds and the plan that it makes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from lightning_prune import GroupNormPruner
from lightning_prune.models import ResNet

KEPT, RESIDUAL, INNER = "#e4e4e4", "#0072b2", "#e69f00"  # grey, blue and orange of Okabe and Ito
LAYERS = {
    "stem.weight": "stem",
    "stages.0.0.conv1.weight": "conv 1",
    "stages.0.0.conv2.weight": "conv 2",
    "head.weight": "head",
}


def draw(path: Path) -> None:
    """Prune a block of 8 channels to 5 and colour every entry by the group that took it.

    Args:
        path: Picture to write, PNG or SVG by its ending.
    """
    torch.manual_seed(0)
    net = ResNet(in_channels=3, widths=(8,), depth=1)
    pruner = GroupNormPruner(net, torch.zeros(1, 3, 8, 8), pruning_ratio=0.375)
    inner = {("stages.0.0.conv1.weight", 0), ("stages.0.0.conv2.weight", 1)}
    weights = dict(net.named_parameters())
    owner = {name: torch.zeros(weights[name].shape[:2], dtype=torch.int64) for name in LAYERS}  # [out, in]
    for cut in pruner.step(dry_run=True).cuts:
        if cut.tensor in owner:
            gone = [i for i in range(cut.size) if i not in cut.keep]
            colour = 2 if (cut.tensor, cut.dim) in inner else 1
            owner[cut.tensor][gone if cut.dim == 0 else (slice(None), gone)] = colour
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots(1, len(LAYERS), width_ratios=[3, 8, 8, 8])
    for axis, (name, title) in zip(axes, LAYERS.items(), strict=True):
        out, into = owner[name].shape
        axis.pcolormesh(
            owner[name], cmap=ListedColormap([KEPT, RESIDUAL, INNER]), vmin=0, vmax=2, ec="white", lw=1.5
        )
        axis.set(title=title, xlabel=f"{into} in", ylabel=f"{out} out", xticks=[], yticks=[], aspect="equal")
        axis.invert_yaxis()
        axis.spines[:].set_visible(False)
    legend = {
        RESIDUAL: "the residual group: the same channels in every layer",
        INNER: "the group inside the block",
        KEPT: "stays",
    }
    figure.legend(
        handles=[Patch(color=c, label=t) for c, t in legend.items()],
        loc="outside lower center",
        ncols=3,
        frameon=False,
    )
    figure.suptitle(
        "stem → conv 1 → conv 2 → + stem → head:  weights as out × in, and what a prune takes from each"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"svg.hashsalt": "0"}):
        figure.savefig(path, dpi=150)


if __name__ == "__main__":
    draw(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/images/residual_group.png"))
