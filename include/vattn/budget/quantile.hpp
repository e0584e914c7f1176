// Quantiles of the distributions behind the asymptotic bounds.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <unsupported/Eigen/SpecialFunctions>

#include "vattn/config.hpp"

namespace vattn::budget {

/// z with P(Z <= z) = p, Z standard normal; p in (0, 1).
[[nodiscard]] inline double normal_quantile(double p) noexcept { return Eigen::numext::ndtri(p); }

/// P(F > x) for F with (nu1, nu2) degrees of freedom, real and positive; x >= 0.
[[nodiscard]] inline double f_upper_tail(double x, double nu1, double nu2) noexcept {
  return Eigen::numext::betainc(nu2 / 2, nu1 / 2, nu2 / (nu2 + nu1 * x));
}

/// x with P(F > x) = delta. nu2 above 1e4 counts as 1e4 (larger x by at most 0.2 %). Newton on log x from
/// the Wilson-Hilferty start, inside a bracket: a few incomplete beta functions.
[[nodiscard]] inline double f_quantile(double delta, double nu1, double nu2) noexcept {
  nu2 = std::min(nu2, 1e4);
  const double z = normal_quantile(1 - delta);
  // Paulson's cube-root transform of F is close to normal.
  const double a = 2 / (9 * nu1), b = 2 / (9 * nu2);
  const double denominator = (1 - b) * (1 - b) - z * z * b;
  double x = 1;
  if (denominator > 0) {
    const double spread = (1 - b) * (1 - b) * a + (1 - a) * (1 - a) * b - a * b * z * z;
    const double root = ((1 - a) * (1 - b) + z * std::sqrt(std::max(spread, 0.0))) / denominator;
    x = std::max(root * root * root, 1e-3);
  }
  // Not std::lgamma: it writes the global signgam, a race between the threads of a call.
  using Eigen::numext::lgamma;
  const double log_beta = lgamma(nu1 / 2) + lgamma(nu2 / 2) - lgamma((nu1 + nu2) / 2);
  double low = 0, high = std::numeric_limits<double>::infinity();
  for (int iteration = 0; iteration < 60; ++iteration) {
    const double tail = f_upper_tail(x, nu1, nu2);
    (tail > delta ? low : high) = x;
    // d tail / d log x = −x·density
    const double log_density =
        nu1 / 2 * std::log(nu1 / nu2) + nu1 / 2 * std::log(x) - (nu1 + nu2) / 2 * std::log1p(nu1 / nu2 * x) - log_beta;
    double next = x * std::exp((tail - delta) / std::exp(log_density));
    if (!(next > low && next < high)) next = std::isinf(high) ? 4 * x : (low + high) / 2;
    if (std::abs(next - x) <= 1e-5 * x) return next;
    x = next;
  }
  return high;  // a delta below 1e-25 may take more steps: too large a quantile breaks no promise
}

/// q such that (estimate − truth)² / V̂ <= q with probability 1 − delta, for an error with effective
/// dimension nu1 and a variance estimate V̂ (trace) with nu2 degrees of freedom.
/// Exact for one dimension and known variance: the square of the two-sided normal quantile.
[[nodiscard]] inline double squared_error_quantile(double delta, double nu1, double nu2) noexcept {
  if (nu1 <= 1 && nu2 >= 1e4) {
    const double z = normal_quantile(1 - delta / 2);
    return z * z;
  }
  return f_quantile(delta, nu1, nu2);
}

}  // namespace vattn::budget
