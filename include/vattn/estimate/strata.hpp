// Sums over rows of two strata, for the heads of a group at once: picked rows of unequal probability, and a uniform
// sample of the rest. One pass over K and V.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <span>

#include "vattn/base/workspace.hpp"
#include "vattn/kernel/block.hpp"
#include "vattn/kernel/row_sums.hpp"
#include "vattn/stats/evidence.hpp"

namespace vattn::VATTN_ABI {

/// Query heads whose rows are read together, at most.
inline constexpr index_t max_group = 8;

/// A block of rows as `stratum::add` wants them: 1/π, t = 1/π·(1/π − 1), r². What lies behind the rows is 0.
struct block_weights {
  alignas(64) float w[kernel::block_rows], t[kernel::block_rows], r2[kernel::block_rows];
  void clear() noexcept {
    std::fill_n(w, kernel::block_rows, 0.0f);
    std::fill_n(t, kernel::block_rows, 0.0f);
    std::fill_n(r2, kernel::block_rows, 0.0f);
  }
};

/// Σ over the rows of one stratum, for one head; x = exp(l − reference), r = ‖v − c‖ for a fixed centre c, w the row's
/// weight 1/π and t = (1 − π)/π² its variance factor. r is in the stratum's unit.
struct stratum_scalars {
  double x = 0;                   ///< Σ w x
  double power = 0;               ///< Σ w x r²
  double square = 0;              ///< Σ t x²
  double spread = 0;              ///< Σ t x² r²
  double f0 = 0, f2 = 0, f4 = 0;  ///< Σ t² x⁴ {1, r², r⁴}
};

/// Groups to which rows are dealt with random signs, for Tr(Σ²).
inline constexpr index_t sign_groups = 8;
inline constexpr index_t sign_rows = 16;          ///< consecutive rows that share one
inline constexpr index_t most_signed_rows = 384;  ///< the rest says no more about the spectrum

/// The sums of one stratum. Vectors are the caller's memory, see `storage_size`. Values' squares, r² and all that is
/// given as u, o or a length, are in `unit` (kernel/units.hpp); vectors of sums are as values are.
class stratum {
 public:
  [[nodiscard]] static std::size_t storage_size(index_t heads, index_t dv) noexcept {
    return static_cast<std::size_t>((2 + sign_groups) * heads * dv);
  }

  stratum() = default;
  stratum(std::span<float> storage, index_t heads, index_t dv, float unit = 1) noexcept
      : storage_(storage), heads_(heads), dv_(dv), unit_(unit) {
    clear();
  }

  void clear() noexcept {
    std::fill(storage_.begin(), storage_.end(), 0.0f);
    scalars_ = {};
    signed_x_ = sign_square_ = sign_spread_ = {};
    tilted_square_ = tilted_spread_ = {};
    rows_ = signed_rows_ = 0;
  }

  [[nodiscard]] index_t rows() const noexcept { return rows_; }
  [[nodiscard]] float unit() const noexcept { return unit_; }
  [[nodiscard]] const stratum_scalars& of(index_t h) const noexcept { return scalars_[at(h)]; }
  /// Σ w x v of a head, [dv].
  [[nodiscard]] const float* numerator(index_t h) const noexcept { return storage_.data() + h * dv_; }

  /// Σ t x²‖v − ô‖² = Σ t x²(r² − 2(v − c)·u + u²), u = ô − c [dv], the middle term's share from the first rows.
  [[nodiscard]] double second(index_t h, const kernel::float_map& u, double u2, double cu) const noexcept {
    const stratum_scalars& k = of(h);
    const double rough = tilted_spread_[at(h)] + tilted_square_[at(h)] * u2;
    if (!(rough > 0)) return k.spread + k.square * u2;
    const kernel::const_float_map tilt(storage_.data() + (heads_ + h) * dv_, static_cast<Eigen::Index>(dv_));
    const double middle = static_cast<double>(unit_ * tilt.dot(u)) - tilted_square_[at(h)] * cu;
    return (k.spread + k.square * u2) * std::max(0.0, 1 - 2 * middle / rough);
  }

