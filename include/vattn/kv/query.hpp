// One query of one head against one KV head: its logits, and the tokens that it sees.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <iterator>
#include <limits>
#include <span>
#include <utility>

#include "vattn/kernel/units.hpp"
#include "vattn/kv/view.hpp"
#include "vattn/options.hpp"

namespace vattn::VATTN_ABI {

/// Everything that a logit needs. `scaled_query` is scale·q, [dk].
template <kv_head Head>
struct query_row {
  Head head;
  const float* scaled_query;
  float scale = 1;  ///< that is in it
  float softcap = 0;
  float alibi_slope = 0;
  float sink_logit = -std::numeric_limits<float>::infinity();
  index_t position = 0;
  index_t kv_head = 0;  ///< batch·n_kv_heads + head: names the state that belongs to `head`
  /// What `value` multiplies by: a power of two that makes values numbers whose squares float holds (kernel/units.hpp).
  /// States, moments and centres of a sampled query are in this unit; its output is not.
  float value_unit = 1;
  mask_view::line mask{};
  cell_positions::line positions{};

  [[nodiscard]] index_t dv() const noexcept { return head.dv(); }

  /// A value, in the unit.
  [[nodiscard]] auto value(index_t token) const noexcept {
    return kernel::unit_row<std::remove_cvref_t<decltype(head.value(token))>>{head.value(token), value_unit};
  }

  /// Reads one key. Non-finite only if q, K or the mask is.
  [[nodiscard]] float logit(index_t token) const noexcept {
    using kernel::dot;
    return transform(dot(scaled_query, head.key(token)), token);
  }

  /// Whether `transform` does anything.
  [[nodiscard]] bool transforms() const noexcept { return softcap > 0 || mask.adds() || alibi_slope != 0; }

  /// Cap, mask and position bias of a scaled product; increasing in `s`, so it maps bounds to bounds.
  [[nodiscard]] float transform(float s, index_t token) const noexcept {
    if (softcap > 0) s = softcap * std::tanh(s / softcap);
    if (mask.adds()) s += mask(token);
    if (alibi_slope != 0)
      s += alibi_slope * static_cast<float>((positions ? index_t{positions(token)} : token) - position);
    return s;
  }
};

/// The tokens that one query sees: a range, or a list where a mask removes some. In order of position, or, where cells
/// have positions of their own, with the sinks in front, the window at the end, and the rest between in order of cell.
/// This, not [0, n), is what sinks, windows and samples are drawn from.
class population {
 public:
  static constexpr index_t max_size = index_t{1} << 31;

  population() = default;
  population(index_t first, index_t last) noexcept : first_(first), size_(std::max<index_t>(0, last - first)) {}

  /// Drops the masked tokens of [first, last). `storage` holds the survivors, [last - first] at most.
  population(index_t first, index_t last, const mask_view::line& mask, std::span<ordinal> storage) noexcept
      : population(first, last) {
    if (!mask) return;
    std::size_t kept = 0;
    for (index_t token = first; token < last; ++token) {
      storage[kept] = static_cast<ordinal>(token);
      kept += mask.hides(token) ? 0u : 1u;
    }
    size_ = static_cast<index_t>(kept);
    if (kept == 0) return;
    first_ = index_t{storage[0]};
    // What is left may be a range all the same: a sequence's cells among those of others.
    if (index_t{storage[kept - 1]} - first_ + 1 != size_) list_ = storage.data();
  }

  /// The tokens of `list`, the sinks in front and the window at the end.
  explicit population(std::span<const ordinal> list) noexcept
      : size_(static_cast<index_t>(list.size())), list_(list.data()) {}

  [[nodiscard]] index_t size() const noexcept { return size_; }
  /// Token j + 1 is in the cell after token j's.
  [[nodiscard]] bool contiguous() const noexcept { return list_ == nullptr; }
  /// Token (row of the cache) at place j of the population.
  [[nodiscard]] index_t operator[](index_t j) const noexcept { return list_ ? index_t{list_[j]} : first_ + j; }
  /// The tokens themselves, [size()], or null where they are a range.
  [[nodiscard]] const ordinal* list() const noexcept { return list_; }

