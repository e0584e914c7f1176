// How far an estimate may be off, by each bound: asymptotic ones from a variance, finite-sample ones from known ranges.
#pragma once

#include <cmath>
#include <concepts>

#include "vattn/stats/promise.hpp"
#include "vattn/stats/quantile.hpp"

namespace vattn::stats {

/// What is known of an error's distribution besides its variance.
struct error_shape {
  double dimension = 1;   ///< ν₁
  double dof = infinity;  ///< ν₂
  double rows = 0;        ///< sampled, behind the variance
  bool scalar = false;    ///< the error of a number, not of a vector
};

/// An asymptotic bound: q with P(error² > q·V̂) <= delta.
template <class B>
concept asymptotic_bound = B::kind == guarantee::asymptotic&& requires(const error_shape& e, double delta) {
  { B::squared_quantile(e, delta) } -> std::convertible_to<double>;
  { B::name } -> std::convertible_to<const char*>;
  { B::assumptions } -> std::convertible_to<const char*>;
};

/// z·sqrt(Tr Σ) covers vectors of every spectrum only for δ <= 0.215 (Székely and Bakirov 2003), beyond which z² stays
/// at its value there.
inline constexpr double least_vector_quantile = 1.5365;

/// Central limit theorem, two-sided: quantiles of F(ν₁, ν₂). With ν₁ = 1 and known variance this is Lemma 4.1 of arXiv
/// 2510.05688, Φ⁻¹(1 − δ/2)·sqrt(V̂).
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

/// r² with P(‖error‖² > r²) <= delta. A sample that lacks rows of one side is off to the other, and its V̂ is too small
/// by `skew` times the error: r² = q·(V̂ + skew·r), as Wilson's interval has it for a count.
template <asymptotic_bound B>
[[nodiscard]] VATTN_FN double squared_radius(double variance, double skew, const error_shape& shape,
                                             double delta) noexcept {
  if (variance == 0) return 0;
  const double q = B::squared_quantile(shape, delta), half = q * skew / 2;
  const double r = half + std::sqrt(half * half + q * variance);
  return r * r;
}

}  // namespace vattn::stats
