"""plot_attention: attention maps over the image that they were made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attn_gate import reference

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = 4  # of pictures in a row, for 2D


def plot_attention(
    image: Tensor,
    maps: Mapping[str, Tensor],
    *,
    sample: int = 0,
    channel: int = 0,
    position: Sequence[int] | None = None,
    limits: tuple[float, float] | None = None,
) -> Figure:
    """Draws the image, and beside it every map over it.

        with attn_gate.capture_attention(model) as maps:
            model(image)
        attn_gate.plot_attention(image, maps).savefig("attention.png")

    Args:
        image: [N, C, *S], what the model was given; 2D, or 3D, of which three planes are drawn.
        maps: by name, each [N, K, *R] (K maps per gate are averaged), as capture_attention yields them.
        sample, channel: which image of the batch, and which channel of it, to draw.
        position: the voxel that the three planes of a 3D image meet in; its centre by default.
        limits: (lowest, highest) value of the colours, the same for all maps; by default each map's own,
            which the colour bar beside it tells.

    Returns:
        A matplotlib Figure, with no backend chosen: show or save it.

    Raises:
        ImportError: matplotlib is missing. ValueError: shapes or indices don't fit.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("plot_attention needs matplotlib: pip install 'attn_gate[plot]'") from None
    axes = _check(image, maps, sample, channel, position)
    size = image.shape[2:]
    picture = image[sample, channel].detach().float().cpu()
    overlays = {}
    for name, alpha in maps.items():
        alpha = alpha[sample : sample + 1].detach().float().cpu().mean(1, keepdim=True)
        overlays[name] = reference.resize(alpha, size, "linear")[0, 0]

    if axes == 2:
        planes = [slice(None)]
        columns = min(_COLUMNS, 1 + len(overlays))
        rows = -(-(1 + len(overlays)) // columns)
    else:
        position = [n // 2 for n in size] if position is None else position
        planes = [(*[slice(None)] * axis, position[axis]) for axis in range(3)]
        columns, rows = 1 + len(overlays), 3
    heights = [size[0] / size[1]] * rows if axes == 2 else _heights(size)
    heights = [min(max(h, 0.3), 3.0) for h in heights]
    figure = Figure(figsize=(2.9 * columns, 0.3 + 2.4 * sum(heights)), layout="compressed")
    grid = figure.subplots(rows, columns, squeeze=False, height_ratios=heights)
    for axis in grid.flat:
        axis.set_axis_off()
    low, high = _range(picture)
    for row, plane in enumerate(planes):
        spots = grid.flat if axes == 2 else grid[row]
        shown = picture[plane].numpy()
        for spot, (name, overlay) in zip(spots, [("image", None), *overlays.items()], strict=False):
            spot.imshow(shown, cmap="gray", vmin=low, vmax=high, origin="upper")
            if row == 0:
                spot.set_title(_short(name), fontsize=8)
            if overlay is None:
                continue
            least, most = limits or _range(overlay)
            drawn = spot.imshow(overlay[plane].numpy(), cmap="inferno", alpha=0.55, vmin=least, vmax=most)
            figure.colorbar(drawn, ax=spot, fraction=0.046, pad=0.02).ax.tick_params(labelsize=6)
    return figure


def _check(
    image: Tensor, maps: Mapping[str, Tensor], sample: int, channel: int, position: Sequence[int] | None
) -> int:
    """The image's number of axes of space."""
    if not isinstance(image, Tensor) or image.ndim not in (4, 5):
        got = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(f"image must be a tensor [N, C, *S] with 2 or 3 axes of space; got {got}")
    if not maps:
        raise ValueError("maps is empty: run the model inside of `with capture_attention(model) as maps`")
    for index, n, name in ((sample, image.shape[0], "sample"), (channel, image.shape[1], "channel")):
        if not 0 <= index < n:
            raise ValueError(f"{name} must be in 0..{n - 1}; got {index}")
    for name, alpha in maps.items():
        if alpha.ndim != image.ndim or alpha.shape[0] != image.shape[0]:
            raise ValueError(
                f"maps[{name!r}] must be [N, K, *R] for image {tuple(image.shape)}; got {tuple(alpha.shape)}"
            )
    axes = image.ndim - 2
    if position is not None and (
        len(position) != axes or not all(0 <= p < n for p, n in zip(position, image.shape[2:], strict=True))
    ):
        raise ValueError(f"position must be a voxel of {tuple(image.shape[2:])}; got {tuple(position)}")
    return axes


def _heights(size: Sequence[int]) -> list[float]:
    """Height over width of the planes across each axis."""
    planes = [[n for axis, n in enumerate(size) if axis != across] for across in range(3)]
    return [height / width for height, width in planes]


def _range(t: Tensor) -> tuple[float, float]:
    """What nearly all voxels lie between."""
    voxels = t.flatten()
    voxels = voxels[:: max(1, voxels.numel() // 1_000_000)]  # torch.quantile takes 16 million at most
    low, high = voxels.quantile(torch.tensor([0.01, 0.99])).tolist()
    return low, high


def _short(name: str) -> str:
    return name if len(name) <= 34 else "…" + name[-33:]
