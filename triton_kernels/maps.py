"""Device functions that all kernels share: where a map's elements lie, activations, and tiles of voxels.

A map [N, channels, D, H, W] (2D: D = 1) is dense in one of two layouts: contiguous, or channels last (CL). A
tile is [channels, voxels] in both; the compiler lays the threads along whichever lies together in memory.
OFFSET, the type of indices, is int64 for maps whose samples have 2^31 elements or more.
"""

import triton
import triton.language as tl


@triton.jit
def at(c, v, channels, voxels, CL: tl.constexpr):
    """Offset of channel c at voxel v inside a sample."""
    if CL:
        offset = v * channels + c
    else:
        offset = c * voxels + v
    return offset


@triton.jit
def sample(pointer, n, channels, voxels):
    """Where sample n begins; 64-bit, for the whole batch may be larger than a sample."""
    return pointer + n.to(tl.int64) * channels * voxels


@triton.jit
def load_tile(pointer, c, v, c_inside, v_inside, channels, voxels, CL: tl.constexpr):
    """[channels, voxels] in the map's own dtype; zeros outside."""
    mask = c_inside[:, None] & v_inside[None, :]
    return tl.load(pointer + at(c[:, None], v[None, :], channels, voxels, CL), mask=mask, other=0.0)


@triton.jit
def store_tile(pointer, value, c, v, c_inside, v_inside, channels, voxels, CL: tl.constexpr):
    """Rounds to the map's dtype."""
    mask = c_inside[:, None] & v_inside[None, :]
    value = value.to(pointer.dtype.element_ty)
    tl.store(pointer + at(c[:, None], v[None, :], channels, voxels, CL), value, mask=mask)


@triton.jit
def tile_begin(tile, tiles_d, tiles_h, tiles_w, step_d, step_h, step_w):
    """Sample and first coarse voxel of a tile; tiles are numbered along w first."""
    n = tile // (tiles_d * tiles_h * tiles_w)
    d = tile // (tiles_h * tiles_w) % tiles_d * step_d
    h = tile // tiles_w % tiles_h * step_h
    w = tile % tiles_w * step_w
    return n, d, h, w


@triton.jit
def scattered(v):
    """v, in a way that hides from Triton how it is aligned, by a zero that it can't know.

    It gives all accesses to tiles of one shape the longest vectors that one of them can have. Where some are
    strided (patches) or shifted (a finer grid), these would fetch a memory sector once for every element of a
    vector; without vectors neighbouring threads take neighbouring elements, and whole sectors all the same.
    """
    return v + tl.program_id(1)


@triton.jit
def tile_voxels(
    d0, h0, w0, Rd, Rh, Rw, voxels,
    BD: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BOX: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Index v, coordinates d, h, w, and whether inside: of a box of BD x BH x BW, or a run of BW voxels."""
    j = tl.arange(0, BD * BH * BW)
    if BOX:
        d, h, w = d0 + j // (BH * BW), h0 + j // BW % BH, w0 + j % BW
        inside = (d < Rd) & (h < Rh) & (w < Rw)
        v = scattered((d.to(OFFSET) * Rh + h) * Rw + w)
    else:
        v = w0.to(OFFSET) + j
        inside = v < voxels
        d, h, w = v // (Rh * Rw), v // Rw % Rh, v % Rw
    return v, d, h, w, inside


@triton.jit
def activate(s, ACTIVATION: tl.constexpr):
    """q = activation(s). NaN stays NaN: it takes the side of the comparison that keeps it."""
    if ACTIVATION == "relu":
        q = tl.where(s <= 0.0, 0.0, s)
    elif ACTIVATION == "leaky_relu":
        q = tl.where(s <= 0.0, 0.01 * s, s)
    elif ACTIVATION == "softplus":
        q = tl.where(s > 0.0, s, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(s)))
    elif ACTIVATION == "silu":
        q = s * tl.sigmoid(s)
    else:
        tl.static_assert(ACTIVATION == "gelu")
        q = 0.5 * s * (1.0 + tl.erf(s * 0.7071067811865476))
    return q


@triton.jit
def slope(s, ACTIVATION: tl.constexpr):
    """d activation / d s."""
    if ACTIVATION == "relu":
        q = tl.where(s <= 0.0, 0.0, 1.0)
    elif ACTIVATION == "leaky_relu":
        q = tl.where(s <= 0.0, 0.01, 1.0)
    elif ACTIVATION == "softplus":
        q = tl.sigmoid(s)
    elif ACTIVATION == "silu":
        a = tl.sigmoid(s)
        q = a * (1.0 + s * (1.0 - a))
    else:
        tl.static_assert(ACTIVATION == "gelu")
        q = 0.5 * (1.0 + tl.erf(s * 0.7071067811865476)) + s * 0.3989422804014327 * tl.exp(-0.5 * s * s)
    return q
