// Scores of the tokens that a query sees, and the order they imply.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <span>

#include "vattn/config.hpp"

namespace vattn {

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
  // Puts the k-th best at k - 1 with the better ones before it; [0, count_) stays.
  void select(index_t k) noexcept {
    std::nth_element(order_.begin() + count_, order_.begin() + (k - 1), order_.end(), by_score{scores_.data()});
  }

  std::span<const float> scores_;
  std::span<ordinal> order_;
  index_t count_ = 0;
};

}  // namespace vattn