 private:
  index_t first_ = 0, size_ = 0;
  const ordinal* list_ = nullptr;
};

/// The unit for the values of `tokens`, from eight of them: two at each end, which are read anyway, and four between.
/// `scratch` [dv].
template <kv_head Head>
[[nodiscard]] float value_unit(const Head& head, const population& tokens, std::span<float> scratch) noexcept {
  if constexpr (kernel::has_tiles<std::remove_cvref_t<decltype(head.value(0))>>) {
    using kernel::load;
    const index_t last = tokens.size() - 1;
    const index_t places[] = {0, 1, last / 5, last * 2 / 5, last * 3 / 5, last * 4 / 5, last - 1, last};
    std::array<float, std::size(places)> largest{};
    for (std::size_t i = 0; i < largest.size(); ++i) {
      if (places[i] < 0 || places[i] > last) continue;
      load(head.value(tokens[places[i]]), scratch.data());
      largest[i] = Eigen::Map<const Eigen::ArrayXf>(scratch.data(), head.dv()).abs().maxCoeff();
    }
    return kernel::unit_for(largest);
  } else {
    return 1;
  }
}

/// What positions leave to a query: cells at positions in [first, last].
struct position_range {
  std::int32_t first = 0, last = std::numeric_limits<std::int32_t>::max();
};

/// The positions that causality and the sliding window leave to a query at `position`: the latest `sliding_window` up
/// to its own, or all up to its own, or all.
[[nodiscard]] inline position_range visible_positions(index_t position, const attention_options& options) noexcept {
  constexpr index_t most = std::numeric_limits<std::int32_t>::max();
  position_range range;
  const index_t past = std::max<index_t>(position + 1, 0);  // taken from it, no window is too large
  if (options.sliding_window > 0)
    range.first = static_cast<std::int32_t>(std::min(past - std::min(past, options.sliding_window), most));
  if (options.causal || options.sliding_window > 0)
    range.last = static_cast<std::int32_t>(std::clamp<index_t>(position, -1, most));
  return range;
}

/// The cells of [0, n) that mask and positions leave, ordered for `sinks` and `window` as `population` says. `storage`
/// [n] and `ends` [min(n, sinks + window)] hold it. O(n) where cells are in order of position, and about that where
/// they are so but for a few runs; at most O(n log(sinks + window)).
[[nodiscard]] inline population visible_by_position(index_t n, const mask_view::line& mask,
                                                    const cell_positions::line& positions, const position_range& range,
                                                    index_t sinks, index_t window, std::span<ordinal> storage,
                                                    std::span<ordinal> ends) noexcept {
  std::size_t kept = 0;
  bool ordered = true;
  std::int32_t previous = 0;
  for (index_t c = 0; c < n; ++c) {
    const std::int32_t position = positions(c);
    if (position < range.first || position > range.last) continue;  // an empty cell is at −1
    if (mask && mask.hides(c)) continue;
    ordered &= position >= previous;
    previous = position;
    storage[kept++] = static_cast<ordinal>(c);
  }
  const std::span<ordinal> list = storage.first(kept);
  const auto fixed = static_cast<std::size_t>(sinks + window);
  if (ordered && static_cast<index_t>(kept) == n) return {0, n};
  if (ordered || kept <= fixed) return population(list);

  // Tokens of an image may share a position: cells break the tie.
  const auto lower = [&](ordinal a, ordinal b) {
    const std::int32_t pa = positions(a), pb = positions(b);
    return pa < pb || (pa == pb && a < b);
  };
  const auto higher = [&](ordinal a, ordinal b) { return lower(b, a); };
  const std::span<ordinal> low = ends.first(static_cast<std::size_t>(sinks));
  const std::span<ordinal> high = ends.subspan(low.size(), static_cast<std::size_t>(window));
  // From the far end, so that a heap of the highest seldom changes where cells are nearly in order.
  std::partial_sort_copy(list.begin(), list.end(), low.begin(), low.end(), lower);
  std::partial_sort_copy(list.rbegin(), list.rend(), high.rbegin(), high.rend(), higher);
  const auto middle = std::remove_if(list.begin(), list.end(), [&](ordinal c) {
    return (!low.empty() && !lower(low.back(), c)) || (!high.empty() && !lower(c, high.front()));
  });
  std::move_backward(list.begin(), middle, middle + static_cast<std::ptrdiff_t>(low.size()));
  std::copy(low.begin(), low.end(), list.begin());
  std::copy(high.begin(), high.end(), list.end() - static_cast<std::ptrdiff_t>(high.size()));
  return population(list);
}

/// The same by rows, for query t of T against n tokens: a half-open range. The query's position is n − T + t.
[[nodiscard]] inline std::pair<index_t, index_t> visible_range(index_t n, index_t n_queries, index_t t,
                                                               const attention_options& options) noexcept {
  const index_t position = n - n_queries + t;
  index_t first = 0, last = n;
  if (options.causal || options.sliding_window > 0) last = std::clamp<index_t>(position + 1, 0, n);
  if (options.sliding_window > 0) first = last - std::min(last, options.sliding_window);
  return {first, last};
}

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
