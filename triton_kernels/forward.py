"""The forward pass: one launch from (x, theta, phi) or (x, g) to y and alpha.

A program owns a tile of coarse voxels (R, the grid of theta and alpha): it makes their logits, I channels in
blocks of BI, then multiplies the fine voxels (S, the grid of x) that are theirs. Bytes per sample, at e bytes
an element:

- one grid: reads C + 2I (chain) or C + G (whole) channels, writes C and alpha. The whole gate reads x again
  from L2: a tile of 128 voxels x 64 channels is 32 KB, and all tiles under way fit in 50 MB.
- S finer than R, linear: fine voxel o belongs to the tile that holds its lower tap, so a tile needs alpha one
  coarse voxel beyond its end. Two ways to have it there:
    recompute   tiles of B voxels an axis own B - 1; theta and phi (whole: x and g) are read
                h = prod(B / (B - 1)) times: 1.14 for 16 x 16, 1.49 for 8 x 8 x 8, nearly all of it from L2,
                since neighbours run together
    1 channel   alpha through memory and a second launch: reads all of x once more, C of about 2C
  Memory counts 1.0 to h against 1.5, so it is recomputed. Where arithmetic binds (deep 3D gates), h - 1 times
  the products cost more than the bytes: `geometry.halo_pays` compares them and the launch is split.
- nearest: no neighbour is needed, h = 1.
- g on a grid Q of its own, whole gate: phi = W_g g commutes with its resize, so there are two ways too:
    resize g    in this launch: 2 I G operations and 2^d taps of G channels (from L1) a voxel of R
    resize phi  made on Q by a launch before: 2 I G operations a voxel of Q, I channels of Q through memory in
                float32, 2^d taps of I channels a voxel of R
  With Q twice as coarse and G = 2 I the former does 2^d times the products and twice the loads, to save 8 I Q
  bytes beside the 2 e C S of x and y: phi is resized.

What a program requests of L1 and L2 is more. Paper 2D in float32, T = 4 taps, I = C = 64, G = 128, 32 x 32
coarse voxels in 33 tiles of 4 x 16 (3 x 15 their own): 4.15 times the 2 T C + G channels, counted by an
interpreter of PTX (bench/triton_kernels.md), of which

    1.4    x's patches: h = 1.39, each sector once for each tap along w, rows that begin anywhere
    1.25   weights: 4 I (T C + G) bytes a tile, 98 KB, which L1 holds
    1.0    x again and y, in rows of 30 voxels that begin anywhere
    0.4    g

Larger tiles would have fewer weights and less halo; float32 by three products has no registers for them
(bfloat16, of 128 voxels: 3.0). Tiles of 8 x 8 have h = 1.31, but rows of 8 take 2 sectors where they fill 1.
"""

import triton
import triton.language as tl

from .maps import activate, at, load_tile, sample, store_tile, tile_begin, tile_voxels
from .resize import first_from, resized


