// Certified attention: importance sampling whose guarantee holds at the sample's own size, from hard bounds.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>

#include "vattn/budget/norm_bound.hpp"
#include "vattn/call/call.hpp"
#include "vattn/certify/certify.hpp"
#include "vattn/estimate/exact.hpp"
#include "vattn/exact_attention.hpp"
#include "vattn/sample/importance.hpp"
#include "vattn/select/selector.hpp"

namespace vattn::VATTN_ABI {

namespace detail {

// Let h_i be an upper bound of token i's logit, r_i = ‖v_i − c‖ and t = top of the bounds. Token i is kept with
// π_i = min(1, share·w_i), w_i = e^{h_i − t}(r_i + R), R > 0 fixed. With D̂ = Σ_S x/π and ô = Σ_S x v/π / D̂,
//   D̂(ô − o) = W = Σ_i (I_i/π_i − 1)·x_i(v_i − o),
// exactly, since Σ x_i(v_i − o) = 0: a sum of independent centred vectors, with no linearisation. Every term is
// at most b = e^t/share · max_r (r + ‖c − o‖)/(r + R) long.
struct certified_sample {
  double reference = 0;  // logit
  double denominator = 0, output_norm = 0, centre_distance = 0, power = 0;
  double sampled_denominator = 0, sampled_power = 0;  // of rows with π < 1, their part of the two
  double unit = 0;                                    // e^{t − reference}/share
  sampled_sum sum;                                    // of W, about ô for o
  index_t rows = 0, certain = 0;
  bool finite = true;
};

}  // namespace detail

/// One query of one head. Wants scores that are upper bounds of the logits (score_kind::logit) and values'
/// distances from a centre; promises P(‖ô − o‖ > ε·T) <= δ at finite n, with nothing asymptotic, or reads all.
/// A small pilot sets the size of a fresh sample, so that the bound is not conditioned on having been chosen;
/// a second fresh sample, at a fifth of δ, follows where the first does not come to the goal. Where the bounds
/// alone show that all unread tokens are negligible, nothing is left to chance: guarantee::deterministic.
/// False where a number is not finite; a head that is not `done` then is the caller's to attend exactly.
template <class Selector, kv_head Head>
[[nodiscard]] bool attend_certified(head_task<Head>& task, const config& settings, const Selector& selector) noexcept {
  using kernel::axpy, kernel::load, kernel::squared_norm;
  const query_row<Head>& row = task.row;
  const population& tokens = task.tokens;
  scratch& s = task.s;
  certificate& c = task.c;
  const index_t n = tokens.size(), first = settings.sinks, last = n - settings.window;
  const index_t fixed = settings.sinks + settings.window, dv = row.dv();
  const auto most = static_cast<index_t>(settings.max_density * static_cast<double>(n));
  const auto at = [](index_t i) { return static_cast<std::size_t>(i); };
  const auto width = static_cast<Eigen::Index>(dv);

  const std::span<float> scores = s.scores.first(at(n));
  const score_result scored = selector.score(row, tokens, {scores, s.errors, s.value_centre, s.selector});
  s.lagging = scored.lagging;
  if (!scored.ok) return false;
  const auto distance = select::value_distances(row, tokens, s.value_centre);
  float top = -std::numeric_limits<float>::infinity(), nearest = std::numeric_limits<float>::infinity(), farthest = 0;
  double mean = 0;
  for (index_t j = first; j < last; ++j) {
    const float r = distance(tokens[j]);
    if (!std::isfinite(r)) return false;
    top = std::max(top, scores[at(j)]);
    nearest = std::min(nearest, r), farthest = std::max(farthest, r);
    mean += static_cast<double>(r) / static_cast<double>(last - first);
  }
  const double about = std::max(mean, 1e-30), slack = 1 + 1e-5;  // of r, computed in float
  double total = 0;
  for (index_t j = first; j < last; ++j) {
    s.weights[at(j)] = static_cast<float>(std::exp(static_cast<double>(scores[at(j)]) - static_cast<double>(top)) *
                                          (static_cast<double>(distance(tokens[j])) + about));
    total += static_cast<double>(s.weights[at(j)]);
  }
  if (!(total > 0)) return true;
  // In units of the numbers' grid, so that u < π has probability π and nothing else.
  const auto probability = [&](index_t j, double share) {
    return std::min(1.0,
                    std::ceil(std::max(share * static_cast<double>(s.weights[at(j)]), 0x1p-24) * 0x1p24) * 0x1p-24);
  };

  softmax_state exact(s.offset), part(s.part);
  add_sink(exact, row.sink_logit);
  if (!accumulate_exact(
          row, fixed, [&](index_t j) { return tokens[j < settings.sinks ? j : n - fixed + j]; }, exact, part, true))
    return false;
  // Rows that are read anyway check the bounds, of which no honest one is exceeded.
  const auto exceeded = [&](index_t place, float logit) { return stats::breaches(logit, scores[at(place)]); };
  for (index_t j = 0; j < fixed; ++j) {
    const index_t place = j < settings.sinks ? j : n - fixed + j;
    c.breaches += exceeded(place, row.logit(tokens[place]));
  }
  if (c.breaches > 0) return true;
  const double centre_norm = static_cast<double>(kernel::const_float_map(s.value_centre.data(), width).norm());

  // Draws {u < π(share)} and sums it. Leaves ô in s.centre, the estimate in task.state.
  const auto draw = [&](double share, std::uint32_t fork) {
    detail::certified_sample e;
    sample::draw_numbers(s.numbers, first, last, task.stream.fork(fork));
    for (index_t j = first; j < last; ++j) {
      const double p = probability(j, share);
      if (!(static_cast<double>(s.numbers[at(j)]) < p)) continue;
      if (fixed + e.rows >= most) {
        e.rows = most;
        return e;
      }
      const float logit = row.logit(tokens[j]);
      e.finite = e.finite && std::isfinite(logit);
      c.breaches += exceeded(j, logit);
      s.weighted[at(e.rows++)] = {static_cast<ordinal>(j), logit, static_cast<float>(p), 0};
    }
    const std::span<weighted_row> rows = s.weighted.first(at(e.rows));
    float reference = exact.max_logit();
    for (const weighted_row& r : rows) reference = std::max(reference, r.logit);
    task.state.clear();
    task.state.raise(reference);
    task.state.merge(exact);
    for (const weighted_row& r : rows) {
      const auto value = row.value(tokens[r.place]);
      const double p = static_cast<double>(r.probability);
      const double x = std::exp(static_cast<double>(r.logit - reference)) / p;
      const double power = x * static_cast<double>(squared_norm(value));
      task.state.add_denominator(x);
      task.state.add_power(power);
      axpy(static_cast<float>(x), value, task.state.numerator().data());
      e.certain += p >= 1;
      if (p < 1) e.sampled_denominator += x, e.sampled_power += power;
    }
    e.reference = static_cast<double>(reference);
    e.denominator = task.state.denominator();
    e.power = task.state.power();
    static_cast<void>(task.state.finish(s.centre));
    const kernel::const_float_map o(s.centre.data(), width);
    e.output_norm = static_cast<double>(o.norm());
    e.centre_distance = static_cast<double>((o - kernel::const_float_map(s.value_centre.data(), width)).norm());
    e.unit = std::exp(static_cast<double>(top) - e.reference) / share;
    e.finite = e.finite && std::isfinite(e.denominator) && std::isfinite(e.output_norm) && std::isfinite(e.power);
    if (!e.finite) return e;

    second_moment moment(s.matrix, dv);
    for (const weighted_row& r : rows) {
      if (r.probability >= 1) continue;
      const double p = static_cast<double>(r.probability);
      const double x = std::exp(static_cast<double>(r.logit) - e.reference);
      const double a = (1 - p) / (p * p) * x * x;
      load(row.value(tokens[r.place]), s.output.data());
      kernel::float_map y(s.output.data(), width);
      y -= o;
      e.sum.weight += a;
      e.sum.variance += a * static_cast<double>(y.squaredNorm());
      moment.add(static_cast<float>(std::sqrt(a)), s.output);
    }
    e.sum.largest = moment.largest_eigenvalue();
    return e;
  };

  // How long a vector v_i − o can be, relative to r_i + R, if ‖ô − o‖ <= error.
  const auto stretch = [&](const detail::certified_sample& e, double error) {
    const double low = static_cast<double>(nearest), reach = (e.centre_distance + error) * slack;
    return std::max(1.0, (low * slack + reach) / (low + about)) * slack;
  };
  // ‖ô − o‖ <= error for sure up to delta, if this is true: see budget/norm_bound.hpp for why one trial value will do.
  const auto holds = [&](const detail::certified_sample& e, double error, double delta) {
    sampled_sum w = e.sum;
    w.term = e.unit * stretch(e, error);
    return norm_bound(w, error, delta) * (1 + 1e-4) < error * e.denominator;
  };
  // Share of δ that the scale's own estimate takes, where it is one.
  constexpr double for_scale = 0.1;
  const auto goal = [&](const detail::certified_sample& e, double delta) {
    const double relative = settings.epsilon / (1 + settings.epsilon);  // of ‖ô‖: then ε of ‖o‖ is no less
    if (settings.scale == error_scale::output) return relative * e.output_norm;
    // T² = Σ x‖v‖² / Σ x, from below: sums of bounded nonnegative terms.
    const double ends[2] = {static_cast<double>(nearest), static_cast<double>(farthest)};
    double longest = 0;
    for (const double r : ends)
      longest = std::max(longest, (r * slack + centre_norm) * (r * slack + centre_norm) / (r + about));
    const double low = sum_at_least(e.sampled_power, e.unit * longest * slack, delta * for_scale / 2);
    const double high = sum_at_most(e.sampled_denominator, e.unit / (ends[0] + about) * slack, delta * for_scale / 2);
    const double certain_power = e.power - e.sampled_power, certain = e.denominator - e.sampled_denominator;
    return std::max(relative * e.output_norm,
                    settings.epsilon * std::sqrt(std::max(0.0, certain_power + low) / (certain + high)));
  };
  const double for_error = settings.scale == error_scale::rms ? 1 - for_scale : 1.0;
  const auto certify = [&](const detail::certified_sample& e, double stated, guarantee promise) {
    // D̂ as a sum of bounded terms, from both sides.
    const double term = e.unit / (static_cast<double>(nearest) + about) * slack;
    const double low = sum_at_least(e.sampled_denominator, term, settings.delta / 2),
                 high = sum_at_most(e.sampled_denominator, term, settings.delta / 2);
    stats::evidence seen;
    seen.output2 = e.output_norm * e.output_norm, seen.power = e.power / e.denominator;
    stats::verdict v;
    v.met = true, v.epsilon_achieved = stated;
    v.denominator_error = std::max(e.sampled_denominator - low, high - e.sampled_denominator) / e.denominator;
    stats::certify(
        c, seen, v,
        {.rows_exact = fixed + e.certain,
         .rows_sampled = e.rows - e.certain,
         .budget = e.rows - e.certain,
         .kind = promise,
         .bound = promise == guarantee::deterministic ? "negligible" : "bernstein",
         .assumptions = "finite-sample: the scores bound the logits, and the values lie as far from their centre as "
                        "stored"});
  };

  // The tokens of the highest bounds alone, if all others together are negligible: error <= Σ x‖v − o_S‖ / D_S.
  ranking order(s.weights.first(at(n)), first, last, s.order);
  double ranked = 0;
  index_t summed = 0;
  const auto tail = [&](index_t k) {
    order.extend(k);
    for (; summed < k; ++summed) ranked += static_cast<double>(s.weights[at(index_t{order.top()[at(summed)]})]);
    return std::max(0.0, total - ranked) + 1e-6 * total;
  };
  const auto negligible = [&](const detail::certified_sample& e, double rest, double error) {
    return std::exp(static_cast<double>(top) - e.reference) * rest * stretch(e, 0) <= error * e.denominator;
  };
  const auto settle = [&](index_t k) {
    detail::certified_sample e;
    task.state.clear();
    task.state.merge(exact);
    e.finite = accumulate_exact(
        row, k, [&](index_t j) { return tokens[order.top()[at(j)]]; }, task.state, part, true);
    if (!e.finite) return false;
    for (const ordinal place : order.top().first(at(k))) c.breaches += exceeded(place, row.logit(tokens[place]));
    if (c.breaches > 0) return false;
    e.reference = static_cast<double>(task.state.max_logit()), e.denominator = task.state.denominator();
    e.power = task.state.power();
    static_cast<void>(task.state.finish(s.centre));
    const kernel::const_float_map o(s.centre.data(), width);
    e.output_norm = static_cast<double>(o.norm());
    e.centre_distance = static_cast<double>((o - kernel::const_float_map(s.value_centre.data(), width)).norm());
    const double error = settings.epsilon / (1 + settings.epsilon) * e.output_norm, rest = tail(k);
    if (!negligible(e, rest, error * (1 - 1e-4))) return false;
    e.certain = e.rows = k;
    certify(e, settings.epsilon, guarantee::deterministic);
    if (s.chosen) {
      s.chosen.clear();
      s.chosen.add_ends(tokens, settings.sinks, settings.window);
      for (index_t j = 0; j < k; ++j) s.chosen.add(tokens[order.top()[at(j)]], 1);
    }
    // D̂ leaves out at most what the bounds of the others add up to.
    c.denominator_error = std::exp(static_cast<double>(top) - e.reference) * rest /
                          (static_cast<double>(nearest) + about) / e.denominator;
    return task.done = true;
  };

  constexpr double pilot = 192;
  double share = pilot / total;
  detail::certified_sample e = draw(share, 1);
  index_t spent = e.rows - e.certain;
  c.rounds = 1;
  const double deltas[] = {0.8 * settings.delta, 0.2 * settings.delta};
  for (std::uint32_t round = 0; round < 2; ++round) {
    if (!e.finite) return false;
    if (c.breaches > 0 || fixed + e.rows >= most) break;
    // The size that this sample predicts to be enough: its sums fall as the share grows.
    const auto predicted = [&](double factor) {
      detail::certified_sample next = e;
      double variance = 0;
      for (const weighted_row& r : s.weighted.first(at(e.rows))) {
        const double p = static_cast<double>(r.probability),
                     q = std::max(p, probability(index_t{r.place}, share * factor));
        const double x = std::exp(static_cast<double>(r.logit) - e.reference);
        const double y = static_cast<double>(distance(tokens[r.place]));
        variance += (1 - q) / (q * p) * x * x * y * y;
      }
      double now = 0;
      for (const weighted_row& r : s.weighted.first(at(e.rows))) {
        const double p = static_cast<double>(r.probability), x = std::exp(static_cast<double>(r.logit) - e.reference);
        const double y = static_cast<double>(distance(tokens[r.place]));
        now += (1 - p) / (p * p) * x * x * y * y;
      }
      const double ratio = now > 0 ? variance / now : 0;
      next.unit /= factor;
      next.sum.weight *= ratio, next.sum.variance *= ratio;
      // A pilot of fewer rows than dimensions overstates the largest eigenvalue.
      next.sum.largest *= ratio * (round == 0 ? 0.5 : 1.0);
      return holds(next, 0.97 * goal(next, deltas[round]), for_error * deltas[round]);
    };
    double low = 1, high = static_cast<double>(n);  // a share of n·pilot: all
    for (int i = 0; i < 20; ++i) {
      const double middle = std::sqrt(low * high);
      (predicted(middle) ? high : low) = middle;
    }
    share *= high * 1.05;
    double expected = 0;
    for (index_t j = first; j < last; ++j) expected += probability(j, share);
    if (round == 0) {
      const double error = settings.epsilon / (1 + settings.epsilon) * e.output_norm;
      const index_t limit =
          std::min({std::max<index_t>(256, static_cast<index_t>(expected)), order.size(), most - fixed});
      for (index_t k = 64; k <= limit; k *= 2) {
        if (negligible(e, tail(k), 0.9 * error) && settle(k)) return true;
        if (c.breaches > 0) return true;
      }
    }
    if (static_cast<double>(fixed) + expected > static_cast<double>(most)) break;

    e = draw(share, round + 2);
    c.rounds = static_cast<index_t>(round) + 2;
    if (!e.finite) return false;
    if (c.breaches > 0 || fixed + e.rows >= most) break;
    const double error = goal(e, deltas[round]);
    if (holds(e, error, for_error * deltas[round])) {
      double least = 1;  // of the goal, the least that this sample shows
      for (int i = 0; i < 12 && holds(e, error * least * 0.97, for_error * deltas[round]); ++i) least *= 0.97;
      certify(e, settings.epsilon * least, guarantee::finite_sample);
      c.rows_sampled += spent;
      if (s.chosen) {
        s.chosen.clear();
        s.chosen.add_ends(tokens, settings.sinks, settings.window);
        for (const weighted_row& r : s.weighted.first(at(e.rows)))
          s.chosen.add(tokens[r.place], 1 / static_cast<double>(r.probability));
      }
      return task.done = true;
    }
    spent += e.rows - e.certain;
  }
  return true;
}

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
