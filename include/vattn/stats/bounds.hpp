// How far an estimate may be off, by each bound: asymptotic ones from a variance, finite-sample ones from known ranges.
#include "vattn/macros_push.hpp"
#pragma once

#include <cmath>
#include <concepts>

#include "vattn/stats/promise.hpp"
#include "vattn/stats/quantile.hpp"

namespace vattn::VATTN_ABI::stats {

/// What is known of an error's distribution besides its variance.
struct error_shape {
  double dimension = 1;   ///< ν₁: 1 is the most cautious
  double dof = infinity;  ///< ν₂ = 2 / (relative variance of the variance)
  double rows = 0;        ///< sampled, behind the variance
  bool scalar = false;    ///< the error of a number, not of a vector
};

/// What is known of a residual of `population` terms X_i (scalars or vectors) of which some are sampled uniformly, and
/// of the estimate population·mean of their sum.
struct sum_evidence {
  double population = 0;  ///< N_r, terms in the residual
  double variance = 0;    ///< estimated trace of the covariance of one term, s²
  double dimension = 1, dof = infinity;
  /// Known, not estimated, inf = unknown. Vectors: every ‖X_i − c‖ <= radius for one c fixed before the
  /// draw. Scalars: every X_i is in [0, radius] (and c = 0).
  double radius = infinity;
  double second_moment = 0;  ///< mean of ‖X_i − c‖² over the sample, for that c
  double sampled = 0;        ///< rows behind `variance` and `second_moment`
  bool scalar = false;       ///< the terms are numbers, not vectors
  bool with_replacement = false;

  [[nodiscard]] VATTN_FN constexpr error_shape shape() const noexcept { return {dimension, dof, sampled, scalar}; }
  /// Variance factor of a sample of m without replacement: (N − m)/N (the variance is the N − 1 form).
  [[nodiscard]] VATTN_FN constexpr double unread(double m) const noexcept {
    return with_replacement ? 1 : larger(0, 1 - m / population);
  }
  /// Estimated mean square of the error of the sum: N²·s²/m·(N − m)/N at the sample's own m.
  [[nodiscard]] VATTN_FN constexpr double error_variance() const noexcept {
    return population * population * variance / sampled * unread(sampled);
  }
  /// Rows at which that would be 1/ratio of what it is, s² unchanged: a whole number in [1, population].
  [[nodiscard]] VATTN_FN double rows_for(double ratio) const noexcept {
    if (!(ratio > 0)) return 1;
    const double rest = with_replacement ? 0 : 1 / population;
    return within(std::ceil(1 / (rest + (1 / sampled - rest) / ratio)), 1, larger(1, std::floor(population)));
  }
};

/// Smallest whole m in [1, most] that is enough, if what is enough stays so for every larger m; `most` if none is.
template <class F>
[[nodiscard]] VATTN_FN double smallest_size(double most, F&& enough) noexcept {
  double low = 0, high = larger(1, std::floor(most));
  if (!enough(high)) return high;
  while (high - low > 1) {
    const double middle = std::floor((low + high) / 2);
    (enough(middle) ? high : low) = middle;
  }
  return high;
}

template <class B>
concept described_bound = requires {
  { B::kind } -> std::convertible_to<guarantee>;
  { B::name } -> std::convertible_to<const char*>;
  { B::assumptions } -> std::convertible_to<const char*>;
};
/// An asymptotic bound says how an error is distributed: q with P(error² > q·V) <= delta, V its estimated mean square.
template <class B>
concept asymptotic_bound =
    described_bound<B> && B::kind == guarantee::asymptotic && requires(const error_shape& e, double delta) {
      { B::squared_quantile(e, delta) } -> std::convertible_to<double>;
    };
/// A finite-sample bound says how far population·mean of m sampled terms is from the sum, with probability 1 − delta.
template <class B>
concept finite_bound = described_bound<B> && B::kind == guarantee::finite_sample &&
                       requires(const sum_evidence& e, double m, double delta) {
                         { B::radius(e, m, delta) } -> std::convertible_to<double>;
                       };

/// z·sqrt(Tr Σ) covers vectors of every spectrum only for δ <= 0.215 (Székely and Bakirov 2003), beyond which z² stays
/// at its value there.
inline constexpr double least_vector_quantile = 1.5365;

/// Central limit theorem, two-sided: quantiles of F(ν₁, ν₂). With ν₁ = 1 and known variance this is Lemma 4.1 of arXiv
/// 2510.05688, a radius of Φ⁻¹(1 − δ/2)·N·sqrt(Tr Σ/m).
struct clt {
  static constexpr guarantee kind = guarantee::asymptotic;
  static constexpr const char* name = "clt";
  static constexpr const char* assumptions =
      "asymptotic: the sample is large enough for its mean to be normal and for its variance to be seen";

  [[nodiscard]] VATTN_FN static double squared_quantile(const error_shape& e, double delta) noexcept {
    const double q = squared_error_quantile(delta, e.dimension, e.dof);
    return !e.scalar && e.dimension <= 1 ? larger(q, least_vector_quantile) : q;
  }
};

/// As `clt`, with Student's quantile: the variance is estimated from the sample, no credit for dimension.
struct student {
  static constexpr guarantee kind = guarantee::asymptotic;
  static constexpr const char* name = "student";
  static constexpr const char* assumptions =
      "asymptotic: the sample is large enough for its mean to be normal; its variance is estimated with few degrees of "
      "freedom";

