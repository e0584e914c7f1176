// Scores of the tokens that a query sees, and the order they imply.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <span>

#include "vattn/base/config.hpp"

namespace vattn::VATTN_ABI {

/// Order by (score descending, place ascending): total, so ties never depend on the algorithm.
/// NaN is smaller than everything.
struct by_score {
  const float* scores;
  [[nodiscard]] bool operator()(ordinal a, ordinal b) const noexcept {
    const float x = key(scores[a]), y = key(scores[b]);
    return x != y ? x > y : a < b;
  }
  [[nodiscard]] static float key(float score) noexcept {
    return std::isnan(score) ? -std::numeric_limits<float>::infinity() : score;
  }
};

/// Partial ranking of the places [first, last) of a population. Grows: `extend(k)` is O(n) once and
/// never reorders what came before it. Non-owning: `scores` [n], `order` [last - first].
class ranking {
 public:
  ranking() = default;
  ranking(std::span<const float> scores, index_t first, index_t last, std::span<ordinal> order) noexcept
      : scores_(scores), order_(order.first(static_cast<std::size_t>(std::max<index_t>(0, last - first)))) {
    std::iota(order_.begin(), order_.end(), static_cast<ordinal>(first));
  }

  /// Places that can be ranked.
  [[nodiscard]] index_t size() const noexcept { return static_cast<index_t>(order_.size()); }
  /// All rankable places, in no order.
  [[nodiscard]] std::span<const ordinal> places() const noexcept { return order_; }
  /// Places ranked so far.
  [[nodiscard]] index_t count() const noexcept { return count_; }
  /// The ranked places: the `count()` best, in no particular order within one `extend`.
  [[nodiscard]] std::span<const ordinal> top() const noexcept { return order_.first(static_cast<std::size_t>(count_)); }
  [[nodiscard]] float score(ordinal place) const noexcept { return by_score::key(scores_[place]); }

  /// Ranks the k best (at most size()).
  void extend(index_t k) noexcept {
    k = std::min(k, size());
    if (k <= count_) return;
    select(k);
    count_ = k;
  }

  /// The place of rank k (1-based) without ranking it; k in [count(), size()], k >= 1.
  [[nodiscard]] ordinal at_rank(index_t k) noexcept {
    if (k > count_) select(k);
    return order_[static_cast<std::size_t>(k - 1)];
  }

  /// Ranks from + 1 .. k, in no particular order; only right after `at_rank(k)`.
  [[nodiscard]] std::span<const ordinal> partitioned(index_t from, index_t k) const noexcept {
    return order_.subspan(static_cast<std::size_t>(from), static_cast<std::size_t>(k - from));
  }

  /// Is this place among the `count()` best?
  [[nodiscard]] bool contains(ordinal place) const noexcept {
    return count_ > 0 && !before(order_[static_cast<std::size_t>(count_ - 1)], place);
  }
  /// Does `a` rank before `b`?
  [[nodiscard]] bool before(ordinal a, ordinal b) const noexcept { return by_score{scores_.data()}(a, b); }

  /// No unranked place scores above this (−inf when all are ranked).
  [[nodiscard]] float bound() noexcept {
    if (count_ == size()) return -std::numeric_limits<float>::infinity();
    return score(at_rank(std::max<index_t>(count_, 1)));
  }

 private:
  // Puts the k-th best at k - 1 with the better ones before it; [0, count_) stays. Ranks found earlier are
  // kept as cuts, so that each selection only looks between the two nearest.
  void select(index_t k) noexcept {
    for (int passes = 0;; ++passes) {
      const auto above = std::lower_bound(cuts_.begin(), cuts_.begin() + n_cuts_, k);
      const index_t high = above == cuts_.begin() + n_cuts_ ? size() : *above;
      const index_t low = std::max(count_, above == cuts_.begin() ? 0 : *(above - 1));
      if (high == k && above != cuts_.begin() + n_cuts_) return;
      const bool closed = above != cuts_.begin() + n_cuts_;  // then the last place is that of rank `high`
      const index_t end = closed ? high - 1 : high;
      if (passes < 8 && n_cuts_ + 2 < cuts_.size() && end - low > 2048 && part(k, low, end)) continue;
      std::nth_element(order_.begin() + low, order_.begin() + (k - 1), order_.begin() + end, by_score{scores_.data()});
      cut(k);
      return;
    }
  }

  void cut(index_t k) noexcept {
    if (n_cuts_ == cuts_.size()) return;
    const auto at = std::lower_bound(cuts_.begin(), cuts_.begin() + n_cuts_, k);
    if (at != cuts_.begin() + n_cuts_ && *at == k) return;
    std::copy_backward(at, cuts_.begin() + n_cuts_, cuts_.begin() + n_cuts_ + 1);
    *at = k;
    ++n_cuts_;
  }

  // One branch-free pass over [low, end) about a pivot whose rank, judged by a sample, is just past k (just
  // before k in the upper half): Floyd and Rivest 1975. nth_element mispredicts every other comparison,
  // 16 ns a place; this takes about 1.5.
  bool part(index_t k, index_t low, index_t end) noexcept {
    constexpr index_t size = 256;
    const index_t length = end - low;
    const double p = static_cast<double>(k - low) * size / static_cast<double>(length);
    const double margin = 2 + 2 * std::sqrt(p * (1 - p / size));
    const auto rank = static_cast<index_t>(2 * p < size ? p + margin : p - margin);
    if (rank < 0 || rank >= size) return false;
    std::array<ordinal, size> sample;
    for (index_t i = 0; i < size; ++i)
      sample[static_cast<std::size_t>(i)] = order_[static_cast<std::size_t>(low + i * length / size)];
    std::nth_element(sample.begin(), sample.begin() + rank, sample.end(), by_score{scores_.data()});
    const ordinal pivot = sample[static_cast<std::size_t>(rank)];
    const float bar = score(pivot);
    auto to = static_cast<std::size_t>(low);
    std::size_t pivot_at = to;
    for (std::size_t i = to; i < static_cast<std::size_t>(end); ++i) {
      const ordinal place = order_[i];
      const float x = score(place);
      const bool better = (x > bar) | ((x == bar) & (place <= pivot));
      pivot_at = place == pivot ? to : pivot_at;
      order_[i] = order_[to];
      order_[to] = place;
      to += better;
    }
    std::swap(order_[pivot_at], order_[to - 1]);
    cut(static_cast<index_t>(to));
    return true;
  }

  std::array<index_t, 128> cuts_{};
  std::size_t n_cuts_ = 0;
  std::span<const float> scores_;
  std::span<ordinal> order_;
  index_t count_ = 0;
};

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
