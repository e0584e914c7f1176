// Certified attention: importance sampling whose guarantee holds at the sample's own size, from hard bounds.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <span>
#include <utility>

#include "vattn/call/looks.hpp"
#include "vattn/estimate/exact.hpp"
#include "vattn/estimate/second_moment.hpp"
#include "vattn/sample/importance.hpp"
#include "vattn/select/ranking.hpp"
#include "vattn/select/selector.hpp"

namespace vattn::VATTN_ABI {

/// One query of one head, a sampling design (call/looks.hpp). Wants scores that are upper bounds of the logits
/// (score_kind::logit) and values' distances from a centre c; promises P(‖ô − o‖ > ε·T) <= δ at finite n, with nothing
/// asymptotic, or leaves all rows to be read.
///   begin  scores h_i, distances r_i; sinks and window, which check the bounds
///   draw   a fresh Poisson sample, with π_i = min(1, share·w_i), w_i = e^{h_i − top}(r_i + R): stats::poisson_ranges
/// The first look is a pilot that sets the size of the next sample and is no part of it, so that the bound is not
/// conditioned on having been chosen; it gets 0.8 of δ. Where it does not come to the goal a last fresh sample gets the
/// rest. Where the bounds alone show after the pilot that all unread tokens are negligible, nothing is left to chance:
/// guarantee::deterministic.
template <stats::finite_bound B, class Selector, kv_head Head>
class certified_sampler {
 public:
  /// The pilot, and two samples.
  static constexpr index_t most_looks = 3;

  /// `group` of one head.
  certified_sampler(head_group<Head>& group, const config& settings, const Selector& selector) noexcept
      : task_(group[0]),
        s_(task_.s),
        settings_(settings),
        selector_(selector),
        n_(task_.tokens.size()),
        first_(settings.sinks),
        last_(n_ - settings.window),
        fixed_(settings.sinks + settings.window),
        most_(static_cast<index_t>(settings.max_density * static_cast<double>(n_))),
        exact_(s_.offset),
        part_(s_.part) {}

  [[nodiscard]] bool begin() noexcept {
    const score_result scored =
        selector_.score(task_.row, task_.tokens, {s_.scores.first(at(n_)), s_.errors, s_.value_centre, s_.selector});
    s_.lagging = scored.lagging;
    if (!scored.ok) return task_.ok = false;
    distance_.emplace(select::value_distances(task_.row, task_.tokens, s_.value_centre));
    if (!measure()) return task_.ok = false;
    if (!(total_ > 0)) return false;
    add_sink(exact_, task_.row.sink_logit);
    const auto place = [&](index_t j) { return j < settings_.sinks ? j : n_ - fixed_ + j; };
    if (!accumulate_exact(
            task_.row, fixed_, [&](index_t j) { return task_.tokens[place(j)]; }, exact_, part_, true))
      return task_.ok = false;
    for (index_t j = 0; j < fixed_; ++j) check(place(j), task_.row.logit(task_.tokens[place(j)]));
    order_ = ranking(s_.weights.first(at(n_)), first_, last_, s_.order);
    share_ = pilot_rows / total_;
    return task_.c.breaches == 0;
  }

  [[nodiscard]] draw_outcome draw() noexcept {
    const index_t look = ++task_.c.rounds;
    task_.ok = take(static_cast<std::uint32_t>(look));
    if (!task_.ok || task_.c.breaches > 0 || fixed_ + rows_ >= most_) return draw_outcome::too_much;
    if (look > 1) return draw_outcome::sample;
    spent_ = rows_ - certain_;
    plan(look + 1);
    if (settle()) return draw_outcome::sample;
    return task_.c.breaches == 0 && fits() ? draw_outcome::nothing : draw_outcome::too_much;
  }

  [[nodiscard]] soundness evidence(index_t, stats::evidence& e) noexcept {
    e.denominator = seen_.denominator, e.output2 = seen_.output2, e.power = seen_.power;
    e.rows = fixed_ + rows_, e.certain = fixed_ + certain_;
    return soundness::sound;
  }
  [[nodiscard]] stats::verdict judge(index_t, const stats::evidence&) noexcept {
    if (settled_) {
      stats::verdict v;
      v.met = true, v.epsilon_achieved = settings_.epsilon, v.denominator_error = unread_denominator_;
      return v;
    }
    return stats::judge<B>(seen_, promise(task_.c.rounds));
  }
  [[nodiscard]] bool suffices(index_t, const stats::evidence&, const stats::verdict& v) const noexcept { return v.met; }
  [[nodiscard]] bool next(index_t, const stats::evidence&, const stats::verdict&) noexcept {
    spent_ += rows_ - certain_;
    if (task_.c.rounds == most_looks) return false;
    plan(most_looks);
    return fits();
  }

