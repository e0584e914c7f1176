// Whether δ holds in production: on a share of rows also the exact output, and a count of those that were off by more.
#include "vattn/macros_push.hpp"
#pragma once

#include <atomic>
#include <cmath>
#include <cstdio>
#include <string>

#include "vattn/call/call.hpp"
#include "vattn/estimate/exact.hpp"

namespace vattn::VATTN_ABI {

/// Counts at one moment. A row is one query of one head.
struct audit_report {
  std::uint64_t rows = 0;        ///< served
  std::uint64_t audited = 0;     ///< compared with exact attention
  std::uint64_t exact = 0;       ///< of the audited: read in full, and right by construction
  std::uint64_t violations = 0;  ///< of the audited: error > ε
  double delta = 0;              ///< mean of the promised δ over the audited
  double largest = 0;            ///< largest error / ε

  [[nodiscard]] double share() const noexcept {
    return audited == 0 ? 0 : static_cast<double>(violations) / static_cast<double>(audited);
  }
  /// P(that many violations or more | each row fails with probability δ, independently). Small: δ does not hold.
  [[nodiscard]] double p_value() const noexcept { return upper_tail(violations, delta); }
  /// Two-sided Clopper-Pearson interval of the violation probability, at 95 %.
  [[nodiscard]] double lowest() const noexcept {
    return violations == 0 ? 0 : solve([&](double p) { return upper_tail(violations, p) < 0.025; });
  }
  [[nodiscard]] double highest() const noexcept {
    return violations >= audited ? 1 : solve([&](double p) { return upper_tail(violations + 1, p) < 0.975; });
  }
  /// False alarms: one report in a hundred where δ is used up whole, fewer where it is not.
  [[nodiscard]] bool holds() const noexcept { return p_value() >= 0.01; }

  /// One line.
  [[nodiscard]] std::string text() const {
    char line[320];
    std::snprintf(line, sizeof(line),
                  "calls %llu, audited %llu (%llu read in full), violations %llu, share %.4g [%.4g, %.4g], delta %.4g, "
                  "p %.3g, largest error %.3g epsilon: %s",
                  static_cast<unsigned long long>(rows), static_cast<unsigned long long>(audited),
                  static_cast<unsigned long long>(exact), static_cast<unsigned long long>(violations), share(),
                  lowest(), highest(), delta, p_value(), largest,
                  audited == 0 ? "nothing audited yet"
                  : holds()    ? "delta holds"
                               : "DELTA DOES NOT HOLD");
    return line;
  }

 private:
  // P(X >= k), X binomial(audited, p).
  [[nodiscard]] double upper_tail(std::uint64_t k, double p) const noexcept {
    if (k == 0 || p >= 1) return 1;
    if (k > audited || p <= 0) return 0;
    return stats::incomplete_beta(static_cast<double>(k), static_cast<double>(audited - k + 1), p);
  }
  template <class Below>
  [[nodiscard]] static double solve(Below&& below) noexcept {
    double low = 0, high = 1;
    for (int i = 0; i < 60; ++i) (below((low + high) / 2) ? low : high) = (low + high) / 2;
    return (low + high) / 2;
  }
};

/// Give it to a call as its observer: attend(q, cache, options, result, memory, key, executor, auditor), or to `run`.
/// Keep one for each layer to see each layer's share. Which rows are audited is a function of the draw key and the row,
/// so the same for any number of threads. What is served stays the sparse output: the count is of what users got. Safe
/// from several threads; costs exact attention on its share of the rows; allocates nothing.
class auditor {
 public:
  /// `share` in [0, 1]; what is outside counts as its nearer end, and NaN as 0.
  explicit auditor(double share) noexcept
      : threshold_(share >= 1  ? std::uint64_t{1} << 32
                   : share > 0 ? static_cast<std::uint64_t>(share * 0x1p32)
                               : 0) {}

  template <kv_head Head>
  void operator()(head_task<Head>& task) noexcept {
    if (!task.ok) return;  // the call fails: nothing is served
    rows_.fetch_add(1, std::memory_order_relaxed);
    random_stream coin = task.stream.fork(purpose);
    if (coin.next() >= threshold_) return;
    const certificate& c = task.c;
    double error = 0;  // relative to what ε is relative to
    if (c.exact()) {
      exact_.fetch_add(1, std::memory_order_relaxed);
    } else {
      error = measured(task);
      double seen = largest_.load(std::memory_order_relaxed);
      const double ratio = error / c.epsilon;
      while (ratio > seen && !largest_.compare_exchange_weak(seen, ratio, std::memory_order_relaxed)) {
      }
      // Float sums of the exact side are off by some 1e-6.
      if (!(error <= c.epsilon * (1 + 1e-4))) violations_.fetch_add(1, std::memory_order_relaxed);
    }
    delta_.fetch_add(static_cast<std::uint64_t>(c.delta * delta_unit), std::memory_order_relaxed);
    audited_.fetch_add(1, std::memory_order_relaxed);
  }

  [[nodiscard]] audit_report report() const noexcept {
    audit_report r;
    r.rows = rows_.load(), r.audited = audited_.load(), r.exact = exact_.load(), r.violations = violations_.load();
    r.largest = largest_.load();
    if (r.audited > 0) r.delta = static_cast<double>(delta_.load()) / delta_unit / static_cast<double>(r.audited);
    return r;
  }
  /// Not while a call is under way.
  void reset() noexcept {
    rows_ = audited_ = exact_ = violations_ = delta_ = 0;
    largest_ = 0;
  }

 private:
  static constexpr std::uint32_t purpose = 0x4155;  // of the stream; no sampler uses it
  static constexpr double delta_unit = 0x1p30;      // δ summed in integers: the same in any order

  // The target's error, relative to its scale.
  template <kv_head Head>
  [[nodiscard]] static double measured(head_task<Head>& task) noexcept {
    VATTN_ASSERT(task.s.truth.size() == task.s.output.size());  // for_each_group was told that it is observed
    softmax_state exact(task.s.audited), part(task.s.part);
    add_sink(exact, task.row.sink_logit);
    const population& tokens = task.tokens;
    if (!accumulate_exact(
            task.row, tokens.size(), [&](index_t j) { return tokens[j]; }, exact, part, true))
      return std::numeric_limits<double>::infinity();
    const auto n = static_cast<Eigen::Index>(task.s.output.size());
    const double shift = static_cast<double>(task.state.max_logit()) - static_cast<double>(exact.max_logit());
    const double denominators = task.state.denominator() * std::exp(shift) / exact.denominator();  // D̂/D
    const double power = std::sqrt(exact.power() / exact.denominator());
    if (task.c.target == target_kind::denominator) return std::abs(denominators - 1);
    static_cast<void>(task.state.finish(task.s.output));
    static_cast<void>(exact.finish(task.s.truth));
    const kernel::const_float_map ours(task.s.output.data(), n), o(task.s.truth.data(), n);
    const double norm = static_cast<double>(o.norm());
    if (task.c.target == target_kind::numerator) {
      const double off = static_cast<double>((ours * static_cast<float>(denominators) - o).norm());
      return off == 0 ? 0 : off / norm;
    }
    const double off = static_cast<double>((ours - o).norm());
    return off == 0 ? 0 : off / (task.c.scale == error_scale::rms ? power : norm);
  }

  std::uint64_t threshold_;
  std::atomic<std::uint64_t> rows_{0}, audited_{0}, exact_{0}, violations_{0}, delta_{0};
  std::atomic<double> largest_{0};
};

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
