// Verified attention by importance sampling: one rule for heavy tokens and samples.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <span>

#include "vattn/call/call.hpp"
#include "vattn/certify/certify.hpp"
#include "vattn/estimate/exact.hpp"
#include "vattn/estimate/weighted.hpp"
#include "vattn/exact_attention.hpp"
#include "vattn/sample/importance.hpp"
#include "vattn/select/score_check.hpp"
#include "vattn/select/selector.hpp"

namespace vattn::VATTN_ABI {

/// exp(β·s) tempers the weights by how much of the scores' spread is error: β = 1 − median(σ²)/var(s).
[[nodiscard]] inline double tempering(std::span<const float> scores, std::span<const float> errors,
                                      std::span<float> scratch) noexcept {
  const auto n = static_cast<double>(scores.size());
  double sum = 0, square = 0;
  for (const float s : scores) {
    sum += s;
    square += double{s} * s;
  }
  const double variance = square / n - sum / n * (sum / n);
  std::copy(errors.begin(), errors.end(), scratch.begin());
  const auto middle = scratch.begin() + static_cast<std::ptrdiff_t>(errors.size() / 2);
  std::nth_element(scratch.begin(), middle, scratch.begin() + static_cast<std::ptrdiff_t>(errors.size()));
  return variance > 0 ? std::clamp(1 - double{*middle} * *middle / variance, 0.3, 1.0) : 1.0;
}

/// Where the tokens of a call come from: all that a query sees, or a first phase's sample of them.
struct sampling_frame {
  index_t n = 0;                      ///< tokens that the query sees
  std::span<const float> prior = {};  ///< [tokens], probability with which the first phase kept each
  /// log of the λ e^{-reference} and the K that the first phase's own floors had: a token that its score hid from
  /// that phase is covered up to them.
  double log_floor = std::numeric_limits<double>::infinity();
  double offset = std::numeric_limits<double>::infinity();
};

namespace detail {

/// One head's part of a (shared) Poisson sample, and how far it has come.
template <bound B>
struct importance_head {
  sample::importance pi;
  softmax_state exact;
  double share = 0, floor = 0, offset = 0;                          // c, λ and K that are wanted,
  double entered_share = 0, entered_floor = 0, entered_offset = 0;  // and that the sample has
  select::score_check check;
  index_t scoring_rows = 0;
  bool done = false;
  bool unusable = false;  // its scores or errors are not finite

  [[nodiscard]] double wanted(index_t i) const noexcept { return pi.probability(i, share, floor, offset); }
  [[nodiscard]] double entered(index_t i) const noexcept {
    return pi.probability(i, entered_share, entered_floor, entered_offset);
  }

  /// Scores, probabilities, and the rows that are read for certain. False: see head_task::ok.
  template <class Selector, kv_head Head>
  [[nodiscard]] bool begin(head_task<Head>& task, const Selector& selector, const config& settings,
                           const sample::importance_shape& shape, const sampling_frame& frame) noexcept {
    const population& tokens = task.tokens;
    scratch& s = task.s;
    const index_t n = tokens.size(), fixed = settings.sinks + settings.window;
    const auto size = static_cast<std::size_t>(n);
    const std::span<float> scores = s.scores.first(size), errors = s.errors.first(size);
    const score_result scored = selector.score(task.row, tokens, {scores, errors, s.value_centre, s.selector});
    s.lagging = scored.lagging;
    if (!scored.ok) return false;
    scoring_rows = scored.rows_read;
    const auto ranked = static_cast<std::size_t>(std::max<index_t>(0, n - fixed));
    const auto skip = static_cast<std::size_t>(settings.sinks);
    unusable = !can_sample(scores.subspan(skip, ranked), errors.subspan(skip, ranked));
    if (unusable) return true;

    const auto distance = select::value_distances(task.row, tokens, s.value_centre);
    pi = sample::importance(s.weights, s.floors, s.reaches, frame.prior);
    pi.prepare(
        scores, errors, [&](index_t j) { return distance(tokens[j]); }, settings.sinks, n - settings.window,
        tempering(scores, errors, s.reaches), shape, settings.delta);
    offset = pi.offset();
    share = shape.pilot;

    exact = softmax_state(s.offset);
    softmax_state part(s.part);
    add_sink(exact, task.row.sink_logit);
    const auto place = [&](index_t j) { return j < settings.sinks ? j : n - fixed + j; };
    if (!accumulate_exact(
            task.row, fixed, [&](index_t j) { return tokens[place(j)]; }, exact, part, true))
      return false;
    // Rows that are read anyway check what the scores say of themselves. These are read whatever their scores: the
    // newest are among them, which an index lags behind in. Not of scores that were fitted to other rows in this call,
    // whose one error scale need not be that of sinks.
    for (index_t j = 0; scored.rows_read == 0 && j < fixed; ++j) {
      const auto at = static_cast<std::size_t>(place(j));
      check.estimate(task.row.logit(tokens[place(j)]), scores[at], errors[at], false);
    }
    return true;
  }

