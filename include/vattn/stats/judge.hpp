// The judgement: does the promise hold for what a sample shows, and if not, what would be enough?
#include "vattn/macros_push.hpp"
#pragma once

#include <cmath>
#include <concepts>

#include "vattn/stats/bounds.hpp"
#include "vattn/stats/evidence.hpp"
#include "vattn/stats/promise.hpp"
#include "vattn/stats/ranges.hpp"

namespace vattn::VATTN_ABI::stats {

struct verdict {
  bool met = false;
  double epsilon_achieved = infinity;  ///< stated (1 − δ) quantile of the target's error, relative; never below κε
  double denominator_error = infinity;  ///< the same of D̂, whatever the target
  double ratio = infinity;  ///< (radius/goal)²: how many times too large the variance is, or how little of it is used
  double needed_variance = 0;  ///< V̂ at which the output's promise would just hold, all else as it is; 0: of no V̂
};

/// (εT)² of the output. ‖ô‖² is inflated by the error's own mean square; the mean square of the values is not.
[[nodiscard]] VATTN_FN inline double squared_goal(const evidence& e, const promise& p) noexcept {
  const double scale2 = p.scale == error_scale::rms ? e.power : larger(e.output2 - e.variance, e.output2 / 4);
  return p.epsilon * p.epsilon * scale2;
}

/// The largest x‖v − ô‖, relative to exp(reference), at which a token may be missed without cost to the promise: κεT·D̂.
[[nodiscard]] VATTN_FN inline double missable(const evidence& e, const promise& p) noexcept {
  return p.hidden * std::sqrt(squared_goal(e, p)) * e.denominator;
}

/// Radius of D̂ relative to D̂, and of N̂ relative to ‖N̂‖: what the judge asks of evidence, beside the output's. For
/// evidence of the other kind they are in ranges.hpp.
template <asymptotic_bound B>
[[nodiscard]] VATTN_FN double denominator_radius(const evidence& e, double delta) noexcept {
  const error_shape shape{1, e.denominator_dof, static_cast<double>(e.rows - e.certain), true};
  return std::sqrt(squared_radius<B>(e.denominator_variance, 0, shape, delta));
}
template <asymptotic_bound B>
[[nodiscard]] VATTN_FN double numerator_radius(const evidence& e, double delta) noexcept {
  const error_shape shape{1, infinity, static_cast<double>(e.rows - e.certain), false};
  return std::sqrt(squared_radius<B>(e.numerator_variance, 0, shape, delta));
}

namespace detail {

template <asymptotic_bound B>
VATTN_FN void judge_output(const evidence& e, const promise& p, verdict& v) noexcept {
  const error_shape shape{e.dimension, e.dof, static_cast<double>(e.rows - e.certain), false};
  const double q = B::squared_quantile(shape, p.delta);
  const double goal2 = squared_goal(e, p), square = widened(q, e.variance, e.skew);
  v.ratio = square > 0 ? square / goal2 : square;
  // r² = q(V + skew/V̂·V·r) at r² = goal².
  const double lean = e.variance > 0 ? e.skew / e.variance : 0;
  v.needed_variance = goal2 / (q * (1 + lean * std::sqrt(goal2)));
}
template <finite_bound B, class Ranges>
VATTN_FN void judge_output(const Ranges& e, const promise& p, verdict& v) noexcept {
  const double of_goal = output_radius<B>(e, p) / p.epsilon;
  v.ratio = of_goal * of_goal;
}

}  // namespace detail

/// Where f, of one minimum in [a, b], is least: golden sections, to 6e-5 of the length.
template <class F>
[[nodiscard]] VATTN_FN double minimise(double a, double b, F&& f) noexcept {
  constexpr double golden = 0.6180339887498949;
  double x = b - golden * (b - a), y = a + golden * (b - a), fx = f(x), fy = f(y);
  for (int i = 0; i < 20; ++i) {
    if (fx <= fy) {
      b = y, y = x, fy = fx, x = b - golden * (b - a), fx = f(x);
    } else {
      a = x, x = y, fx = fy, y = a + golden * (b - a), fy = f(y);
    }
  }
  return (a + b) / 2;
}

/// The output's relative error if N is within e1 of itself and D within e2: (ε₁ + ε₂)/(1 − ε₂).
[[nodiscard]] VATTN_FN constexpr double sdpa_error(double e1, double e2) noexcept {
  return e2 < 1 ? (e1 + e2) / (1 - e2) : infinity;
}

/// Evidence is of two kinds, for bounds are: `evidence` holds variances, and an asymptotic bound says how an error of
/// that variance is distributed; `uniform_ranges` and `poisson_ranges` (ranges.hpp) hold ranges and no variance, from
/// which a finite-sample bound makes radii. Either says how far D̂, N̂ and ô may be off at δ, and the rest is the same.
template <class Evidence, class B>
concept evidence_for = requires(const Evidence& e, double delta) {
  { e.finite() } -> std::same_as<bool>;
  { denominator_radius<B>(e, delta) } -> std::same_as<double>;
};

/// Does the promise hold, for what the evidence shows? Every target, by every bound. What is not a number is not met.
template <class B, target_kind Target = target_kind::output, evidence_for<B> Evidence>
[[nodiscard]] VATTN_FN verdict judge(const Evidence& e, const promise& p) noexcept {
  static_assert(Target != target_kind::none,
                "judge<bound, target>: name what is promised, target_kind::output or another");
  verdict v;
  if (!e.finite()) return v;
  const double least = p.hidden * p.epsilon;
  // A token that a floor allows to be missed is off in D too.
  const double d = denominator_radius<B>(e, p.delta);
  v.denominator_error = std::sqrt(d * d + least * least);
  double radius = 0;  // relative, of what ε is relative to
  if constexpr (Target == target_kind::output) {
    detail::judge_output<B>(e, p, v);
    radius = p.epsilon * std::sqrt(v.ratio);
  } else if constexpr (Target == target_kind::sdpa) {
    // δ = δ₁ + δ₂ at the share that gives the least error: never one of the ends, for a radius grows without bound as
    // its δ vanishes.
    constexpr double least_share = 0.01;
    double e1 = 0, e2 = 0;
    const auto error = [&](double share) {
      e1 = numerator_radius<B>(e, share * p.delta), e2 = denominator_radius<B>(e, (1 - share) * p.delta);
      return sdpa_error(e1, e2);
    };
    radius = error(minimise(least_share, 1 - least_share, error));
    // k·e₁ and k·e₂ are just small enough where k(e₁ + e₂) = ε(1 − k·e₂).
    const double of_goal = (e1 + (1 + p.epsilon) * e2) / p.epsilon;
    v.ratio = of_goal * of_goal;
  } else {
    radius = Target == target_kind::denominator ? d : numerator_radius<B>(e, p.delta);
    v.ratio = radius / p.epsilon * (radius / p.epsilon);
  }
  v.epsilon_achieved = larger(radius, least);
  v.met = radius <= p.epsilon;
  return v;
}

/// Logits and scores are sums of floats: relative to 1 + |logit|, this much is rounding.
inline constexpr double score_rounding = 1e-3;

/// A row that was read checks what its score said of its logit: at most `highest`, or within `error` of the score. More
/// than rounding beyond that is a breach; of stated errors σ, give 4σ: one honest score in 16000 is off by as much.
[[nodiscard]] VATTN_FN constexpr bool breaches(double logit, double highest) noexcept {
  return logit > highest + score_rounding * (1 + (logit < 0 ? -logit : logit));
}
[[nodiscard]] VATTN_FN constexpr bool breaches(double logit, double score, double error) noexcept {
  return breaches(logit, score + error) || breaches(-logit, error - score);
}
/// Breaches among `rows` beyond which scores do not know their own error, and nothing may rest on them.
[[nodiscard]] VATTN_FN constexpr index_t breaches_of_errors(index_t rows) noexcept { return 2 + rows / 100; }

}  // namespace vattn::VATTN_ABI::stats

#include "vattn/macros_pop.hpp"
