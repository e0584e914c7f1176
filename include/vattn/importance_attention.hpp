// Verified attention by importance sampling: one rule for heavy tokens and samples.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <span>

#include "vattn/call/looks.hpp"
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
struct importance_head {
  sample::importance pi;
  softmax_state exact;
  double share = 0, floor = 0, offset = 0;                          // c, λ and K that are wanted,
  double entered_share = 0, entered_floor = 0, entered_offset = 0;  // and that the sample has
  double log_needed = 0, needed = 0, away = 0;  // by the last look: log of κεT·D̂'s part of λ, λ and K
  select::score_check check;
  index_t scoring_rows = 0;
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

  /// What the sample of these rows shows; their probabilities are known. Not finite: as head_task::ok has it.
  template <kv_head Head>
  [[nodiscard]] stats::evidence look(head_task<Head>& task, std::span<weighted_row> rows,
                                     const stats::promise& asked) noexcept {
    scratch& s = task.s;
    const stats::evidence e =
        estimate_weighted(task.row, task.tokens, rows, exact, task.state, s.centre, s.moments, task.stream.fork(1));
    // A token that is missed although it may move the output by f must cost at most κ·ε·T. What moves it is
    // x‖v − ô‖, at most x(r + ‖ô − centre‖).
    const kernel::const_float_map o(s.centre.data(), static_cast<Eigen::Index>(s.centre.size()));
    const kernel::const_float_map centre(s.value_centre.data(), static_cast<Eigen::Index>(s.value_centre.size()));
    away = static_cast<double>((o - centre).norm());
    log_needed = -e.reference - std::log(stats::missable(e, asked));
    needed = std::exp(pi.top() + log_needed);
    return e;
  }

  /// Whether no token that this phase, or a first one, left to chance could have cost more than its share of ε.
  [[nodiscard]] bool covered(const sampling_frame& frame) const noexcept {
    // What is needed is an estimate too, and changes from look to look: a fifth less is no reason for another one.
    constexpr double enough = 0.8;
    return floor >= enough * needed && offset >= enough * away && frame.log_floor >= std::log(enough) + log_needed &&
           frame.offset >= enough * away;
  }

  /// What the next look is to have. False: nothing more.
  template <bound B>
  [[nodiscard]] bool ask(std::span<const weighted_row> rows, const stats::evidence& e, const stats::verdict& v,
                         double goal2, double delta) noexcept {
    floor = std::max(floor, needed);
    offset = std::max(offset, away);
    if (!v.met) share = enough_for<B>(rows, e, goal2, delta);
    return share > entered_share || floor > entered_floor || offset > entered_offset;
  }

 private:
  // The least share of which the sample itself predicts enough, with its rows standing for those to come:
  // V' = Σ (1 − π')/(π'π)‖Y‖², and Σt'² = Σ (1 − π')²/(π'³π)‖Y‖⁴ for the new ν₂.
  template <bound B>
  [[nodiscard]] double enough_for(std::span<const weighted_row> rows, const stats::evidence& e, double goal2,
                                  double delta) const noexcept {
    // Of the squared goal, for a look that just misses it costs another; and a look is to add something at all.
    constexpr double aim = 0.985 * 0.985, least_growth = 1.03, most_growth = 4;
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
      return stats::squared_radius<B>(variance, skew, {e.dimension, dof, static_cast<double>(rows.size())}, delta) <=
             aim * goal2;
    };
    double low = least_growth * share, high = most_growth * share;
    for (int i = 0; i < 8; ++i) {
      const double middle = std::sqrt(low * high);
      (enough(middle) ? high : low) = middle;
    }
    return high;
  }
};

}  // namespace detail

/// The heads of a group from one Poisson sample, a sampling design (call/looks.hpp):
///   begin  scores -> probabilities -> rows that are read for certain
///   draw   each row with the largest probability that any of the heads gives it
/// Heads' tokens must be the same; `numbers` [tokens] are their permanent numbers.
template <bound B, class Selector, kv_head Head>
class poisson_sampler {
 public:
  poisson_sampler(head_group<Head>& group, const config& settings, const Selector& selector,
                  const sample::importance_shape& shape, std::span<const float> numbers,
                  const sampling_frame& frame) noexcept
      : group_(group),
        settings_(settings),
        selector_(selector),
        shape_(shape),
        numbers_(numbers),
        frame_(frame),
        fixed_(settings.sinks + settings.window) {}

  [[nodiscard]] bool begin() noexcept {
    for (index_t g = 0; g < group_.size(); ++g) {
      if (group_[g].ok) group_[g].ok = heads_[at(g)].begin(group_[g], selector_, settings_, shape_, frame_);
    }
    return true;
  }

