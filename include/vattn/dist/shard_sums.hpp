// What a shard's sample says of its heads: sums about a centre that all shards share, and what they merge into.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <span>

#include "vattn/dist/shard_format.hpp"
#include "vattn/estimate/strata.hpp"
#include "vattn/index/index_reader.hpp"
#include "vattn/stats/evidence.hpp"

namespace vattn::VATTN_ABI::dist {

/// Sums over a shard's rows for the heads of a group, about `centre`.
class shard_sums {
 public:
  [[nodiscard]] static std::size_t storage_size(index_t heads, index_t dv, int groups) noexcept {
    return static_cast<std::size_t>((3 + groups) * heads * dv + 4 * heads * kernel::block_rows);
  }

  shard_sums() = default;
  shard_sums(std::span<float> storage, index_t heads, index_t dv, int groups) noexcept
      : storage_(storage), heads_(heads), dv_(dv), groups_(groups) {}

  void clear() noexcept {
    std::fill(storage_.begin(), storage_.end(), 0.0f);
    s_ = {};
    more_ = {};
  }
  [[nodiscard]] stats::scalar_sums& of(index_t h) noexcept { return s_[at(h)]; }
  [[nodiscard]] look_scalars& more(index_t h) noexcept { return more_[at(h)]; }
  /// As stats::sample_sums numbers them.
  [[nodiscard]] float* vector(index_t i, index_t h) noexcept { return storage_.data() + (i * heads_ + h) * dv_; }

  /// All picks of a sample whose values are chosen. `key` deals signs; `first_group`: of the first rows.
  template <kv_head Head>
  void add_sample(kernel::isa how, const Head& head, index_reader<Head>& read, const float* centre, std::uint64_t key,
                  int first_group) noexcept {
    using V = typename row_gatherer<Head>::value_element;
    using kernel::squared_distance;
    for (index_t h = 0; h < heads_; ++h) s_[at(h)].reference = double{read.reference(h)};
    constexpr index_t rows = kernel::block_rows;
    // Of a row, whatever the head: what it counts for, ±√t, ‖v − c‖² and, if chance took it, ‖v − c‖.
    struct row {
      stats::row_weight q;
      double root, rho, far;
    };
    std::array<row, static_cast<std::size_t>(rows)> all;
    index_t part = first_group;
    read.visit_values(
        [&](const ordinal* cells, index_t n, const float* w, const float* x, const kernel::block_of_rows& values) {
          float* const block = storage_.data() + (3 + groups_) * heads_ * dv_;  // [4, heads, rows]
          std::fill_n(block, 4 * heads_ * rows, 0.0f);
          index_t certain = 0;
          for (index_t i = 0; i < n; ++i) {
            row& r = all[at(i)];
            r.q = stats::poisson_row(std::max(1.0, double{w[i]}));
            r.rho = static_cast<double>(squared_distance(head.value(index_t{cells[i]}), centre));
            r.root = stats::deal(key, cells[i], 1).negative ? -std::sqrt(r.q.t) : std::sqrt(r.q.t);
            r.far = r.q.t > 0 ? std::sqrt(r.rho) : 0;
            certain += r.q.t > 0 ? 0 : 1;
          }
          for (index_t h = 0; h < heads_; ++h) {
            stats::scalar_sums s = s_[at(h)];
            double reach = more_[at(h)].reach;
            const float* const xs = x + h * rows;
            float *nominal = block + h * rows, *second = block + (heads_ + h) * rows;
            float *third = block + (2 * heads_ + h) * rows, *along = block + (3 * heads_ + h) * rows;
            for (index_t from = 0; from < n; from += sign_rows) {
              double signed_x = 0;
              for (index_t i = from; i < std::min(n, from + sign_rows); ++i) {
                const row& r = all[at(i)];
                const double y = double{xs[i]}, wx = r.q.w * y, tx2 = r.q.t * y * y, tx2r = tx2 * r.rho;
                const double sx3 = r.q.s * y * y * y, sx3r = sx3 * r.rho, z = r.root * y;
                s.x += wx, s.power += wx * r.rho, reach += wx * r.far;
                s.square += tx2, s.spread += tx2r;
                s.f0 += tx2 * tx2, s.f2 += tx2 * tx2r, s.f4 += tx2r * tx2r;
                s.third0 += sx3, s.third2 += sx3r;
                signed_x += z;
                nominal[i] = static_cast<float>(wx), second[i] = static_cast<float>(tx2);
                third[i] = static_cast<float>(sx3r), along[i] = static_cast<float>(z);
              }
              s.signed_x[(part + from / sign_rows) % groups_] += signed_x;
            }
            s.rows += n, s.certain += certain;
            s_[at(h)] = s, more_[at(h)].reach = reach;
          }
          for (index_t i = 0; i < 3; ++i)
            kernel::block_add<V>(how, block + i * heads_ * rows, heads_, values, dv_, vector(i, 0));
          for (index_t from = 0; from < n; from += sign_rows, ++part) {
            const index_t count = std::min(sign_rows, n - from);
            // The kernels read a block's weights from its beginning.
            for (index_t h = 0; h < heads_; ++h) {
              float* const signs = block + h * rows;
              std::fill_n(signs, rows, 0.0f);
              std::copy_n(block + (3 * heads_ + h) * rows + from, count, signs);
            }
            kernel::block_add<V>(how, block, heads_, values.part(from, count), dv_, vector(3 + part % groups_, 0));
          }
        });
    for (index_t h = 0; h < heads_; ++h) {
      const stats::scalar_sums& s = s_[at(h)];
      from_centre(vector(0, h), s.x, centre);
      from_centre(vector(1, h), s.square, centre);
      from_centre(vector(2, h), s.third2, centre);
      for (int g = 0; g < groups_; ++g) from_centre(vector(3 + g, h), s.signed_x[g], centre);
    }
  }

