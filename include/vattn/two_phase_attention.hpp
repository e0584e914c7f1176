// Importance sampling in two phases: a coarse scan keeps candidates, a finer score thins them, rows are read last.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <span>
#include <utility>

#include "vattn/importance_attention.hpp"

namespace vattn::VATTN_ABI {

/// Both phases keep token i by the same permanent number: candidates are {u_i < prior_i}, the sample is
/// {u_i < π_i} with π_i <= prior_i, so the two together are one Poisson sample with probabilities π_i, known
/// exactly. The fine score is computed for candidates alone. Where the candidates turn out too few (their
/// probabilities cap what a head needs, or the coarse floors were too low) the first phase is widened, threefold
/// each time, and at last the fine scores of all tokens are sampled by.
template <bound B, class Selector, kv_head Head>
void attend_in_two_phases(head_group<Head>& group, const config& settings, const Selector& selector,
                          const sample::importance_shape& shape, double widening) noexcept {
  using fine = std::remove_cvref_t<decltype(selector.fine)>;
  scratch& s0 = group[0].s;
  const population all = group[0].tokens;
  const index_t n = all.size(), last = n - settings.window, fixed = settings.sinks + settings.window;
  // Of this sequence's tokens: there is room for those of the longest.
  const auto most = std::min(static_cast<index_t>(s0.prior.size()),
                             static_cast<index_t>(std::ceil(settings.max_density * static_cast<double>(n))));
  sample::draw_numbers(s0.numbers, settings.sinks, last, group[0].stream);

  double share = widening * shape.pilot;
  for (int attempt = 0; attempt < 4; ++attempt, share *= 3) {
    // Phase 1: coarse scores of every token, candidates for the heads together.
    std::array<sample::importance, static_cast<std::size_t>(max_shared)> pi{};
    std::array<double, static_cast<std::size_t>(max_shared)> floor{}, offset{};
    sampling_frame frame{.n = n};
    bool usable = true;
    for (index_t g = 0; g < group.size(); ++g) {
      head_task<Head>& task = group[g];
      if (!task.ok || group[g].done) continue;
      const auto size = static_cast<std::size_t>(n);
      scratch& s = task.s;
      const std::span<float> scores = s.scores.first(size), errors = s.errors.first(size);
      const score_result scored = selector.coarse.score(task.row, all, {scores, errors, s.value_centre, s.selector});
      s.lagging = scored.lagging;
      if (!(task.ok = scored.ok)) continue;
      if (!can_sample(scores, errors)) {  // the coarse scores know nothing: the fine ones of all
        usable = false;
        break;
      }
      const auto distance = select::value_distances(task.row, all, s.value_centre);
      auto& p = pi[static_cast<std::size_t>(g)];
      p = sample::importance(s.weights, s.floors, s.reaches);
      p.prepare(
          scores, errors, [&](index_t j) { return distance(all[j]); }, settings.sinks, last,
          tempering(scores, errors, s.reaches), shape, settings.delta);
      // What the first look will ask for, guessed; what a look has asked for, later.
      double sum = 0;
      for (const float score : scores) sum += std::exp(static_cast<double>(score) - p.top());
      const double guess =
          -p.top() - std::log(shape.kappa * settings.epsilon * 10 * p.offset() * sum);  // T is about the mean r
      const double log_own = std::isfinite(task.log_floor) ? task.log_floor + 0.3 : guess;
      floor[static_cast<std::size_t>(g)] = std::exp(p.top() + log_own);
      // Half of the mean r costs few candidates; outputs further from the centre than that take a second attempt.
      offset[static_cast<std::size_t>(g)] = std::max(5 * p.offset(), 1.1 * task.offset);
      frame.log_floor = std::min(frame.log_floor, log_own);
      frame.offset = std::min(frame.offset, offset[static_cast<std::size_t>(g)]);
    }
    if (!usable) break;
    index_t kept = 0;
    const auto keep = [&](index_t i, float prior) {
      const auto to = static_cast<std::size_t>(kept++), from = static_cast<std::size_t>(i);
      s0.order[to] = static_cast<ordinal>(all[i]);
      s0.prior[to] = prior;
      s0.kept_numbers[to] = s0.numbers[from];
      for (index_t g = 0; g < group.size(); ++g) {
        group[g].s.coarse_scores[to] = group[g].s.scores[from];
        group[g].s.coarse_errors[to] = group[g].s.errors[from];
      }
    };
    bool full = fixed >= most;
    for (index_t i = 0; i < n && !full; ++i) {
      if (i < settings.sinks || i >= last) {
        keep(i, 1);
        continue;
      }
      double p = 0;
      for (index_t g = 0; g < group.size(); ++g) {
        if (group[g].ok && !group[g].done)
          p = std::max(p, pi[static_cast<std::size_t>(g)].probability(i, share, floor[static_cast<std::size_t>(g)],
                                                                      offset[static_cast<std::size_t>(g)]));
      }
      const auto prior = static_cast<float>(p);
      if (s0.numbers[static_cast<std::size_t>(i)] < prior) keep(i, prior);
      full = kept + settings.window >= most;
    }
    if (full) break;

    // Phase 2: among the candidates, with what the first phase has done to them.
    const auto size = static_cast<std::size_t>(kept);
    const population candidates(s0.order.first(size));
    head_group<Head> open;
    std::array<index_t, static_cast<std::size_t>(max_shared)> origin{};
    for (index_t g = 0; g < group.size(); ++g) {
      if (!group[g].ok || group[g].done) continue;
      origin[static_cast<std::size_t>(open.size())] = g;
      head_task<Head> task = group[g];
      task.tokens = candidates;
      open.push(std::move(task));
    }
    if (open.size() == 0) return;
    frame.prior = s0.prior.first(size);
    poisson_sampler<B, fine, Head> design(open, settings, selector.fine, shape, s0.kept_numbers.first(size), frame);
    look_until_verified(design, open, settings.max_rounds);
    for (index_t o = 0; o < open.size(); ++o) {
      head_task<Head>& from = open[o];
      const auto g = static_cast<std::size_t>(origin[static_cast<std::size_t>(o)]);
      head_task<Head>& to = group[static_cast<index_t>(g)];
      to.state = from.state, to.c = from.c, to.ok = from.ok, to.log_floor = from.log_floor, to.offset = from.offset;
      if (!from.ok || !from.done) continue;
      // The rows that were read check the coarse scores as they do the fine ones.
      const index_t rows = from.c.rows_exact - fixed + from.c.budget;
      select::score_check check;
      const auto compare = [&](index_t place, float logit, bool chosen) {
        const auto at = static_cast<std::size_t>(place);
        check.estimate(logit, from.s.coarse_scores[at], from.s.coarse_errors[at], chosen);
      };
      for (index_t j = 0; j < fixed; ++j) {
        const index_t place = j < settings.sinks ? j : kept - fixed + j;
        compare(place, from.row.logit(candidates[place]), false);
      }
      for (const weighted_row& row : from.s.weighted.first(static_cast<std::size_t>(rows)))
        compare(row.place, row.logit, true);
      to.c.breaches += check.breaches();
      to.done = check.believed();
      if (!to.done) attempt = 4;  // what the coarse scores say of their errors is not true: no more of them
    }
  }
  // Where a first phase cannot thin enough, or never kept what was needed: the fine scores of all.
  for (index_t g = 0; g < group.size(); ++g) {
    if (!group[g].ok || group[g].done) continue;
    head_group<Head> one;
    one.push(head_task<Head>(group[g]));
    const sampling_frame whole{.n = n};
    poisson_sampler<B, fine, Head> design(one, settings, selector.fine, shape, s0.numbers, whole);
    look_until_verified(design, one, settings.max_rounds);
    const index_t breaches = group[g].c.breaches;  // of the coarse scores
    group[g].state = one[0].state, group[g].c = one[0].c, group[g].ok = one[0].ok, group[g].done = one[0].done;
    group[g].c.breaches += breaches;
  }
}

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
