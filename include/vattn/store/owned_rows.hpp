// What owning caches share: rows that grow, and what can be wrong with a cache that is copied.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>
#include <span>
#include <vector>

#include "vattn/base/pages.hpp"
#include "vattn/kv/view.hpp"

namespace vattn::VATTN_ABI::detail {

/// [n_heads, capacity, width]. Heads of a huge page or more have memory of their own each: growth moves no head past
/// another, and on Linux copies nothing (page_buffer). Smaller ones share theirs, so that together they have huge
/// pages. Not checked: rows past the capacity.
template <kernel::element T>
class owned_rows {
 public:
  owned_rows() = default;
  owned_rows(index_t n_heads, index_t width)
      : width_(width), first_(static_cast<std::size_t>(n_heads)), apart_(static_cast<std::size_t>(n_heads)) {}

  [[nodiscard]] T* row(index_t h, index_t i) noexcept { return first_[static_cast<std::size_t>(h)] + i * width_; }
  [[nodiscard]] const T* row(index_t h, index_t i) const noexcept {
    return first_[static_cast<std::size_t>(h)] + i * width_;
  }

  /// Room for n rows a head, n·width·sizeof(T) < 2^63; the first `used`, which there was room for, are kept. False
  /// where there is no memory; nothing is lost then.
  [[nodiscard]] bool reserve(index_t n, index_t used) noexcept {
    if (n <= shared_rows_) return true;
    const std::size_t kept = bytes(used), wanted = bytes(n);
    const bool were_apart = shared_rows_ == 0 && !first_.empty() && first_.front() != nullptr;
    if (wanted < page_buffer::huge && !were_apart) {
      page_buffer fresh;
      if (!fresh.reserve(first_.size() * wanted)) return false;
      move_to([&](std::size_t h) { return fresh.data() + h * wanted; }, kept);
      shared_ = std::move(fresh), shared_rows_ = n;
      return true;
    }
    const bool ok = std::all_of(apart_.begin(), apart_.end(), [&](page_buffer& head) {
      return (!were_apart || head.resize_for_overwrite(kept)) && head.reserve(wanted);
    });
    if (!ok && !were_apart) return false;
    // Where memory ran out, some of them.
    move_to([&](std::size_t h) { return apart_[h].data(); }, were_apart ? 0 : kept);
    shared_ = page_buffer(), shared_rows_ = 0;
    return ok;
  }

 private:
  [[nodiscard]] std::size_t bytes(index_t rows) const noexcept {
    return static_cast<std::size_t>(rows * width_) * sizeof(T);
  }
  template <class Place>
  void move_to(const Place& place, std::size_t kept) noexcept {
    for (std::size_t h = 0; h < first_.size(); ++h) {
      T* to = reinterpret_cast<T*>(place(h));
      if (kept > 0) std::memcpy(to, first_[h], kept);
      first_[h] = to;
    }
  }

  index_t width_ = 0, shared_rows_ = 0;  // capacity of shared_, of each head
  std::vector<T*> first_;                // [n_heads], where a head's rows are
  page_buffer shared_;
  std::vector<page_buffer> apart_;  // [n_heads]
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

}  // namespace vattn::VATTN_ABI::detail

#include "vattn/macros_pop.hpp"
