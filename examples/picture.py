"""One slice: the truth and the prediction as outlines, and the attention maps."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path

import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor


def draw(
    path: Path, image: Tensor, label: Tensor, prediction: Tensor, maps: Mapping[str, Tensor], source: str
) -> None:
    """Writes the coronal slice with most of the label. All are [X, Y, Z], but for maps, [1, 1, *R]."""
    y = int(label.sum((0, 2)).argmax())
    figure = Figure(figsize=(3.4 * (1 + len(maps)), 2.9), layout="compressed")
    spots = figure.subplots(1, 1 + len(maps), squeeze=False)[0]
    for spot, (name, alpha) in zip(
        spots, [("truth (green), prediction (red, dashed)", None), *maps.items()], strict=True
    ):
        spot.imshow(image[:, y].T, cmap="gray", origin="lower")
        if alpha is None:
            spot.contour(label[:, y].T, [0.5], colors="lime", linewidths=1.2)
            if prediction[:, y].any():
                spot.contour(prediction[:, y].T, [0.5], colors="red", linewidths=1.2, linestyles="dashed")
            spot.set_title(name, fontsize=9)
        else:
            alpha = F.interpolate(alpha.float(), image.shape, mode="trilinear")[0, 0, :, y]
            drawn = spot.imshow(alpha.T, cmap="inferno", alpha=0.6, origin="lower")
            figure.colorbar(drawn, ax=spot, fraction=0.03)
            spot.set_title(f"attention, {'x'.join(map(str, maps[name].shape[2:]))}", fontsize=9)
        spot.set_axis_off()
    figure.supxlabel("\n".join(textwrap.wrap(source, 60 * (1 + len(maps)))), fontsize=6)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
