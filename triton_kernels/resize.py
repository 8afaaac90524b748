"""Device functions that resize grids as torch.nn.functional.interpolate(size=...) does, and the adjoint.

Along one axis, out[o] = (1 - t) * in[lower] + t * in[upper]. Each axis has a MODE of its own: "same" (equal
sizes), "nearest", "linear" or "align_corners". `scale` is source positions a step of o, `spread` its inverse;
`reach` is how many o at most one input index feeds. The host computes them (`geometry.Resize`).

The adjoint is a gather: in[r] receives from the `reach` outputs from `first_fed(r)` on, each by the weight
that the forward resize gives it, zero where none. So nothing is scattered, and sums have one order.
"""

import triton
import triton.language as tl

from .maps import at


@triton.jit
def taps(o, n_in, scale, MODE: tl.constexpr):
    """lower, upper, t for output index o."""
    if MODE == "same":
        lower, upper, t = o, o, o.to(tl.float32) * 0.0
    elif MODE == "nearest":
        lower = tl.minimum((o.to(tl.float32) * scale).to(tl.int32), n_in - 1)
        upper, t = lower, lower.to(tl.float32) * 0.0
    else:
        if MODE == "align_corners":
            source = o.to(tl.float32) * scale
        else:
            source = tl.maximum((o.to(tl.float32) + 0.5) * scale - 0.5, 0.0)
        lower = tl.minimum(source.to(tl.int32), n_in - 1)
        upper, t = tl.minimum(lower + 1, n_in - 1), source - lower.to(tl.float32)
    return lower, upper, t


@triton.jit
def first_from(c, n_in, n_out, scale, spread, MODE: tl.constexpr):
    """The first output index whose lower tap is c or beyond; n_out where none is."""
    if MODE == "same":
        first = tl.minimum(c, n_out)
    else:
        guess = c.to(tl.float32) * spread
        if MODE == "linear":
            guess += 0.5 * spread - 0.5
        begin = tl.minimum(tl.maximum(guess.to(tl.int32) - 3, 0), n_out)
        o = begin + tl.arange(0, 8)
        lower, _, _ = taps(o, n_in, scale, MODE)
        first = begin + tl.sum(((lower < c) & (o < n_out)).to(tl.int32), 0)
        first = tl.where(c <= 0, 0, tl.where(c >= n_in, n_out, first))
    return first


@triton.jit
def first_fed(r, n_out, spread, MODE: tl.constexpr):
    """The first output index that input index r may feed (weights vanish at the open ends of linear taps)."""
    if MODE == "same":
        first = r
    else:
        if MODE == "nearest":
            begin = tl.floor(r.to(tl.float32) * spread + 0.25)
        elif MODE == "align_corners":
            begin = tl.floor((r.to(tl.float32) - 1.0) * spread) + 1.0
        else:
            begin = tl.floor((r.to(tl.float32) - 0.5) * spread - 0.5) + 1.0
        first = tl.minimum(tl.maximum(begin.to(tl.int32), 0), n_out - 1)
    return first


@triton.jit
def weight_of(o, r, n_in, n_out, scale, MODE: tl.constexpr):
    """How much of in[r] is in out[o]; 0 beyond the last o."""
    if MODE == "same":
        weight = ((o == r) & (o < n_out)).to(tl.float32)
    else:
        lower, upper, t = taps(o, n_in, scale, MODE)
        weight = tl.where(lower == r, 1.0 - t, 0.0)
        if MODE != "nearest":
            weight += tl.where(upper == r, t, 0.0)
        weight = tl.where(o < n_out, weight, 0.0)
    return weight


@triton.jit
def _along_w(pointer, c, row, lw, uw, tw, mask, channels, voxels, CL: tl.constexpr, MODE: tl.constexpr):
    value = tl.load(pointer + at(c, row + lw, channels, voxels, CL), mask=mask, other=0.0).to(tl.float32)
    if MODE == "linear" or MODE == "align_corners":
        upper = tl.load(pointer + at(c, row + uw, channels, voxels, CL), mask=mask, other=0.0).to(tl.float32)
        value = (1.0 - tw) * value + tw * upper
    return value


