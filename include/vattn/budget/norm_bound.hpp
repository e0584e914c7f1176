// Finite-sample bounds for a Poisson sample's sums: the length of a vector sum, and nonnegative sums.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>

#include "vattn/kernel/row.hpp"

namespace vattn::VATTN_ABI {

/// Evidence on W = Σ (I_i/π_i − 1) y_i, y_i = x_i(v_i − o), from a sample in which o is replaced by an estimate ô:
/// with a_i = (1 − π_i)/π_i²·x_i², sums over the sampled rows with π_i < 1.
struct sampled_sum {
  double weight = 0;    ///< Σ a_i
  double variance = 0;  ///< Σ a_i‖v_i − ô‖²: estimates E‖W‖²
  double largest = 0;   ///< an upper bound of the largest eigenvalue of Σ a_i (v_i − ô)(v_i − ô)ᵀ
  double term = 0;      ///< b: no term of W is longer, whatever the draw
};

/// A radius ρ with P(‖W‖ > ρ) <= delta, if ‖ô − o‖·D̂ <= distance; +inf never, 0 without evidence. Of delta, 0.8 go to
/// the tail and 0.1 each to the two second moments.
///  - E‖W‖² and the largest eigenvalue λ of its covariance are means of sums of independent terms in [0, b²], so
///    sqrt(mean) <= sqrt(sum + b²L/2) + b·sqrt(L/2) with probability 1 − e^{−L}: the lower tail of a nonnegative sum
///    (Maurer 2003, theorem 2.1); for λ along its own, fixed eigenvector, so no factor of dimension.
///  - About o instead of ô the roots of both sums grow by at most ‖ô − o‖·sqrt(Σ a): Minkowski.
///  - Klein and Rio 2005, theorem 1.1, with E‖W‖ <= sqrt(E‖W‖²):
///    P(‖W‖ >= E‖W‖ + t) <= exp(−t²/(2(λ + 2b E‖W‖) + 3bt)).
/// The result is increasing and of degree one in (root sums, b, distance), all of which grow at most in proportion to
/// `distance`: hence norm_bound(distance) < distance implies the same for every larger value, and with it that the
/// true distance is smaller. One trial value proves itself.
[[nodiscard]] inline double norm_bound(const sampled_sum& e, double distance, double delta) noexcept {
  const double moment_log = std::log(10 / delta), tail_log = std::log(1.25 / delta);
  const double moved = distance * std::sqrt(std::max(0.0, e.weight));
  const auto upper = [&](double sum) {
    const double root = std::sqrt(std::max(0.0, sum)) + moved, b = e.term;
    return std::sqrt(root * root + b * b * moment_log / 2) + b * std::sqrt(moment_log / 2);
  };
  const double mean = upper(e.variance), weak = std::min(upper(e.largest), mean);
  const double v = weak * weak + 2 * e.term * mean, linear = 3 * e.term * tail_log;
  return mean + (linear + std::sqrt(linear * linear + 8 * v * tail_log)) / 2;
}

/// A sum A of nonnegative terms estimated by Σ_S a/π = `estimate`, no a/π above `term`: at least this, up to delta
/// (Bernstein: the variance is at most term·A).
[[nodiscard]] inline double sum_at_least(double estimate, double term, double delta) noexcept {
  const double half = term * std::log(1 / delta) / 2;
  const double inside = estimate - half / 3;  // Â <= A + 2·sqrt(half·A) + 4 half/3
  if (!(inside > 0)) return 0;
  const double root = std::sqrt(inside) - std::sqrt(half);
  return root > 0 ? root * root : 0;
}
/// At most this, up to delta: the lower tail of a nonnegative sum (Maurer 2003).
[[nodiscard]] inline double sum_at_most(double estimate, double term, double delta) noexcept {
  const double half = term * std::log(1 / delta) / 2;
  const double root = std::sqrt(estimate + half) + std::sqrt(half);
  return root * root;
}

/// Σ y yᵀ of rows y, [dv, dv], and a bound of its largest eigenvalue. `storage` [2·dv²].
class second_moment {
 public:
  second_moment(std::span<float> storage, index_t dv) noexcept
      : dv_(static_cast<Eigen::Index>(dv)), sum_(storage.data(), dv_, dv_), next_(sum_.data() + dv_ * dv_, dv_, dv_) {
    sum_.setZero();
  }

  /// Adds factor²·y yᵀ.
  void add(float factor, std::span<const float> y) noexcept {
    const kernel::const_float_map v(y.data(), dv_);
    for (Eigen::Index j = 0; j < dv_; ++j) sum_.col(j).head(j + 1) += (factor * factor * v[j]) * v.head(j + 1);
  }

  /// Tr(M^p)^{1/p} with p = 32: at least the largest eigenvalue, at most dv^{1/32} times it. Destroys the sum.
  [[nodiscard]] double largest_eigenvalue() noexcept {
    for (Eigen::Index j = 0; j < dv_; ++j) sum_.col(j).tail(dv_ - j) = sum_.row(j).tail(dv_ - j).transpose();
    double log_scale = 0;
    for (int square = 0; square < 5; ++square) {
      const float trace = sum_.trace();
      if (!(trace > 0)) return 0;
      sum_ *= 1 / trace;
      log_scale = 2 * (log_scale + std::log(static_cast<double>(trace)));
      next_.noalias() = sum_.lazyProduct(sum_);  // no temporaries, no allocation
      sum_ = next_;
    }
    const double trace = static_cast<double>(sum_.trace());
    return trace > 0 ? std::exp((std::log(trace) + log_scale) / 32) * (1 + 1e-4) : 0;
  }

 private:
  using matrix_map = Eigen::Map<Eigen::MatrixXf>;
  Eigen::Index dv_;
  matrix_map sum_, next_;
};

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