  [[nodiscard]] VATTN_FN static double squared_quantile(error_shape e, double delta) noexcept {
    e.dimension = 1;
    e.dof = smaller(e.dof, larger(1, e.rows - 1));
    return clt::squared_quantile(e, delta);
  }
};

/// Hoeffding, from a known range alone. Scalars in [0, R]: N·R·sqrt(ln(2/δ)/2m). Vectors in a ball of radius R: N·R·(1
/// + sqrt(2 ln(1/δ)))/sqrt(m) (bounded differences about E‖S‖ <= R·sqrt(m)). Without replacement both still hold: E f
/// of the sum only falls for convex f (Hoeffding 1963, theorem 4). A finite-sample bound; +inf where no range is known.
struct hoeffding {
  static constexpr guarantee kind = guarantee::finite_sample;
  static constexpr const char* name = "hoeffding";
  static constexpr const char* assumptions = "finite-sample: every residual term lies in a known range";

  [[nodiscard]] VATTN_FN static double radius(const sum_evidence& e, double m, double delta) noexcept {
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

  [[nodiscard]] VATTN_FN static double radius(const sum_evidence& e, double m, double delta) noexcept {
    if (!e.with_replacement && m >= e.population) return 0;
    if (!(e.radius < infinity)) return e.radius;
    const double chernoff = std::log(2 / delta) / (2 * larger(1, e.sampled));
    const double sigma = std::sqrt(chernoff) * e.radius + std::sqrt(e.second_moment + chernoff * e.radius * e.radius);
    const double bounded = smaller(sigma, e.radius);
    const double log_term = std::log(4 / delta);
    const double linear = (e.scalar ? 1 : 2) * e.radius * log_term / 3;
    return e.population / m * (linear + std::sqrt(linear * linear + 2 * m * bounded * bounded * log_term));
  }
};

/// r² for a squared quantile q. A sample that lacks rows of one side is off to the other, and its V̂ is too small by
/// `skew` times the error: r² = q·(V̂ + skew·r), as Wilson's interval has it for a count.
[[nodiscard]] VATTN_FN inline double widened(double q, double variance, double skew) noexcept {
  if (variance == 0) return 0;
  if (skew == 0) return q * variance;  // of an infinite q, too
  const double half = q * skew / 2, r = half + std::sqrt(half * half + q * variance);
  return r * r;
}
/// r² with P(‖error‖² > r²) <= delta.
template <asymptotic_bound B>
[[nodiscard]] VATTN_FN double squared_radius(double variance, double skew, const error_shape& shape,
                                             double delta) noexcept {
  return variance == 0 ? 0 : widened(B::squared_quantile(shape, delta), variance, skew);
}

/// squared_radius of a known variance of 1, by Wilson and Hilferty's cube root: for plans, which need no more.
template <asymptotic_bound B>
[[nodiscard]] VATTN_FN double planned_radius2(double dimension, double delta) noexcept {
  if (dimension < 3) return squared_radius<B>(1, 0, {dimension, infinity, known_variance_dof}, delta);
  const double spread = 2 / (9 * dimension);
  const double root = 1 - spread + normal_quantile(1 - delta) * std::sqrt(spread);
  return root * root * root;
}

/// How far population·mean of m uniformly sampled terms is from their sum, up to delta, if they are as the evidence has
/// it. Asymptotic: N·sqrt(q·s²/m·(1 − m/N)).
template <class B>
[[nodiscard]] VATTN_FN double sum_radius(const sum_evidence& e, double m, double delta) noexcept {
  if constexpr (B::kind == guarantee::finite_sample) {
    return B::radius(e, m, delta);
  } else {
    return e.population * std::sqrt(B::squared_quantile(e.shape(), delta) * e.variance / m * e.unread(m));
  }
}

/// Smallest whole m in [1, population] with radius <= tau; population if none.
template <class B>
[[nodiscard]] VATTN_FN double sample_size(const sum_evidence& e, double tau, double delta) noexcept {
  if constexpr (B::kind == guarantee::asymptotic) {
    // radius = tau solved for m: 1/m = (tau/N)²/(q s²) + 1/N.
    if (!(e.variance > 0)) return 1;
    const double t = tau / e.population;
    const double inverse =
        t * t / (B::squared_quantile(e.shape(), delta) * e.variance) + (e.with_replacement ? 0 : 1 / e.population);
    return within(std::ceil(1 / inverse), 1, larger(1, std::floor(e.population)));
  } else {
    return smallest_size(e.population, [&](double m) { return B::radius(e, m, delta) <= tau; });
  }
}

}  // namespace vattn::VATTN_ABI::stats

namespace vattn::VATTN_ABI {

/// The bound slot: asymptotic or finite-sample.
template <class B>
concept bound = stats::asymptotic_bound<B> || stats::finite_bound<B>;

namespace budget {
using stats::bernstein, stats::clt, stats::hoeffding, stats::student;
}  // namespace budget

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
