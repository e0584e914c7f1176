// Which of the picked tokens are worth their values, once their keys are read: the second half of two-stage sampling.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <span>

#include "vattn/kernel/row.hpp"
#include "vattn/kernel/row_sums.hpp"
#include "vattn/kernel/scan.hpp"
#include "vattn/sample/plan_search.hpp"

namespace vattn::VATTN_ABI {

/// A token that the scan picked with probability π₁ is kept with min(1, π*/π₁), π* = min(1, max_h a_h x_h R_h) by its
/// exact logits (R² = r² + ‖ô − c‖²): in all with π = min(π₁, π*). Its row of V is not read where its key has shown
/// that it hardly matters. The a_h are the least for which each head's variance
///   Σ (x R)²/π₁·(1/min(π₁, π*) − 1)
/// over the picks, itself unbiased for the variance to come, meets its goal.
class thinning {
 public:
  /// Floats of memory for `capacity` picks.
  [[nodiscard]] static constexpr std::size_t storage_size(index_t heads, index_t capacity) noexcept {
    return static_cast<std::size_t>((3 * heads + 2) * padded(capacity));
  }

  thinning() = default;
  thinning(kernel::isa how, std::span<float> storage, index_t heads, index_t picks) noexcept
      : how_(how), storage_(storage), heads_(heads), n_(picks) {
    std::fill_n(column(least_) + picks, padded(picks) - picks, 0.0f);
  }

  /// [picks] 1/π₁, to be filled by the caller.
  [[nodiscard]] float* inverse() const noexcept { return column(least_); }
  /// [picks rounded up to 16] x_h R_h in any unit, to be filled by the caller before what follows; what lies behind the
  /// picks may be overwritten.
  [[nodiscard]] float* weight(index_t h) noexcept { return column(3 * h); }

  /// What the picks' keys say of a head: Σ x/π₁, the variance Σ t (x R)² if all values are read, t = 1/π₁·(1/π₁ − 1),
  /// and the sum of the squares of its terms' shares: near 1 it rests on few picks.
  struct weighed {
    double x = 0, variance = 0, concentration = 0;
  };
  /// Makes weights of the logits that stand in `weight(h)`: x relative to exp(reference), R² = r² + away2. `r2`
  /// [picks].
  [[nodiscard]] weighed weigh(index_t h, float reference, const float* r2, double away2) noexcept {
    const Eigen::Map<const Eigen::ArrayXf> inverse_of(inverse(), n_), reach2(r2, n_);
    kernel::exponentials(how_, weight(h), n_, reference);
    Eigen::Map<Eigen::ArrayXf> w(weight(h), n_);
    const auto x = static_cast<double>((w * inverse_of).sum());
    w *= (reach2 + static_cast<float>(away2)).sqrt();
    const float all = all_kept(h, 1).sum;
    const float squares = all > 1e-30f ? all_kept(h, 1 / all).squares : 0;
    return {x, static_cast<double>(all), static_cast<double>(squares)};
  }

  /// Of t = scale·(x R)²/π₁·(1/π₁ − 1): head h's variance if all picks are kept.
  [[nodiscard]] kernel::variance_totals all_kept(index_t h, float scale) noexcept {
    pad(h);
    return kernel::variance_sums(how_, column(3 * h), column(least_), padded(n_), scale);
  }

  /// `goals` [heads]: variances in the squared unit of a head's weights; infinity: the head asks for nothing. False: a
  /// head does not meet its goal with all picks; then it keeps all of what matters to it.
  [[nodiscard]] bool solve(const std::array<double, kernel::scan_heads>& goals) noexcept {
    bool met = true;
    using map = Eigen::Map<Eigen::ArrayXf>;
    const Eigen::Index n = padded(n_);
    map group(column(best_), n);
    group.setConstant(std::numeric_limits<float>::max());
    std::array<double, kernel::scan_heads> a{};
    for (index_t h = 0; h < heads_; ++h) {
      pad(h);
      total_[at(h)] = static_cast<double>(
          kernel::thinning_terms(how_, column(3 * h), column(least_), n, column(3 * h + 1), column(3 * h + 2)));
      goals_[at(h)] = goals[at(h)];
      a[at(h)] = least(h, met);
      if (a[at(h)] > 0) group = group.min(map(column(3 * h + 2), n) * static_cast<float>(1 / a[at(h)]));
    }
    // What one head keeps serves the others: how far all may ask for less.
    const double rise =
        common_rise(heads_, 2, [&](index_t h, double factor) { return variance(h, true, factor) <= goals_[at(h)]; });
    shift_ = static_cast<float>(std::exp(rise));
    return met;
  }