@triton.jit
def patch_rows(k, channels, kernel_h, kernel_w, Sh, Sw, TAPS: tl.constexpr, CL: tl.constexpr):
    """Channel c and tap of rows k of a patch, and the tap's distance from the patch's first voxel.

    Rows lie as the elements of a weight [I, C, *kernel] do: taps innermost, or channels where maps are
    channels last. The kernel's sizes are no constants: of a stride that it knows Triton would lay the threads
    along the taps of a patch, and each would touch a memory sector of its own.
    """
    if TAPS == 1:
        c, tap, away = k, k * 0, k * 0
    else:
        if CL:
            c, tap = k % channels, k // channels
        else:
            c, tap = k // TAPS, k % TAPS
        away = (tap // (kernel_h * kernel_w) * Sh + tap // kernel_w % kernel_h) * Sw + tap % kernel_w
    return c, tap, away


@triton.jit
def patch_begin(
    v, d, h, w, Sh, Sw,
    TAPS: tl.constexpr, SD: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """The fine voxel at which the patch of coarse voxel v begins."""
    if TAPS * SD * SH * SW == 1:
        fine = v
    else:
        fine = (d.to(OFFSET) * SD * Sh + h * SH) * Sw + w * SW
    return fine


@triton.jit
def weight_at(i, k, channels, TAPS: tl.constexpr, CL: tl.constexpr, WEIGHT_CL: tl.constexpr):
    """Offset of a weight's inner channel i and row k."""
    row = k
    if TAPS > 1 and CL and not WEIGHT_CL:
        row = k % channels * TAPS + k // channels
    return i * (channels * TAPS) + row


@triton.jit
def projected(
    s, source, weight, i, i_inside, v, d, h, w, inside, channels, kernel_h, kernel_w, Sh, Sw, voxels,
    BK: tl.constexpr, CL: tl.constexpr, WEIGHT_CL: tl.constexpr, TAPS: tl.constexpr,
    SD: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PRECISION: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """s + weight * patches(source), [BI, voxels]; weight [I, C, *kernel]."""
    begin = patch_begin(v, d, h, w, Sh, Sw, TAPS, SD, SH, SW, OFFSET)
    for k0 in range(0, channels * TAPS, BK):
        k = k0 + tl.arange(0, BK).to(OFFSET)
        k_inside = k < channels * TAPS
        c, tap, away = patch_rows(k, channels, kernel_h, kernel_w, Sh, Sw, TAPS, CL)
        offset = at(c[:, None], begin[None, :] + away[:, None], channels, voxels, CL)
        tile = tl.load(source + offset, mask=k_inside[:, None] & inside[None, :], other=0.0)
        place = weight_at(i[:, None], k[None, :], channels, TAPS, CL, WEIGHT_CL)
        part = tl.load(weight + place, mask=i_inside[:, None] & k_inside[None, :], other=0.0)
        s = tl.dot(part.to(tile.dtype), tile, s, input_precision=PRECISION)
    return s


@triton.jit
def preactivation(
    x, g, theta, phi, theta_weight, phi_weight, bias, i, i_inside, v, d, h, w, inside, C, G, I, Sh, Sw, Sv,
    Rh, Rw, Rv,
    Qd, Qh, Qw, Qv, kernel_h, kernel_w, phi_scale_d, phi_scale_h, phi_scale_w,
    BI: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    X_CL: tl.constexpr, G_CL: tl.constexpr, THETA_CL: tl.constexpr, PHI_CL: tl.constexpr,
    WEIGHT_CL: tl.constexpr, TAPS: tl.constexpr, SD: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PHI_D: tl.constexpr, PHI_H: tl.constexpr, PHI_W: tl.constexpr,
    PRECISION: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """s = theta + resize(phi) [BI, BT]: given, or projected from x and g where the weights are there."""
    s = tl.zeros([BI, BT], tl.float32)
    if theta_weight is not None:
        s = projected(
            s, x, theta_weight, i, i_inside, v, d, h, w, inside, C, kernel_h, kernel_w, Sh, Sw, Sv,
            BK, X_CL, WEIGHT_CL, TAPS, SD, SH, SW, PRECISION, OFFSET,
        )  # fmt: skip
    if phi_weight is not None:
        s = projected(
            s, g, phi_weight, i, i_inside, v, d, h, w, inside, G, 1, 1, Rh, Rw, Rv,
            BK, G_CL, False, 1, 1, 1, 1, PRECISION, OFFSET,
        )  # fmt: skip
    if bias is not None:
        s += tl.load(bias + i, mask=i_inside, other=0.0)[:, None]
    if theta is not None:
        s += load_tile(theta, i, v, i_inside, inside, I, Rv, THETA_CL).to(tl.float32)
    if phi is not None:
        mask = i_inside[:, None] & inside[None, :]
        if PHI_D == "same" and PHI_H == "same" and PHI_W == "same":
            s += tl.load(phi + at(i[:, None], v[None, :], I, Rv, PHI_CL), mask=mask, other=0.0).to(tl.float32)
        else:
            s += resized(
                phi, i[:, None], d[None, :], h[None, :], w[None, :], mask, I, Qv, Qh * Qw, Qw, 0, 0, 0, Qd,
                Qh, Qw,
                phi_scale_d, phi_scale_h, phi_scale_w, PHI_CL, PHI_D, PHI_H, PHI_W, OFFSET,
            )  # fmt: skip
    return s


@triton.jit
def forward_kernel(
    x, g, theta, phi, theta_weight, phi_weight, bias, psi, psi_bias, y, alpha, preact, scratch,
    C, G, I, Sd, Sh, Sw, Sv, Rd, Rh, Rw, Rv, Qd, Qh, Qw, Qv,
    tiles_d, tiles_h, tiles_w, own_d, own_h, own_w, kernel_h, kernel_w,
    scale_d, scale_h, scale_w, spread_d, spread_h, spread_w, phi_scale_d, phi_scale_h, phi_scale_w,
    BD: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BOX: tl.constexpr, FULL: tl.constexpr,
    BI: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr, BF: tl.constexpr,
    X_CL: tl.constexpr, G_CL: tl.constexpr, THETA_CL: tl.constexpr, PHI_CL: tl.constexpr,
    WEIGHT_CL: tl.constexpr, TAPS: tl.constexpr, SD: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    MODE_D: tl.constexpr, MODE_H: tl.constexpr, MODE_W: tl.constexpr,
    PHI_D: tl.constexpr, PHI_H: tl.constexpr, PHI_W: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """y and alpha; without y the logits (or alpha, where FULL) of all voxels and nothing else."""
    BT: tl.constexpr = BD * BH * BW
    n, d0, h0, w0 = tile_begin(tl.program_id(0), tiles_d, tiles_h, tiles_w, own_d, own_h, own_w)
    v, d, h, w, inside = tile_voxels(d0, h0, w0, Rd, Rh, Rw, Rv, BD, BH, BW, BOX, OFFSET)
    owned = inside
    if BOX:
        owned = inside & (d < d0 + own_d) & (h < h0 + own_h) & (w < w0 + own_w)
    if x is not None:
        x = sample(x, n, C, Sv)
    if g is not None:
        g = sample(g, n, G, Rv)
    if theta is not None:
        theta = sample(theta, n, I, Rv)
    if phi is not None:
        phi = sample(phi, n, I, Qv)

    logit = tl.zeros([BT], tl.float32)
    for i0 in range(0, I, BI):
        i = i0 + tl.arange(0, BI).to(OFFSET)
        i_inside = i < I
        s = preactivation(
            x, g, theta, phi, theta_weight, phi_weight, bias, i, i_inside, v, d, h, w, inside,
            C, G, I, Sh, Sw, Sv, Rh, Rw, Rv, Qd, Qh, Qw, Qv, kernel_h, kernel_w,
            phi_scale_d, phi_scale_h, phi_scale_w,
            BI, BT, BK, X_CL, G_CL, THETA_CL, PHI_CL, WEIGHT_CL, TAPS, SD, SH, SW, PHI_D, PHI_H, PHI_W,
            PRECISION, OFFSET,
        )  # fmt: skip
        if preact is not None:
            store_tile(sample(preact, n, I, Rv), s, i, v, i_inside, owned, I, Rv, X_CL)
        weight = tl.load(psi + i, mask=i_inside, other=0.0)
        logit += tl.sum(activate(s, ACTIVATION) * weight[:, None], 0)
    if psi_bias is not None:
        logit += tl.load(psi_bias)
    a = logit
    if FULL:
        a = tl.sigmoid(logit)
    tl.store(sample(alpha, n, 1, Rv) + v, a, mask=owned)

    if y is not None:
        y = sample(y, n, C, Sv)
        k = tl.arange(0, BC).to(OFFSET)
        if BOX:
            # Alpha with its halo, through a scratch of the program's own (L1): 1 channel of the coarse grid.
            scratch += tl.program_id(0).to(tl.int64) * BT
            tl.store(scratch + tl.arange(0, BT), a)
            tl.debug_barrier()
            f_d = first_from(d0, Rd, Sd, scale_d, spread_d, MODE_D)
            f_h = first_from(h0, Rh, Sh, scale_h, spread_h, MODE_H)
            f_w = first_from(w0, Rw, Sw, scale_w, spread_w, MODE_W)
            n_d = first_from(d0 + own_d, Rd, Sd, scale_d, spread_d, MODE_D) - f_d
            n_h = first_from(h0 + own_h, Rh, Sh, scale_h, spread_h, MODE_H) - f_h
            n_w = first_from(w0 + own_w, Rw, Sw, scale_w, spread_w, MODE_W) - f_w
            for q0 in range(0, n_d * n_h * n_w, BF):
                q = q0 + tl.arange(0, BF)
                o_inside = q < n_d * n_h * n_w
                od, oh, ow = f_d + q // (n_h * n_w), f_h + q // n_w % n_h, f_w + q % n_w
                up = resized(
                    scratch, 0, od, oh, ow, o_inside, 1, BT, BH * BW, BW, d0, h0, w0, Rd, Rh, Rw,
                    scale_d, scale_h, scale_w, False, MODE_D, MODE_H, MODE_W, OFFSET,
                )  # fmt: skip
                o = (od.to(OFFSET) * Sh + oh) * Sw + ow
                for c0 in range(0, C, BC):
                    c = c0 + k
                    tile = load_tile(x, c, o, c < C, o_inside, C, Sv, X_CL).to(tl.float32)
                    store_tile(y, tile * up[None, :], c, o, c < C, o_inside, C, Sv, X_CL)
        else:
            for c0 in range(0, C, BC):
                c = c0 + k
                tile = load_tile(x, c, v, c < C, inside, C, Sv, X_CL).to(tl.float32)
                store_tile(y, tile * a[None, :], c, v, c < C, inside, C, Sv, X_CL)


@triton.jit
def apply_kernel(
    x, alpha, y, C, Sd, Sh, Sw, Sv, Rd, Rh, Rw, Rv, tiles, scale_d, scale_h, scale_w,
    BC: tl.constexpr, BF: tl.constexpr, X_CL: tl.constexpr,
    MODE_D: tl.constexpr, MODE_H: tl.constexpr, MODE_W: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """y = x * resize(alpha): a run of BF fine voxels, all channels. Moves x, y and alpha's one channel."""
    tile = tl.program_id(0)
    n, begin = tile // tiles, tile % tiles * BF
    v, d, h, w, inside = tile_voxels(0, 0, begin, Sd, Sh, Sw, Sv, 1, 1, BF, False, OFFSET)
    up = resized(
        sample(alpha, n, 1, Rv), 0, d, h, w, inside, 1, Rv, Rh * Rw, Rw, 0, 0, 0, Rd, Rh, Rw,
        scale_d, scale_h, scale_w,
        False, MODE_D, MODE_H, MODE_W, OFFSET,
    )  # fmt: skip
    x, y = sample(x, n, C, Sv), sample(y, n, C, Sv)
    for c0 in range(0, C, BC):
        c = c0 + tl.arange(0, BC).to(OFFSET)
        value = load_tile(x, c, v, c < C, inside, C, Sv, X_CL).to(tl.float32) * up[None, :]
        store_tile(y, value, c, v, c < C, inside, C, Sv, X_CL)