@triton.jit
def _along_h(
    pointer, c, plane, stride_h, lh, uh, th, lw, uw, tw, mask, channels, voxels,
    CL: tl.constexpr, MODE_H: tl.constexpr, MODE_W: tl.constexpr,
):  # fmt: skip
    value = _along_w(pointer, c, plane + lh * stride_h, lw, uw, tw, mask, channels, voxels, CL, MODE_W)
    if MODE_H == "linear" or MODE_H == "align_corners":
        upper = _along_w(pointer, c, plane + uh * stride_h, lw, uw, tw, mask, channels, voxels, CL, MODE_W)
        value = (1.0 - th) * value + th * upper
    return value


@triton.jit
def resized(
    pointer, c, d, h, w, mask, channels, voxels, stride_d, stride_h, from_d, from_h, from_w, in_d, in_h, in_w,
    scale_d, scale_h, scale_w,
    CL: tl.constexpr, MODE_D: tl.constexpr, MODE_H: tl.constexpr, MODE_W: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Channels c of the map at `pointer`, at the voxels (d, h, w) of the output grid, in float32.

    The input grid's voxel (d, h, w) lies at (d - from_d) * stride_d + (h - from_h) * stride_h + w - from_w.
    """
    ld, ud, td = taps(d, in_d, scale_d, MODE_D)
    lh, uh, th = taps(h, in_h, scale_h, MODE_H)
    lw, uw, tw = taps(w, in_w, scale_w, MODE_W)
    lh, uh, lw, uw = lh - from_h, uh - from_h, lw - from_w, uw - from_w
    lower = (ld - from_d).to(OFFSET) * stride_d
    value = _along_h(
        pointer, c, lower, stride_h, lh, uh, th, lw, uw, tw, mask, channels, voxels, CL, MODE_H, MODE_W
    )
    if MODE_D == "linear" or MODE_D == "align_corners":
        lower = (ud - from_d).to(OFFSET) * stride_d
        upper = _along_h(
            pointer, c, lower, stride_h, lh, uh, th, lw, uw, tw, mask, channels, voxels, CL, MODE_H, MODE_W
        )
        value = (1.0 - td) * value + td * upper
    return value


@triton.jit
def gathered(
    pointer, c, c_inside, d, h, w, inside, channels, voxels, stride_d, stride_h, from_d, from_h, from_w,
    in_d, in_h, in_w, out_d, out_h, out_w, scale_d, scale_h, scale_w, spread_d, spread_h, spread_w,
    reach_d, reach_h, reach_w,
    CL: tl.constexpr, MODE_D: tl.constexpr, MODE_H: tl.constexpr, MODE_W: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """The adjoint: [channels, voxels] of the input grid, from the output grid's values at `pointer`.

    Those lie as the input's of `resized`.
    """
    begin_d = first_fed(d, out_d, spread_d, MODE_D)
    begin_h = first_fed(h, out_h, spread_h, MODE_H)
    begin_w = first_fed(w, out_w, spread_w, MODE_W)
    total = tl.zeros([c.shape[0], w.shape[0]], tl.float32)
    for a in range(0, reach_d):
        od = begin_d + a
        weight_d = tl.where(inside, weight_of(od, d, in_d, out_d, scale_d, MODE_D), 0.0)
        for b in range(0, reach_h):
            oh = begin_h + b
            weight_h = weight_d * weight_of(oh, h, in_h, out_h, scale_h, MODE_H)
            row = (od - from_d).to(OFFSET) * stride_d + (oh - from_h) * stride_h - from_w
            for e in range(0, reach_w):
                ow = begin_w + e
                weight = weight_h * weight_of(ow, w, in_w, out_w, scale_w, MODE_W)
                mask = c_inside[:, None] & (weight != 0.0)[None, :]
                offset = at(c[:, None], (row + ow)[None, :], channels, voxels, CL)
                total += weight[None, :] * tl.load(pointer + offset, mask=mask, other=0.0).to(tl.float32)
    return total
