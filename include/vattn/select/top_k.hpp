// How many of the highest scores are taken exactly: a fixed share (top-k) or a share of the mass (top-p).
#include "vattn/macros_push.hpp"
#pragma once

#include <cmath>
#include <span>

#include "vattn/select/ranking.hpp"

namespace vattn::VATTN_ABI {

/// The k places of highest score, ties to the lower place. `order` [scores.size()] is scratch; the
/// result is its prefix, unordered. O(n). k is cut to n.
[[nodiscard]] inline std::span<const ordinal> top_k(std::span<const float> scores, index_t k,
                                                    std::span<ordinal> order) noexcept {
  ranking r(scores, 0, static_cast<index_t>(scores.size()), order);
  r.extend(std::max<index_t>(k, 0));
  return r.top().first(static_cast<std::size_t>(r.count()));
}

/// Smallest k such that the k highest scores of `r` hold at least `mass` of Σ exp(score), and ranks
/// them. At most `limit`. Source: Twilight (arXiv 2502.02770); nucleus sampling.
inline index_t extend_to_mass(ranking& r, double mass, index_t limit) noexcept {
  limit = std::min(limit, r.size());
  float highest = -std::numeric_limits<float>::infinity();
  for (const ordinal place : r.places()) highest = std::max(highest, r.score(place));
  if (!(highest > -std::numeric_limits<float>::infinity())) return 0;
  const auto weight = [&](ordinal place) { return std::exp(static_cast<double>(r.score(place)) - highest); };
  double total = 0;
  for (const ordinal place : r.places()) total += weight(place);

  // Blocks of doubling size bracket k, then bisection on rank inside the last block: each probe is one
  // selection over what is still unranked, so the whole stays O(n).
  double held = 0;
  for (index_t step = 64; r.count() < limit && held < mass * total; step *= 2) {
    const index_t from = r.count();
    index_t to = std::min(limit, from + step);
    const auto held_to = [&](index_t k) {
      static_cast<void>(r.at_rank(k));  // partitions: the k best come first
      double sum = held;
      for (const ordinal place : r.partitioned(from, k)) sum += weight(place);
      return sum;
    };
    if (double all = held_to(to); all < mass * total) {
      r.extend(to);
      held = all;
      continue;
    }
    for (index_t low = from; to - low > 1;) {
      const index_t middle = low + (to - low) / 2;
      (held_to(middle) >= mass * total ? to : low) = middle;
    }
    r.extend(to);
    break;
  }
  return r.count();
}

/// The places that hold `mass` of the softmax of `scores`, at most all of them. `order` is scratch.
[[nodiscard]] inline std::span<const ordinal> top_p(std::span<const float> scores, double mass,
                                                    std::span<ordinal> order) noexcept {
  const auto n = static_cast<index_t>(scores.size());
  ranking r(scores, 0, n, order);
  extend_to_mass(r, mass, n);
  return r.top();
}

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