  void record(index_t, const stats::evidence& e, const stats::verdict& v) noexcept {
    stats::certify(
        task_.c, e, v,
        {.rows_exact = e.certain,
         .rows_sampled = settled_ ? 0 : e.rows - e.certain + spent_,
         .budget = e.rows - e.certain,
         .kind = settled_ ? guarantee::deterministic : B::kind,
         .bound = settled_ ? "negligible" : B::name,
         .assumptions = "finite-sample: the scores bound the logits, and the values lie as far from their centre as "
                        "stored"});
    if (!s_.chosen) return;
    s_.chosen.clear();
    s_.chosen.add_ends(task_.tokens, settings_.sinks, settings_.window);
    if (settled_) {
      for (const ordinal place : order_.top().first(at(rows_))) s_.chosen.add(task_.tokens[place], 1);
    } else {
      for (const weighted_row& r : rows()) s_.chosen.add(task_.tokens[r.place], 1 / static_cast<double>(r.probability));
    }
  }

 private:
  static constexpr double pilot_rows = 192;  // expected: enough for a second moment within some 10 %

  [[nodiscard]] static constexpr std::size_t at(index_t i) noexcept { return static_cast<std::size_t>(i); }
  [[nodiscard]] std::span<weighted_row> rows() noexcept { return s_.weighted.first(at(rows_)); }
  // The second look is the one that is meant to suffice: most of δ is its, and the last look's the rest.
  [[nodiscard]] stats::promise promise(index_t look) const noexcept {
    return {settings_.epsilon, (look == 2 ? 0.8 : 0.2) * settings_.delta, settings_.scale};
  }
  [[nodiscard]] double distance(index_t place) const noexcept {
    return static_cast<double>((*distance_)(task_.tokens[place]));
  }
  // Rows that are read anyway check the bounds, of which no honest one is exceeded.
  void check(index_t place, float logit) noexcept { task_.c.breaches += stats::breaches(logit, s_.scores[at(place)]); }

  // Distances and weights. False: a value is not finite.
  [[nodiscard]] bool measure() noexcept {
    float nearest = std::numeric_limits<float>::infinity(), farthest = 0;
    double mean = 0;
    for (index_t j = first_; j < last_; ++j) {
      const float r = (*distance_)(task_.tokens[j]);
      if (!std::isfinite(r)) return false;
      top_ = std::max(top_, s_.scores[at(j)]);
      nearest = std::min(nearest, r), farthest = std::max(farthest, r);
      mean += static_cast<double>(r) / static_cast<double>(last_ - first_);
    }
    seen_.nearest = static_cast<double>(nearest), seen_.farthest = static_cast<double>(farthest);
    seen_.margin = std::max(mean, 1e-30);  // all values may be equal
    seen_.centre_norm = static_cast<double>(kernel::const_float_map(s_.value_centre.data(), width()).norm());
    for (index_t j = first_; j < last_; ++j) {
      s_.weights[at(j)] = static_cast<float>(
          std::exp(static_cast<double>(s_.scores[at(j)]) - static_cast<double>(top_)) * (distance(j) + seen_.margin));
      total_ += static_cast<double>(s_.weights[at(j)]);
    }
    return true;
  }
  [[nodiscard]] Eigen::Index width() const noexcept { return static_cast<Eigen::Index>(task_.row.dv()); }

  // In units of the numbers' grid, so that u < π has probability π and nothing else.
  [[nodiscard]] double probability(index_t j, double share) const noexcept {
    return std::min(1.0,
                    std::ceil(std::max(share * static_cast<double>(s_.weights[at(j)]), 0x1p-24) * 0x1p24) * 0x1p-24);
  }

