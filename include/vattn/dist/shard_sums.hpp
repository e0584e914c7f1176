// What a shard's sample says of its heads: sums about a centre that all shards share, and their form on the wire.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <span>

#include "vattn/estimate/strata.hpp"
#include "vattn/index/index_reader.hpp"
#include "vattn/stats/evidence.hpp"

namespace vattn::VATTN_ABI::dist {

/// Writes numbers and arrays one behind the other.
class wire_writer {
 public:
  explicit wire_writer(std::span<std::byte> to) noexcept : to_(to) {}
  template <class T>
  void put(const T* from, index_t count) noexcept {
    const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(T);
    VATTN_ASSERT(at_ + bytes <= to_.size());
    std::memcpy(to_.data() + at_, from, bytes);
    at_ += bytes;
  }
  template <class T>
  void put(const T& x) noexcept {
    put(&x, 1);
  }

 private:
  std::span<std::byte> to_;
  std::size_t at_ = 0;
};
/// Reads them back in the same order.
class wire_reader {
 public:
  explicit wire_reader(const std::byte* from) noexcept : from_(from) {}
  template <class T>
  void get(T* to, index_t count) noexcept {
    const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(T);
    std::memcpy(to, from_, bytes);
    from_ += bytes;
  }
  template <class T>
  [[nodiscard]] T get() noexcept {
    T x;
    get(&x, 1);
    return x;
  }

 private:
  const std::byte* from_;
};

/// What one rank sends of a group of heads in a look: for each head the scalars of `stats::sample_sums`, Σ w x (v − c)
/// in float, the other vectors in 16 bits of a unit of their own, which only the evidence rests on. At head size 128
/// that is 13.2 kB for 4 heads and 22.1 kB for 8, whatever the number of tokens.
struct look_format {
  index_t heads = 1, dv = 1;
  int groups = 4;  ///< of random signs

  static constexpr std::size_t most_bytes = 24000;  ///< where 4 groups of signs allow it
  // More of them say little more of ν₁, and cost judging the square of their number.
  static constexpr int most_signs = 8, fewest_groups = 4;

  look_format() = default;
  look_format(index_t of_heads, index_t width) noexcept : heads(of_heads), dv(width), groups(most_signs) {
    while (groups > fewest_groups && bytes() > most_bytes) --groups;
  }
  [[nodiscard]] std::size_t bytes() const noexcept { return group_bytes + static_cast<std::size_t>(heads) * head(); }
  /// Where a head's part begins.
  [[nodiscard]] std::size_t offset(index_t h) const noexcept {
    return group_bytes + static_cast<std::size_t>(h) * head();
  }

  static constexpr int scalars = 14;

