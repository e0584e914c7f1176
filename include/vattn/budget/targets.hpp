// What the promise is about, and how many rows it takes: the target concept and the paper's targets.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <cmath>
#include <span>

#include "vattn/certificate.hpp"
#include "vattn/estimate/residual.hpp"
#include "vattn/select/selector.hpp"
#include "vattn/settings.hpp"
#include "vattn/stats/judge.hpp"

namespace vattn::VATTN_ABI {

/// Rows of each kind.
struct split {
  index_t heavy = 0;    ///< exact because ranked
  index_t sampled = 0;  ///< drawn from the residual
};

/// One look at the sample: all that a target may use to judge it.
struct look {
  const estimate& now;
  const residual_moments& moments;
  std::span<const float> offset;  // [dv], ô − c
  ranking& order;
  std::span<const drawn_row> rows;
  index_t n;      ///< visible tokens
  index_t fixed;  ///< sinks + window
  score_result scores;
  std::span<const float> value_centre;  ///< [dv], of score_kind::contribution
  const config& settings;
  bool with_replacement;

  /// The most that x·sqrt(‖v − centre‖² + offset²) can be where the score is no more than this, of
  /// score_kind::contribution.
  [[nodiscard]] double contribution(float score) const noexcept {
    return std::exp(score - now.reference) * double{scores.contribution_unit};
  }
};

/// A judgement, and what to read next.
struct verdict : stats::verdict {
  index_t budget = 0;  ///< sampled rows that the bound asks for
  split next{};        ///< rows to have at the next look, if not met
};

/// Supply `kind`, `first(order, n, residual, heavy, settings)`, the rows before the first look, and
/// `judge<Bound>(look)`, which says whether ε holds at δ and, if not, with how many rows it will.
template <class T, class Bound>
concept target_for = bound<Bound> && requires(const look& l, index_t n, const config& c) {
  { T::kind } -> std::convertible_to<target_kind>;
  { T::first(n, n, n, c) } -> std::same_as<split>;
  { T::template judge<Bound>(l) } -> std::same_as<verdict>;
};

namespace budget {

using stats::sum_evidence, stats::sample_size, stats::sum_radius;

/// With a contribution ranking every residual x·sqrt(‖v − p‖² + s²) is at most exp(k-th score) times this:
/// the largest sqrt(((t + r)² + s²)/(t² + offset²)) over t = ‖v − centre‖ >= 0, r = ‖p − centre‖. At the
/// maximum r t² + (r² + s² − offset²) t − r offset² = 0.
template <class Point>
[[nodiscard]] double reach(const look& l, Point&& p, double s) noexcept {
  double r2 = 0;
  for (std::size_t j = 0; j < l.value_centre.size(); ++j) {
    const double d = p(j) - l.value_centre[j];
    r2 += d * d;
  }
  const double r = std::sqrt(r2), o2 = double{l.scores.value_offset} * l.scores.value_offset, s2 = s * s;
  const auto square = [&](double t) { return ((t + r) * (t + r) + s2) / (t * t + o2); };
  double most = std::max(1.0, square(0));  // 1 is the limit of large t
  if (r > 0) {
    const double b = r2 + s2 - o2;
    most = std::max(most, square((std::sqrt(b * b + 4 * r2 * o2) - b) / (2 * r)));
  }
  return std::sqrt(most);
}

/// What is asked of one look. Of δ, asymptotic bounds take all (docs/statistics.md measures what repeated looks do),
/// finite-sample bounds an equal part for each possible look.
template <bound B>
[[nodiscard]] stats::promise asked(const look& l) noexcept {
  const double looks = B::kind == guarantee::finite_sample ? static_cast<double>(l.settings.max_rounds) : 1;
  return {l.settings.epsilon, l.settings.delta / looks, l.settings.scale};
}

/// The next look of a finite-sample bound: twice the rows of each kind, whatever the draw has shown.
[[nodiscard]] inline verdict scheduled(const look& l) noexcept {
  verdict v;
  const auto sampled = static_cast<index_t>(l.rows.size());
  const bool fixed = l.settings.heavy != config::automatic || l.scores.kind == score_kind::ranking;
  v.next = {fixed ? l.order.count() : std::min(2 * l.order.count(), l.order.size()), 2 * sampled};
  v.budget = sampled;
  return v;
}

/// Terms of which nothing is known but how many there are, and were sampled.
[[nodiscard]] inline sum_evidence sampled_terms(const look& l) noexcept {
  sum_evidence e;
  e.population = l.now.population, e.sampled = l.now.sampled, e.with_replacement = l.with_replacement;
  return e;
}

/// Terms x of the denominator.
[[nodiscard]] inline sum_evidence denominator_evidence(const look& l) noexcept {
  const estimate& e = l.now;
  sum_evidence d = sampled_terms(l);
  d.scalar = true;
  d.variance = std::max(0.0, (e.s.A - e.s.S * e.s.S / e.sampled) / (e.sampled - 1));
  d.second_moment = e.s.A / e.sampled;
  // The k-th score bounds every residual logit, or x·sqrt(‖v − centre‖² + offset²) and so offset·x.
  if (l.scores.kind == score_kind::logit) d.radius = std::exp(l.order.bound() - e.reference);
  if (l.scores.kind == score_kind::contribution)
    d.radius = l.contribution(l.order.bound()) / double{l.scores.value_offset};
  return d;
}

/// Terms x·v of the numerator.
[[nodiscard]] inline sum_evidence numerator_evidence(const look& l) noexcept {
  const estimate& e = l.now;
  sum_evidence n = sampled_terms(l);
  const double square = e.s.C + 2 * e.second_c + e.s.A * e.centre2;                   // Σ‖x v‖²
  const double mean2 = e.first2 + 2 * e.s.S * e.first_c + e.s.S * e.s.S * e.centre2;  // ‖Σ x v‖²
  n.variance = std::max(0.0, (square - mean2 / e.sampled) / (e.sampled - 1));
  n.second_moment = square / e.sampled;
  // Logits alone say nothing of ‖v‖.
  const auto zero = [](std::size_t) { return 0.0; };
  if (l.scores.kind == score_kind::contribution) n.radius = l.contribution(l.order.bound()) * reach(l, zero, 0);
  return n;
}

/// What a look shows, for asymptotic bounds: the estimate, and the variances of D̂ and N̂. That of ô is left to `output`,
/// which alone asks for it.
[[nodiscard]] inline stats::evidence variances(const look& l) noexcept {
  const estimate& now = l.now;
  const double norm = std::sqrt(now.output2) * now.denominator;
  stats::evidence e;
  e.reference = now.reference;
  e.denominator = now.denominator;
  e.output2 = now.output2, e.power = now.power, e.away2 = now.u2;
  e.rows = static_cast<index_t>(now.sampled);
  e.denominator_variance = denominator_evidence(l).error_variance() / (now.denominator * now.denominator);
  // A sum without length is never within ε of itself.
  e.numerator_variance = norm > 0 ? numerator_evidence(l).error_variance() / (norm * norm) : stats::infinity;
  return e;
}

/// The same for finite-sample bounds: ranges, as far as the scores know them.
[[nodiscard]] inline stats::uniform_ranges ranges(const look& l) noexcept {
  const estimate& now = l.now;
  stats::uniform_ranges e;
  e.denominator = now.denominator, e.output2 = now.output2, e.away2 = now.u2, e.rows = now.sampled;
  e.weights = denominator_evidence(l), e.values = numerator_evidence(l), e.joint = sampled_terms(l);
  if (l.scores.kind != score_kind::contribution) return e;  // nothing is known of the values
  const double s = e.join = l.scores.value_offset;
  e.joint.second_moment = (now.s.C + s * s * now.s.A) / now.sampled;
  const auto centre = [&](std::size_t j) { return double{l.moments.centre()[j]}; };
  e.joint.radius = l.contribution(l.order.bound()) * reach(l, centre, s);
  return e;
}

/// Paper's sampling plan: the selector's heavy share, then a pilot of a fixed share of the residual
/// (2 %, at least min_sample), then the budget that the pilot implies; never less than the pilot.
template <target_kind Kind>
struct published {
  static constexpr target_kind kind = Kind;
  static constexpr double pilot_share = 0.02;

