// Searches of the planners: how high thresholds may be with every head's goal still met.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <cmath>

#include "vattn/base/config.hpp"
#include "vattn/kernel/row_sums.hpp"

namespace vattn::VATTN_ABI {

/// Whether a variance, the sum of a plan's terms less `total`, with its quantile's part for few effective terms, about
/// 1 + 8/ν₂ = 1 + 4 Σt²/V², is within `goal`.
[[nodiscard]] inline bool within_goal(const kernel::plan_totals& sum, double total, double goal) noexcept {
  const double variance = std::max(0.0, static_cast<double>(sum.first) - total);
  if (!(variance > 0)) return true;
  return variance + 4 * static_cast<double>(sum.second) / variance <= goal;
}

/// The least a with `enough(a)`: 0 where that is enough. `high` is an upper bound of log a, and becomes one that is
/// nearer. `halvings` of a step of 3 nats.
template <class Enough>
[[nodiscard]] double least_enough(double& high, int halvings, Enough&& enough) noexcept {
  if (enough(0.0)) return 0;
  double low = high - 3;
  while (enough(std::exp(low)) && low > -20) high = low, low -= 3;
  for (int i = 0; i < halvings; ++i) {
    const double middle = (low + high) / 2;
    (enough(std::exp(middle)) ? high : low) = middle;
  }
  return std::exp(high);
}

/// Every head of a group reads the others' rows too: how far all thresholds may rise, at most `most` nats, with each
/// head's goal still met. `enough(h, factor of a)`.
template <class Enough>
[[nodiscard]] double common_rise(index_t heads, double most, Enough&& enough) noexcept {
  if (heads <= 1) return 0;
  double low = 0, high = most;
  for (int i = 0; i < 4; ++i) {
    const double middle = (low + high) / 2;
    bool all = true;
    for (index_t h = 0; h < heads && all; ++h) all = enough(h, std::exp(-middle));
    (all ? low : high) = middle;
  }
  return low;
}

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