  /// Rows from here on get no signs: sums that are merged into others need no storage but numerators, [heads, dv].
  void without_signs() noexcept { signed_rows_ = most_signed_rows; }
  [[nodiscard]] bool wants_signs() const noexcept { return signed_rows_ < most_signed_rows; }
  /// Adds the sums of other rows, which have no signs and the same references.
  void merge(const stratum& other) noexcept {
    const index_t n = heads_ * dv_;
    for (index_t j = 0; j < n; ++j) storage_[at(j)] += other.storage_[at(j)];
    for (index_t h = 0; h < heads_; ++h) {
      stratum_scalars& s = scalars_[at(h)];
      const stratum_scalars& o = other.scalars_[at(h)];
      s.x += o.x, s.power += o.power, s.square += o.square, s.spread += o.spread;
      s.f0 += o.f0, s.f2 += o.f2, s.f4 += o.f4;
    }
    rows_ += other.rows_;
  }

  /// Multiplies every x of a head by `factor`.
  void rescale(index_t h, double factor) noexcept {
    const auto f = static_cast<float>(factor);
    const auto scale = [&](float* v, float by) {
      for (index_t j = 0; j < dv_; ++j) v[j] *= by;
    };
    scale(storage_.data() + h * dv_, f);
    scale(storage_.data() + (heads_ + h) * dv_, f * f);
    stratum_scalars& s = scalars_[at(h)];
    const double square = factor * factor;
    s.x *= factor, s.power *= factor, s.square *= square, s.spread *= square;
    tilted_square_[at(h)] *= square, tilted_spread_[at(h)] *= square;
    s.f0 *= square * square, s.f2 *= square * square, s.f4 *= square * square;
    for (index_t g = 0; g < sign_groups; ++g) {
      scale(signs(g, h), f);
      signed_x_[at(g)][at(h)] *= factor;
      sign_square_[at(g)][at(h)] *= square;
      sign_spread_[at(g)][at(h)] *= square;
    }
  }

  /// Adds a block: x [heads, block_rows] (0 from `values.count` on), w and t [block_rows], r2 = r² [block_rows];
  /// `coins` the rows' random signs. `t` null: all rows are certain (t = 0). Reads each value once a purpose.
  template <kernel::block_element T>
  void add(kernel::isa how, const float* x, const float* w, const float* t, const float* r2,
           const kernel::block_of_rows& values, std::uint64_t coins, float* scratch) noexcept {
    using block = Eigen::Map<const Eigen::Array<float, kernel::block_rows, 1>>;
    const auto real = [](float sum) { return static_cast<double>(sum); };
    const auto rows_of = [](auto* all, index_t h) { return all + h * kernel::block_rows; };
    rows_ += values.count;
    for (index_t h = 0; h < heads_; ++h) {
      const kernel::weighted_totals sums =
          kernel::weighted_sums(how, rows_of(x, h), w, r2, kernel::block_rows, rows_of(scratch, h));
      scalars_[at(h)].x += real(sums.sum);
      scalars_[at(h)].power += real(sums.far);
    }
    kernel::block_add<T>(how, scratch, heads_, values, dv_, storage_.data());
    if (t == nullptr) return;
    const bool with_signs = wants_signs();
    for (index_t h = 0; h < heads_; ++h) {
      const kernel::squared_totals sums =
          kernel::squared_sums(how, rows_of(x, h), t, r2, kernel::block_rows, rows_of(scratch, h));
      stratum_scalars& s = scalars_[at(h)];
      s.square += real(sums.sum), s.spread += real(sums.far);
      s.f0 += real(sums.f0), s.f2 += real(sums.f2), s.f4 += real(sums.f4);
      if (!with_signs) continue;
      tilted_square_[at(h)] += real(sums.sum);
      tilted_spread_[at(h)] += real(sums.far);
    }
    if (!with_signs) return;
    kernel::block_add<T>(how, scratch, heads_, values, dv_, storage_.data() + heads_ * dv_);
    Eigen::Array<float, kernel::block_rows, 1> root = block(t).sqrt();  // and a sign, the same for all heads
    for (int i = 0; i < static_cast<int>(kernel::block_rows); ++i) root[i] = coins >> i & 1 ? root[i] : -root[i];
    using part_of_block = Eigen::Array<float, sign_rows, 1>;
    for (index_t from = 0; from < values.count; from += sign_rows) {
      const index_t count = std::min(sign_rows, values.count - from), g = signed_rows_ / sign_rows % sign_groups;
      const Eigen::Map<const part_of_block> sign(root.data() + from), far(r2 + from);
      for (index_t h = 0; h < heads_; ++h) {
        const Eigen::Map<const part_of_block> xs(x + h * kernel::block_rows + from);
        Eigen::Map<part_of_block> z(scratch + h * kernel::block_rows);
        z = sign * xs;
        const part_of_block square = z.square();
        signed_x_[at(g)][at(h)] += static_cast<double>(z.sum());
        sign_square_[at(g)][at(h)] += static_cast<double>(square.sum());
        sign_spread_[at(g)][at(h)] += static_cast<double>((square * far).sum());
      }
      kernel::block_add<T>(how, scratch, heads_, values.part(from, count), dv_, signs(g, 0));
      signed_rows_ += sign_rows;
    }
  }

