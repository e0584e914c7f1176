// Quantiles of the distributions behind the asymptotic bounds, on the host and on a GPU: no tables, no global state.
#include "vattn/macros_push.hpp"
#pragma once

#include <cmath>
#include <limits>

#include "vattn/base/config.hpp"

namespace vattn::VATTN_ABI::stats {

inline constexpr double infinity = std::numeric_limits<double>::infinity();

// Not std::min and std::max, which are no device functions. Of a NaN and a number, the first argument.
VATTN_FN constexpr double smaller(double a, double b) noexcept { return b < a ? b : a; }
VATTN_FN constexpr double larger(double a, double b) noexcept { return b > a ? b : a; }
VATTN_FN constexpr double within(double x, double low, double high) noexcept { return smaller(larger(x, low), high); }

/// Variances known at least this well count as known: z takes the place of Student's t and F is χ²/ν₁ to 2e-5.
inline constexpr double known_variance_dof = 1e6;

namespace detail {

/// ln Γ(z) less its leading term (z − ½)·ln z − z + ½·ln 2π; z >= 10: the sixth term of Stirling's series is below
/// 1e-14.
[[nodiscard]] VATTN_FN inline double stirling_rest(double z) noexcept {
  const double r = 1 / z, q = r * r;
  return r *
         (1.0 / 12 - q * (1.0 / 360 - q * (1.0 / 1260 - q * (1.0 / 1680 - q * (1.0 / 1188 - q * (691.0 / 360360))))));
}

/// ln Γ(z), z > 0. Not std::lgamma: it writes the global signgam, a race between the threads of a call.
[[nodiscard]] VATTN_FN inline double log_gamma(double z) noexcept {
  double product = 1;
  while (z < 10) product *= z, z += 1;  // Γ(z + 1) = z·Γ(z)
  constexpr double half_log_two_pi = 0.91893853320467274178;
  return (z - 0.5) * std::log(z) - z + half_log_two_pi + stirling_rest(z) - std::log(product);
}

/// ln B(a, b). Where an argument is large, without the difference of two large logarithms.
[[nodiscard]] VATTN_FN inline double log_beta(double a, double b) noexcept {
  const double small = smaller(a, b), large = larger(a, b);
  if (large < 10) return log_gamma(small) + log_gamma(large) - log_gamma(small + large);
  // ln Γ(large) − ln Γ(small + large), by Stirling.
  return log_gamma(small) - (large - 0.5) * std::log1p(small / large) - small * std::log(small + large) + small +
         (stirling_rest(large) - stirling_rest(small + large));
}

/// The continued fraction of the incomplete beta function, by Lentz's method as Thompson and Barnett modified it:
/// I_x(a, b) = x^a (1 − x)^b / (a B(a, b)) times this. It converges fast for x < (a + 1)/(a + b + 2).
/// Source: NIST Digital Library of Mathematical Functions, 8.17.22.
[[nodiscard]] VATTN_FN inline double beta_fraction(double a, double b, double x) noexcept {
  constexpr double tiny = 1e-300;
  const auto away_from_0 = [](double v) { return std::fabs(v) < tiny ? tiny : v; };
  double c = 1, d = 1 / away_from_0(1 - (a + b) * x / (a + 1)), f = d;
  for (int i = 1; i <= 5000; ++i) {
    const double m = i, a2 = a + 2 * m;
    double step = m * (b - m) * x / ((a2 - 1) * a2);
    d = 1 / away_from_0(1 + step * d);
    c = away_from_0(1 + step / c);
    f *= c * d;
    step = -(a + m) * (a + b + m) * x / (a2 * (a2 + 1));
    d = 1 / away_from_0(1 + step * d);
    c = away_from_0(1 + step / c);
    f *= c * d;
    if (std::fabs(c * d - 1) < 4e-15) break;
  }
  return f;
}

/// The upper tail of F at x = e^s: ln P(F > x), and its hazard −d ln P / ds.
struct log_tail {
  double value, hazard;
};
/// `log_b` = ln B(ν₁/2, ν₂/2).
[[nodiscard]] VATTN_FN inline log_tail f_log_tail(double s, double nu1, double nu2, double log_b) noexcept {
  const double a = nu1 / 2, b = nu2 / 2, log_w = s + std::log(nu1 / nu2);  // w = ν₁x/ν₂
  const double w = std::exp(log_w), y = 1 / (1 + w);
  const double log_y = log_w > 40 ? -log_w : -std::log1p(w);           // e^-40 is below 2^-53
  const double log_density = b * log_y + a * (log_y + log_w) - log_b;  // of ln F
  if (y < (b + 1) / (a + b + 2)) {
    const double fraction = beta_fraction(b, a, y);
    return {log_density - std::log(b) + std::log(fraction), b / fraction};
  }
  const double below = std::exp(log_density) / a * beta_fraction(a, b, w * y);
  const double tail = std::log1p(-below);
  return {tail, std::exp(log_density - tail)};
}

}  // namespace detail

/// I_x(a, b), the regularised incomplete beta function; a, b > 0, x in [0, 1].
[[nodiscard]] VATTN_FN inline double incomplete_beta(double a, double b, double x) noexcept {
  if (!(x > 0)) return 0;
  if (!(x < 1)) return 1;
  const double factor = std::exp(a * std::log(x) + b * std::log1p(-x) - detail::log_beta(a, b));
  if (x < (a + 1) / (a + b + 2)) return factor / a * detail::beta_fraction(a, b, x);
  return 1 - factor / b * detail::beta_fraction(b, a, 1 - x);
}

/// z with P(Z > z) = tail, Z standard normal; tail in (0, 1), to the last digits down to 1e-300.
[[nodiscard]] VATTN_FN inline double normal_upper_quantile(double tail) noexcept {
  if (tail > 0.5) return -normal_upper_quantile(1 - tail);
  // P(Z > z) <= ½·exp(−z²/2): the start is at or above the root of ln P(Z > z) = ln tail, a concave function, from
  // where Newton's steps can only come down to it.
  constexpr double root_half = 0.70710678118654752440, root_two_over_pi = 0.79788456080286535588;
  const double log_tail = std::log(tail);
  double z = std::sqrt(larger(0, -2 * std::log(2 * tail)));
  for (int i = 0; i < 20; ++i) {
    const double twice = std::erfc(z * root_half);
    const double step = (std::log(0.5 * twice) - log_tail) * twice / (root_two_over_pi * std::exp(-z * z / 2));
    z += step;
    if (std::fabs(step) <= 1e-9 * (1 + z)) break;
  }
  return z;
}
/// z with P(Z <= z) = p.
[[nodiscard]] VATTN_FN inline double normal_quantile(double p) noexcept {
  return p < 0.5 ? -normal_upper_quantile(p) : normal_upper_quantile(1 - p);
}

/// P(F > x) for F with (nu1, nu2) degrees of freedom, real and positive; x >= 0.
[[nodiscard]] VATTN_FN inline double f_upper_tail(double x, double nu1, double nu2) noexcept {
  if (!(x > 0)) return 1;
  if (!(x < infinity)) return 0;
  return std::exp(detail::f_log_tail(std::log(x), nu1, nu2, detail::log_beta(nu1 / 2, nu2 / 2)).value);
}

/// x with P(F > x) = delta; infinite where it is out of a double's reach. nu2 above `known_variance_dof` counts as
/// that. Newton's method for ln P(F > e^s) = ln delta. The density of ln F is log-concave, so its tail is (Prékopa
/// 1973): every step lands at or above the root, and from there steps only come down. No bracket is needed, and what is
/// returned is never too small by more than the last rounding.
[[nodiscard]] VATTN_FN inline double f_quantile(double delta, double nu1, double nu2) noexcept {
  if (!(nu2 > 0)) return infinity;  // nothing is known of the variance
  nu2 = smaller(nu2, known_variance_dof);
  const double log_b = detail::log_beta(nu1 / 2, nu2 / 2), log_delta = std::log(delta);
  // A concave function lies below its asymptote, −ν₂/2·ln(ν₁x/ν₂) − ln(ν₂/2·B): nowhere is the root higher.
  const double highest = (-log_delta - std::log(nu2 / 2) - log_b) / (nu2 / 2) - std::log(nu1 / nu2);
  double s = highest;
  // Paulson's cube-root transform of F is close to normal.
  const double z = normal_upper_quantile(delta), a = 2 / (9 * nu1), b = 2 / (9 * nu2);
  const double denominator = (1 - b) * (1 - b) - z * z * b;
  if (denominator > 0) {
    const double spread = (1 - b) * (1 - b) * a + (1 - a) * (1 - a) * b - a * b * z * z;
    const double root = ((1 - a) * (1 - b) + z * std::sqrt(larger(spread, 0))) / denominator;
    s = smaller(3 * std::log(larger(root, 1e-3)), highest);
  }
  for (int i = 0; i < 60; ++i) {
    const detail::log_tail t = detail::f_log_tail(s, nu1, nu2, log_b);
    const double next = smaller(s + (t.value - log_delta) / t.hazard, highest);
    const bool close = std::fabs(next - s) <= 1e-7 * (1 + std::fabs(s));
    s = next;
    if (close) break;
  }
  return std::exp(s);
}

/// q such that (estimate − truth)² / V̂ <= q with probability 1 − delta, for an error with effective dimension nu1 and
/// an estimate V̂ of its mean square with nu2 degrees of freedom: Student's t², in one dimension, and z² where V̂ is
/// known.
[[nodiscard]] VATTN_FN inline double squared_error_quantile(double delta, double nu1, double nu2) noexcept {
  if (nu1 <= 1 && nu2 >= known_variance_dof) {
    const double z = normal_upper_quantile(delta / 2);
    return z * z;
  }
  return f_quantile(delta, nu1, nu2);
}

/// t with P(T <= t) = p, T Student's with nu degrees of freedom.
[[nodiscard]] VATTN_FN inline double student_quantile(double p, double nu) noexcept {
  if (p < 0.5) return -student_quantile(1 - p, nu);
  return p > 0.5 ? std::sqrt(squared_error_quantile(2 * (1 - p), 1, nu)) : 0;
}

}  // namespace vattn::VATTN_ABI::stats

#include "vattn/macros_pop.hpp"