  /// `count` rows of head h that were read for certain: Σ x, Σ x v [dv] and Σ x‖v − from‖² relative to exp(reference),
  /// which is the sums' own, or the first.
  void add_certain(index_t h, double reference, double x, const float* numerator, double power, const float* from,
                   const float* centre, index_t count) noexcept {
    stats::scalar_sums& s = s_[at(h)];
    if (!(s.reference > -stats::infinity)) s.reference = reference;
    s.rows += count, s.certain += count;
    s.x += x;
    float* const n = vector(0, h);
    double turn = 0, apart = 0;  // Σ x (v − from)·(from − centre), ‖from − centre‖²
    for (index_t j = 0; j < dv_; ++j) {
      const double shift = from ? double{from[j]} - double{centre[j]} : -double{centre[j]};
      const double moved = double{numerator[j]} - (from ? x * double{from[j]} : 0);
      turn += moved * shift, apart += shift * shift;
      n[j] += static_cast<float>(moved + x * shift);
    }
    s.power += std::max(0.0, power + 2 * turn + x * apart);
  }

  /// The message, [f.bytes()].
  void write(const look_format& f, const look_counts& counts, std::span<std::byte> to) noexcept {
    wire_writer(to).put(counts);
    for (index_t h = 0; h < heads_; ++h) {
      wire_writer out(to.subspan(f.offset(h)));
      const stats::scalar_sums& s = s_[at(h)];
      const double all[look_format::scalars] = {s.reference,
                                                s.x,
                                                s.power,
                                                s.square,
                                                s.spread,
                                                s.f0,
                                                s.f2,
                                                s.f4,
                                                s.third0,
                                                s.third2,
                                                more_[at(h)].reach,
                                                more_[at(h)].floor,
                                                static_cast<double>(s.rows),
                                                static_cast<double>(s.certain)};
      out.put(all, look_format::scalars);
      out.put(s.signed_x, groups_);
      out.put(vector(0, h), dv_);
      for (index_t i = 1; i < 3 + groups_; ++i) put_rounded(out, vector(i, h));
    }
  }

 private:
  [[nodiscard]] static constexpr std::size_t at(index_t i) noexcept { return static_cast<std::size_t>(i); }

  void from_centre(float* v, double weight, const float* centre) const noexcept {
    for (index_t j = 0; j < dv_; ++j) v[j] = static_cast<float>(double{v[j]} - weight * double{centre[j]});
  }
  // In steps of 1/32767 of the largest; where that is not finite, neither is what is read back.
  void put_rounded(wire_writer& out, const float* v) const noexcept {
    const float top =
        kernel::const_float_map(v, static_cast<Eigen::Index>(dv_)).cwiseAbs().maxCoeff<Eigen::PropagateNaN>();
    const float unit = top / 32767, inverse = top > 1e-30f && std::isfinite(top) ? 32767 / top : 0.0f;
    out.put(unit);
    std::int16_t* const to = out.room<std::int16_t>(dv_);
    if (!(inverse > 0)) {
      std::fill_n(to, dv_, std::int16_t{0});
      return;
    }
    for (index_t j = 0; j < dv_; ++j)
      to[j] = static_cast<std::int16_t>(static_cast<int>(v[j] * inverse + std::copysign(0.5f, v[j])));
  }

