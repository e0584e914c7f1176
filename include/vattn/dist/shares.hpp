// How much of the error that is allowed each rank may make, so that the slowest is done first.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <span>

#include "vattn/estimate/strata.hpp"

namespace vattn::VATTN_ABI::dist {

/// What a rank's sample of a group has to do. A sample of m rows whose probabilities follow x‖v − c‖ has a variance of
/// about S²/m, S the sum of x‖v − c‖ over the rank's tokens.
struct shard_effort {
  bool samples = false;                    ///< false: it reads all rows, and has no error
  double cells = 0;                        ///< that it scans
  std::array<double, max_group> spread{};  ///< S, of each head
};

/// Rank r's share of head h's variance: m_r rows with Σ_r S_r²/m_r = goal for the head that needs most, and the same
/// time scan·cells_r + key·m_r for every rank that samples, but for ranks that reach `least` rows first. `goals`: the
/// variance that verifies, in the unit of S²; infinity: a head that asks for nothing, whose share stays as it is.
/// Shares of a head add up to 1. A tenth is dealt evenly, for a first look that saw little of a rank.
inline void share_variance(std::span<const shard_effort> ranks, const std::array<double, max_group>& goals,
                           index_t heads, double scan, double key, std::size_t mine,
                           std::array<double, max_group>& to) noexcept {
  constexpr double least = 16, even = 0.1;
  double sampling = 0, slowest = 0;
  for (const shard_effort& r : ranks) {
    sampling += r.samples ? 1 : 0;
    slowest = std::max(slowest, r.samples ? r.cells : 0);
  }
  if (!ranks[mine].samples || sampling == 0) return;
  const auto rows = [&](const shard_effort& r, double extra) {  // `extra`: rows of the rank with most cells
    return std::max(least, extra + scan / key * (slowest - r.cells));
  };
  const auto enough = [&](double extra) {
    for (index_t h = 0; h < heads; ++h) {
      const auto i = static_cast<std::size_t>(h);
      double variance = 0;
      for (const shard_effort& r : ranks) variance += r.samples ? r.spread[i] * r.spread[i] / rows(r, extra) : 0;
      if (variance > goals[i]) return false;
    }
    return true;
  };
  double low = -scan / key * slowest, high = 1;
  while (high < 1e9 && !enough(high)) low = high, high *= 4;
  for (int i = 0; i < 20; ++i) {
    const double middle = (low + high) / 2;
    (enough(middle) ? high : low) = middle;
  }
  for (index_t h = 0; h < heads; ++h) {
    const auto i = static_cast<std::size_t>(h);
    if (!(goals[i] < stats::infinity)) continue;
    double all = 0;
    for (const shard_effort& r : ranks) all += r.samples ? r.spread[i] * r.spread[i] / rows(r, high) : 0;
    const double own = ranks[mine].spread[i] * ranks[mine].spread[i] / rows(ranks[mine], high);
    to[i] = all > 0 && all < std::numeric_limits<double>::infinity() ? (1 - even) * own / all + even / sampling
                                                                     : 1 / sampling;
  }
}

}  // namespace vattn::VATTN_ABI::dist

#include "vattn/macros_pop.hpp"
