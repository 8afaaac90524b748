"""Kernels around the two passes: sums of partial results, weight gradients of a stored ds, one projection
alone, and the adjoint of phi's resize. The last three serve gates whose g is on a grid of its own, or that
are bound by arithmetic; maps of I channels on g's grid are small beside x.
"""

import triton
import triton.language as tl

from .forward import patch_begin, patch_rows, weight_at
from .maps import at, load_tile, sample, scattered, store_tile, tile_begin, tile_voxels
from .resize import gathered


@triton.jit
def sum_kernel(
    partial, out_theta, out_phi, out_bias, out_psi, out_psi_bias, rows, columns,
    at_phi, at_bias, at_psi, at_psi_bias, channels,
    TAPS: tl.constexpr, CL: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Each gradient's columns of partial [rows, columns], summed over rows in one fixed order.

    The columns of a patch product of maps that are channels last (CL) have their taps outside, out_theta
    inside.
    """
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    total = tl.zeros([BR, BN], tl.float32)
    for row0 in range(0, rows, BR):
        row = row0 + tl.arange(0, BR)
        mask = (row < rows)[:, None] & (column < columns)[None, :]
        total += tl.load(
            partial + row.to(tl.int64)[:, None] * columns + column[None, :], mask=mask, other=0.0
        )
    value = tl.sum(total, 0)
    if out_theta is not None:
        wide = channels * TAPS
        place = weight_at(column // wide, column % wide, channels, TAPS, CL, False)
        tl.store(out_theta + place, value, mask=column < at_phi)
    if out_phi is not None:
        tl.store(out_phi + column - at_phi, value, mask=(column >= at_phi) & (column < at_bias))
    if out_bias is not None:
        tl.store(out_bias + column - at_bias, value, mask=(column >= at_bias) & (column < at_psi))
    if out_psi is not None:
        tl.store(out_psi + column - at_psi, value, mask=(column >= at_psi) & (column < at_psi_bias))
    if out_psi_bias is not None:
        tl.store(out_psi_bias + column - at_psi_bias, value, mask=column == at_psi_bias)


@triton.jit
def weights_kernel(
    ds, source, partial, channels, inter, kernel_h, kernel_w, Sh, Sw, Sv, Rd, Rh, Rw, Rv,
    samples, tiles, columns, blocks_i, blocks_k,
    BI: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, DS_CL: tl.constexpr, CL: tl.constexpr,
    TAPS: tl.constexpr, SD: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PRECISION: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """partial[row] = ds * patches(source)^T over the tiles row, row + rows, ...: [I, channels * taps]."""
    block = tl.program_id(0) % (blocks_i * blocks_k)
    row, rows = tl.program_id(0) // (blocks_i * blocks_k), tl.num_programs(0) // (blocks_i * blocks_k)
    i = block % blocks_i * BI + tl.arange(0, BI).to(OFFSET)
    k = block // blocks_i * BK + tl.arange(0, BK).to(OFFSET)
    i_inside, k_inside = i < inter, k < channels * TAPS
    c, tap, away = patch_rows(k, channels, kernel_h, kernel_w, Sh, Sw, TAPS, CL)
    total = tl.zeros([BI, BK], tl.float32)
    for tile in range(row, samples * tiles, rows):
        n, d0, h0, w0 = tile_begin(tile, 1, 1, tiles, 1, 1, BT)
        v, d, h, w, inside = tile_voxels(d0, h0, w0, Rd, Rh, Rw, Rv, 1, 1, BT, False, OFFSET)
        if TAPS * SD * SH * SW != 1:
            v = scattered(v)
        o = patch_begin(v, d, h, w, Sh, Sw, TAPS, SD, SH, SW, OFFSET)[None, :] + away[:, None]
        slopes = load_tile(sample(ds, n, inter, Rv), i, v, i_inside, inside, inter, Rv, DS_CL)
        pointer = sample(source, n, channels, Sv) + at(c[:, None], o, channels, Sv, CL)
        values = tl.load(pointer, mask=k_inside[:, None] & inside[None, :], other=0.0)
        total = tl.dot(slopes.to(values.dtype), tl.trans(values), total, input_precision=PRECISION)
    pointer = partial + row.to(tl.int64) * columns + i[:, None] * (channels * TAPS) + k[None, :]
    tl.store(pointer, total, mask=i_inside[:, None] & k_inside[None, :])


@triton.jit
def project_kernel(
    source, weight, out, channels, outputs, voxels, tiles, blocks, stride_out, stride_in,
    BI: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, CL: tl.constexpr, OUT_CL: tl.constexpr,
    PRECISION: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """out = weight * source, a convolution of kernel 1; by its strides weight may be the transposed one."""
    tile, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    n, _, _, w0 = tile_begin(tile, 1, 1, tiles, 1, 1, BT)
    v = w0.to(OFFSET) + tl.arange(0, BT)
    i = block * BI + tl.arange(0, BI).to(OFFSET)
    source = sample(source, n, channels, voxels)
    total = tl.zeros([BI, BT], tl.float32)
    for c0 in range(0, channels, BK):
        c = c0 + tl.arange(0, BK).to(OFFSET)
        part = load_tile(source, c, v, c < channels, v < voxels, channels, voxels, CL)
        mask = (i < outputs)[:, None] & (c < channels)[None, :]
        factor = tl.load(weight + i[:, None] * stride_out + c[None, :] * stride_in, mask=mask, other=0.0)
        total = tl.dot(factor.to(part.dtype), part, total, input_precision=PRECISION)
    store_tile(sample(out, n, outputs, voxels), total, i, v, i < outputs, v < voxels, outputs, voxels, OUT_CL)


@triton.jit
def spread_kernel(
    slopes, out, inter, Rd, Rh, Rw, Rv, Qd, Qh, Qw, Qv, tiles, blocks,
    scale_d, scale_h, scale_w, spread_d, spread_h, spread_w, reach_d, reach_h, reach_w,
    BI: tl.constexpr, BT: tl.constexpr, CL: tl.constexpr, OUT_CL: tl.constexpr,
    MODE_D: tl.constexpr, MODE_H: tl.constexpr, MODE_W: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """out [I, Q] = resize^T(slopes [I, R]), resize from Q to R."""
    tile, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    n, _, _, w0 = tile_begin(tile, 1, 1, tiles, 1, 1, BT)
    v, d, h, w, inside = tile_voxels(0, 0, w0, Qd, Qh, Qw, Qv, 1, 1, BT, False, OFFSET)
    i = block * BI + tl.arange(0, BI).to(OFFSET)
    total = gathered(
        sample(slopes, n, inter, Rv), i, i < inter, d, h, w, inside, inter, Rv, Rh * Rw, Rw, 0, 0, 0,
        Qd, Qh, Qw, Rd, Rh, Rw, scale_d, scale_h, scale_w, spread_d, spread_h, spread_w,
        reach_d, reach_h, reach_w, CL, MODE_D, MODE_H, MODE_W, OFFSET,
    )  # fmt: skip
    store_tile(sample(out, n, inter, Qv), total, i, v, i < inter, inside, inter, Qv, OUT_CL)