  std::span<float> storage_;  // [3 + groups, heads, dv], [4, heads, block_rows]
  index_t heads_ = 0, dv_ = 0;
  int groups_ = 1;
  std::array<stats::scalar_sums, max_group> s_{};
  std::array<look_scalars, max_group> more_{};
};

/// A head's scalars in a look's message, as `shard_sums::write` orders them.
struct head_scalars {
  double of[look_format::scalars];
  [[nodiscard]] double reference() const noexcept { return of[0]; }
  [[nodiscard]] double x() const noexcept { return of[1]; }
  [[nodiscard]] look_scalars more() const noexcept { return {of[10], of[11]}; }
};
[[nodiscard]] inline head_scalars read_scalars(const look_format& f, const std::byte* message, index_t h) noexcept {
  return wire_reader(message + f.offset(h)).get<head_scalars>();
}

/// The counts of a look's message.
[[nodiscard]] inline look_counts read_counts(const std::byte* message) noexcept {
  return wire_reader(message).get<look_counts>();
}

/// Adds the sums of a head of a look's message to `to`, as stats::sample_sums::merge adds them, and returns its
/// scalars. What was not finite on the wire leaves sums that are not.
inline head_scalars add_sums(const look_format& f, const std::byte* message, index_t h,
                             stats::sample_sums& to) noexcept {
  wire_reader in(message + f.offset(h));
  const auto scalars = in.get<head_scalars>();
  const double* const all = scalars.of;
  stats::scalar_sums s;
  s.reference = all[0], s.x = all[1], s.power = all[2], s.square = all[3], s.spread = all[4];
  s.f0 = all[5], s.f2 = all[6], s.f4 = all[7], s.third0 = all[8], s.third2 = all[9];
  s.rows = static_cast<index_t>(all[12]), s.certain = static_cast<index_t>(all[13]);
  in.get(s.signed_x, f.groups);
  const stats::merge_factors by = stats::merge(to.s, s);
  bool finite = true;
  for (int i = 0; i < 3 + f.groups; ++i) {
    const auto power = [i](double x) { return static_cast<float>(i == 1 ? x * x : i == 2 ? x * x * x : x); };
    const float mine = power(by.mine), theirs = power(by.theirs);
    float* const v = to.vector(i);
    if (i == 0) {
      const float* const from = in.look<float>(f.dv);
      for (index_t j = 0; j < f.dv; ++j) v[j] = mine * v[j] + theirs * from[j];
      continue;
    }
    const float unit = in.get<float>(), each = theirs * unit;
    finite = finite && std::isfinite(unit);
    const std::int16_t* const steps = in.look<std::int16_t>(f.dv);
    for (index_t j = 0; j < f.dv; ++j) v[j] = mine * v[j] + each * static_cast<float>(steps[j]);
  }
  if (!finite) to.s.x = std::numeric_limits<double>::quiet_NaN();
  return scalars;
}

/// stats::estimate of a Poisson sample's sums, for all ranks to make: products of the signed groups, whose number goes
/// with the square of theirs, and whose vectors the wire has rounded, are of floats.
[[nodiscard]] inline stats::evidence estimate_merged(const stats::sample_sums& of, const float* centre, double sink,
                                                     float* output, float* offset) noexcept {
  const double more = sink > -stats::infinity ? std::exp(sink - of.s.reference) : 0, denominator = of.s.x + more;
  stats::centre_products c;
  for (index_t j = 0; j < of.dv; ++j) {
    // The sink's value is 0: −c from the centre.
    offset[j] = static_cast<float>((double{of.vector(0)[j]} - more * double{centre[j]}) / denominator);
    output[j] = offset[j] + centre[j];
    c.add(offset[j], centre[j]);
  }
  stats::sample_sums unsigned_sums = of;
  unsigned_sums.groups = 0;
  stats::sum_products p;
  p.add(unsigned_sums, offset, centre);
  const auto vector = [&](const float* x) { return kernel::const_float_map(x, static_cast<Eigen::Index>(of.dv)); };
  const auto dot = [&](const float* x, const float* y) { return double{vector(x).dot(vector(y))}; };
  for (int g = 0; g < of.groups; ++g) {
    const float* const z = of.vector(3 + g);
    p.zu[g] = dot(z, offset), p.zn[g] = dot(z, of.vector(0)), p.zb[g] = dot(z, of.vector(1));
    p.zh[g] = vector(z).cast<double>().dot(vector(of.vector(2)).cast<double>());  // of x to the fourth
    for (int o = 0; o <= g; ++o) p.zz[g * (g + 1) / 2 + o] = dot(z, of.vector(3 + o));
  }
  return stats::conclude(of.s, p, nullptr, nullptr, {}, c, more, of.groups, of.dv);
}

}  // namespace vattn::VATTN_ABI::dist

#include "vattn/macros_pop.hpp"