  /// ν₁ = Tr(Σ)²/Tr(Σ²) of the terms x(v − o), from the signed groups: E (Z_a·Z_b)² is the sum of (z_i·z_j)² over their
  /// rows, and Σ‖z‖² of each is known (r² + u² stands for ‖v − o‖²). 1 to dv.
  [[nodiscard]] double dimension(index_t h, const float* o, double u2) const noexcept {
    double traces = 0, products = 0;
    const index_t used = std::min(sign_groups, signed_rows_ / sign_rows);
    const auto n = static_cast<Eigen::Index>(dv_);
    const kernel::const_float_map output(o, n);
    std::array<double, sign_groups> along{};  // Z·o
    const double o2 = static_cast<double>(output.squaredNorm());
    for (index_t a = 0; a < used; ++a) {
      const kernel::const_float_map za(signs(a, h), n);
      along[at(a)] = static_cast<double>(unit_ * za.dot(output));
      const double xa = signed_x_[at(a)][at(h)];
      for (index_t b = 0; b < a; ++b) {
        const double xb = signed_x_[at(b)][at(h)];
        const kernel::const_float_map zb(signs(b, h), n);
        const float product = unit_ == 1 ? za.dot(zb) : (za * unit_).dot(zb * unit_);
        const double dot = static_cast<double>(product) - xb * along[at(a)] - xa * along[at(b)] + xa * xb * o2;
        traces += (sign_spread_[at(a)][at(h)] + u2 * sign_square_[at(a)][at(h)]) *
                  (sign_spread_[at(b)][at(h)] + u2 * sign_square_[at(b)][at(h)]);
        products += dot * dot;
      }
    }
    return products > 0 ? std::clamp(traces / products, 1.0, static_cast<double>(dv_)) : 1.0;
  }

 private:
  [[nodiscard]] static std::size_t at(index_t i) noexcept { return static_cast<std::size_t>(i); }
  [[nodiscard]] float* signs(index_t g, index_t h) noexcept { return storage_.data() + ((2 + g) * heads_ + h) * dv_; }
  [[nodiscard]] const float* signs(index_t g, index_t h) const noexcept {
    return storage_.data() + ((2 + g) * heads_ + h) * dv_;
  }

