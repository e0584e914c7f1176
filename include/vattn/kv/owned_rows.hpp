// What owning caches share: rows that grow, and what can be wrong with a cache that is copied.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>
#include <span>
#include <vector>

#include "vattn/kv/view.hpp"
#include "vattn/runtime/pages.hpp"

namespace vattn::detail {

/// [n_heads, capacity, width], each head in memory of its own: growth moves no head past another, and on Linux copies
/// nothing (page_buffer). Not checked: rows past the capacity.
template <kernel::element T>
class owned_rows {
 public:
  owned_rows() = default;
  owned_rows(index_t n_heads, index_t width) : width_(width), heads_(static_cast<std::size_t>(n_heads)) {}

  [[nodiscard]] T* row(index_t h, index_t i) noexcept { return reinterpret_cast<T*>(at(h).data()) + i * width_; }
  [[nodiscard]] const T* row(index_t h, index_t i) const noexcept {
    return reinterpret_cast<const T*>(heads_[static_cast<std::size_t>(h)].data()) + i * width_;
  }

  /// Room for n rows a head, n·width·sizeof(T) < 2^63; the first `used`, which there was room for, are kept. False
  /// where there is no memory; nothing is lost then.
  [[nodiscard]] bool reserve(index_t n, index_t used) noexcept {
    const auto bytes = [&](index_t rows) { return static_cast<std::size_t>(rows * width_) * sizeof(T); };
    return std::all_of(heads_.begin(), heads_.end(), [&](page_buffer& head) {
      return head.resize_for_overwrite(bytes(used)) && head.reserve(bytes(n));
    });
  }

 private:
  [[nodiscard]] page_buffer& at(index_t h) noexcept { return heads_[static_cast<std::size_t>(h)]; }

  index_t width_ = 0;
  std::vector<page_buffer> heads_;
};

/// to[j] = row[j] for j < width, converted where types differ. `scratch` [width].
template <kernel::row R, kernel::element T>
void copy_row(const R& from, T* to, index_t width, std::span<float> scratch) noexcept {
  if constexpr (std::is_convertible_v<R, std::span<const T>>) {
    const std::span<const T> same = from;
    std::memcpy(to, same.data(), static_cast<std::size_t>(width) * sizeof(T));
  } else {
    using kernel::load;
    load(from, scratch.data());
    for (index_t j = 0; j < width; ++j) to[j] = static_cast<T>(scratch[static_cast<std::size_t>(j)]);
  }
}

/// Whether sequence `b` of a cache can be copied into an owner of so many heads and elements.
template <kv_cache KV>
[[nodiscard]] status check_copy(const KV& cache, index_t b, index_t n_kv_heads, index_t dk, index_t dv) noexcept {
  if (status s = cache.validate(); !s) return s;
  if (cache.n_kv_heads() != n_kv_heads || cache.dk() != dk || cache.dv() != dv) {
    return status::error(errc::invalid_argument,
                         "the cache has %lld heads of sizes %lld and %lld, the store %lld, "
                         "%lld and %lld: make the store for this cache",
                         static_cast<long long>(cache.n_kv_heads()), static_cast<long long>(cache.dk()),
                         static_cast<long long>(cache.dv()), static_cast<long long>(n_kv_heads),
                         static_cast<long long>(dk), static_cast<long long>(dv));
  }
  if (b < 0 || b >= cache.n_batch()) {
    return status::error(errc::invalid_argument, "sequence %lld of a cache of %lld: give one that it has",
                         static_cast<long long>(b), static_cast<long long>(cache.n_batch()));
  }
  return {};
}

/// Whether n tokens of so many bytes, all heads together, can be counted; ordinals have 31 bits.
[[nodiscard]] inline status check_capacity(index_t n, index_t token_bytes) noexcept {
  if (n >> 31 != 0 || n > std::numeric_limits<index_t>::max() / 2 / token_bytes) {
    return status::error(errc::invalid_argument, "a store of %lld tokens: give it less than 2^31 tokens a sequence",
                         static_cast<long long>(n));
  }
  return {};
}

[[nodiscard]] inline status no_room(index_t n, index_t n_kv_heads) noexcept {
  return status::error(errc::out_of_memory,
                       "no memory for a store of %lld tokens of %lld heads: free some, or truncate() or clear() others",
                       static_cast<long long>(n), static_cast<long long>(n_kv_heads));
}

/// Capacity of a store that is full, for amortised growth.
[[nodiscard]] inline index_t grown(index_t capacity) noexcept {
  return std::max<index_t>(256, capacity + capacity / 2);
}

}  // namespace vattn::detail