  [[nodiscard]] draw_outcome draw() noexcept {
    const population& tokens = group_[0].tokens;
    const auto most = static_cast<index_t>(settings_.max_density * static_cast<double>(frame_.n));
    for (index_t i = settings_.sinks; i < tokens.size() - settings_.window; ++i) {
      const auto u = static_cast<double>(numbers_[at(i)]);
      if (!(u < wanted(i)) || u < entered(i)) continue;
      if (fixed_ + count_ + 1 >= most) return draw_outcome::too_much;
      for (index_t g = 0; g < group_.size(); ++g) {
        head_task<Head>& task = group_[g];
        if (!task.ok) continue;
        const float logit = task.row.logit(tokens[i]);
        task.ok = std::isfinite(logit);
        heads_[at(g)].check.estimate(logit, task.s.scores[at(i)], task.s.errors[at(i)], true);
        task.s.weighted[at(count_)] = {static_cast<ordinal>(i), logit, 1, 0};
      }
      ++count_;
    }
    for (auto& head : heads_)
      head.entered_share = head.share, head.entered_floor = head.floor, head.entered_offset = head.offset;
    return draw_outcome::sample;
  }

  [[nodiscard]] soundness evidence(index_t g, stats::evidence& e) noexcept {
    auto& head = heads_[at(g)];
    head_task<Head>& task = group_[g];
    task.c.breaches = head.check.breaches();
    if (head.unusable || !head.check.believed()) return soundness::not_this_head;
    for (weighted_row& r : rows(g)) r.probability = static_cast<float>(entered(index_t{r.place}));
    // Near the cap a floor is lower: there only samples stop that look better than they are, and what makes them look
    // so is a token that they miss.
    const double room = static_cast<double>(count_) / (settings_.max_density * static_cast<double>(frame_.n));
    e = head.look(task, rows(g), promise(shape_.kappa * (1 - 0.6 * std::min(1.0, room))));
    if (!std::isfinite(e.denominator) || !std::isfinite(e.output2) || !std::isfinite(e.power)) {
      task.ok = false;
      return soundness::not_this_head;
    }
    task.log_floor = std::max(task.log_floor, head.log_needed);
    task.offset = std::max(task.offset, head.away);
    return soundness::sound;
  }
  [[nodiscard]] stats::verdict judge(index_t, const stats::evidence& e) const noexcept {
    return stats::judge<B>(e, promise(fixed_ + count_ == frame_.n ? 0 : shape_.kappa));
  }
  [[nodiscard]] bool suffices(index_t g, const stats::evidence&, const stats::verdict& v) const noexcept {
    return v.met && heads_[at(g)].covered(frame_);
  }
  [[nodiscard]] bool next(index_t g, const stats::evidence& e, const stats::verdict& v) noexcept {
    return heads_[at(g)].template ask<B>(rows(g), e, v, stats::squared_goal(e, promise(0)), settings_.delta);
  }

  void record(index_t g, const stats::evidence& e, const stats::verdict& v) noexcept {
    head_task<Head>& task = group_[g];
    stats::certify(task.c, e, v,
                   {.rows_exact = fixed_ + e.certain,
                    .rows_sampled = count_ - e.certain + heads_[at(g)].scoring_rows,
                    .budget = count_ - e.certain,
                    .kind = B::kind,
                    .bound = B::name,
                    .assumptions = "asymptotic, as stated by the bound; and the scores' stated errors are true"});
    if (!task.s.chosen) return;
    task.s.chosen.clear();
    task.s.chosen.add_ends(task.tokens, settings_.sinks, settings_.window);
    for (const weighted_row& r : rows(g))
      task.s.chosen.add(task.tokens[r.place], 1 / static_cast<double>(r.probability));
  }

 private:
  [[nodiscard]] static constexpr std::size_t at(index_t i) noexcept { return static_cast<std::size_t>(i); }
  [[nodiscard]] std::span<weighted_row> rows(index_t g) noexcept { return group_[g].s.weighted.first(at(count_)); }
  [[nodiscard]] stats::promise promise(double hidden) const noexcept {
    return {settings_.epsilon, settings_.delta, settings_.scale, hidden};
  }

  // The sample is for the heads together: each row with the largest probability that any of them gives it.
  [[nodiscard]] double wanted(index_t i) const noexcept {
    return largest([i](const auto& head) { return head.wanted(i); });
  }
  [[nodiscard]] double entered(index_t i) const noexcept {
    return largest([i](const auto& head) { return head.entered(i); });
  }
  template <class F>
  [[nodiscard]] double largest(F&& probability) const noexcept {
    double p = 0;
    for (index_t g = 0; g < group_.size(); ++g) {
      const auto& head = heads_[at(g)];
      if (group_[g].ok && !head.unusable) p = std::max(p, probability(head));
    }
    return p;
  }

  head_group<Head>& group_;
  const config& settings_;
  const Selector& selector_;
  const sample::importance_shape& shape_;
  std::span<const float> numbers_;
  const sampling_frame& frame_;
  index_t fixed_, count_ = 0;
  std::array<detail::importance_head, static_cast<std::size_t>(max_shared)> heads_{};
};

/// Every head of the group by importance sampling, or not at all where that does not come to a verified end.
template <bound B, class Selector, kv_head Head>
void attend_by_importance(head_group<Head>& group, const config& settings, const Selector& selector,
                          const sample::importance_shape& shape) noexcept {
  head_task<Head>& first = group[0];
  const index_t n = first.tokens.size();
  const sampling_frame frame{.n = n};
  sample::draw_numbers(first.s.numbers, settings.sinks, n - settings.window, first.stream);
  poisson_sampler<B, Selector, Head> design(group, settings, selector, shape, first.s.numbers, frame);
  look_until_verified(design, group, settings.max_rounds);
}

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
