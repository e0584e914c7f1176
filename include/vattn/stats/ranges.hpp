// Evidence of the second kind: no variances, but ranges that are known, of which finite-sample bounds make radii.
#include "vattn/macros_push.hpp"
#pragma once

#include <cmath>

#include "vattn/stats/bounds.hpp"

namespace vattn::VATTN_ABI::stats {

/// Of a uniform sample of the residual, each term of which lies in a known range (sum_evidence::radius). Nothing is
/// linearised, and nothing estimated but second moments.
struct uniform_ranges {
  double denominator = 0, output2 = 0, away2 = 0;  ///< D̂, ‖ô‖², ‖ô − c‖²
  sum_evidence weights;                            ///< terms x of D
  sum_evidence values;                             ///< terms x·v of N
  sum_evidence joint;                              ///< terms x·(v − c, s): both at once
  double join = 0;                                 ///< s > 0, in units of the values; 0: the values have no known range
  double rows = 0;                                 ///< m of the radii: as many as were sampled, or a plan's

  [[nodiscard]] VATTN_FN bool finite() const noexcept {
    return denominator > 0 && denominator < infinity && output2 < infinity;
  }
};

/// Radius of D̂, relative to D̂.
template <finite_bound B>
[[nodiscard]] VATTN_FN double denominator_radius(const uniform_ranges& e, double delta) noexcept {
  return B::radius(e.weights, e.rows, delta) / e.denominator;
}
/// Of N̂, relative to ‖N̂‖.
template <finite_bound B>
[[nodiscard]] VATTN_FN double numerator_radius(const uniform_ranges& e, double delta) noexcept {
  const double norm = std::sqrt(e.output2) * e.denominator;
  return norm > 0 ? B::radius(e.values, e.rows, delta) / norm : infinity;
}
/// Of ô, relative to ‖o‖ (which is at most the root mean square of the values, the promise's other scale). With E the
/// error of the joint sum, and since o D = N: (ô − o) D̂ = E_N − (o − c) E_D, so e D̂ <= w‖E‖ + e‖E‖/s with
/// w = sqrt(1 + ‖ô − c‖²/s²) (Cauchy-Schwarz), and e <= w‖E‖/(D̂ − ‖E‖/s). At last ‖o‖ >= ‖ô‖ − e.
template <finite_bound B>
[[nodiscard]] VATTN_FN double output_radius(const uniform_ranges& e, const promise& p) noexcept {
  if (!(e.join > 0)) return infinity;
  const double error = B::radius(e.joint, e.rows, p.delta), denominator = e.denominator - error / e.join;
  if (!(denominator > 0)) return infinity;
  const double away = std::sqrt(1 + e.away2 / (e.join * e.join)) * error / denominator;
  const double norm = std::sqrt(e.output2) - away;
  return norm > 0 ? away / norm : infinity;
}

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
[[nodiscard]] VATTN_FN inline double norm_bound(const sampled_sum& e, double distance, double delta) noexcept {
  const double moment_log = std::log(10 / delta), tail_log = std::log(1.25 / delta);
  const double moved = distance * std::sqrt(larger(0, e.weight));
  const auto upper = [&](double sum) {
    const double root = std::sqrt(larger(0, sum)) + moved, b = e.term;
    return std::sqrt(root * root + b * b * moment_log / 2) + b * std::sqrt(moment_log / 2);
  };
  const double mean = upper(e.variance), weak = smaller(upper(e.largest), mean);
  const double v = weak * weak + 2 * e.term * mean, linear = 3 * e.term * tail_log;
  return mean + (linear + std::sqrt(linear * linear + 8 * v * tail_log)) / 2;
}

/// A sum A of nonnegative terms estimated by Σ_S a/π = `estimate`, no a/π above `term`: at least this, up to delta
/// (Bernstein: the variance is at most term·A).
[[nodiscard]] VATTN_FN inline double sum_at_least(double estimate, double term, double delta) noexcept {
  const double half = term * std::log(1 / delta) / 2;
  const double inside = estimate - half / 3;  // Â <= A + 2·sqrt(half·A) + 4 half/3
  if (!(inside > 0)) return 0;
  const double root = std::sqrt(inside) - std::sqrt(half);
  return root > 0 ? root * root : 0;
}
/// At most this, up to delta: the lower tail of a nonnegative sum (Maurer 2003).
[[nodiscard]] VATTN_FN inline double sum_at_most(double estimate, double term, double delta) noexcept {
  const double half = term * std::log(1 / delta) / 2;
  const double root = std::sqrt(estimate + half) + std::sqrt(half);
  return root * root;
}

/// Of a Poisson sample with hard bounds: token i, of logit at most h_i and value at distance r_i from c, is kept with
/// probability π_i >= min(1, e^{h_i}(r_i + R)/unit) for an R > 0. Then
///   D̂(ô − o) = W = Σ_i (I_i/π_i − 1)·x_i(v_i − o),
/// exactly, since Σ x_i(v_i − o) = 0: a sum of independent centred vectors, with no linearisation. Every term is at
/// most b = unit·max_r (r + ‖c − o‖)/(r + R) long.
struct poisson_ranges {
  double denominator = 0, output2 = 0, power = 0;     ///< D̂, ‖ô‖², Σ x‖v‖²/D̂
  double sampled_denominator = 0, sampled_power = 0;  ///< Σ x/π and Σ x‖v‖²/π of the rows with π < 1
  sampled_sum sum;                                    ///< of W about ô, without its `term`
  double unit = 0;                                    ///< relative to exp(reference)
  double nearest = 0, farthest = 0;                   ///< least and largest r_i, computed in float
  double margin = 0;                                  ///< R
  double centre_norm = 0, away = 0;                   ///< ‖c‖, ‖ô − c‖

