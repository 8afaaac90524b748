"""The backward pass: one launch from the gradients of y and alpha to those of all maps, and partial sums of
those of the parameters.

    d alpha_up = sum_c dy * x      d alpha = resize^T(d alpha_up)     d logit = d alpha * alpha * (1 - alpha)
    ds = d logit * psi * activation'(s), with s = theta + resize(phi) given, stored, or recomputed here
    dx = dy * alpha_up + theta_weight^T ds,     dg = phi_weight^T ds,   d weight = ds [x; g]^T

A program takes tiles of coarse voxels in turn. Bytes per sample, e an element:

- one grid: reads x, dy and theta, phi (whole: g), writes dx and dtheta, dphi (whole: dg). The whole gate
  comes back to x, dy and g for the products with ds, from L2.
- S finer than R: d alpha of a tile needs d alpha_up of fine voxels that other tiles own. Two ways:
    halo        x and dy are read over the tile and h = prod((2 b + 2) / 2 b) around it (b coarse voxels an
                axis of a resize by 2: 1.2 for 8 x 16, 1.8 for 4 x 4 x 8), nearly all of it from L2
    1 channel   d alpha_up through memory and a second launch, which for the whole gate reads all of x and dy
                again: 5 C of traffic where 3 C are needed
  The halo moves less for the whole gate and the same for the chain, in one launch: it is the way. d alpha_up
  of a tile goes through a scratch of the program's own, which stays in L1 or L2; alpha_up of its patches too.
- weight gradients are added up in a row of the workspace that belongs to the program: for a tile of BT voxels
  8 I (C + G) bytes from L2 beside 4 (3 C + 2 G) BT. At I >= 128 that is more than a launch of its own that
  reads a stored ds: `geometry.splits` compares them (SPLIT). SPLIT also takes any I, a block at a time.
- g, or phi, on a grid of its own: dphi gathers ds from tiles of other programs, in a launch after this one.
  Tiles of whole voxels of Q could do without it where the resize is nearest by an integer: at S = R = 4 Q and
  I = C / 2 the launch reads I channels again beside 3 C + 2.5 I, 12 %. But all such tiles would be boxes, in
  place of runs, and rows of 16 voxels that begin anywhere take 3 sectors for 2 of each map: no gain.

What a program requests of L1 and L2 is more than what memory must move. Paper 2D in float32, T = 4 taps,
I = C = 64, G = 128, SPLIT, tiles of 4 x 16, BI = 32, BK = 16: 6.1 times the 3 T C + 2 G channels, counted by
an interpreter of PTX (bench/triton_kernels.md), of which

    1.5    ds again for each BK rows of dx and dg: e I (T C + G) / BK bytes a voxel
    1.0    x's patches once for each BI of I, and each sector once for each tap along w
    1.0    dy and dx at the patches, each sector once for each tap along w
    0.9    x and dy around the tile: 1.33 times their voxels, in rows that begin anywhere
    0.75   weights, for s and for dx and dg: 8 I (T C + G) / BT
    0.4    g for each BI of I, and dg

The first, 16 KB a tile, stays in L1. Twice the rows at a time would halve it, but spill: operands of 32 x 64
by three products on compute capability 8.0, in bfloat16 with 128 threads too.

Rows of the workspace are summed in order afterwards (`parameters.sum_kernel`): no atomics, the same bits
always.
"""

import triton
import triton.language as tl

from .forward import patch_begin, patch_rows, preactivation, weight_at
from .maps import activate, at, load_tile, sample, slope, store_tile, tile_begin, tile_voxels
from .resize import first_fed, first_from, gathered, resized


@triton.jit
def accumulate(row, value, index, count, again):
    """row[:count] += value where `again` is 1; where it is 0, at the program's first tile, row begins."""
    before = tl.load(row + index, mask=index < count * again, other=0.0)
    tl.store(row + index, before + value, mask=index < count)


@triton.jit
def _support(first, own, size, reach, n_in, n_out, spread, MODE: tl.constexpr):
    """The output indices that input indices [first, first + own) feed."""
    last = tl.minimum(first + own, n_in) - 1
    return first_fed(first, n_out, spread, MODE), tl.minimum(
        first_fed(last, n_out, spread, MODE) + reach, n_out
    )


