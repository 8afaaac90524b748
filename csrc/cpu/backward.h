// Backward. Bytes that must move on one grid: x, g and dy read once, dx and dg written once.
//
//   d_alpha = resize^T(sum_c dy * x)
//   d_logit = d_alpha * alpha * (1 - alpha)
//   ds      = d_logit * psi * activation'(s)
//   dx      = dy * resize(alpha) + W_theta^T ds
//   dg      = W_phi^T ds
//   dW      = ds [x; g]^T
//   dbias   = sum ds
//   dpsi    = sum d_logit * q
//   db      = sum d_logit
//
// s is recomputed tile by tile, or read where forward stored it.
//
// Parameter gradients are summed per group of tiles; the groups depend on the problem alone, never on the
// number of threads, and are added in order: the same bits from run to run.
#pragma once
#include "input_gradient.h"
#include "norms.h"
#include "weight_gradient.h"

namespace attn_gate::cpu {
namespace {

// What a thread holds while it goes through its groups of tiles.
template <class T>
class Backward {
  using A = Acc<T>;

 public:
  Backward(const Problem& p, const Layout& layout)
      : p_(p), layout_(layout), work_(p, layout, true), tiles_(p, work_.ld), ld_(work_.ld), I_(p.inter),
        Ip_(work_.packed.inter), dy_here_(p.dy && p.same_grid()),
        dx_directly_(p.dx && p.uses_x() && in_rows(work_, p.dx) &&
                     !(p.dy && (!p.same_grid() || p.dy.channels_last))),
        dg_directly_(p.dg && in_rows(work_, p.dg)),
        dy_in_tile_(dy_here_ && (p.dy.channels_last || (p.dx && !dx_directly_))),
        weights_(p.weight_grads && p.depth() > 0), alpha_(ld_), dlogit_(ld_), ds_(Ip_ * ld_),
        own_ds_g_(p.norms ? Ip_ * ld_ : 0), ds_g_(p.norms ? own_ds_g_ : ds_),
        dy_(dy_in_tile_ ? round_up(p.x.channels, MatrixUnits::kRows) * ld_ : 0),
        own_x_(dy_here_ && !p.uses_x() ? p.x.channels * ld_ : 0), lane_sums_(4 * Ip_ * kLanes<A>),
        ds_t_(sums_weights() ? Ip_ * ld_ : 0), panel_(sums_weights() && !work_.units ? kPanel * ld_ : 0),
        packed_rows_(sums_weights() && work_.units ? kRowsPacked * 3 * ld_ : 0), line_(p.fine.w) {
    if (p.dy && !dy_here_ && p.dfine) alpha_resize_.emplace(p.alpha_resize, p.coarse, p.fine, true);
  }

  // The groups [first, last) of `groups`.
  void go_through(int64_t groups, int64_t first, int64_t last) {
    const int64_t behind = tiles_.first_of(last, groups);
    int64_t t = tiles_.first_of(first, groups);
    work_.begin(next_, tiles_[t]);
    for (int64_t group = first; group < last; ++group) {
      begin_group(group);
      for (const int64_t begin = t, end = tiles_.first_of(group + 1, groups); t < end; ++t) {
        const Voxels tile = tiles_[t];
        begin_tile(tile, t + 1 < behind ? tiles_[t + 1] : Voxels{tile.n, tile.v1, tile.v1});
        find_dlogit();
        find_ds();
        if (weights_) layout_.weight_panels > 0 ? keep_turned(t) : add_to_weights(t == begin);
        write_dg();  // then dx: the tile's rows of the input are free now
        write_dx();
      }
      end_group();
    }
    streams_end();
  }

