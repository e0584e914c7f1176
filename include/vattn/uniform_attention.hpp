// Verified attention by a ranking and a uniform sample: the best rows exactly, of the rest as many as it takes.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <cmath>
#include <optional>
#include <utility>

#include "vattn/budget/targets.hpp"
#include "vattn/call/looks.hpp"
#include "vattn/estimate/exact.hpp"
#include "vattn/select/score_check.hpp"

namespace vattn::VATTN_ABI {

/// One query of one head, a sampling design (call/looks.hpp):
///   begin  scores -> ranking -> sinks, window and the ranking's best
///   draw   more of the ranking, more of the rest, as the target asks
template <class Policy, kv_head Head>
class ranked_sampler {
  using selector = typename Policy::selector;
  using sampler = typename Policy::sampler;
  using bound = typename Policy::bound;
  using target = typename Policy::target;

 public:
  /// `group` of one head.
  ranked_sampler(head_group<Head>& group, const config& settings, const selector& select) noexcept
      : task_(group[0]),
        s_(task_.s),
        settings_(settings),
        selector_(select),
        n_(task_.tokens.size()),
        fixed_(settings.sinks + settings.window),
        part_(s_.part) {}

  [[nodiscard]] bool begin() noexcept {
    const auto size = static_cast<std::size_t>(n_);
    scores_ =
        selector_.score(task_.row, task_.tokens, {s_.scores.first(size), s_.errors, s_.value_centre, s_.selector});
    s_.lagging = scores_.lagging;
    if (!scores_.ok) return task_.ok = false;
    order_ = ranking(s_.scores, settings_.sinks, n_ - settings_.window, s_.order);
    const index_t heavy = std::clamp<index_t>(selector_.heavy_count(order_, n_, settings_), 0, order_.size());
    // A selector that ranks nothing need not have written scores.
    if ((heavy > 0 || scores_.kind != score_kind::ranking) && !can_rank(scores_, s_.scores.first(size))) return false;
    want_ = target::first(n_, order_.size(), heavy, settings_);

    // Exact part: sinks and window, then the ranking's best as they come.
    add_sink(task_.state, task_.row.sink_logit);
    task_.ok = add_exactly(fixed_, [&](index_t j) { return end_place(j); }) && read_heavy();
    for (index_t j = 0; compares() && j < fixed_; ++j) compare_certain(end_place(j), false);

    // Sampled part: deviations from the exact part's output, so that shared means cancel.
    task_.state.finish(s_.centre);
    moments_.emplace(s_.moments, task_.row.dv());
    moments_->clear(s_.centre, task_.state.max_logit());
    sample_.emplace(task_.row, task_.tokens, settings_.sinks, settings_.window, order_,
                    sampler(static_cast<ordinal>(n_), task_.stream, s_.table), s_.drawn, *moments_);
    return task_.ok;
  }

  [[nodiscard]] draw_outcome draw() noexcept {
    ++task_.c.rounds;  // also of those who read all after this
    const auto most = static_cast<index_t>(settings_.max_density * static_cast<double>(n_));
    if (fixed_ + want_.heavy + want_.sampled > most) return draw_outcome::too_much;
    if (want_.heavy > order_.count()) {
      if (!(task_.ok = read_heavy())) return draw_outcome::too_much;
      sample_->shed();
    }
    task_.ok = sample_->grow(want_.sampled);
    now_ = make_estimate(task_.state, *moments_, sample_->population_size(), s_.offset);
    task_.ok = task_.ok && now_.finite;
    return task_.ok ? draw_outcome::sample : draw_outcome::too_much;
  }

  [[nodiscard]] soundness evidence(index_t, stats::evidence& e) noexcept {
    // Scores that are to bound logits, and do not: nothing may rest on them.
    for (; compares() && compared_ < order_.count(); ++compared_) compare_certain(heavy_place(compared_), true);
    select::score_check check = certain_rows_;
    for (const drawn_row& r : sample_->rows()) compare(check, r.logit, r.place, true);
    task_.c.breaches = check.breaches();
    e = budget::variances(seen());
    return check.believed() ? soundness::sound : soundness::not_this_head;
  }
  [[nodiscard]] verdict judge(index_t, const stats::evidence&) noexcept {
    return target::template judge<bound>(seen());
  }
  [[nodiscard]] bool suffices(index_t, const stats::evidence&, const verdict& v) const noexcept {
    return v.met || (settings_.accept_last && task_.c.rounds >= settings_.max_rounds);
  }
  [[nodiscard]] bool next(index_t, const stats::evidence&, const verdict& v) noexcept {
    want_ = v.next;
    return true;
  }

