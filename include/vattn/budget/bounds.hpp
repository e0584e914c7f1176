// How far the estimate of a sum may be from the sum: from a sample's moments to a radius, and back to
// the number of rows that a radius needs.
#pragma once

#include <algorithm>
#include <cmath>
#include <concepts>
#include <limits>

#include "vattn/budget/quantile.hpp"
#include "vattn/config.hpp"
#include "vattn/stats/promise.hpp"

namespace vattn {

/// What is known of a residual of `population` terms X_i (scalars or vectors) of which some are sampled,
/// and of the estimate population·mean of their sum.
struct sum_evidence {
  double population = 0;                                 ///< N_r, terms in the residual
  double variance = 0;                                   ///< estimated trace of the covariance of one term, s²
  double dimension = 1;                                  ///< ν₁ = Tr(Σ)²/Tr(Σ²): 1 is the most cautious
  double dof = std::numeric_limits<double>::infinity();  ///< ν₂ = 2 / (relative variance of s²)
  /// Known, not estimated, inf = unknown. Vectors: every ‖X_i − c‖ <= radius for one c fixed before the
  /// draw. Scalars: every X_i is in [0, radius] (and c = 0).
  double radius = std::numeric_limits<double>::infinity();
  double second_moment = 0;  ///< mean of ‖X_i − c‖² over the sample, for that c
  double sampled = 0;        ///< rows behind `variance` and `second_moment`
  bool scalar = false;       ///< the terms are numbers, not vectors
  bool with_replacement = false;
};

/// A bound says how far population·mean of m sampled terms is from the sum, with probability 1 − delta.
template <class B>
concept bound = requires(const sum_evidence& e, double m, double delta) {
  { B::radius(e, m, delta) } -> std::convertible_to<double>;
  { B::kind } -> std::convertible_to<guarantee>;
  { B::name } -> std::convertible_to<const char*>;
  { B::assumptions } -> std::convertible_to<const char*>;
};

namespace budget {

/// r² with which B covers, with probability 1 − delta, the error of an estimate of variance V̂ that rests on `sampled`
/// rows. `dimension` and `dof` as in sum_evidence.
template <bound B>
[[nodiscard]] double squared_radius(double variance, double dimension, double dof, double sampled,
                                    double delta) noexcept {
  sum_evidence y;
  y.with_replacement = true;
  y.population = 1;
  y.variance = variance;
  y.dimension = dimension;
  y.dof = dof;
  y.sampled = sampled;
  const double r = B::radius(y, 1, delta);
  return r * r;
}

/// Smallest whole m in [1, population] with B::radius(e, m, delta) <= tau; population if none. Closed form
/// where the bound has one (`rows`), else bisection: every radius falls with m.
template <bound B>
[[nodiscard]] double sample_size(const sum_evidence& e, double tau, double delta) noexcept {
  double low = 0, high = std::max(1.0, std::floor(e.population));  // radius(high) <= tau or high = all
  if constexpr (requires { B::rows(e, tau, delta); }) return std::clamp(std::ceil(B::rows(e, tau, delta)), 1.0, high);
  if (!(B::radius(e, high, delta) <= tau)) return high;
  while (high - low > 1) {
    const double middle = std::floor((low + high) / 2);
    (B::radius(e, middle, delta) <= tau ? high : low) = middle;
  }
  return high;
}

/// Variance factor of a sample without replacement: (N − m)/N (the variance is the N − 1 form).
[[nodiscard]] inline double finite_population(const sum_evidence& e, double m) noexcept {
  return e.with_replacement ? 1.0 : std::max(0.0, 1 - m / e.population);
}

/// Central limit theorem, two-sided: radius = N·sqrt(q·s²/m·(1 − m/N)) with q the quantile of F(ν₁, ν₂).
/// With ν₁ = 1 and known variance this is the paper's Lemma 4.1, Φ⁻¹(1 − δ/2)·N·sqrt(Tr Σ/m).
/// Source: arXiv 2510.05688, Lemma 4.1; for vectors z·sqrt(Tr Σ) covers every spectrum only for
/// δ <= 0.215 (Székely and Bakirov 2003), beyond which z stays at its value there.
struct clt {
  static constexpr guarantee kind = guarantee::asymptotic;
  static constexpr const char* name = "clt";
  static constexpr const char* assumptions =
      "asymptotic: the sample is large enough for its mean to be normal and for its variance to be seen";

