"""Forward and backward as launches of the kernels: what runs, on how many programs, with which arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import triton.language as tl
from torch import Tensor

from . import launch
from .backward import backward_kernel
from .forward import apply_kernel, forward_kernel
from .geometry import (
    Grid,
    Resize,
    Tiles,
    boxes,
    grid_of,
    halo_pays,
    is_channels_last,
    new_map,
    power_of_two,
    runs,
    splits,
)
from .launch import Blocks
from .parameters import project_kernel, spread_kernel, sum_kernel, weights_kernel

ONE = (1, 1, 1)
# Elements of a sample from which offsets take 64 bits; lanes beyond the end must not wrap around.
WIDE_FROM = 2**31 - 2**20
MOST_VOXELS = WIDE_FROM - 1  # of a grid, which 32 bits count
# Bytes of scratch that all programs of a launch may take together.
SCRATCH = 2**24


@dataclass
class Problem:
    """One gate, forward or backward: what is there of it. Absent tensors are None.

    Attributes:
        like: x, or theta: dtype, device and batch of all maps.
        fine, coarse, gating: S, R, Q (R where there is no g or phi).
        alpha_resize, phi_resize: R -> S, Q -> R.
        kernel, stride: of theta's convolution.
        full: through sigmoid and multiply; else up to the logits.
    """

    like: Tensor
    inter: int
    fine: Grid
    coarse: Grid
    gating: Grid
    alpha_resize: Resize
    phi_resize: Resize
    activation: str
    psi: Tensor | None = None
    psi_bias: Tensor | None = None
    x: Tensor | None = None
    g: Tensor | None = None
    theta: Tensor | None = None
    phi: Tensor | None = None
    theta_weight: Tensor | None = None
    phi_weight: Tensor | None = None
    bias: Tensor | None = None
    kernel: Grid = ONE
    stride: Grid = ONE
    full: bool = True

    @property
    def project(self) -> bool:
        """Whether theta is made here."""
        return self.theta_weight is not None

    @property
    def samples(self) -> int:
        """The batch."""
        return self.like.shape[0]

    @property
    def empty(self) -> bool:
        """Whether there is no voxel to compute."""
        return 0 in (self.samples, *self.fine, *self.coarse)

    @property
    def channels(self) -> int:
        """C."""
        return self.x.shape[1] if self.x is not None else 1

    @property
    def gating_channels(self) -> int:
        """G; 0 where there is no g."""
        return self.g.shape[1] if self.g is not None else 0

    @property
    def taps(self) -> int:
        """Voxels of a patch."""
        return math.prod(self.kernel)

    @property
    def depth(self) -> int:
        """K: rows of [x's patch; g]."""
        return self.channels * self.taps + self.gating_channels

    def offset(self) -> tl.dtype:
        """The type of indices inside a sample."""
        largest = max(self.channels, self.inter, self.gating_channels)
        voxels = max(math.prod(grid) for grid in (self.fine, self.coarse, self.gating))
        return tl.int64 if largest * voxels >= WIDE_FROM else tl.int32

    def key(self, *more: object) -> tuple:
        """The class of shapes that block sizes are chosen for."""
        maps = (self.x, self.g, self.theta, self.phi)
        return (
            *more, str(self.like.dtype), self.full, self.kernel, self.stride, self.activation,
            self.alpha_resize.modes, self.phi_resize.modes, power_of_two(self.inter),
            power_of_two(self.depth), _last(self.theta_weight),
            *(m if m is None else is_channels_last(m) for m in maps), launch.precision(self.like),
        )  # fmt: skip


def _last(t: Tensor | None) -> bool:
    return t is not None and is_channels_last(t)


def _block(elements: int, voxels: int, channels: int, t: Tensor | None) -> int:
    """Channels of a tile of t: no less than a memory sector of 32 bytes where they lie together."""
    least = 32 // t.element_size() if _last(t) else 1
    return min(max(least, elements // voxels), power_of_two(channels))


def _blocks_of_inter(p: Problem, blocks: Blocks, voxels: int) -> int:
    """BI: all of I up to a limit for matrix products, which take no less than 16."""
    if p.project:
        return max(16, min(power_of_two(p.inter), blocks.inter))
    # A resize of three axes has eight taps of each element in registers.
    elements = blocks.elements // 2 if all(_linear_axes(p.phi_resize)) else blocks.elements
    return _block(elements, voxels, p.inter, p.theta)


def _sizes(p: Problem) -> dict:
    sizes = {"C": p.channels, "G": p.gating_channels, "I": p.inter}
    for letter, grid in (("S", p.fine), ("R", p.coarse), ("Q", p.gating)):
        sizes.update(_by_axis(letter, grid))
        sizes[f"{letter}v"] = math.prod(grid)
    return sizes


def _by_axis(prefix: str, values: Sequence, upper: bool = False) -> dict:
    """One argument an axis; constants of a kernel in upper case."""
    return {prefix + axis: value for axis, value in zip("DHW" if upper else "dhw", values, strict=True)}


def _options(p: Problem, tiles: Tiles) -> dict:
    """Arguments that forward and backward share."""
    return {
        **_sizes(p), **_by_axis("tiles_", tiles.counts),
        **_by_axis("scale_", p.alpha_resize.scale), **_by_axis("spread_", p.alpha_resize.spread),
        **_by_axis("phi_scale_", p.phi_resize.scale),
        **_by_axis("B", tiles.shape, upper=True), "BOX": tiles.box, "FULL": p.full,
        "X_CL": _last(p.x), "G_CL": _last(p.g), "PHI_CL": _last(p.phi),
        "WEIGHT_CL": _last(p.theta_weight), "kernel_h": p.kernel[1], "kernel_w": p.kernel[2],
        "TAPS": p.taps, **_by_axis("S", p.stride, upper=True),
        **_by_axis("MODE_", p.alpha_resize.modes, upper=True),
        **_by_axis("PHI_", p.phi_resize.modes, upper=True),
        "ACTIVATION": p.activation, "PRECISION": launch.precision(p.like), "OFFSET": p.offset(),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------- forward


def _linear_axes(resize: Resize) -> list[bool]:
    return [mode in ("linear", "align_corners") for mode in resize.modes]


def run_forward(p: Problem, y: Tensor | None, alpha: Tensor, preact: Tensor | None) -> None:
    """Fills y (or stops at alpha), alpha (the logits where not p.full) and, where there is one, preact."""
    if p.empty:
        return

    def run(blocks: Blocks) -> None:
        target = y
        tiles = runs(p.coarse, blocks.voxels)
        if y is not None and not p.alpha_resize.identity:
            tiles = boxes(p.coarse, blocks.voxels, _linear_axes(p.alpha_resize))
            ratio = math.prod(p.fine) / math.prod(p.coarse)
            counted = (p.channels, p.gating_channels, p.inter, p.taps)
            if p.project and not halo_pays(tiles, *counted, ratio, p.like.element_size()):
                tiles, target = runs(p.coarse, blocks.voxels), None
        voxels = math.prod(tiles.shape)
        fine = voxels if not tiles.box else 256
        programs = p.samples * tiles.total
        scratch = alpha.new_empty((programs, voxels)) if tiles.box else None
        launch.start(
            forward_kernel, programs,
            p.x, p.g, p.theta, p.phi, p.theta_weight, p.phi_weight, p.bias, p.psi, p.psi_bias,
            target, alpha, preact, scratch,
            blocks=blocks, **_options(p, tiles), **_by_axis("own_", tiles.own),
            BI=_blocks_of_inter(p, blocks, voxels), BK=_depth(p, blocks),
            BC=_block(blocks.elements, fine, p.channels, p.x),
            BF=fine, THETA_CL=_last(p.theta),
        )  # fmt: skip
        if target is not y:
            run_apply(p, alpha, y, blocks)

    wide = p.offset() == tl.int64
    choices = launch.whole(p.like, wide) if p.project else _chain_choices(p)
    launch.tuned(p.key("forward", y is None, wide), p.like.device, choices, run)


def _chain_choices(p: Problem) -> tuple[Blocks, ...]:
    """The taps of a resized phi take the registers of larger tiles."""
    return launch.CHAIN if p.phi_resize.identity else launch.CHAIN[:2]


def _depth(p: Problem, blocks: Blocks) -> int:
    """BK: no more than there are rows."""
    return max(16, min(blocks.depth, power_of_two(max(p.channels * p.taps, p.gating_channels))))


def run_apply_alone(p: Problem, alpha: Tensor, y: Tensor) -> None:
    """The multiply as an operator of its own."""
    if not p.empty:
        launch.tuned(p.key("apply"), y.device, launch.CHAIN, lambda blocks: run_apply(p, alpha, y, blocks))


def run_apply(p: Problem, alpha: Tensor, y: Tensor, blocks: Blocks) -> None:
    """y = x * resize(alpha)."""
    tiles = runs(p.fine, blocks.voxels)
    voxels = math.prod(tiles.shape)
    sizes = {k: v for k, v in _sizes(p).items() if k[0] in "CSR"}
    launch.start(
        apply_kernel, p.samples * tiles.total, p.x, alpha, y, tiles=tiles.total, blocks=blocks,
        **sizes, **_by_axis("scale_", p.alpha_resize.scale),
        BC=_block(blocks.elements, voxels, p.channels, p.x), BF=voxels, X_CL=_last(p.x),
        **_by_axis("MODE_", p.alpha_resize.modes, upper=True), OFFSET=p.offset(),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ backward


@dataclass
class Gradients:
    """Where the gradients go; None where not wanted. ds: theta's, or a map to go on from."""

    dx: Tensor | None = None
    dg: Tensor | None = None
    ds: Tensor | None = None
    dphi: Tensor | None = None
    dalpha: Tensor | None = None
    theta_weight: Tensor | None = None
    phi_weight: Tensor | None = None
    bias: Tensor | None = None
    psi: Tensor | None = None
    psi_bias: Tensor | None = None

    @property
    def parameters(self) -> tuple[Tensor | None, ...]:
        """In the order of a workspace's columns."""
        return self.theta_weight, self.phi_weight, self.bias, self.psi, self.psi_bias


def run_backward(
    p: Problem,
    out: Gradients,
    dy: Tensor | None,
    dalpha: Tensor | None,
    alpha: Tensor | None,
    preact: Tensor | None = None,
) -> None:
    """Fills all of `out` from the gradients of y and alpha (dalpha: of the logits, where not p.full)."""
    if out.dx is not None and dy is None and (not p.project or _gaps(p) or p.empty):
        out.dx.zero_()
    if p.empty:
        for t in out.parameters:
            if t is not None:
                t.zero_()
        return
    choices = _whole_backward_choices(p) if p.project else _chain_choices(p)
    wanted = tuple(t is not None for t in (dy, dalpha, preact, *vars(out).values()))
    launch.tuned(
        p.key("backward", wanted), p.like.device, choices,
        lambda blocks: _backward(p, out, dy, dalpha, alpha, preact, blocks),
    )  # fmt: skip


def _whole_backward_choices(p: Problem) -> tuple[Blocks, ...]:
    """Those that the registers suffice for: bench/triton_resources.csv."""
    first, *others = launch.whole_backward(p.like)
    if p.depth <= 16:
        return tuple(others)  # loops of one step unroll
    if p.taps == 1 and _last(p.x) and p.like.dtype == torch.float32:
        first = replace(first, stages=1)
    return first, *others


def _gaps(p: Problem) -> bool:
    """Whether some voxels of x belong to no patch."""
    return p.kernel != p.stride or any(r * s != n for r, s, n in zip(p.coarse, p.stride, p.fine, strict=True))


def _backward(
    p: Problem,
    out: Gradients,
    dy: Tensor | None,
    dalpha: Tensor | None,
    alpha: Tensor | None,
    preact: Tensor | None,
    blocks: Blocks,
) -> None:
    box = dy is not None and not p.alpha_resize.identity
    tiles = boxes(p.coarse, blocks.voxels, (False,) * 3) if box else runs(p.coarse, blocks.voxels)
    voxels, total = math.prod(tiles.shape), p.samples * tiles.total
    whole_weights = p.project and (out.theta_weight is not None or out.phi_weight is not None)
    sums = any(t is not None for t in out.parameters)
    through = (
        sums or any(t is not None for t in (out.ds, out.dphi, out.dg)) or (p.project and out.dx is not None)
    )
    sizes = [p.channels * p.taps * p.inter, p.gating_channels * p.inter]
    weight_rows = min(total, 256)
    split = p.project and through and splits(
        p.inter, p.depth, p.samples * math.prod(p.coarse), weight_rows, voxels, p.like.element_size(),
        blocks.inter
    )  # fmt: skip
    fused_weights = whole_weights and not split
    rows = weight_rows if fused_weights else min(total, 1024)
    needs_alpha = through or out.dalpha is not None
    # A program's scratch: x * dy at the fine voxels around a tile, and alpha at those of its patches.
    room = math.prod(_box_room(p, tiles)) if box and needs_alpha else 0
    if room:
        rows = max(1, min(rows, SCRATCH // (4 * (room + p.taps * voxels))))
    widths = [
        w if fused_weights and t is not None else 0 for w, t in zip(sizes, out.parameters, strict=False)
    ]
    widths += [p.inter if p.project else 0, p.inter, 1]
    at = [sum(widths[:i]) for i in range(5)]
    columns = sum(widths)
    like = p.like
    partial = like.new_empty((rows, columns), dtype=torch.float32) if sums else None
    scratch = like.new_empty((rows, room + p.taps * voxels), dtype=torch.float32) if room else None
    ds = out.ds
    if ds is None and split:
        ds = new_map(p.x, p.inter, p.coarse)
    fine = voxels if not tiles.box else 256
    launch.start(
        backward_kernel, rows,
        dy, dalpha, p.x, p.g, p.theta, p.phi, p.theta_weight, p.phi_weight, p.bias, p.psi, alpha, preact,
        out.dx, out.dg, ds, out.dphi, out.dalpha, partial, scratch,
        blocks=blocks, **_options(p, tiles),
        total_tiles=total, room=room, columns=columns, at_phi=at[1], at_bias=at[2], at_psi=at[3],
        at_psi_bias=at[4],
        **_by_axis("reach_", p.alpha_resize.reach),
        kernel_d=p.kernel[0], BI=_blocks_of_inter(p, blocks, voxels), BK=_depth(p, blocks),
        BC=_block(blocks.elements, fine, p.channels, p.x),
        BF=fine, DY_CL=_last(dy), THETA_CL=_last(p.theta if preact is None else preact),
        DS_CL=_last(p.x if p.project else p.theta),
        PROJECT=p.project, THROUGH=through, SPLIT=split, GAPS=_gaps(p),
        SUM_THETA=fused_weights and out.theta_weight is not None,
        SUM_PHI=fused_weights and out.phi_weight is not None, SUM_PSI=sums,
    )  # fmt: skip
    if sums:
        skip = [t if i > 1 or fused_weights else None for i, t in enumerate(out.parameters)]
        _sum(partial, skip, at, p.channels, p.taps, _last(p.x))
    if whole_weights and split:
        for source, gradient, kernel, stride in (
            (p.x, out.theta_weight, p.kernel, p.stride),
            (p.g, out.phi_weight, ONE, ONE),
        ):
            if gradient is not None:
                run_weights(p, ds, source, gradient, kernel, stride, blocks)


def _box_room(p: Problem, tiles: Tiles) -> list[int]:
    """At most so many fine voxels an axis feed a tile, or belong to it."""
    room = []
    for n, r, b, spread, reach, stride in zip(
        p.fine, p.coarse, tiles.shape, p.alpha_resize.spread, p.alpha_resize.reach, p.stride, strict=True
    ):
        most = n if b >= r else math.ceil((b + 1) * max(spread, stride)) + reach + 3
        room.append(min(n, most))
    return room


def _sum(
    partial: Tensor,
    gradients: Sequence[Tensor | None],
    at: Sequence[int],
    channels: int,
    taps: int,
    last: bool,
) -> None:
    """channels, taps, last: of the map whose weight comes first."""
    rows, columns = partial.shape
    block = min(64, power_of_two(columns))
    launch.start(
        sum_kernel, -(-columns // block), partial, *gradients, rows, columns, *at[1:], channels,
        TAPS=taps, CL=last, BR=min(power_of_two(rows), 2048 // block), BN=block, blocks=Blocks(0),
    )  # fmt: skip


def run_weights(
    p: Problem, ds: Tensor, source: Tensor, gradient: Tensor, kernel: Grid, stride: Grid, blocks: Blocks
) -> None:
    """gradient = ds * patches(source)^T, summed over all voxels."""
    channels, taps = source.shape[1], math.prod(kernel)
    coarse, fine = grid_of(ds), grid_of(source)
    # Both operands of the product are as long as a tile: of float32, by three products, 32 fill the
    # registers. Patches are to have another shape than the product (`maps.scattered`).
    short = source.dtype == torch.float32 or fine != coarse
    tiles = runs(coarse, min(blocks.voxels, 32 if short else 64))
    columns = p.inter * channels * taps
    if columns == 0:
        return
    bi, bk = (max(16, min(power_of_two(n), 64)) for n in (p.inter, channels * taps))
    blocks_i, blocks_k = -(-p.inter // bi), -(-channels * taps // bk)
    # Enough rows to fill a GPU; no more, for each is written and read once.
    rows = max(1, min(p.samples * tiles.total, 512 // (blocks_i * blocks_k) + 1))
    partial = source.new_empty((rows, columns), dtype=torch.float32)
    launch.start(
        weights_kernel, rows * blocks_i * blocks_k, ds, source, partial, channels, p.inter,
        kernel_h=kernel[1], kernel_w=kernel[2], Sh=fine[1], Sw=fine[2], Sv=math.prod(fine),
        **_by_axis("R", coarse), Rv=math.prod(coarse), samples=p.samples, tiles=tiles.total, columns=columns,
        blocks_i=blocks_i, blocks_k=blocks_k, BI=bi, BK=bk, BT=math.prod(tiles.shape),
        DS_CL=_last(ds), CL=_last(source), TAPS=taps, **_by_axis("S", stride, upper=True),
        PRECISION=launch.precision(source), OFFSET=p.offset(), blocks=blocks,
    )  # fmt: skip
    at = (0, columns, columns, columns, columns)
    _sum(partial, (gradient, None, None, None, None), at, channels, taps, _last(source))


def run_project(p: Problem, source: Tensor, weight: Tensor, out: Tensor, transposed: bool) -> None:
    """out = weight * source (of one voxel each), or weight^T * source; weight [I, G]."""
    inputs, outputs = source.shape[1], out.shape[1]
    if 0 in source.shape or 0 in out.shape:
        out.zero_()
        return
    strides = (1, weight.shape[1]) if transposed else (weight.shape[1], 1)
    grid = grid_of(source)

    def run(blocks: Blocks) -> None:
        tiles = runs(grid, blocks.voxels)
        bi = max(16, min(power_of_two(outputs), 64))
        count = -(-outputs // bi)
        launch.start(
            project_kernel, p.samples * tiles.total * count, source, weight, out, inputs, outputs,
            math.prod(grid),
            tiles.total, count, *strides, BI=bi, BK=max(16, min(blocks.depth, power_of_two(inputs))),
            BT=math.prod(tiles.shape), CL=_last(source), OUT_CL=_last(out),
            PRECISION=launch.precision(source),
            OFFSET=p.offset(), blocks=blocks,
        )  # fmt: skip

    key = p.key("project", transposed, power_of_two(inputs), power_of_two(outputs))
    launch.tuned(key, source.device, launch.whole(source), run)


def run_spread(p: Problem, slopes: Tensor, out: Tensor) -> None:
    """out [I, Q] = resize^T(slopes [I, R])."""
    blocks = launch.CHAIN[0]
    tiles = runs(p.gating, blocks.voxels)
    voxels = math.prod(tiles.shape)
    bi = _block(blocks.elements, voxels, p.inter, slopes)
    count = -(-p.inter // bi)
    if p.empty or p.inter == 0:
        return
    sizes = {k: v for k, v in _sizes(p).items() if k[0] in "RQ"}
    launch.start(
        spread_kernel, p.samples * tiles.total * count, slopes, out, p.inter, *sizes.values(), tiles.total,
        count,
        *p.phi_resize.scale, *p.phi_resize.spread, *p.phi_resize.reach, BI=bi, BT=voxels,
        CL=_last(slopes), OUT_CL=_last(out),
        **_by_axis("MODE_", p.phi_resize.modes, upper=True), OFFSET=p.offset(),
        blocks=blocks,
    )  # fmt: skip