 private:
  void begin_group(int64_t group) {
    std::memset(lane_sums_, 0, size_t(4 * Ip_ * kLanes<A>) * sizeof(A));
    sums_ = static_cast<A*>(p_.partial) + layout_.group_at + group * layout_.partial_elements;
    db_ = 0;
  }
  void end_group() {
    if (p_.norms && !p_.norm_sums) return;
    const auto leave = [&](const A* lanes, int64_t at) {
      for (int64_t i = 0; i < I_; ++i) sums_[at + i] = horizontal_sum<A>(load(lanes + i * kLanes<A>));
    };
    leave(bias_sums(), layout_.bias_at);
    leave(psi_sums(), layout_.psi_at);
    sums_[layout_.psi_bias_at] = db_;
    if (!p_.norms) return;
    leave(scale_sums(), layout_.scale_x_at);
    leave(scale_sums() + Ip_ * kLanes<A>, layout_.scale_g_at);
  }

  // Has the tile's input at hand, what it is given, and s where the units make it.
  void begin_tile(const Voxels& tile, const Voxels& after) {
    tile_ = tile;
    const auto [n, v0, v1] = tile;
    const int64_t len = tile.len(), padded = round_up(len, kLanes<A>);
    work_.turn_to(next_, tile, after);
    work_.load_given(n, v0, v1);
    if (work_.units && work_.makes_s()) {
      work_.multiply_by_units(next_, len);
      work_.mend_tile(tile);
    }
    if (p_.ds) {
      for (int64_t i = I_; i < Ip_; ++i) std::memset(ds_ + i * ld_, 0, size_t(padded) * sizeof(A));
      load_tile<T>(p_.ds, work_.flat, n, v0, v1, static_cast<A*>(ds_), ld_);
    }
    if (p_.alpha) take_coarse(p_.alpha, alpha_);
  }
  // to[i] = map[N, R] of the tile's voxels, or 0 where there is no map; zeros up to the next whole vector.
  void take_coarse(const void* map, A* to) const {
    const int64_t len = map ? tile_.len() : 0;
    if (map)
      std::memcpy(to, static_cast<const A*>(map) + tile_.n * p_.coarse.voxels() + tile_.v0,
                  size_t(len) * sizeof(A));
    for (int64_t i = len; i < round_up(tile_.len(), kLanes<A>); ++i) to[i] = A(0);
  }

  // d_logit, and dy * alpha in place of a tile of dy.
  void find_dlogit() {
    A *const dlogit = dlogit_, *const alpha = alpha_;
    take_coarse(p_.dalpha, dlogit);
    if (dy_here_) {
      add_dot(dlogit);
    } else if (alpha_resize_) {
      add_dfine(dlogit);
    }
    const int64_t len = tile_.len();
    if (p_.through_sigmoid)
      for (int64_t i = 0; i < len; ++i) dlogit[i] *= alpha[i] * (A(1) - alpha[i]);
    for (int64_t i = 0; i < len; ++i) db_ += dlogit[i];
  }
  // dalpha += sum_c dy * x, all on one grid.
  void add_dot(A* dalpha) {
    const auto [n, v0, v1] = tile_;
    const int64_t len = tile_.len(), C = p_.x.channels, ld = ld_;
    const A* x = p_.uses_x() ? work_.rows : static_cast<A*>(own_x_);
    if (!p_.uses_x()) load_tile<T>(p_.x, work_.flat, n, v0, v1, static_cast<A*>(own_x_), ld);
    if (!dy_in_tile_) {
      for (int64_t c = 0; p_.through_sigmoid && c < C; ++c) {
        const T* dy = sample_of<T>(p_.dy, n) + c * p_.coarse.voxels() + v0;
        for (int64_t i = 0; i < len; ++i) dalpha[i] += to_acc(dy[i]) * x[c * ld + i];
      }
      return;
    }
    A* const dy = dy_;
    load_tile<T>(p_.dy, work_.flat, n, v0, v1, dy, ld);
    for (int64_t i = 0; i < len; i += kLanes<A>) {
      const Vec<A> alpha = load(alpha_ + i);
      Vec<A> dot = load(dalpha + i);
      for (int64_t c = 0; c < C; ++c) {
        const Vec<A> d = load(dy + c * ld + i);
        dot += d * load(x + c * ld + i);
        store(dy + c * ld + i, d * alpha);
      }
      if (p_.through_sigmoid) store(dalpha + i, dot);
    }
  }
  // dalpha += resize^T(dfine)
  void add_dfine(A* dalpha) {
    const Grid& coarse = p_.coarse;
    Buffer<A> piece(coarse.w);
    const A* dfine = static_cast<const A*>(p_.dfine) + tile_.n * p_.fine.voxels();
    for_row_pieces(same_row_patches(coarse), tile_.v0, tile_.v1,
                   [&](int64_t first, int64_t count, int64_t offset) {
                     const int64_t w0 = offset % coarse.w, row = offset / coarse.w;
                     alpha_resize_->adjoint_row(dfine, row / coarse.h, row % coarse.h, w0, w0 + count,
                                                static_cast<A*>(piece), static_cast<A*>(line_));
                     for (int64_t i = 0; i < count; ++i) dalpha[first + i] += piece[i];
                   });
  }

