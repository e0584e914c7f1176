// Verified attention by importance sampling: one rule for heavy tokens and samples.
#pragma once

#include <algorithm>
#include <cmath>

#include "vattn/estimate/exact.hpp"
#include "vattn/estimate/weighted.hpp"
#include "vattn/exact_attention.hpp"
#include "vattn/runtime/call.hpp"
#include "vattn/sample/importance.hpp"
#include "vattn/select/selector.hpp"

namespace vattn {

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

/// One query of one head: score -> probabilities -> sample -> estimate -> verify -> certify, until the
/// estimate is verified and every token's floor is covered. False where a number is not finite.
template <bound B, class Selector, kv_head Head>
[[nodiscard]] bool attend_by_importance(const query_row<Head>& row, const population& tokens,
                                        const random_stream& stream, const config& settings, const Selector& selector,
                                        const sample::importance_shape& shape, scratch& s, softmax_state& state,
                                        certificate& c) noexcept {
  const index_t n = tokens.size(), fixed = settings.sinks + settings.window;
  const auto most = static_cast<index_t>(settings.max_density * static_cast<double>(n));
  const auto size = static_cast<std::size_t>(n);
  const std::span<float> scores = s.scores.first(size), errors = s.errors.first(size);
  const score_result scored = selector.score(row, tokens, {scores, errors, s.value_centre, s.selector});
  s.lagging = scored.lagging;
  if (!scored.ok) return false;

  // A token can move the output by x‖v − ô‖; a tenth of the mean distance stands for ô ≠ centre.
  const auto distance = select::value_distances(row.head, tokens, s.value_centre);
  double mean = 0;
  for (index_t j = 0; j < n; ++j) mean += distance(tokens[j]) / static_cast<double>(n);
  const auto value = [&](index_t j) { return distance(tokens[j]) + 0.1f * static_cast<float>(mean); };
  sample::importance pi(s.weights, s.floors, s.numbers);
  pi.prepare(scores, errors, value, settings.sinks, n - settings.window, tempering(scores, errors, s.numbers), shape,
             stream);

  softmax_state exact(s.offset), part(s.part);
  add_sink(exact, row.sink_logit);
  bool finite = accumulate_exact(
      row, fixed, [&](index_t j) { return tokens[j < settings.sinks ? j : n - fixed + j]; }, exact, part, true);

  double share = shape.pilot, floor = 0, entered_share = 0, entered_floor = 0;
  index_t count = 0, breaches = 0;
  for (c.rounds = 1; finite && c.rounds <= settings.max_rounds; ++c.rounds) {
    pi.enter(share, floor, entered_share, entered_floor, [&](index_t j) {
      if (fixed + count >= most) return void(++count);
      const float logit = row.logit(tokens[j]);
      finite = finite && std::isfinite(logit);
      const auto at = static_cast<std::size_t>(j);
      // Rows are read anyway: they check what the scores say of themselves.
      breaches += std::abs(logit - scores[at]) > 4 * errors[at] + 1e-3f * (1 + std::abs(logit));
      s.weighted[static_cast<std::size_t>(count++)] = {static_cast<ordinal>(j), logit, 1, 0};
    });
    entered_share = share, entered_floor = floor;
    c.breaches = breaches;
    // Of honest scores one in 16000 is off by 4σ. More than that: they do not know their own error.
    if (fixed + count >= most || breaches > 2 + count / 100) break;
    if (!finite) return false;

    const std::span<weighted_row> rows = s.weighted.first(static_cast<std::size_t>(count));
    for (weighted_row& r : rows) r.probability = static_cast<float>(pi.probability(r.place, share, floor));
    const weighted_estimate e = estimate_weighted(row, tokens, rows, exact, state, s.centre, s.moments, stream.fork(1));
    if (!std::isfinite(e.denominator) || !std::isfinite(e.output2) || !std::isfinite(e.power)) return false;

    const double scale2 =
        settings.scale == error_scale::rms ? e.power : std::max(e.output2 - e.variance, e.output2 / 4);
    const auto radius2 = [&](double variance, double dof) {
      sum_evidence y;
      y.with_replacement = true;
      y.population = 1;
      y.variance = variance;
      y.dimension = e.dimension;
      y.dof = dof;
      y.sampled = static_cast<double>(count);
      const double r = B::radius(y, 1, settings.delta);
      return r * r;
    };
    const double error2 = radius2(e.variance, e.dof), goal2 = settings.epsilon * settings.epsilon * scale2;
    // A token that is missed although it may weigh f must cost at most κ·ε·T.
    const double needed = std::exp(pi.top() - e.reference) / (shape.kappa * std::sqrt(goal2) * e.denominator);
    const bool verified = error2 <= goal2, covered = floor >= 0.8 * needed;
    if (verified && covered) {
      c.rows_exact = fixed + e.certain;
      c.rows_sampled = count - e.certain;
      c.budget = c.rows_sampled;
      c.epsilon_achieved = error2 > 0 ? std::sqrt(error2 / scale2) : 0;
      c.denominator_error = std::sqrt(radius2(e.denominator_variance, e.dof));
      c.coherence = e.power > 0 ? std::sqrt(e.output2 / e.power) : 0;
      c.promise = B::kind, c.bound = B::name;
      c.assumptions = "asymptotic, as stated by the bound; and the scores' stated errors are true";
      return true;
    }
    floor = std::max(floor, needed);
    if (verified) continue;
    // The least share of which the sample itself predicts enough, with its rows standing for those to come:
    // V' = Σ (1 − π')/(π'π)‖Y‖², and Σt'² = Σ (1 − π')²/(π'³π)‖Y‖⁴ for the new ν₂.
    constexpr double aim = 0.96 * 0.96;
    const auto enough = [&](double next) {
      double variance = 0, fourth = 0;
      for (const weighted_row& r : rows) {
        const double p = pi.probability(r.place, next, floor), y2 = static_cast<double>(r.spread);
        const double t = (1 - p) / (p * static_cast<double>(r.probability)) * y2;
        variance += t;
        fourth += t * (1 - p) / (p * p) * y2;
      }
      return radius2(variance, fourth > 0 ? 2 * variance * variance / fourth : e.dof) <= aim * goal2;
    };
    double low = 1.1 * share, high = 4 * share;
    for (int i = 0; i < 8; ++i) {
      const double middle = std::sqrt(low * high);
      (enough(middle) ? high : low) = middle;
    }
    share = high;
  }
  if (!finite) return false;
  return attend_exactly(row, tokens, s, state, c);
}

}  // namespace vattn
