// The target that a user means: the error of the output itself, verified on the sample.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "vattn/budget/targets.hpp"
#include "vattn/estimate/linearised.hpp"

namespace vattn::VATTN_ABI::budget {

/// ‖ô − o‖ <= ε T, T the scale of config::scale. Asymptotic bounds: each look states
/// V̂ = N_r²·(1 − m/N_r)/m·s², the estimated mean square of the error, and stops when
/// V̂·F⁻¹(1 − δ; ν₁, ν₂) <= (εT)²; if not, it goes on to the (k, m) of fewest rows that its own sample
/// predicts to be enough. Finite-sample bounds: looks at a fixed schedule, without linearisation.
struct output {
  static constexpr target_kind kind = target_kind::output;

  /// `base` automatic: n/256 rows, at least 128, at most 256.
  [[nodiscard]] static split first(index_t n, index_t residual, index_t heavy, const config& c) noexcept {
    const index_t pilot = c.base == config::automatic
                              ? std::clamp<index_t>(n / 256, 128, 256)
                              : static_cast<index_t>(std::ceil(c.base * static_cast<double>(residual)));
    return {heavy, std::max(pilot, c.min_sample)};
  }

  template <bound B>
  [[nodiscard]] static verdict judge(const look& l) noexcept {
    verdict v = scheduled(l);
    if constexpr (B::kind == guarantee::finite_sample) {
      static_cast<stats::verdict&>(v) = stats::judge<B>(ranges(l), asked<B>(l));
    } else {
      const linearised_terms y = linearise(l.now, l.moments, l.offset);
      sum_evidence terms = sampled_terms(l);
      terms.variance = y.variance, terms.dimension = y.dimension, terms.dof = y.dof;
      add_unseen(terms, unseen_term(l, l.order.bound()), l.settings.delta);
      stats::evidence e = variances(l);
      e.variance = terms.error_variance(), e.dimension = terms.dimension, e.dof = terms.dof;
      static_cast<stats::verdict&>(v) = stats::judge<B>(e, asked<B>(l));
      v.next = v.met ? split{l.order.count(), e.rows}
                     : cheapest<B>(l, terms, y, std::sqrt(stats::squared_goal(e, asked<B>(l))));
      v.budget = v.next.sampled;
    }
    return v;
  }

 private:
  // Terms as large as the selector's bound allows may be in the residual unseen. Of m draws none hits a share λ/m of
  // them with probability e^{−λ}: as likely as δ at λ = ln(1/δ), and then the error is λ terms in one direction. So
  // many terms count as seen that the quantile of one dimension, z, covers that: z·sqrt(count) = λ.
  static void add_unseen(sum_evidence& terms, double guard, double delta) noexcept {
    const double count =
        std::max(1.0, std::pow(std::log(1 / delta), 2) / stats::squared_error_quantile(delta, 1, stats::infinity));
    stats::add_direction(terms, count * guard * guard / terms.sampled);
  }

  // Largest ‖Y‖ that a place of score <= bound can have, as far as the scores tell.
  [[nodiscard]] static double unseen_term(const look& l, float bound) noexcept {
    const estimate& e = l.now;
    if (l.scores.kind == score_kind::ranking || l.order.size() == l.order.count()) return 0;
    if (l.scores.kind == score_kind::contribution)
      return l.contribution(bound) / e.denominator *
             reach(
                 l, [&](std::size_t j) { return double{l.moments.centre()[j]} + l.offset[j]; }, 0);
    // Logits say nothing of ‖v‖: a value as large as the attended ones are in the mean, opposite to ô.
    return std::exp(bound - e.reference) / e.denominator * (std::sqrt(e.power) + std::sqrt(e.output2));
  }

