"""Sizes, layouts and tiles of a call, worked out on the host; and what is decided by counting bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Grid = tuple[int, int, int]


def grid_of(t: Tensor) -> Grid:
    """D, H, W of a map; D = 1 in 2D."""
    return (1, *t.shape[2:]) if t.ndim == 4 else tuple(t.shape[2:])


def native(t: Tensor) -> Tensor:
    """t itself where it is contiguous or channels last, else a contiguous copy."""
    return t if t.is_contiguous() or is_channels_last(t) else t.contiguous()


def is_channels_last(t: Tensor) -> bool:
    """Whether it is that, and not contiguous too."""
    last = torch.channels_last if t.ndim == 4 else torch.channels_last_3d
    return not t.is_contiguous() and t.is_contiguous(memory_format=last)


def layout_of(t: Tensor) -> torch.memory_format:
    """Of a native map."""
    last = torch.channels_last if t.ndim == 4 else torch.channels_last_3d
    return last if is_channels_last(t) else torch.contiguous_format


def new_map(like: Tensor, channels: int, grid: Grid, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised [N, channels, *grid] in the layout of `like`; in its dtype unless told."""
    shape = (like.shape[0], channels, *grid[5 - like.ndim :])
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=layout_of(like))


def power_of_two(n: int) -> int:
    """The smallest that is not less than n."""
    return 1 << max(n - 1, 0).bit_length()


@dataclass(frozen=True)
class Resize:
    """A resize of grids, by axis: the arguments that the device functions of `resize` take."""

    modes: tuple[str, str, str]
    scale: tuple[float, float, float]
    spread: tuple[float, float, float]
    reach: Grid

    @staticmethod
    def between(mode: str, source: Grid, target: Grid) -> Resize:
        """mode: "linear", "nearest" or "align_corners"; axes of equal sizes stay what they are."""
        axes = [_axis("same" if a == b else mode, a, b) for a, b in zip(source, target, strict=True)]
        return Resize(*zip(*axes, strict=True))

    @property
    def identity(self) -> bool:
        """Whether the grids are equal."""
        return self.modes == ("same", "same", "same")


def _axis(mode: str, n_in: int, n_out: int) -> tuple[str, float, float, int]:
    if mode == "same" or n_in == 0 or n_out == 0:
        return "same", 1.0, 1.0, 1
    if mode == "align_corners":
        scale = (n_in - 1) / (n_out - 1) if n_out > 1 else 0.0
        spread = (n_out - 1) / (n_in - 1) if n_in > 1 else float(n_out)
        # An open interval of 2 * spread; one voxel feeds all.
        reach = max(1, math.ceil(2 * spread))
        return mode, scale, spread, reach
    reach = -(-n_out // n_in) + 1 if mode == "nearest" else -(-2 * n_out // n_in)
    return mode, n_in / n_out, n_out / n_in, reach


@dataclass(frozen=True)
class Tiles:
    """A partition of a grid: boxes of `shape` voxels that own `own` of them and come `counts` an axis."""

    shape: Grid
    own: Grid
    counts: Grid
    box: bool

    @property
    def total(self) -> int:
        """Tiles of a sample."""
        return math.prod(self.counts)


def runs(grid: Grid, voxels: int) -> Tiles:
    """Tiles of consecutive voxels, whatever the rows."""
    voxels = min(voxels, max(16, power_of_two(math.prod(grid))))
    return Tiles((1, 1, voxels), (1, 1, voxels), (1, 1, -(-math.prod(grid) // voxels)), False)


def boxes(grid: Grid, voxels: int, halo: Sequence[bool]) -> Tiles:
    """Boxes of about `voxels` voxels, as square as rows allow; with `halo` an axis owns one voxel less.

    Rows of 4 voxels for each of the other axes: what is read twice is a share of each row too, but rows that
    are long share the cache lines at their ends with few others.
    """
    shape = [1, 1, 1]
    wanted = [power_of_two(n) for n in grid]
    while math.prod(shape) < voxels and shape != wanted:
        # Double the axis that is shortest for its weight, among those that may grow.
        axis = min((a for a in range(3) if shape[a] < wanted[a]), key=lambda a: (shape[a] / (1, 1, 4)[a], -a))
        shape[axis] *= 2
    while math.prod(shape) < 16:  # matrix products take no less
        shape[2] *= 2
    for axis in range(3):
        if halo[axis] and shape[axis] == 1 and grid[axis] > 1:
            shape[axis] = 2
    own = [b - 1 if edge and b < n else b for b, edge, n in zip(shape, halo, grid, strict=True)]
    counts = [-(-n // o) for n, o in zip(grid, own, strict=True)]
    return Tiles(tuple(shape), tuple(own), tuple(counts), True)


def halo_pays(
    tiles: Tiles, channels: int, gating: int, inter: int, taps: int, fine_per_coarse: float, element: int
) -> bool:
    """Whether the forward of a whole gate computes the halo of alpha twice, rather than read x twice.

    The halo costs h - 1 times the products, x's second reading its bytes. A GPU does 100 to 300 operations of
    its matrix units in the time of a byte from memory (A100, H100; float32 by tf32 the former).
    """
    h = math.prod(tiles.shape) / math.prod(tiles.own)
    operations = (h - 1) * 2 * inter * (channels * taps + gating)
    return operations <= 100 * channels * fine_per_coarse * element


def splits(inter: int, depth: int, voxels: int, rows: int, tile: int, element: int, most: int) -> bool:
    """Whether a whole gate's backward stores ds (I channels) and makes weight gradients in a second launch.

    Bytes a coarse voxel, K = `depth` rows of [x's patch; g]: adding up in the workspace reads and writes I x
    K sums a tile (from L2, three times as fast as memory), and the rows are written and read once at the end.
    A second launch writes and reads ds, and reads x and g again. More than `most` inner channels don't fit at
    once.
    """
    inside = 8 * inter * depth * (1 / (3 * tile) + rows / max(voxels, 1))
    return inter > most or inside > element * (2 * inter + depth)
