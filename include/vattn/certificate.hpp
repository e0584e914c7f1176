// What one query of one head was promised, and what it cost.
#include "vattn/macros_push.hpp"
#pragma once

#include <limits>

#include "vattn/base/config.hpp"
#include "vattn/stats/promise.hpp"

namespace vattn::VATTN_ABI {

/// Plain data; valid for the one (query, head) it was made for. Lengths are rows of the cache.
struct certificate {
  index_t n = 0;             ///< tokens that the query sees
  index_t rows_exact = 0;    ///< read because they were chosen (sinks, window, heavy), or because all were
  index_t rows_sampled = 0;  ///< read by chance
  index_t budget = 0;        ///< sampled rows that the bound asked for
  double log_denominator = -std::numeric_limits<double>::infinity();  ///< log D̂, natural, no shift
  double denominator_error = 0;  ///< radius of D̂ relative to D̂, at δ, by the same bound
  double epsilon = 0;            ///< asked
  double delta = 0;              ///< asked: share of draws in which the promise may fail
  double epsilon_achieved = 0;   ///< stated (1 − δ) quantile of the error of the target
  double coherence = 0;          ///< χ = ‖o‖ / RMS of the attended values: cost grows as 1/(χε)²
  index_t breaches = 0;          ///< rows read whose logit was far outside what their score stated
  index_t rounds = 0;            ///< looks at the sample
  index_t shards = 1;            ///< parts of the cache whose samples were judged together (dist/)
  target_kind target = target_kind::none;
  error_scale scale = error_scale::output;
  guarantee promise = guarantee::none;
  const char* bound = "none";
  const char* assumptions = "none: nothing is promised";
  bool saturated = false;  ///< a cap stopped the rule before ε was reached: see epsilon_achieved

  [[nodiscard]] bool exact() const noexcept { return promise == guarantee::exact; }
  [[nodiscard]] index_t rows() const noexcept { return rows_exact + rows_sampled; }
  /// Share of the visible rows that were read; 0 where nothing is visible.
  [[nodiscard]] double density() const noexcept {
    return n == 0 ? 0.0 : static_cast<double>(rows()) / static_cast<double>(n);
  }
};

/// Every one of its n tokens was read.
inline void certify_exact(certificate& c) noexcept {
  c.rows_exact = c.n;
  c.rows_sampled = 0;
  c.promise = guarantee::exact;
  c.bound = "none";
  c.assumptions = "none: every visible row was read";
  c.epsilon_achieved = c.denominator_error = 0;
  c.saturated = false;
}

[[nodiscard]] constexpr const char* to_string(target_kind t) noexcept {
  switch (t) {
    case target_kind::denominator:
      return "denominator";
    case target_kind::numerator:
      return "numerator";
    case target_kind::sdpa:
      return "sdpa";
    case target_kind::output:
      return "output";
    default:
      return "none";
  }
}
[[nodiscard]] constexpr const char* to_string(guarantee g) noexcept {
  switch (g) {
    case guarantee::asymptotic:
      return "asymptotic";
    case guarantee::finite_sample:
      return "finite-sample";
    case guarantee::deterministic:
      return "deterministic";
    case guarantee::exact:
      return "exact";
    default:
      return "none";
  }
}
[[nodiscard]] constexpr const char* to_string(error_scale s) noexcept {
  return s == error_scale::output ? "output" : "rms";
}

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