  std::span<float> storage_;  // [2 + sign_groups, heads, dv]
  index_t heads_ = 0, dv_ = 0, rows_ = 0, signed_rows_ = 0;
  float unit_ = 1;
  std::array<stratum_scalars, max_group> scalars_{};
  std::array<double, max_group> tilted_square_{}, tilted_spread_{};
  std::array<std::array<double, max_group>, sign_groups> signed_x_{}, sign_square_{}, sign_spread_{};
};

/// Output of one head from both strata and its evidence; squared lengths are in the strata's unit.
/// `picked`: rows with weights of their own, Poisson (certain ones with t = 0). `light`: those of m rows drawn
/// uniformly without replacement from n that belong to the light stratum, with w = t = 1. `extra` is added to D (a
/// learned sink). `centre` is as values are. Writes ô to `output` [dv], as values are too. `scratch` [2·dv].
///   V = Σ t x²‖v − ô‖²/D̂² over the picked, (n/m)²·(1 − m/n)·m/(m − 1)·(Σ‖Y‖² − ‖ΣY‖²/m) over the light
[[nodiscard]] inline stats::evidence estimate_strata(const stratum& picked, const stratum& light, index_t h, index_t n,
                                                     index_t m, double extra, std::span<const float> centre,
                                                     std::span<float> output, float* scratch) noexcept {
  stats::evidence e;
  const auto dv = static_cast<Eigen::Index>(output.size());
  const stratum_scalars &p = picked.of(h), &l = light.of(h);
  const double count = static_cast<double>(m), weight = m > 0 ? static_cast<double>(n) / count : 0;
  e.denominator = p.x + weight * l.x + extra;
  const float unit = picked.unit();
  const kernel::const_float_map pn(picked.numerator(h), dv), ln(light.numerator(h), dv);
  kernel::float_map o(scratch + dv, dv), u(scratch, dv);
  kernel::float_map(output.data(), dv) = (pn + static_cast<float>(weight) * ln) * static_cast<float>(1 / e.denominator);
  o = kernel::const_float_map(output.data(), dv) * unit;
  const auto c = kernel::const_float_map(centre.data(), dv) * unit;
  u = o - c;
  const auto real = [](float x) { return static_cast<double>(x); };
  e.output2 = real(o.squaredNorm());
  e.away2 = real(u.squaredNorm());
  const double c2 = real(c.squaredNorm());
  e.power = (p.power + weight * l.power + 2 * real(c.dot((pn + static_cast<float>(weight) * ln) * unit)) -
             c2 * (p.x + weight * l.x)) /
            e.denominator;

  const double cu = real(c.dot(u));
  const auto fourth = [&](const stratum_scalars& k) {  // ‖v − ô‖⁴ <= r⁴ + 6r²u² + u⁴ on average over directions
    return k.f4 + 6 * e.away2 * k.f2 + e.away2 * e.away2 * k.f0;
  };
  const double d2 = e.denominator * e.denominator;
  const double part_p = picked.second(h, u, e.away2, cu) / d2;
  double part_l = 0, f_l = 0, one_l = 0;
  if (m > 1) {
    const double share = count / static_cast<double>(n);
    const double factor = weight * weight * std::max(0.0, 1 - share) * count / (count - 1);
    const double mean2 = real((ln * unit - static_cast<float>(l.x) * o).squaredNorm()) / count;
    part_l = factor * std::max(0.0, light.second(h, u, e.away2, cu) - mean2) / d2;
    f_l = factor * factor * fourth(l) / (d2 * d2);
    one_l = factor * std::max(0.0, l.square - l.x * l.x / count);
  }
  e.variance = part_p + part_l;
  e.light = part_l;
  e.denominator_variance = (p.square + one_l) / d2;
  const double f = fourth(p) / (d2 * d2) + f_l;
  if (f > 0) e.denominator_dof = e.dof = 2 * e.variance * e.variance / f;
  e.rows = picked.rows() + light.rows();
  // Tr(Σ_p + Σ_l)² <= (Tr(Σ_p²)^½ + Tr(Σ_l²)^½)²
  const double root = (part_p > 0 ? part_p / std::sqrt(picked.dimension(h, o.data(), e.away2)) : 0) +
                      (part_l > 0 ? part_l / std::sqrt(light.dimension(h, o.data(), e.away2)) : 0);
  if (root > 0) e.dimension = std::clamp(e.variance * e.variance / (root * root), 1.0, static_cast<double>(dv));
  return e;
}

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
