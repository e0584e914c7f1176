// The target that a user means: the error of the output itself, verified on the sample.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "vattn/budget/targets.hpp"
#include "vattn/estimate/linearised.hpp"

namespace vattn::budget {

/// ‖ô − o‖ <= ε T, T the scale of config::scale. Each look states V̂ = N_r²·(1 − m/N_r)/m·s², the
/// estimated mean square of the error, and stops when V̂·F⁻¹(1 − δ; ν₁, ν₂) <= (εT)². If not, it goes on
/// to the (k, m) of fewest rows that its own sample predicts to be enough.
struct output {
  static constexpr target_kind kind = target_kind::output;

  /// `heavy` and `base` automatic: n/256 and the residual's 1/256, at least 64 and 128, at most 512.
  [[nodiscard]] static split first(index_t n, index_t residual, index_t heavy, const config& c) noexcept {
    split s{heavy, c.min_sample};
    if (c.heavy == config::automatic) s.heavy = std::min(heavy, std::clamp<index_t>(n / 256, 64, 512));
    s.sampled = c.base == config::automatic ? std::clamp<index_t>(n / 256, 128, 512)
                                            : static_cast<index_t>(std::ceil(c.base * static_cast<double>(residual)));
    s.sampled = std::max(s.sampled, c.min_sample);
    return s;
  }

  template <bound B>
  [[nodiscard]] static verdict judge(const look& l) noexcept {
    const estimate& e = l.now;
    const linearised_terms y = linearise(e, l.moments, l.offset);
    sum_evidence evidence;
    evidence.with_replacement = l.with_replacement;
    evidence.population = e.population;
    evidence.sampled = e.sampled;
    evidence.dimension = y.dimension;
    evidence.dof = y.dof;
    // A term as large as the selector's bound allows may be in the residual unseen: count one such.
    const double guard = unseen_term(l, l.order.bound());
    evidence.variance = y.variance + guard * guard / e.sampled;

    const double mean_square = evidence.population * evidence.population * evidence.variance / e.sampled *
                               finite_population(evidence, e.sampled);
    const double scale = std::sqrt(squared_scale(l, mean_square));
    verdict v;
    v.epsilon_achieved =
        scale > 0 ? B::radius(evidence, e.sampled, l.settings.delta) / scale : std::numeric_limits<double>::infinity();
    v.met = v.epsilon_achieved <= l.settings.epsilon;
    v.next = v.met ? split{l.order.count(), l.now.s.rows > 0 ? static_cast<index_t>(e.sampled) : 0}
                   : cheapest<B>(l, evidence, y.variance, l.settings.epsilon * scale);
    v.budget = v.next.sampled;
    return v;
  }

 private:
  // ‖ô‖² is inflated by the error's own mean square; RMS is not.
  [[nodiscard]] static double squared_scale(const look& l, double mean_square) noexcept {
    if (l.settings.scale == error_scale::rms) return l.now.power;
    return std::max(l.now.output2 - mean_square, l.now.output2 / 4);
  }

  // Largest ‖Y‖ that a place of score <= bound can have, as far as the scores tell.
  [[nodiscard]] static double unseen_term(const look& l, float bound) noexcept {
    const estimate& e = l.now;
    if (l.scores.kind == score_kind::ranking || l.order.size() == l.order.count()) return 0;
    const double x = std::exp(bound - e.reference) / e.denominator;
    // contribution: x(‖v‖ + ‖ô‖) <= x(‖v‖ + offset)·max(1, ‖ô‖/offset). logit: a value as large as the
    // attended values are in the mean.
    if (l.scores.kind == score_kind::contribution)
      return x * std::max(1.0, std::sqrt(e.output2) / l.scores.value_offset);
    return x * (std::sqrt(e.power) + std::sqrt(e.output2));
  }

  // Fewest rows k + m predicted to reach `tau`. Taking the ranks up to k' out of the residual leaves the
  // sampled rows that rank below k': their terms are the sample of the smaller residual.
  template <bound B>
  [[nodiscard]] static split cheapest(const look& l, const sum_evidence& now, double variance, double tau) noexcept {
    // Aimed a little past the goal: one more look costs about as much as the rows it would save.
    constexpr double aim = 0.95;
    const estimate& e = l.now;
    const index_t k = l.order.count();
    double all = 0;
    for (const drawn_row& r : l.rows) all += term(r, e.reference);
    const double per_term = all > 0 ? variance * (e.sampled - 1) / all : 0;  // about c -> about ô, centred

    split best{k, std::numeric_limits<index_t>::max()};
    const auto consider = [&](index_t heavy, double kept_rows, double kept_terms, float bound) {
      sum_evidence s = now;
      s.population = e.population - static_cast<double>(heavy - k);
      if (s.population < 1 || kept_rows < 2) return;
      const double guard = unseen_term(l, bound);
      s.variance = kept_terms * per_term / (kept_rows - 1) + guard * guard / e.sampled;
      double m = kept_rows;
      for (int i = 0; i < 3; ++i) {  // ν₂ grows with m: a fixed point in a few steps
        s.dof = now.dof * m / e.sampled;
        m = std::max(kept_rows, sample_size<B>(s, aim * tau, l.settings.delta));
      }
      const auto rows = static_cast<index_t>(m);
      if (best.sampled == std::numeric_limits<index_t>::max() || heavy + rows < best.heavy + best.sampled)
        best = {heavy, rows};
    };
    consider(k, e.sampled, all, l.order.bound());
    if (l.settings.heavy == config::automatic && l.scores.kind != score_kind::ranking) {
      const index_t most = std::min(l.order.size() - 1, l.n / 4);
      for (double rung = 1.5 * static_cast<double>(std::max<index_t>(k, 32)); rung <= static_cast<double>(most);
           rung *= 1.5) {
        const auto heavy = static_cast<index_t>(rung);
        const ordinal last = l.order.at_rank(heavy);
        double rows = 0, terms = 0;
        for (const drawn_row& r : l.rows) {
          if (!l.order.before(last, r.place)) continue;
          rows += 1;
          terms += term(r, e.reference);
        }
        consider(heavy, rows, terms, l.order.score(last));
        if (heavy > best.heavy + best.sampled) break;  // dearer than the best already, and rising
      }
    }
    if (best.sampled == std::numeric_limits<index_t>::max()) best.sampled = static_cast<index_t>(e.population);
    if (best.heavy == k) best.sampled = std::max(best.sampled, static_cast<index_t>(e.sampled) + 1);
    return best;
  }

  [[nodiscard]] static double term(const drawn_row& r, double reference) noexcept {
    const double x = std::exp(r.logit - reference);
    return x * x * r.spread;
  }
};

}  // namespace vattn::budget