  // Fewest rows k + m predicted to reach `tau`. Taking the ranks up to k' out of the residual leaves the
  // sampled rows that rank below k': their terms are the sample of the smaller residual.
  template <bound B>
  [[nodiscard]] static split cheapest(const look& l, const sum_evidence& now, const linearised_terms& y,
                                      double tau) noexcept {
    // Aimed a little past the goal: one more look costs about as much as the rows it would save.
    constexpr double aim = 0.97;
    // A sample at most doubles at a look: a small one sees too heavy a tail and would ask for too much.
    constexpr double growth = 1;
    const estimate& e = l.now;
    const index_t k = l.order.count();
    // Terms about c, scaled so that all of them give the variance about ô.
    tally all;
    for (const drawn_row& r : l.rows) all.add(term(r, e.reference));
    const double per_term = all.sum > 0 ? y.variance * (e.sampled - 1) / all.sum : 0;

    constexpr index_t none = std::numeric_limits<index_t>::max();
    split best{k, none};
    const auto consider = [&](index_t heavy, const tally& kept, float bound) {
      sum_evidence s = now;
      s.population = e.population - static_cast<double>(heavy - k);
      if (s.population < 1 || kept.rows < 2) return;
      const double guard = unseen_term(l, bound);
      double m = e.sampled;
      for (int i = 0; i < 3; ++i) {  // ν₂ and the guard's share depend on m: a fixed point in a few steps
        s.variance = kept.sum * per_term / (kept.rows - 1);
        s.dimension = y.dimension;
        s.sampled = m;
        add_unseen(s, guard, l.settings.delta);
        // Without its heaviest terms the variance is the better known: the ranking lightens the tail.
        s.dof = now.dof * kept.effective() / all.effective() * m / kept.rows;
        m = std::max(kept.rows, sample_size<B>(s, aim * tau, l.settings.delta));
      }
      const auto rows = static_cast<index_t>(m);
      if (best.sampled == none || heavy + rows < best.heavy + best.sampled) best = {heavy, rows};
    };
    consider(k, all, l.order.bound());
    if (l.settings.heavy == config::automatic && l.scores.kind != score_kind::ranking) {
      // Rungs beyond the best so far can only be dearer, and far ones are not reached at this look. From the highest
      // down, so that each selects among what the one above has left; then one pass deals the rows to the rungs.
      const index_t most = std::min({l.order.size() - 1, l.n / 4, 8 * (k + static_cast<index_t>(e.sampled)),
                                     best.sampled == none ? none : best.heavy + best.sampled});
      constexpr std::size_t max_rungs = 48;  // 1.5^48 > 2^28
      std::array<index_t, max_rungs> heavy;
      std::array<ordinal, max_rungs> last;
      std::array<float, max_rungs> score;
      std::array<tally, max_rungs> kept{};
      std::size_t rungs = 0;
      for (double rung = 72; rung <= static_cast<double>(most) && rungs < max_rungs; rung *= 1.5)
        if (rung > 1.25 * static_cast<double>(k)) heavy[rungs++] = static_cast<index_t>(rung);
      for (std::size_t i = rungs; i-- > 0;) {
        last[i] = l.order.at_rank(heavy[i]);
        score[i] = l.order.score(last[i]);
      }
      // A row that ranks behind rung i ranks behind all rungs below it: count it at the highest, then sum.
      for (const drawn_row& r : l.rows) {
        std::size_t passed = 0;
        while (passed < rungs && l.order.before(last[passed], r.place)) ++passed;
        if (passed > 0) kept[passed - 1].add(term(r, e.reference));
      }
      for (std::size_t i = rungs; i-- > 1;) kept[i - 1].merge(kept[i]);
      for (std::size_t i = 0; i < rungs; ++i) {
        if (heavy[i] > best.heavy + best.sampled) break;
        consider(heavy[i], kept[i], score[i]);
      }
    }
    if (best.sampled == none) best.sampled = static_cast<index_t>(e.population);
    // A far jump from a small sample overshoots: the tail it saw decides, and a larger sample sees better.
    const double have = static_cast<double>(k) + e.sampled, asked = static_cast<double>(best.heavy + best.sampled);
    if (const double part = growth * have / (asked - have); part < 1) {
      best.heavy = k + static_cast<index_t>(part * static_cast<double>(best.heavy - k));
      best.sampled = static_cast<index_t>(e.sampled + part * (static_cast<double>(best.sampled) - e.sampled));
    }
    if (best.heavy == k) best.sampled = std::max(best.sampled, static_cast<index_t>(e.sampled) + 1);
    return best;
  }

  struct tally {
    double rows = 0, sum = 0, square = 0;
    void add(double t) noexcept {
      rows += 1;
      sum += t;
      square += t * t;
    }
    void merge(const tally& o) noexcept {
      rows += o.rows;
      sum += o.sum;
      square += o.square;
    }
    // Rows that carry the sum: all of them if equal, 1 if one dominates.
    [[nodiscard]] double effective() const noexcept { return square > 0 ? sum * sum / square : rows; }
  };

  [[nodiscard]] static double term(const drawn_row& r, double reference) noexcept {
    const double x = std::exp(r.logit - reference);
    return x * x * r.spread;
  }
};

}  // namespace vattn::VATTN_ABI::budget

#include "vattn/macros_pop.hpp"