  [[nodiscard]] VATTN_FN bool finite() const noexcept {
    return denominator > 0 && denominator < infinity && output2 < infinity && power < infinity;
  }
};

namespace detail {

// Relative rounding of a distance r_i, computed in float from at most some thousand elements.
inline constexpr double distance_slack = 1 + 1e-5;
// And of the sums of W, whose eigenvalue is a float's power.
inline constexpr double moment_slack = 1 + 1e-4;
// Share of δ that the scale's own estimate takes where it is one: the root mean square of the values.
inline constexpr double share_for_scale = 0.1;

}  // namespace detail

/// How long a vector v_i − o can be, relative to r_i + R, if ‖ô − o‖ <= error.
[[nodiscard]] VATTN_FN inline double longest_value(const poisson_ranges& e, double error) noexcept {
  const double reach = (e.away + error) * detail::distance_slack;
  return larger(1, (e.nearest * detail::distance_slack + reach) / (e.nearest + e.margin)) * detail::distance_slack;
}

/// The error that the promise allows, εT with T taken from below: ε‖o‖ >= ε/(1 + ε)·‖ô‖ wherever ‖ô − o‖ is no more
/// than that; or ε times the values' root mean square, Σ x‖v‖²/Σ x being sums of bounded nonnegative terms.
[[nodiscard]] VATTN_FN inline double allowed_error(const poisson_ranges& e, const promise& p) noexcept {
  const double by_output = p.epsilon / (1 + p.epsilon) * std::sqrt(e.output2);
  if (p.scale == error_scale::output) return by_output;
  const auto longest = [&](double r) {  // ‖v‖² relative to r + R
    const double norm = r * detail::distance_slack + e.centre_norm;
    return norm * norm / (r + e.margin);
  };
  const double power_term = e.unit * larger(longest(e.nearest), longest(e.farthest)) * detail::distance_slack;
  const double term = e.unit / (e.nearest + e.margin) * detail::distance_slack;
  const double delta = p.delta * detail::share_for_scale / 2;
  const double low = sum_at_least(e.sampled_power, power_term, delta);
  const double high = sum_at_most(e.sampled_denominator, term, delta);
  const double certain_power = e.power * e.denominator - e.sampled_power;
  const double certain = e.denominator - e.sampled_denominator;
  return larger(by_output, p.epsilon * std::sqrt(larger(0, certain_power + low) / (certain + high)));
}

/// Whether ‖ô − o‖ <= error, up to the promise's delta (less what the scale's estimate takes of it).
[[nodiscard]] VATTN_FN inline bool within_error(const poisson_ranges& e, double error, const promise& p) noexcept {
  sampled_sum w = e.sum;
  w.term = e.unit * longest_value(e, error);
  const double delta = p.scale == error_scale::rms ? (1 - detail::share_for_scale) * p.delta : p.delta;
  return norm_bound(w, error, delta) * detail::moment_slack < error * e.denominator;
}

/// Radius of D̂ relative to D̂: a sum of bounded terms, from both sides.
template <finite_bound B>
[[nodiscard]] VATTN_FN double denominator_radius(const poisson_ranges& e, double delta) noexcept {
  const double term = e.unit / (e.nearest + e.margin) * detail::distance_slack;
  const double low = sum_at_least(e.sampled_denominator, term, delta / 2);
  const double high = sum_at_most(e.sampled_denominator, term, delta / 2);
  return larger(e.sampled_denominator - low, high - e.sampled_denominator) / e.denominator;
}
/// Of ô relative to the promise's scale: the least, in steps of 3 % below ε, that the sample shows; +inf where it does
/// not show ε.
template <finite_bound B>
[[nodiscard]] VATTN_FN double output_radius(const poisson_ranges& e, const promise& p) noexcept {
  constexpr double step = 0.97;
  constexpr int most_steps = 12;  // a sample that was sized for ε shows little less
  const double error = allowed_error(e, p);
  if (!within_error(e, error, p)) return infinity;
  double share = 1;
  for (int i = 0; i < most_steps && within_error(e, error * share * step, p); ++i) share *= step;
  return p.epsilon * share;
}

}  // namespace vattn::VATTN_ABI::stats

#include "vattn/macros_pop.hpp"
