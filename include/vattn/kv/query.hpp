// One query of one head against one KV head: its logits, and the tokens that it sees.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <utility>

#include "vattn/kv/view.hpp"
#include "vattn/options.hpp"

namespace vattn {

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
  mask_view::line mask{};

  [[nodiscard]] index_t dv() const noexcept { return head.dv(); }

  /// Reads one key. Non-finite only if q, K or the mask is.
  [[nodiscard]] float logit(index_t token) const noexcept {
    using kernel::dot;
    return transform(dot(scaled_query, head.key(token)), token);
  }

  /// Whether `transform` does anything.
  [[nodiscard]] bool transforms() const noexcept { return softcap > 0 || mask || alibi_slope != 0; }

  /// Cap, mask and position bias of a scaled product; increasing in `s`, so it maps bounds to bounds.
  [[nodiscard]] float transform(float s, index_t token) const noexcept {
    if (softcap > 0) s = softcap * std::tanh(s / softcap);
    if (mask) s += mask(token);
    if (alibi_slope != 0) s += alibi_slope * static_cast<float>(token - position);
    return s;
  }
};

/// The tokens that one query sees, in order of position: a range, or a list where a mask removes some.
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
      if (mask(token) != -std::numeric_limits<float>::infinity()) storage[kept++] = static_cast<ordinal>(token);
    }
    if (static_cast<index_t>(kept) == size_) return;
    size_ = static_cast<index_t>(kept);
    list_ = storage.data();
  }

  /// The tokens of `list`, ascending.
  explicit population(std::span<const ordinal> list) noexcept
      : size_(static_cast<index_t>(list.size())), list_(list.data()) {}

  [[nodiscard]] index_t size() const noexcept { return size_; }
  /// Token (row of the cache) at place j of the population.
  [[nodiscard]] index_t operator[](index_t j) const noexcept { return list_ ? index_t{list_[j]} : first_ + j; }
  /// The tokens themselves, [size()], or null where they are a range.
  [[nodiscard]] const ordinal* list() const noexcept { return list_; }

 private:
  index_t first_ = 0, size_ = 0;
  const ordinal* list_ = nullptr;
};

/// The half-open range that causality and the sliding window leave to query t of T against n tokens.
[[nodiscard]] inline std::pair<index_t, index_t> visible_range(index_t n, index_t n_queries, index_t t,
                                                               const attention_options& options) noexcept {
  const index_t position = n - n_queries + t;
  index_t first = 0, last = n;
  if (options.causal) last = std::clamp<index_t>(position + 1, 0, n);
  if (options.sliding_window > 0) first = std::clamp<index_t>(position + 1 - options.sliding_window, 0, last);
  return {first, last};
}

}  // namespace vattn