@triton.jit
def map_gradients(
    source, dsource, weight, row, ds, ds_map, dy, alpha, ups, again, d, h, w, v, inside,
    channels, inter, kernel_h, kernel_w, Rv, Sh, Sw, voxels,
    BI: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, CL: tl.constexpr, DY_CL: tl.constexpr,
    DS_CL: tl.constexpr, WEIGHT_CL: tl.constexpr, TAPS: tl.constexpr,
    SD: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """dsource = weight^T ds (+ dy * alpha_up), and row += ds * patches(source)^T, each where wanted.

    ups: alpha_up at the voxels of the tile's patches, [TAPS, BT]; None on one grid, where it is alpha.
    """
    i = tl.arange(0, BI).to(OFFSET)
    begin = patch_begin(v, d, h, w, Sh, Sw, TAPS, SD, SH, SW, OFFSET)
    for k0 in range(0, channels * TAPS, BK):
        k = k0 + tl.arange(0, BK).to(OFFSET)
        k_inside = k < channels * TAPS
        c, tap, away = patch_rows(k, channels, kernel_h, kernel_w, Sh, Sw, TAPS, CL)
        o = begin[None, :] + away[:, None]
        mask = k_inside[:, None] & inside[None, :]
        if dsource is not None:
            total = tl.zeros([BK, BT], tl.float32)
            if SPLIT:
                for i0 in range(0, inter, BI):
                    inner = i0 + i
                    part = load_tile(ds_map, inner, v, inner < inter, inside, inter, Rv, DS_CL)
                    place = weight_at(inner[None, :], k[:, None], channels, TAPS, CL, WEIGHT_CL)
                    known = k_inside[:, None] & (inner < inter)[None, :]
                    turned = tl.load(weight + place, mask=known, other=0.0).to(part.dtype)
                    total = tl.dot(turned, part, total, input_precision=PRECISION)
            else:
                place = weight_at(i[None, :], k[:, None], channels, TAPS, CL, WEIGHT_CL)
                known = k_inside[:, None] & (i < inter)[None, :]
                turned = tl.load(weight + place, mask=known, other=0.0).to(ds.dtype)
                total = tl.dot(turned, ds, total, input_precision=PRECISION)
            if dy is not None:
                if ups is None:
                    up = tl.load(alpha + v, mask=inside, other=0.0)[None, :]
                else:
                    place = tap[:, None] * BT + tl.arange(0, BT)[None, :]
                    up = tl.load(ups + place, mask=k_inside[:, None], other=0.0)
                slopes = tl.load(dy + at(c[:, None], o, channels, voxels, DY_CL), mask=mask, other=0.0)
                total += slopes.to(tl.float32) * up
            total = total.to(dsource.dtype.element_ty)
            tl.store(dsource + at(c[:, None], o, channels, voxels, CL), total, mask=mask)
        if row is not None:
            # In the order of the rows k, whatever the weight's; `parameters.sum_kernel` knows.
            pointer = row + i[:, None] * (channels * TAPS) + k[None, :]
            begun = (i < inter * again)[:, None] & k_inside[None, :]
            total = tl.load(pointer, mask=begun, other=0.0)
            tile = tl.load(source + at(c[:, None], o, channels, voxels, CL), mask=mask, other=0.0)
            total = tl.dot(ds, tl.trans(tile), total, input_precision=PRECISION)
            tl.store(pointer, total, mask=(i < inter)[:, None] & k_inside[None, :])


@triton.jit
def backward_kernel(
    dy, dalpha, x, g, theta, phi, theta_weight, phi_weight, bias, psi, alpha, preact,
    dx, dg, dtheta, dphi, dalpha_out, partial, scratch,
    C, G, I, Sd, Sh, Sw, Sv, Rd, Rh, Rw, Rv, Qd, Qh, Qw, Qv,
    total_tiles, tiles_d, tiles_h, tiles_w, room, columns, at_phi, at_bias, at_psi, at_psi_bias,
    scale_d, scale_h, scale_w, spread_d, spread_h, spread_w, reach_d, reach_h, reach_w,
    phi_scale_d, phi_scale_h, phi_scale_w, kernel_d, kernel_h, kernel_w,
    BD: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BOX: tl.constexpr, FULL: tl.constexpr,
    BI: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr, BF: tl.constexpr,
    X_CL: tl.constexpr, DY_CL: tl.constexpr, G_CL: tl.constexpr, THETA_CL: tl.constexpr, PHI_CL: tl.constexpr,
    DS_CL: tl.constexpr, WEIGHT_CL: tl.constexpr,
    TAPS: tl.constexpr, SD: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    MODE_D: tl.constexpr, MODE_H: tl.constexpr, MODE_W: tl.constexpr,
    PHI_D: tl.constexpr, PHI_H: tl.constexpr, PHI_W: tl.constexpr,
    PROJECT: tl.constexpr, THROUGH: tl.constexpr, SPLIT: tl.constexpr, GAPS: tl.constexpr,
    SUM_THETA: tl.constexpr, SUM_PHI: tl.constexpr, SUM_PSI: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """FULL: through sigmoid and multiply; else dalpha is the gradient of the logits. THROUGH: ds is wanted.

    theta's gradient is ds; it is also what is stored for the launches that come after (dphi on another grid,
    the weight gradients where SPLIT).
    """
    BT: tl.constexpr = BD * BH * BW
    pid = tl.program_id(0)
    if partial is not None:
        partial += pid.to(tl.int64) * columns
    if scratch is not None:
        scratch += pid.to(tl.int64) * (room + TAPS * BT)
    # Not pipelined: what a tile reads in one step others of its threads may have written in the step before.
    for tile in tl.range(pid, total_tiles, tl.num_programs(0), num_stages=1):
        again = (tile != pid).to(tl.int32)
        n, d0, h0, w0 = tile_begin(tile, tiles_d, tiles_h, tiles_w, BD, BH, BW)
        v, d, h, w, inside = tile_voxels(d0, h0, w0, Rd, Rh, Rw, Rv, BD, BH, BW, BOX, OFFSET)
        k = tl.arange(0, BC).to(OFFSET)

        # d logit, [BT]
        dlogit = tl.zeros([BT], tl.float32)
        ups = None
        if dy is not None:
            xs, dys = sample(x, n, C, Sv), sample(dy, n, C, Sv)
            alphas = sample(alpha, n, 1, Rv)
            if BOX:
                # Own: the patches of this tile's voxels, and what lies beyond the last; theta has no stride
                # in the chain, where a voxel belongs to the tile that holds its lower tap.
                if PROJECT:
                    own_d, own_h, own_w = d0 * SD, h0 * SH, w0 * SW
                    end_d = tl.where(d0 + BD >= Rd, Sd, (d0 + BD) * SD)
                    end_h = tl.where(h0 + BH >= Rh, Sh, (h0 + BH) * SH)
                    end_w = tl.where(w0 + BW >= Rw, Sw, (w0 + BW) * SW)
                else:
                    own_d = first_from(d0, Rd, Sd, scale_d, spread_d, MODE_D)
                    own_h = first_from(h0, Rh, Sh, scale_h, spread_h, MODE_H)
                    own_w = first_from(w0, Rw, Sw, scale_w, spread_w, MODE_W)
                    end_d = first_from(d0 + BD, Rd, Sd, scale_d, spread_d, MODE_D)
                    end_h = first_from(h0 + BH, Rh, Sh, scale_h, spread_h, MODE_H)
                    end_w = first_from(w0 + BW, Rw, Sw, scale_w, spread_w, MODE_W)
                s_d, e_d = _support(d0, BD, Sd, reach_d, Rd, Sd, spread_d, MODE_D)
                s_h, e_h = _support(h0, BH, Sh, reach_h, Rh, Sh, spread_h, MODE_H)
                s_w, e_w = _support(w0, BW, Sw, reach_w, Rw, Sw, spread_w, MODE_W)
                s_d, s_h, s_w = tl.minimum(s_d, own_d), tl.minimum(s_h, own_h), tl.minimum(s_w, own_w)
                n_d, n_h = tl.maximum(e_d, end_d) - s_d, tl.maximum(e_h, end_h) - s_h
                n_w = tl.maximum(e_w, end_w) - s_w
                for q0 in range(0, n_d * n_h * n_w, BF):
                    q = q0 + tl.arange(0, BF)
                    o_inside = q < n_d * n_h * n_w
                    od, oh, ow = s_d + q // (n_h * n_w), s_h + q // n_w % n_h, s_w + q % n_w
                    o = (od.to(OFFSET) * Sh + oh) * Sw + ow
                    writes = o_inside & (od >= own_d) & (od < end_d) & (oh >= own_h) & (oh < end_h)
                    writes = writes & (ow >= own_w) & (ow < end_w)
                    if PROJECT:  # what no patch covers
                        patched = (od % SD < kernel_d) & (oh % SH < kernel_h) & (ow % SW < kernel_w)
                        writes = writes & ~(patched & (od // SD < Rd) & (oh // SH < Rh) & (ow // SW < Rw))
                    if dx is not None and (GAPS or not PROJECT):
                        up = resized(
                            alphas, 0, od, oh, ow, writes, 1, Rv, Rh * Rw, Rw, 0, 0, 0, Rd, Rh, Rw,
                            scale_d, scale_h, scale_w, False, MODE_D, MODE_H, MODE_W, OFFSET,
                        )  # fmt: skip
                    product = tl.zeros([BF], tl.float32)
                    for c0 in range(0, C, BC):
                        c = c0 + k
                        slopes = load_tile(dys, c, o, c < C, o_inside, C, Sv, DY_CL).to(tl.float32)
                        if scratch is not None:
                            values = load_tile(xs, c, o, c < C, o_inside, C, Sv, X_CL).to(tl.float32)
                            product += tl.sum(slopes * values, 0)
                        if dx is not None and (GAPS or not PROJECT):
                            store_tile(
                                sample(dx, n, C, Sv), slopes * up[None, :], c, o, c < C, writes, C, Sv, X_CL
                            )
                    if scratch is not None:
                        tl.store(scratch + q, product, mask=o_inside)
                if PROJECT and THROUGH and dx is not None:
                    ups = scratch + room
                    for tap in range(0, TAPS):
                        up = resized(
                            alphas, 0, d * SD + tap // (kernel_h * kernel_w),
                            h * SH + tap // kernel_w % kernel_h, w * SW + tap % kernel_w, inside,
                            1, Rv, Rh * Rw, Rw, 0, 0, 0, Rd, Rh, Rw,
                            scale_d, scale_h, scale_w, False, MODE_D, MODE_H, MODE_W, OFFSET,
                        )  # fmt: skip
                        tl.store(ups + tap * BT + tl.arange(0, BT), up)
                if scratch is not None:
                    tl.debug_barrier()  # other threads wrote what this one reads
                    zero = tl.arange(0, 1).to(OFFSET)
                    dlogit += tl.sum(gathered(
                        scratch, zero, zero == 0, d, h, w, inside, 1, 0, n_h * n_w, n_w, s_d, s_h, s_w,
                        Rd, Rh, Rw, Sd, Sh, Sw, scale_d, scale_h, scale_w, spread_d, spread_h, spread_w,
                        reach_d, reach_h, reach_w, False, MODE_D, MODE_H, MODE_W, OFFSET,
                    ), 0)  # fmt: skip
                    tl.debug_barrier()  # before the next tile overwrites it
            else:
                a = tl.load(alphas + v, mask=inside, other=0.0)
                for c0 in range(0, C, BC):
                    c = c0 + k
                    slopes = load_tile(dys, c, v, c < C, inside, C, Sv, DY_CL).to(tl.float32)
                    values = load_tile(xs, c, v, c < C, inside, C, Sv, X_CL).to(tl.float32)
                    dlogit += tl.sum(slopes * values, 0)
                    if dx is not None and not PROJECT:
                        store_tile(
                            sample(dx, n, C, Sv), slopes * a[None, :], c, v, c < C, inside, C, Sv, X_CL
                        )
        if dalpha is not None:
            dlogit += tl.load(sample(dalpha, n, 1, Rv) + v, mask=inside, other=0.0)
        if dalpha_out is not None:
            tl.store(sample(dalpha_out, n, 1, Rv) + v, dlogit, mask=inside)
        if FULL:
            a = tl.load(sample(alpha, n, 1, Rv) + v, mask=inside, other=0.0)
            dlogit *= a * (1.0 - a)
        dlogit = tl.where(inside, dlogit, 0.0)

        # ds, [BI, BT]
        if THROUGH:
            if SUM_PSI:
                one = tl.arange(0, 1)
                accumulate(partial + at_psi_bias, tl.sum(dlogit[None, :], 1), one, 1, again)
            for i0 in range(0, I, BI):
                i = i0 + tl.arange(0, BI).to(OFFSET)
                i_inside = i < I
                if preact is not None:
                    s = load_tile(sample(preact, n, I, Rv), i, v, i_inside, inside, I, Rv, X_CL).to(
                        tl.float32
                    )
                else:
                    xs, gs, thetas, phis = x, g, theta, phi
                    if theta_weight is not None:
                        xs = sample(x, n, C, Sv)
                    if phi_weight is not None:
                        gs = sample(g, n, G, Rv)
                    if theta is not None:
                        thetas = sample(theta, n, I, Rv)
                    if phi is not None:
                        phis = sample(phi, n, I, Qv)
                    s = preactivation(
                        xs, gs, thetas, phis, theta_weight, phi_weight, bias, i, i_inside, v, d, h, w, inside,
                        C, G, I, Sh, Sw, Sv, Rh, Rw, Rv, Qd, Qh, Qw, Qv, kernel_h, kernel_w,
                        phi_scale_d, phi_scale_h, phi_scale_w,
                        BI, BT, BK, X_CL, G_CL, THETA_CL, PHI_CL, WEIGHT_CL, TAPS, SD, SH, SW,
                        PHI_D, PHI_H, PHI_W, PRECISION, OFFSET,
                    )  # fmt: skip
                weight = tl.load(psi + i, mask=i_inside, other=0.0)
                ds = (dlogit[None, :] * weight[:, None]) * slope(s, ACTIVATION)
                ds = tl.where(i_inside[:, None] & inside[None, :], ds, 0.0)
                if SUM_PSI:
                    part = tl.sum(activate(s, ACTIVATION) * dlogit[None, :], 1)
                    accumulate(partial + at_psi, part, i, I, again)
                    if PROJECT:
                        accumulate(partial + at_bias, tl.sum(ds, 1), i, I, again)
                if dtheta is not None:
                    store_tile(sample(dtheta, n, I, Rv), ds, i, v, i_inside, inside, I, Rv, DS_CL)
                if dphi is not None:
                    store_tile(sample(dphi, n, I, Rv), ds, i, v, i_inside, inside, I, Rv, DS_CL)
                if PROJECT and not SPLIT:
                    # One block holds all of I.
                    rounded = ds.to(x.dtype.element_ty)
                    _whole(
                        dy, x, g, theta_weight, phi_weight, alpha, ups, dx, dg, dtheta, partial, rounded, n,
                        again, v, d, h, w, inside, C, G, I, kernel_h, kernel_w, Sh, Sw, Sv, Rh, Rw, Rv,
                        at_phi, BI, BT, BK, X_CL, DY_CL, G_CL, DS_CL, WEIGHT_CL, TAPS, SD, SH, SW,
                        SPLIT, SUM_THETA, SUM_PHI, PRECISION, OFFSET,
                    )  # fmt: skip
            if PROJECT and SPLIT:
                if dx is not None or dg is not None:
                    tl.debug_barrier()  # ds was stored by other threads
                    _whole(
                        dy, x, g, theta_weight, phi_weight, alpha, ups, dx, dg, dtheta, partial, None, n,
                        again, v, d, h, w, inside, C, G, I, kernel_h, kernel_w, Sh, Sw, Sv, Rh, Rw, Rv,
                        at_phi, BI, BT, BK, X_CL, DY_CL, G_CL, DS_CL, WEIGHT_CL, TAPS, SD, SH, SW,
                        SPLIT, SUM_THETA, SUM_PHI, PRECISION, OFFSET,
                    )  # fmt: skip
            if partial is not None:
                tl.debug_barrier()  # the row is read again at the next tile


@triton.jit
def _whole(
    dy, x, g, theta_weight, phi_weight, alpha, ups, dx, dg, ds_map, partial, ds, n, again,
    v, d, h, w, inside, C, G, I, kernel_h, kernel_w, Sh, Sw, Sv, Rh, Rw, Rv, at_phi,
    BI: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, X_CL: tl.constexpr,
    DY_CL: tl.constexpr, G_CL: tl.constexpr, DS_CL: tl.constexpr, WEIGHT_CL: tl.constexpr,
    TAPS: tl.constexpr, SD: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, SPLIT: tl.constexpr,
    SUM_THETA: tl.constexpr, SUM_PHI: tl.constexpr, PRECISION: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """dx and dg of a tile, and the weight gradients' sums."""
    dys, alphas, dxs, dgs, dss, row, row_g = None, None, None, None, None, None, None
    if SPLIT:
        dss = sample(ds_map, n, I, Rv)
    if dy is not None:
        dys, alphas = sample(dy, n, C, Sv), sample(alpha, n, 1, Rv)
    if dx is not None:
        dxs = sample(dx, n, C, Sv)
    if SUM_THETA:
        row = partial
    if dx is not None or SUM_THETA:
        map_gradients(
            sample(x, n, C, Sv), dxs, theta_weight, row, ds, dss, dys, alphas, ups, again, d, h, w, v, inside,
            C, I, kernel_h, kernel_w, Rv, Sh, Sw, Sv,
            BI, BT, BK, X_CL, DY_CL, DS_CL, WEIGHT_CL, TAPS, SD, SH, SW, SPLIT, PRECISION, OFFSET,
        )  # fmt: skip
    if dg is not None:
        dgs = sample(dg, n, G, Rv)
    if SUM_PHI:
        row_g = partial + at_phi
    if dg is not None or SUM_PHI:
        map_gradients(
            sample(g, n, G, Rv), dgs, phi_weight, row_g, ds, dss, None, None, None, again, d, h, w, v, inside,
            G, I, 1, 1, Rv, Rh, Rw, Rv,
            BI, BT, BK, G_CL, DY_CL, DS_CL, False, 1, 1, 1, 1, SPLIT, PRECISION, OFFSET,
        )  # fmt: skip