  void record(index_t, const stats::evidence& e, const verdict& v) noexcept {
    constexpr bool asymptotic = bound::kind == guarantee::asymptotic;
    stats::certify(task_.c, e, v,
                   {.rows_exact = fixed_ + order_.count(),
                    .rows_sampled = sample_->count(),
                    .budget = v.budget,
                    .kind = bound::kind,
                    .bound = bound::name,
                    .assumptions = scores_.kind == score_kind::ranking && asymptotic
                                       ? "asymptotic, as stated by the bound; and the selector ranks every heavy token"
                                       : bound::assumptions});
    add_residual(task_.state, now_, *moments_);
    if (!s_.chosen) return;
    s_.chosen.clear();
    s_.chosen.add_ends(task_.tokens, settings_.sinks, settings_.window);
    for (index_t j = 0; j < order_.count(); ++j) s_.chosen.add(task_.tokens[heavy_place(j)], 1);
    for (const drawn_row& r : sample_->rows()) s_.chosen.add(task_.tokens[r.place], now_.weight());
  }

 private:
  // An index may be of other keys; scores that were made from the keys themselves are not.
  static constexpr bool has_index = requires(const selector& s) { s.heads; };
  [[nodiscard]] bool compares() const noexcept { return has_index && scores_.kind != score_kind::ranking; }
  [[nodiscard]] index_t end_place(index_t j) const noexcept { return j < settings_.sinks ? j : n_ - fixed_ + j; }
  [[nodiscard]] index_t heavy_place(index_t j) const noexcept {
    return index_t{order_.top()[static_cast<std::size_t>(j)]};
  }
  template <class Place>
  [[nodiscard]] bool add_exactly(index_t count, Place&& place) noexcept {
    return accumulate_exact(
        task_.row, count, [&](index_t j) { return task_.tokens[place(j)]; }, task_.state, part_, true);
  }
  // Not from order_.count() on: heavy_count() may have ranked places, and ranked is not read.
  [[nodiscard]] bool read_heavy() noexcept {
    order_.extend(want_.heavy);
    const index_t have = std::exchange(heavy_read_, order_.count());
    return add_exactly(order_.count() - have, [&](index_t j) { return heavy_place(have + j); });
  }

  void compare_certain(index_t place, bool chosen) noexcept {
    compare(certain_rows_, task_.row.logit(task_.tokens[place]), place, chosen);
  }
  // Compares a logit that was read with what the score of its place says it is at most. A contribution is at least the
  // logit plus log(offset/unit).
  void compare(select::score_check& check, float logit, index_t place, bool chosen) const noexcept {
    static constexpr bool upper_bounds = requires { requires selector::upper_bounds; };
    if (scores_.kind == score_kind::ranking) return;
    const float least =
        scores_.kind == score_kind::contribution ? std::log(scores_.value_offset / scores_.contribution_unit) : 0.0f;
    const float score = s_.scores[static_cast<std::size_t>(place)];
    // How often an honest score is exceeded: a bound never, but for rounding; upper_scores add 2.75 standard errors.
    check.bound(logit, score - least, upper_bounds ? 1e-12 : 3e-3, chosen);
  }

  [[nodiscard]] look seen() noexcept {
    return {now_,   *moments_, s_.offset,       order_,    sample_->rows(),          n_,
            fixed_, scores_,   s_.value_centre, settings_, sampler::with_replacement};
  }

  head_task<Head>& task_;
  scratch& s_;
  const config& settings_;
  const selector& selector_;
  const index_t n_, fixed_;
  softmax_state part_;
  score_result scores_{};
  ranking order_;
  split want_{};
  index_t heavy_read_ = 0, compared_ = 0;
  select::score_check certain_rows_;
  std::optional<residual_moments> moments_;
  std::optional<residual_sample<Head, sampler>> sample_;
  estimate now_{};
};

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