  /// Looks at the sample of `count` rows: done, or how much more is wanted. False: see head_task::ok.
  template <kv_head Head, class Probability>
  [[nodiscard]] bool look(head_task<Head>& task, index_t count, const config& settings,
                          const sample::importance_shape& shape, const sampling_frame& frame,
                          Probability&& probability) noexcept {
    scratch& s = task.s;
    certificate& c = task.c;
    const std::span<weighted_row> rows = s.weighted.first(static_cast<std::size_t>(count));
    for (weighted_row& r : rows) r.probability = static_cast<float>(probability(index_t{r.place}));
    const stats::evidence e =
        estimate_weighted(task.row, task.tokens, rows, exact, task.state, s.centre, s.moments, task.stream.fork(1));
    if (!std::isfinite(e.denominator) || !std::isfinite(e.output2) || !std::isfinite(e.power)) return false;
    const bool all = settings.sinks + settings.window + count == frame.n;
    stats::promise asked{settings.epsilon, settings.delta, settings.scale, all ? 0 : shape.kappa};
    const stats::verdict v = stats::judge<B>(e, asked);
    // A token that is missed although it may move the output by f must cost at most κ·ε·T. What moves it is
    // x‖v − ô‖, at most x(r + ‖ô − centre‖).
    const kernel::const_float_map o(s.centre.data(), static_cast<Eigen::Index>(s.centre.size()));
    const kernel::const_float_map centre(s.value_centre.data(), static_cast<Eigen::Index>(s.value_centre.size()));
    const double away = static_cast<double>((o - centre).norm());
    // Near the cap less: there only samples stop that look better than they are, and what makes them look so is a
    // token that they miss.
    const double room = static_cast<double>(count) / (settings.max_density * static_cast<double>(frame.n));
    asked.hidden = shape.kappa * (1 - 0.6 * std::min(1.0, room));
    const double log_needed = -e.reference - std::log(stats::missable(e, asked));
    const double needed = std::exp(pi.top() + log_needed);
    task.log_floor = std::max(task.log_floor, log_needed);
    task.offset = std::max(task.offset, away);
    const bool covered = floor >= 0.8 * needed && offset >= 0.8 * away;
    const bool kept = frame.log_floor >= std::log(0.8) + log_needed && frame.offset >= 0.8 * away;
    if (v.met && covered && kept) {
      stats::certify(c, e, v,
                     {.rows_exact = settings.sinks + settings.window + e.certain,
                      .rows_sampled = count - e.certain + scoring_rows,
                      .budget = count - e.certain,
                      .kind = B::kind,
                      .bound = B::name,
                      .assumptions = "asymptotic, as stated by the bound; and the scores' stated errors are true"});
      if (s.chosen) {
        s.chosen.clear();
        s.chosen.add_ends(task.tokens, settings.sinks, settings.window);
        for (const weighted_row& r : rows) s.chosen.add(task.tokens[r.place], 1 / static_cast<double>(r.probability));
      }
      return done = true;
    }
    floor = std::max(floor, needed);
    offset = std::max(offset, away);
    if (v.met) return true;
    // The least share of which the sample itself predicts enough, with its rows standing for those to come:
    // V' = Σ (1 − π')/(π'π)‖Y‖², and Σt'² = Σ (1 − π')²/(π'³π)‖Y‖⁴ for the new ν₂.
    constexpr double aim = 0.985 * 0.985;
    const double goal2 = stats::squared_goal(e, asked);
    const auto enough = [&](double next) {
      double variance = 0, fourth = 0;
      for (const weighted_row& r : rows) {
        const double had = static_cast<double>(r.probability), y2 = static_cast<double>(r.spread);
        const double p = std::max(std::min(had, 1.0), pi.probability(r.place, next, floor, offset));
        const double t = (1 - p) / (p * had) * y2;
        variance += t;
        fourth += t * (1 - p) / (p * p) * y2;
      }
      const double dof = fourth > 0 ? 2 * variance * variance / fourth : e.dof;
      const double skew = e.variance > 0 ? e.skew * variance / e.variance : 0;  // of 1/π², as is t against V's 1/π
      return stats::squared_radius<B>(variance, skew, {e.dimension, dof, static_cast<double>(count)}, settings.delta) <=
             aim * goal2;
    };
    double low = 1.03 * share, high = 4 * share;
    for (int i = 0; i < 8; ++i) {
      const double middle = std::sqrt(low * high);
      (enough(middle) ? high : low) = middle;
    }
    share = high;
    return true;
  }
};

}  // namespace detail

/// The heads of a group from one Poisson sample: score -> probabilities -> sample -> estimate -> verify ->
/// certify, until each head is verified and every token's floor is covered. For a head that does not
/// come to that, `not_done(task)` is called. Heads' tokens must be the same; `numbers` [tokens] are their permanent
/// numbers.
template <bound B, class Selector, kv_head Head, class NotDone>
void sample_by_importance(head_group<Head>& group, const config& settings, const Selector& selector,
                          const sample::importance_shape& shape, std::span<const float> numbers,
                          const sampling_frame& frame, NotDone&& not_done) noexcept {
  const population& tokens = group[0].tokens;
  const index_t n = tokens.size(), fixed = settings.sinks + settings.window;
  const auto most = static_cast<index_t>(settings.max_density * static_cast<double>(frame.n));
  std::array<detail::importance_head<B>, static_cast<std::size_t>(max_shared)> heads{};
  const auto each = [&](auto&& visit) {
    for (index_t g = 0; g < group.size(); ++g) {
      auto& head = heads[static_cast<std::size_t>(g)];
      if (group[g].ok && !head.done) visit(head, group[g]);
    }
  };
  each([&](auto& head, auto& task) { task.ok = head.begin(task, selector, settings, shape, frame); });

  // The sample is for the heads together: each row with the largest probability that any of them gives it.
  const auto wanted = [&](index_t i) {
    double p = 0;
    for (index_t g = 0; g < group.size(); ++g)
      if (group[g].ok && !heads[static_cast<std::size_t>(g)].unusable)
        p = std::max(p, heads[static_cast<std::size_t>(g)].wanted(i));
    return p;
  };
  const auto entered = [&](index_t i) {
    double p = 0;
    for (index_t g = 0; g < group.size(); ++g)
      if (group[g].ok && !heads[static_cast<std::size_t>(g)].unusable)
        p = std::max(p, heads[static_cast<std::size_t>(g)].entered(i));
    return p;
  };
  index_t count = 0;
  bool full = false;
  for (index_t round = 1; round <= settings.max_rounds && !full; ++round) {
    for (index_t i = settings.sinks; i < n - settings.window && !full; ++i) {
      const double u = static_cast<double>(numbers[static_cast<std::size_t>(i)]);
      if (!(u < wanted(i)) || u < entered(i)) continue;
      full = fixed + count + 1 >= most;
      if (full) break;
      for (index_t g = 0; g < group.size(); ++g) {
        head_task<Head>& task = group[g];
        auto& head = heads[static_cast<std::size_t>(g)];
        if (!task.ok) continue;
        const float logit = task.row.logit(tokens[i]);
        task.ok = std::isfinite(logit);
        const auto at = static_cast<std::size_t>(i);
        head.check.estimate(logit, task.s.scores[at], task.s.errors[at], true);
        task.s.weighted[static_cast<std::size_t>(count)] = {static_cast<ordinal>(i), logit, 1, 0};
      }
      ++count;
    }
    if (full) break;
    for (auto& head : heads)
      head.entered_share = head.share, head.entered_floor = head.floor, head.entered_offset = head.offset;
    bool left = false;
    each([&](auto& head, auto& task) {
      task.c.rounds = round;
      task.c.breaches = head.check.breaches();
      if (head.unusable || !head.check.believed()) return;
      task.ok = head.look(task, count, settings, shape, frame, entered);
      // A head that asks for nothing more will see nothing else.
      left |= task.ok && !head.done &&
              (head.share > head.entered_share || head.floor > head.entered_floor || head.offset > head.entered_offset);
    });
    if (!left) break;
  }
  each([&](auto&, auto& task) { not_done(task); });
}

/// Every head of the group by importance sampling, or exactly where that does not come to a verified end.
template <bound B, class Selector, kv_head Head>
void attend_by_importance(head_group<Head>& group, const config& settings, const Selector& selector,
                          const sample::importance_shape& shape) noexcept {
  head_task<Head>& first = group[0];
  const index_t n = first.tokens.size();
  sample::draw_numbers(first.s.numbers, settings.sinks, n - settings.window, first.stream);
  sample_by_importance<B>(group, settings, selector, shape, first.s.numbers, {.n = n}, [&](head_task<Head>& task) {
    task.ok = attend_exactly(task.row, task.tokens, task.s, task.state, task.c);
  });
}

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