 private:
  static constexpr std::size_t group_bytes = 6 * sizeof(double);
  [[nodiscard]] std::size_t head() const noexcept {
    const auto width = static_cast<std::size_t>(dv), signs = static_cast<std::size_t>(groups);
    const std::size_t all = (scalars + signs) * sizeof(double) + width * sizeof(float) +
                            (2 + signs) * (sizeof(float) + width * sizeof(std::int16_t));
    return (all + 7) / 8 * 8;
  }
};

/// Of a group, besides its heads' sums.
struct look_counts {
  double away = 0;  ///< distance of an output from the shard's own centre that its probabilities allow for
  index_t certain = 0, picks = 0, breaches = 0;
  std::uint64_t samples = 0;  ///< 0: all rows were read
  std::uint64_t unsound = 0;  ///< scores do not know their errors: not to be judged
};

/// Of a head, besides its sums.
struct look_scalars {
  double reach = 0;                 ///< Σ w x‖v − c‖ over what was sampled, relative to exp(reference)
  double floor = -stats::infinity;  ///< log of x‖v − ô‖ that no unread token exceeds but by chance; −∞: none is unread
};

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
    index_t part = first_group;
    read.visit_values([&](const ordinal* cells, index_t n, const float* w, const float* x,
                          const kernel::block_of_rows& values) {
      constexpr index_t rows = kernel::block_rows;
      float* const block = storage_.data() + (3 + groups_) * heads_ * dv_;  // [4, heads, rows]
      std::fill_n(block, 4 * heads_ * rows, 0.0f);
      std::array<double, static_cast<std::size_t>(rows)> rho, sign;
      for (index_t i = 0; i < n; ++i) {
        rho[at(i)] = static_cast<double>(squared_distance(head.value(index_t{cells[i]}), centre));
        sign[at(i)] = stats::deal(key, cells[i], 1).negative ? -1 : 1;
      }
      for (index_t h = 0; h < heads_; ++h) {
        stats::scalar_sums& s = s_[at(h)];
        float *nominal = block + h * rows, *second = block + (heads_ + h) * rows;
        float *third = block + (2 * heads_ + h) * rows, *along = block + (3 * heads_ + h) * rows;
        for (index_t i = 0; i < n; ++i) {
          const stats::row_weight q = stats::poisson_row(std::max(1.0, double{w[i]}));
          const double y = double{x[h * rows + i]}, wx = q.w * y, tx2 = q.t * y * y, r = rho[at(i)];
          s.x += wx, s.power += wx * r;
          nominal[i] = static_cast<float>(wx);
          s.rows += 1, s.certain += q.t > 0 ? 0 : 1;
          if (!(q.t > 0)) continue;
          const double sx3 = q.s * y * y * y, z = sign[at(i)] * y * std::sqrt(q.t);
          more_[at(h)].reach += wx * std::sqrt(r);
          s.square += tx2, s.spread += tx2 * r;
          s.f0 += tx2 * tx2, s.f2 += tx2 * tx2 * r, s.f4 += tx2 * tx2 * r * r;
          s.third0 += sx3, s.third2 += sx3 * r;
          s.signed_x[static_cast<std::size_t>((part + i / sign_rows) % groups_)] += z;
          second[i] = static_cast<float>(tx2), third[i] = static_cast<float>(sx3 * r), along[i] = static_cast<float>(z);
        }
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
    for (index_t j = 0; j < dv_; ++j)
      out.put(inverse > 0 ? static_cast<std::int16_t>(v[j] * inverse + std::copysign(0.5f, v[j])) : std::int16_t{0});
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
  [[nodiscard]] double floor() const noexcept { return of[11]; }
};
[[nodiscard]] inline head_scalars read_scalars(const look_format& f, const std::byte* message, index_t h) noexcept {
  return wire_reader(message + f.offset(h)).get<head_scalars>();
}

/// The counts of a look's message, and the sums of one of its heads; `to` has the vectors' memory.
[[nodiscard]] inline look_counts read_counts(const std::byte* message) noexcept {
  return wire_reader(message).get<look_counts>();
}
inline look_scalars read_sums(const look_format& f, const std::byte* message, index_t h,
                              stats::sample_sums& to) noexcept {
  wire_reader in(message + f.offset(h));
  const auto [all] = in.get<head_scalars>();
  stats::scalar_sums& s = to.s = {};
  s.reference = all[0], s.x = all[1], s.power = all[2], s.square = all[3], s.spread = all[4];
  s.f0 = all[5], s.f2 = all[6], s.f4 = all[7], s.third0 = all[8], s.third2 = all[9];
  s.rows = static_cast<index_t>(all[12]), s.certain = static_cast<index_t>(all[13]);
  in.get(s.signed_x, f.groups);
  in.get(to.vector(0), f.dv);
  for (int i = 1; i < 3 + f.groups; ++i) {
    const float unit = in.get<float>();
    float* const v = to.vector(i);
    for (index_t j = 0; j < f.dv; ++j) {
      const auto steps = in.get<std::int16_t>();
      v[j] = std::isfinite(unit) ? unit * static_cast<float>(steps) : unit;
    }
  }
  return {all[10], all[11]};
}

}  // namespace vattn::VATTN_ABI::dist

#include "vattn/macros_pop.hpp"