  // What a finished state says of the output: ô to s_.centre.
  void finish(double share) noexcept {
    seen_.denominator = task_.state.denominator();
    seen_.power = task_.state.power() / seen_.denominator;
    reference_ = static_cast<double>(task_.state.max_logit());
    static_cast<void>(task_.state.finish(s_.centre));
    const kernel::const_float_map o(s_.centre.data(), width());
    const double norm = static_cast<double>(o.norm());
    seen_.output2 = norm * norm;
    seen_.away = static_cast<double>((o - kernel::const_float_map(s_.value_centre.data(), width())).norm());
    seen_.unit = std::exp(static_cast<double>(top_) - reference_) / share;
  }

  // Draws {u < π(share)} and sums it. False: a number is not finite.
  [[nodiscard]] bool take(std::uint32_t fork) noexcept {
    using kernel::axpy, kernel::load, kernel::squared_norm;
    bool finite = true;
    rows_ = certain_ = 0;
    sample::draw_numbers(s_.numbers, first_, last_, task_.stream.fork(fork));
    for (index_t j = first_; j < last_; ++j) {
      const double p = probability(j, share_);
      if (!(static_cast<double>(s_.numbers[at(j)]) < p)) continue;
      if (fixed_ + rows_ >= most_) return true;  // too much: nothing is made of it
      const float logit = task_.row.logit(task_.tokens[j]);
      finite = finite && std::isfinite(logit);
      check(j, logit);
      certain_ += p >= 1;
      s_.weighted[at(rows_++)] = {static_cast<ordinal>(j), logit, static_cast<float>(p), 0};
    }
    float reference = exact_.max_logit();
    for (const weighted_row& r : rows()) reference = std::max(reference, r.logit);
    task_.state.clear();
    task_.state.raise(reference);
    task_.state.merge(exact_);
    seen_.sampled_denominator = seen_.sampled_power = 0;
    for (const weighted_row& r : rows()) {
      const auto value = task_.row.value(task_.tokens[r.place]);
      const double p = static_cast<double>(r.probability);
      const double x = std::exp(static_cast<double>(r.logit - reference)) / p;
      const double power = x * static_cast<double>(squared_norm(value));
      task_.state.add_denominator(x);
      task_.state.add_power(power);
      axpy(static_cast<float>(x), value, task_.state.numerator().data());
      if (p < 1) seen_.sampled_denominator += x, seen_.sampled_power += power;
    }
    finish(share_);
    if (!finite || !seen_.finite()) return false;

    // About ô: a second reading of the values.
    seen_.sum = {};
    second_moment moment(s_.matrix, task_.row.dv());
    for (const weighted_row& r : rows()) {
      if (r.probability >= 1) continue;
      const double p = static_cast<double>(r.probability), x = weight(r);
      const double a = (1 - p) / (p * p) * x * x;
      load(task_.row.value(task_.tokens[r.place]), s_.output.data());
      kernel::float_map y(s_.output.data(), width());
      y -= kernel::const_float_map(s_.centre.data(), width());
      seen_.sum.weight += a;
      seen_.sum.variance += a * static_cast<double>(y.squaredNorm());
      moment.add(static_cast<float>(std::sqrt(a)), s_.output);
    }
    seen_.sum.largest = moment.largest_eigenvalue();
    return true;
  }
  [[nodiscard]] double weight(const weighted_row& r) const noexcept {
    return std::exp(static_cast<double>(r.logit) - reference_);
  }

  // Sets the share of the least sample that this one predicts to be enough at a look: its sums fall as the share grows.
  void plan(index_t look) noexcept {
    // Aimed a little past the goal, and a little larger than that: a fresh sample scatters about the prediction, and
    // one that fails costs all of its rows.
    constexpr double aim = 0.97, reserve = 1.05;
    // A pilot of fewer rows than dimensions overstates the largest eigenvalue.
    const double eigenvalue_seen = look == 2 ? 0.5 : 1.0;
    const stats::promise asked = promise(look);
    // Σ (1 − q)/(q p)·x²r²: the variance that rows kept with p predict for probabilities q.
    const auto variance = [&](double factor) {
      double sum = 0;
      for (const weighted_row& r : rows()) {
        const double p = static_cast<double>(r.probability);
        const double q = std::max(p, probability(index_t{r.place}, share_ * factor));
        const double x = weight(r), y = distance(index_t{r.place});
        sum += (1 - q) / (q * p) * x * x * y * y;
      }
      return sum;
    };
    const double now = variance(1);
    const auto enough = [&](double factor) {
      stats::poisson_ranges next = seen_;
      const double ratio = now > 0 ? variance(factor) / now : 0;
      next.unit /= factor;
      next.sum.weight *= ratio, next.sum.variance *= ratio;
      next.sum.largest *= ratio * eigenvalue_seen;
      return stats::within_error(next, aim * stats::allowed_error(next, asked), asked);
    };
    double low = 1, high = static_cast<double>(n_);  // a share of n times the pilot's: all
    for (int i = 0; i < 20; ++i) {
      const double middle = std::sqrt(low * high);
      (enough(middle) ? high : low) = middle;
    }
    share_ *= high * reserve;
    expected_ = 0;
    for (index_t j = first_; j < last_; ++j) expected_ += probability(j, share_);
  }
  [[nodiscard]] bool fits() const noexcept {
    return static_cast<double>(fixed_) + expected_ <= static_cast<double>(most_);
  }