  [[nodiscard]] static split first(index_t /*n*/, index_t residual, index_t heavy, const config& c) noexcept {
    const double share = c.base == config::automatic ? pilot_share : c.base;
    const auto pilot = static_cast<index_t>(std::ceil(share * static_cast<double>(residual)));
    return {heavy, std::max(c.min_sample, pilot)};
  }

  template <bound B>
  [[nodiscard]] static verdict judge(const look& l) noexcept {
    verdict v = scheduled(l);
    v.next.heavy = l.order.count();
    if constexpr (B::kind == guarantee::finite_sample) {
      stats::uniform_ranges seen = ranges(l);
      static_cast<stats::verdict&>(v) = stats::judge<B, Kind>(seen, asked<B>(l));
      v.budget = static_cast<index_t>(stats::smallest_size(l.now.population, [&](double m) {
        seen.rows = m;
        return stats::judge<B, Kind>(seen, asked<B>(l)).met;
      }));
    } else {
      static_cast<stats::verdict&>(v) = stats::judge<B, Kind>(variances(l), asked<B>(l));
      // Of a residual that is read whole no variance is left to say how much of it was needed.
      const sum_evidence terms = sampled_terms(l);
      if (terms.unread(terms.sampled) > 0) v.budget = static_cast<index_t>(terms.rows_for(v.ratio));
      v.next.sampled = std::max(v.budget, static_cast<index_t>(l.rows.size()) + 1);
    }
    return v;
  }
};

/// |D̂ − D| <= ε D. This is what the paper's experiments certify; it does not bound the output's error.
using denominator = published<target_kind::denominator>;
/// ‖N̂ − N‖ <= ε‖N‖, N = Σ x v.
using numerator = published<target_kind::numerator>;
/// ‖ô − o‖ <= ε‖o‖ by bounding N and D apart: with ‖N̂ − N‖ <= ε₁‖N‖ (probability 1 − δ₁) and
/// |D̂ − D| <= ε₂ D (1 − δ₂) the output is within (ε₁ + ε₂)/(1 − ε₂), and δ₁ + δ₂ = δ, split so that it is least.
using sdpa = published<target_kind::sdpa>;

}  // namespace budget
}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