  // ds, unless that is given, and the sums over voxels.
  void find_ds() {
    const int64_t len = tile_.len(), ld = ld_, I = I_;
    A *const ds = ds_, *const bias_to = bias_sums(), *const psi_to = psi_sums();
    const A* const dlogit = dlogit_;
    if (p_.norms) {
      normed_rows(work_, len, dlogit, ds, ds_g_, bias_to, psi_to, scale_sums(), next_);
    } else if (!p_.ds) {
      for_panels<A>(len, [&](auto nv, int64_t at) {
        constexpr int NV = decltype(nv)::value;
        for (int64_t i = 0; i < I; i += kRows) {
          Vec<A> acc[kRows][NV];
          work_.template preactivation<NV>(i, at, acc, next_);
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) {
            Vec<A> bias_sum = load(bias_to + (i + r) * kLanes<A>),
                   psi_sum = load(psi_to + (i + r) * kLanes<A>);
#pragma GCC unroll 3
            for (int j = 0; j < NV; ++j) {
              const Vec<A> d = load(dlogit + at + j * kLanes<A>);
              psi_sum += d * activate<A>(p_.activation, acc[r][j]);
              const Vec<A> e = activate_backward<A>(p_.activation, acc[r][j], d * work_.packed.psi[i + r]);
              bias_sum += e;
              store(ds + (i + r) * ld + at + j * kLanes<A>, e);
            }
            store(bias_to + (i + r) * kLanes<A>, bias_sum);
            store(psi_to + (i + r) * kLanes<A>, psi_sum);
          }
        }
      });
    }
    if (p_.dtheta)
      store_tile<false, T>(p_.dtheta, work_.flat, tile_.n, tile_.v0, tile_.v1, static_cast<const A*>(ds), ld);
  }

  // Whether the weight gradients of a tile join its group's sums.
  bool sums_weights() const { return weights_ && layout_.weight_panels == 0; }
  // to = ds turned, in blocks of rows.
  void turn(const A* ds, A* to) const {
    for (int64_t i = 0; i < Ip_; i += kBlock<A>)
      transpose<A>(ds + i * ld_, ld_, kBlock<A>, tile_.len(), to + i * ld_, kBlock<A>);
  }
  void keep_turned(int64_t t) const {
    A* to = static_cast<A*>(p_.turned) + t * Ip_ * ld_;
    turn(ds_, to);
    if (p_.norms) turn(ds_g_, to + layout_.turned_g);
  }
  // dW = (first) or += ds [x; g]^T
  void add_to_weights(bool first) {
    const int64_t len = tile_.len(), ld = ld_, rows_x = p_.rows_x();
    const A* turned = nullptr;  // which of ds and ds_g ds_t_ holds
    if constexpr (std::is_same_v<A, float>)
      if (work_.units) {
        const auto add = [&](const float* ds, int64_t k0, int64_t k1, int64_t column) {
          if (k0 == k1) return;
          if (turned != ds) transpose<A>(ds, ld, Ip_, len, static_cast<float*>(ds_t_), Ip_);
          turned = ds;
          add_weights_by_units(work_, next_, k0, k1, static_cast<const float*>(ds_t_), len, first,
                               static_cast<uint16_t*>(packed_rows_), sums_ + column * Ip_);
        };
        add(ds_, 0, rows_x, 0);
        add(ds_g_, rows_x, p_.depth(), layout_.columns_x);
        return;
      }
    for_weight_panels(p_, layout_, 0, count_weight_panels(p_, layout_), [&](const Panel& u) {
      const A* ds = u.of_x ? static_cast<const A*>(ds_) : ds_g_;
      if (turned != ds) turn(ds, ds_t_);
      turned = ds;
      turn_panel(work_.rows + u.row * ld, ld, u.rows, u.width, len, static_cast<A*>(panel_));
      add_weights<A>(p_, ds_t_, ld, static_cast<const A*>(panel_), u.width, len, first, sums_ + u.at * Ip_);
    });
  }