  /// Chooses the picks whose values are read: all, or with `goals`, as `solve` has them, those that are worth it. Into
  /// `kept` their places in order, and into `weights` [picks] 1/π, 0 where the value is not read. `row_of(i)`: the same
  /// row has the same number, by `numbers`, whatever is kept beside it. Returns how many.
  template <class Row>
  [[nodiscard]] index_t keep(const std::array<double, kernel::scan_heads>* goals, std::uint64_t numbers, Row&& row_of,
                             std::span<ordinal> kept, std::span<float> weights) noexcept {
    index_t count = 0;
    if (goals) {
      static_cast<void>(solve(*goals));
      for (index_t i = 0; i < n_; ++i) {
        const float total = inverse_probability(i);
        const auto u = static_cast<float>(kernel::detail::scrambled(numbers ^ row_of(i)) >> 40) * 0x1p-24f;
        const bool keeps = u * total < inverse()[i];
        kept[at(count)] = static_cast<ordinal>(i);
        count += keeps ? 1 : 0;
        weights[at(i)] = keeps ? total : 0;
      }
    } else {
      for (; count < n_; ++count) kept[at(count)] = static_cast<ordinal>(count);
      std::copy_n(inverse(), n_, weights.data());
    }
    return count;
  }

  /// 1/π of pick i; its own number u in [0, 1) decides whether it is kept: u < π/π₁.
  [[nodiscard]] float inverse_probability(index_t i) const noexcept {
    return std::max(column(least_)[i], column(best_)[i] * shift_);
  }

 private:
  [[nodiscard]] static constexpr std::size_t at(index_t i) noexcept { return static_cast<std::size_t>(i); }
  [[nodiscard]] static constexpr index_t padded(index_t n) noexcept { return (n + 15) / 16 * 16; }
  [[nodiscard]] float* column(index_t which) const noexcept { return storage_.data() + which * padded(n_); }
  // Makes what lies behind a head's weights harmless in every sum.
  void pad(index_t h) noexcept { std::fill_n(column(3 * h) + n_, padded(n_) - n_, 1.0f); }

  [[nodiscard]] double variance(index_t h, bool group, double a) const noexcept {
    const float* g = group ? column(best_) : column(3 * h + 2);
    return std::max(0.0, static_cast<double>(kernel::floored_sum(how_, column(3 * h + 1), g, column(least_), padded(n_),
                                                                 static_cast<float>(1 / a))) -
                             total_[at(h)]);
  }

  // The least a that meets the goal.
  [[nodiscard]] double least(index_t h, bool& met) const noexcept {
    const double goal = goals_[at(h)];
    if (!(total_[at(h)] > 0) || goal == std::numeric_limits<double>::infinity()) return 0;
    // Between what keeps all picks that are within e^20 of the largest, and what keeps no more than a few.
    const double top = std::log(static_cast<double>(kernel::const_float_map(column(3 * h), n_).maxCoeff()));
    double high = 20 - top, low = -10 - top;
    if (variance(h, false, std::exp(high)) > goal) {
      met = false;
      return std::exp(high);
    }
    for (int i = 0; i < 8; ++i) {
      const double middle = (low + high) / 2;
      (variance(h, false, std::exp(middle)) <= goal ? high : low) = middle;
    }
    return std::exp(high);
  }

  kernel::isa how_ = kernel::isa::portable;
  std::span<float> storage_;  // [heads][w, q, 1/w], 1/π₁, the group's 1/(a w)
  index_t heads_ = 0, n_ = 0;
  index_t least_ = 3 * heads_, best_ = 3 * heads_ + 1;
  float shift_ = 1;
  std::array<double, kernel::scan_heads> goals_{}, total_{};
};

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
