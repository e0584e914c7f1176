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

/// δ of one look. Asymptotic bounds: all of it (docs/statistics.md measures what repeated looks do).
/// Finite-sample bounds: an equal part for each possible look.
template <bound B>
[[nodiscard]] double level(const config& c) noexcept {
  return B::kind == guarantee::finite_sample ? c.delta / static_cast<double>(c.max_rounds) : c.delta;
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

/// Terms x of the denominator.
[[nodiscard]] inline sum_evidence denominator_evidence(const look& l) noexcept {
  const estimate& e = l.now;
  sum_evidence d;
  d.scalar = true;
  d.with_replacement = l.with_replacement;
  d.population = e.population;
  d.sampled = e.sampled;
  d.variance = std::max(0.0, (e.s.A - e.s.S * e.s.S / e.sampled) / (e.sampled - 1));
  d.second_moment = e.s.A / e.sampled;
  // The k-th score bounds every residual logit, or x·sqrt(‖v − centre‖² + offset²) and so offset·x.
  if (l.scores.kind == score_kind::logit) d.radius = std::exp(l.order.bound() - e.reference);
  if (l.scores.kind == score_kind::contribution)
    d.radius = l.contribution(l.order.bound()) / double{l.scores.value_offset};
  return d;
}

/// Radius of D̂ relative to D̂ at δ.
template <bound B>
[[nodiscard]] double denominator_error(const look& l) noexcept {
  const sum_evidence d = denominator_evidence(l);
  return sum_radius<B>(d, d.sampled, l.settings.delta) / l.now.denominator;
}

/// Terms x·v of the numerator.
[[nodiscard]] inline sum_evidence numerator_evidence(const look& l) noexcept {
  const estimate& e = l.now;
  sum_evidence n;
  n.with_replacement = l.with_replacement;
  n.population = e.population;
  n.sampled = e.sampled;
  const double square = e.s.C + 2 * e.second_c + e.s.A * e.centre2;                   // Σ‖x v‖²
  const double mean2 = e.first2 + 2 * e.s.S * e.first_c + e.s.S * e.s.S * e.centre2;  // ‖Σ x v‖²
  n.variance = std::max(0.0, (square - mean2 / e.sampled) / (e.sampled - 1));
  n.second_moment = square / e.sampled;
  // Logits alone say nothing of ‖v‖.
  if (l.scores.kind == score_kind::contribution) {
    n.radius = l.contribution(l.order.bound()) * reach(
                                                     l, [](std::size_t) { return 0.0; }, 0);
  }
  return n;
}

/// Paper's sampling plan: the selector's heavy share, then a pilot of a fixed share of the residual
/// (2 %, at least min_sample), then the budget that the pilot implies; never less than the pilot.
struct pilot_then_budget {
  [[nodiscard]] static split first(index_t /*n*/, index_t residual, index_t heavy, const config& c) noexcept {
    const double share = c.base == config::automatic ? 0.02 : c.base;
    const auto pilot = static_cast<index_t>(std::ceil(share * static_cast<double>(residual)));
    return {heavy, std::max(c.min_sample, pilot)};
  }

 protected:
  template <bound B>
  [[nodiscard]] static verdict conclude(const look& l, double achieved, double rows) noexcept {
    verdict v;
    v.epsilon_achieved = achieved;
    v.budget = static_cast<index_t>(std::ceil(rows));
    v.met = achieved <= l.settings.epsilon;
    v.next = {l.order.count(), B::kind == guarantee::finite_sample
                                   ? scheduled(l).next.sampled
                                   : std::max(v.budget, static_cast<index_t>(l.rows.size()) + 1)};
    return v;
  }
};

/// |D̂ − D| <= ε D. This is what the paper's experiments certify; it does not bound the output's error.
struct denominator : pilot_then_budget {
  static constexpr target_kind kind = target_kind::denominator;

  template <bound B>
  [[nodiscard]] static verdict judge(const look& l) noexcept {
    const sum_evidence d = denominator_evidence(l);
    const double D = l.now.denominator;
    return conclude<B>(l, sum_radius<B>(d, d.sampled, level<B>(l.settings)) / D,
                       sample_size<B>(d, l.settings.epsilon * D, level<B>(l.settings)));
  }
};

/// ‖N̂ − N‖ <= ε‖N‖, N = Σ x v.
struct numerator : pilot_then_budget {
  static constexpr target_kind kind = target_kind::numerator;

  template <bound B>
  [[nodiscard]] static verdict judge(const look& l) noexcept {
    const sum_evidence n = numerator_evidence(l);
    const double norm = std::sqrt(l.now.output2) * l.now.denominator;
    return conclude<B>(
        l,
        norm > 0 ? sum_radius<B>(n, n.sampled, level<B>(l.settings)) / norm : std::numeric_limits<double>::infinity(),
        sample_size<B>(n, l.settings.epsilon * norm, level<B>(l.settings)));
  }
};

/// ‖ô − o‖ <= ε‖o‖ by bounding N and D apart: with ‖N̂ − N‖ <= ε₁‖N‖ (probability 1 − δ₁) and
/// |D̂ − D| <= ε₂ D (1 − δ₂) the output is within (ε₁ + ε₂)/(1 − ε₂), and δ₁ + δ₂ = δ. The split that
/// needs the fewest rows is searched for (golden section over δ₁; for each, ε₁ and ε₂ are what m rows give).
struct sdpa : pilot_then_budget {
  static constexpr target_kind kind = target_kind::sdpa;

  template <bound B>
  [[nodiscard]] static verdict judge(const look& l) noexcept {
    const sum_evidence d = denominator_evidence(l), n = numerator_evidence(l);
    const double D = l.now.denominator, norm = std::sqrt(l.now.output2) * D;
    const double delta = level<B>(l.settings);
    const auto output_error = [&](double m, double share) {
      const double e1 = sum_radius<B>(n, m, share * delta) / norm, e2 = sum_radius<B>(d, m, (1 - share) * delta) / D;
      return norm > 0 ? stats::sdpa_error(e1, e2) : stats::infinity;
    };
    const auto rows = [&](double share) {
      double low = 0, high = std::max(1.0, d.population);
      if (!(output_error(high, share) <= l.settings.epsilon)) return high;
      while (high - low > 1) {
        const double middle = std::floor((low + high) / 2);
        (output_error(middle, share) <= l.settings.epsilon ? high : low) = middle;
      }
      return high;
    };
    // Both radii grow without bound as their δ vanishes, so the error is unimodal in the share.
    const double share = stats::minimise(0.01, 0.99, [&](double s) { return output_error(d.sampled, s); });
    return conclude<B>(l, output_error(d.sampled, share), rows(share));
  }
};

}  // namespace budget
}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