  void write_dg() {
    if (!p_.dg) return;
    const auto [n, v0, v1] = tile_;
    if (dg_directly_)
      return project_back_to<T, A>(work_, ds_g_, false, p_.dg, Map(), nullptr, n, v0, tile_.len(), next_);
    project_back<false>(work_, static_cast<const A*>(ds_g_), false, p_.rows_g(), tile_.len(), work_.rows,
                        next_);
    store_tile<false, T>(p_.dg, work_.flat, n, v0, v1, static_cast<const A*>(work_.rows), ld_);
  }
  void write_dx() {
    if (!p_.dx) return;
    const auto [n, v0, v1] = tile_;
    const int64_t len = tile_.len();
    const A* const ds = ds_;
    if (dx_directly_) {
      project_back_to<T, A>(work_, ds, true, p_.dx, p_.dy, alpha_, n, v0, len, next_);
    } else if (dy_here_) {
      A* const dy = dy_;  // times alpha by now
      if (p_.uses_x()) project_back<true>(work_, ds, true, p_.x.channels, len, dy, next_);
      store_tile<false, T>(p_.dx, work_.flat, n, v0, v1, static_cast<const A*>(dy), ld_);
    } else if (p_.uses_x()) {  // onto dy * resize(alpha), or onto zeros, that is there already
      project_back<false>(work_, ds, true, p_.rows_x(), len, work_.rows, next_);
      store_tile<true, T>(p_.dx, work_.patches, n, v0, v1, static_cast<const A*>(work_.rows), ld_);
    }
  }

  // By lanes, [I][lanes] each, of a group: of ds, and of dlogit * q; of norms what normed_rows() says.
  A* bias_sums() const { return lane_sums_; }
  A* psi_sums() const { return lane_sums_ + Ip_ * kLanes<A>; }
  A* scale_sums() const { return psi_sums() + Ip_ * kLanes<A>; }

  const Problem& p_;
  const Layout& layout_;
  Worker<T> work_;
  NextTile<T> next_;
  const Tiles tiles_;
  const int64_t ld_, I_, Ip_;
  const bool dy_here_;                    // on alpha's grid
  const bool dx_directly_, dg_directly_;  // to memory, from the registers that made it
  const bool dy_in_tile_;                 // or read where it lies
  const bool weights_;
  Voxels tile_{};
  Buffer<A> alpha_, dlogit_;  // of the tile
  Buffer<A> ds_, own_ds_g_;   // [I][ld]
  A* const ds_g_;             // ds of phi, which is another behind batch norms
  Buffer<A> dy_, own_x_;      // [C][ld]; dy becomes dx
  Buffer<A> lane_sums_;
  Buffer<A> ds_t_, panel_;
  Buffer<uint16_t> packed_rows_;
  Buffer<A> line_;
  std::optional<Resizer<A>> alpha_resize_;
  A* sums_ = nullptr;  // the group's
  A db_ = 0;
};

template <class T>
void backward_groups(const Problem& p, const Layout& layout, int64_t groups, int64_t first, int64_t last) {
  Backward<T>(p, layout).go_through(groups, first, last);
}

}  // namespace
}  // namespace attn_gate::cpu