  [[nodiscard]] static double radius(const sum_evidence& e, double m, double delta) noexcept {
    return e.population * std::sqrt(quantile(e, delta) * e.variance / m * finite_population(e, m));
  }
  /// radius(m) = tau solved for m: 1/m = (tau/N)²/(q s²) + 1/N.
  [[nodiscard]] static double rows(const sum_evidence& e, double tau, double delta) noexcept {
    if (!(e.variance > 0)) return 1;
    const double t = tau / e.population;
    return 1 / (t * t / (quantile(e, delta) * e.variance) + (e.with_replacement ? 0 : 1 / e.population));
  }

 private:
  [[nodiscard]] static double quantile(const sum_evidence& e, double delta) noexcept {
    const double q = squared_error_quantile(delta, e.dimension, e.dof);
    return !e.scalar && e.dimension <= 1 ? std::max(q, 1.5365) : q;
  }
};

/// As `clt`, with Student's quantile: the variance is estimated from the sample, no credit for dimension.
struct student {
  static constexpr guarantee kind = guarantee::asymptotic;
  static constexpr const char* name = "student";
  static constexpr const char* assumptions =
      "asymptotic: the sample is large enough for its mean to be normal; its variance is estimated with few degrees of "
      "freedom";

  [[nodiscard]] static double radius(const sum_evidence& e, double m, double delta) noexcept {
    return clt::radius(cautious(e), m, delta);
  }
  [[nodiscard]] static double rows(const sum_evidence& e, double tau, double delta) noexcept {
    return clt::rows(cautious(e), tau, delta);
  }

 private:
  [[nodiscard]] static sum_evidence cautious(sum_evidence e) noexcept {
    e.dimension = 1;
    e.dof = std::min(e.dof, std::max(1.0, e.sampled - 1));
    return e;
  }
};

/// Hoeffding, from a known range alone. Scalars in [0, R]: N·R·sqrt(ln(2/δ)/2m). Vectors in a ball of radius R: N·R·(1
/// + sqrt(2 ln(1/δ)))/sqrt(m) (bounded differences about E‖S‖ <= R·sqrt(m)). Without replacement both still hold: E f
/// of the sum only falls for convex f (Hoeffding 1963, theorem 4). A finite-sample bound; +inf where no range is known.
struct hoeffding {
  static constexpr guarantee kind = guarantee::finite_sample;
  static constexpr const char* name = "hoeffding";
  static constexpr const char* assumptions = "finite-sample: every residual term lies in a known range";

  [[nodiscard]] static double radius(const sum_evidence& e, double m, double delta) noexcept {
    if (!e.with_replacement && m >= e.population) return 0;
    const double factor = e.scalar ? std::sqrt(std::log(2 / delta) / 2) : 1 + std::sqrt(2 * std::log(1 / delta));
    return e.population * e.radius * factor / std::sqrt(m);
  }
};

/// Empirical Bernstein: the sample's second moment about a fixed centre, and a known range R.
/// Half of δ buys an upper bound of the true second moment, from the multiplicative Chernoff bound
///   sqrt(E‖X−c‖²) <= sqrt(L/2m)·R + sqrt(mean‖X−c‖² + L R²/2m),  L = ln(2/δ)
/// and half buys Bernstein's inequality for vectors (Pinelis 1994, theorem 3.4; ‖X − E X‖ <= a = 2R,
/// or R for scalars):
///   N/m·(a L'/3 + sqrt((a L'/3)² + 2 m σ² L')),  a = 2R,  L' = ln(4/δ).
/// Both carry over to sampling without replacement (Hoeffding 1963, theorem 4). Finite-sample.
struct bernstein {
  static constexpr guarantee kind = guarantee::finite_sample;
  static constexpr const char* name = "bernstein";
  static constexpr const char* assumptions = "finite-sample: every residual term lies in a known range";

  [[nodiscard]] static double radius(const sum_evidence& e, double m, double delta) noexcept {
    if (!e.with_replacement && m >= e.population) return 0;
    if (!std::isfinite(e.radius)) return e.radius;
    const double chernoff = std::log(2 / delta) / (2 * std::max(1.0, e.sampled));
    const double sigma = std::sqrt(chernoff) * e.radius + std::sqrt(e.second_moment + chernoff * e.radius * e.radius);
    const double bounded = std::min(sigma, e.radius);
    const double log_term = std::log(4 / delta);
    const double linear = (e.scalar ? 1 : 2) * e.radius * log_term / 3;
    return e.population / m * (linear + std::sqrt(linear * linear + 2 * m * bounded * bounded * log_term));
  }
};

}  // namespace budget
}  // namespace vattn