  // Tries the tokens of the highest weights alone, 64 of them and more, where all others together may be negligible:
  // as many as the sample would read. True: they are, and the state holds those that are read.
  [[nodiscard]] bool settle() noexcept {
    // By the pilot's output with some room, for it is an estimate; then by that of the rows read, which is not.
    constexpr double by_pilot = 0.9, by_rows = 1 - 1e-4;
    const double epsilon = settings_.epsilon / (1 + settings_.epsilon), pilot_norm = std::sqrt(seen_.output2);
    const index_t limit =
        std::min({std::max<index_t>(256, static_cast<index_t>(expected_)), order_.size(), most_ - fixed_});
    const stats::poisson_ranges pilot = seen_;
    const double reference = reference_;
    for (index_t k = 64; k <= limit && task_.c.breaches == 0; k *= 2) {
      seen_ = pilot, reference_ = reference;
      if (!negligible(tail(k), by_pilot * epsilon * pilot_norm)) continue;
      task_.state.clear();
      task_.state.merge(exact_);
      if (!accumulate_exact(
              task_.row, k, [&](index_t j) { return task_.tokens[order_.top()[at(j)]]; }, task_.state, part_, true))
        continue;
      for (const ordinal place : order_.top().first(at(k))) check(place, task_.row.logit(task_.tokens[place]));
      if (task_.c.breaches > 0) return false;
      finish(1);
      const double rest = tail(k);
      if (!negligible(rest, by_rows * epsilon * std::sqrt(seen_.output2))) continue;
      // D̂ leaves out at most what the bounds of the others add up to.
      unread_denominator_ = seen_.unit * rest / (seen_.nearest + seen_.margin) / seen_.denominator;
      rows_ = certain_ = k;
      return settled_ = true;
    }
    return false;
  }
  // Σ w over all but the k highest, with room for the rounding of the sums.
  [[nodiscard]] double tail(index_t k) noexcept {
    order_.extend(k);
    for (; summed_ < k; ++summed_) ranked_ += static_cast<double>(s_.weights[at(index_t{order_.top()[at(summed_)]})]);
    return std::max(0.0, total_ - ranked_) + 1e-6 * total_;
  }
  // Σ x‖v − o_S‖ over the unread tokens, of which `rest` is Σ w, is no more than error·D_S.
  [[nodiscard]] bool negligible(double rest, double error) const noexcept {
    return std::exp(static_cast<double>(top_) - reference_) * rest * stats::longest_value(seen_, 0) <=
           error * seen_.denominator;
  }

  using distances = decltype(select::value_distances(std::declval<const query_row<Head>&>(),
                                                     std::declval<const population&>(), std::span<float>()));

  head_task<Head>& task_;
  scratch& s_;
  const config& settings_;
  const Selector& selector_;
  const index_t n_, first_, last_, fixed_, most_;
  softmax_state exact_, part_;  // sinks and window
  std::optional<distances> distance_;
  float top_ = -std::numeric_limits<float>::infinity();
  double total_ = 0;                 // Σ w
  double share_ = 0, expected_ = 0;  // of the next sample; its rows besides the fixed ones
  ranking order_;                    // by w
  index_t summed_ = 0;
  double ranked_ = 0;  // Σ w of the first summed_ of them
  stats::poisson_ranges seen_;
  double reference_ = 0;  // logit
  index_t rows_ = 0, certain_ = 0, spent_ = 0;
  bool settled_ = false;
  double unread_denominator_ = 0;
};

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
