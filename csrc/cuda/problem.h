// What the CUDA kernels are asked to do, as plain data: the interface between the operators, which know
// torch, and the kernels, which know only pointers and sizes.
#pragma once
#include <cstdint>

#include "../grid.h"

namespace attn_gate::cuda {

constexpr int kThreads = 256;     // of every block
constexpr int kCachedPsi = 1024;  // weights of psi in shared memory; more of them are read where they lie
constexpr int kMaxGroups = 1024;  // blocks that sum parameter gradients: fixed, so that sums have fixed bits
constexpr int kMaxShared = 48 << 10;  // bytes of shared memory that a block has without asking

// A feature map in memory: element (n, c, v) lies at data[n * sample + c * channel + v * voxel].
// Contiguous maps have voxel = 1, channels-last ones channel = 1. Null data: absent.
struct Map {
  void* data = nullptr;
  int64_t channels = 0, sample = 0, channel = 0, voxel = 0;
  ATTN_GATE_MEMBER explicit operator bool() const { return data != nullptr; }
  ATTN_GATE_MEMBER bool channels_last() const { return voxel != 1; }
};

// One axis of the coarse grid (R, of alpha) and of the fine one (S, of x), cut into tiles: runs of `tile`
// fine voxels, or of coarse ones (by_coarse).
struct Axis {
  int64_t coarse = 1, fine = 1;
  int tile = 1, tiles = 1;
  bool by_coarse = false;
};

// Equal grids are one long row: mode is identity, d and h are 1.
struct Tiling {
  Axis d, h, w;
  Resize mode = Resize::identity;
  int box = 0, fine_box = 0;  // the most voxels that a tile needs of the coarse grid, and has of the fine one
  bool receives = false;      // "has": all fine voxels that its coarse ones receive from, in the adjoint
  int align = 1;              // rows that a tile needs of the coarse grid begin and end at multiples of this
  ATTN_GATE_MEMBER int64_t tiles() const { return int64_t(d.tiles) * h.tiles * w.tiles; }
};

// The way from theta and phi to a logit. Parameters, alpha and sums are in the accumulation type: float, or
// double for float64 maps.
struct Chain {
  Map theta, phi, dtheta, dphi;
  Grid coarse, gating;  // R of theta, Q of phi
  Resize phi_resize = Resize::identity;
  const void *psi = nullptr, *psi_bias = nullptr;
  int inter = 0;  // I
  Activation activation = Activation::relu;
  bool wide = false;      // theta and what lies on its grid 16 bytes at a time
  bool phi_wide = false;  // phi, where it has a grid of its own
  ATTN_GATE_MEMBER bool phi_resized() const { return phi && phi_resize != Resize::identity; }
};

// Forward: the logits from the chain, or alpha as given (no theta); then y = x * resize(alpha), if there is
// x.
struct Forward {
  Chain chain;
  Tiling tiling;
  Grid fine, coarse;
  Map x, y;
  void* alpha = nullptr;  // [N, R]: out (the logits where there is no x), or in
  bool wide = false;      // x and y 16 bytes at a time
  int64_t batch = 0;
  int slices = 1, slice = 0;  // of x's channels, and channels in each
  // Where phi is resized: channels whose part of it lies in shared memory at a time, and its most voxels.
  int chunk = 0, phi_box = 0;
};

// Backward, in tiles of which each block takes every gridDim-th:
//   stream  (dy):   dx = dy * resize(alpha), dfine = sum_c dy_c * x_c
//   chain (sums):   dalpha += resize^T(dfine), dlogit, dtheta and the sums of dpsi and dpsi_bias
struct Backward {
  Chain chain;
  Tiling tiling;
  Grid fine, coarse;
  Map x, dy, dx;
  const void* alpha = nullptr;   // [N, R]; null: dlogits are given as dalpha
  const void* dalpha = nullptr;  // [N, R] or null
  void* dfine = nullptr;  // [N, S]: written by stream alone, read by chain alone; null: one kernel does both
  void* dalpha_out = nullptr;  // [N, R]: the result where there is no chain behind alpha
  void* sums = nullptr;        // [groups, I + 1]
  bool wide = false;
  int64_t batch = 0;
  Resize alpha_resize = Resize::identity;
  ATTN_GATE_MEMBER bool wants_dots() const { return sums || dalpha_out || dfine; }
  // Whether a tile's part of dfine lies in shared memory: as streamed, or as read.
  ATTN_GATE_MEMBER bool keeps_dots() const {
    return dy ? (sums || dalpha_out) && !dfine : dfine && tiling.receives;
  }
};

// One axis of phi's grid cut into tiles, and the most voxels that a tile needs of each grid.
struct PhiAxis {
  int64_t fine = 1, coarse = 1, gating = 1;  // S, R, Q
  int tile = 1, tiles = 1;
  int need = 1, phi = 1, fine_need = 1;
};

// The chain backward where phi has a grid of its own: dlogit from dfine and dalpha, dtheta, dphi, and sums.
// Blocks take slices of channels, in each every so-manieth tile, and sweep it along d.
struct PhiBackward {
  Chain chain;  // dphi on phi's grid
  Grid fine;    // of 2D maps all grids are [H, 1, W] here: they are swept along H
  PhiAxis d, h, w;
  Resize alpha_resize = Resize::identity;
  const void *alpha = nullptr, *dalpha = nullptr, *dfine = nullptr;  // as in Backward
  void* sums = nullptr;
  int64_t batch = 0;
  int slices = 1, slice = 0;  // of theta's channels, and channels in each
  int rows = 1, scratch = 0;  // of a plane at a time, and the bytes that they need
  bool keeps_planes = false;  // of resize^T(dfine), so that each plane of dfine is read once
  ATTN_GATE_MEMBER int64_t tiles() const { return int64_t(d.tiles) * h.tiles * w.tiles; }
  // The most voxels that a plane of a tile has of phi, and owns.
  ATTN_GATE_MEMBER int phi_plane() const { return h.phi * w.phi; }
  ATTN_GATE_MEMBER int own_plane() const { return h.tile * w.tile; }
};

// Launched on `stream` (a cudaStream_t) of the current device; errors are thrown.
void launch_forward(const Forward&, DType, void* stream);
void launch_backward(const Backward&, DType, int64_t groups, void* stream);
void launch_phi_backward(const PhiBackward&, DType, int64_t groups, void* stream);
// dpsi [I] and dpsi_bias [1] (either may be null): columns of sums [groups, I + 1], added in order.
void launch_reduce(const void* sums, int64_t groups, int inter, void* dpsi, void* dpsi_bias, DType,
                   void* stream);
int processors();  // multiprocessors of the current device

}  // namespace attn_gate::cuda
