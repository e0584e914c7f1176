// An owning KV cache whose rows are key and value in one: what selectors gather from.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <span>
#include <vector>

#include "vattn/base/floating_point.hpp"
#include "vattn/kernel/units.hpp"
#include "vattn/store/owned_rows.hpp"

namespace vattn::VATTN_ABI {

struct interleaved_shape {
  index_t n_kv_heads = 1;
  index_t dk = 0, dv = 0;
};

/// KV cache of one sequence in one layer, tokens in their order, rows [K | V] of dk + dv elements, so that a picked
/// token lies in one place. When to use: an owning cache that grows, read through indices and importance sampling. That
/// one place is faster than two has not shown on Zen 4 with huge pages (docs/performance.md). When not: exact attention
/// and selectors that read all keys (K and V apart are read faster), and uniform samples (shuffled_store). A kv_cache
/// of batch 1, for every call that takes one; head() is a strided view.
///
/// Beside the rows it keeps ‖v − c‖ of each value, c the mean of the first 4096 values that were assigned (before, the
/// origin): rankings by contribution then read no values to choose.
///
/// Memory: n·(dk + dv) elements and n floats a head. `append` copies one row a head; it allocates when the capacity
/// grows, by half each time (reserve() to avoid that), which moves pages instead of rows where the system can
/// (page_buffer); rows have other addresses then. Errors are statuses; after one nothing has changed. Not for
/// concurrent appends; reading from many threads is fine. Indices are brought up to it by `append_from(index,
/// store.head(0, h))` (select/index.hpp).
template <kernel::element T>
class interleaved_store {
 public:
  using key_type = T;
  using value_type = T;

  interleaved_store() = default;
  explicit interleaved_store(const interleaved_shape& shape) : shape_(shape) {
    if (!validate()) return;
    rows_ = {shape.n_kv_heads, shape.dk + shape.dv};
    norms_ = {shape.n_kv_heads, 1};
    centres_.resize(static_cast<std::size_t>(shape.n_kv_heads * shape.dv));
    scratch_.resize(static_cast<std::size_t>(std::max(shape.dk, shape.dv)));
  }

  [[nodiscard]] const interleaved_shape& shape() const noexcept { return shape_; }
  [[nodiscard]] index_t size() const noexcept { return n_; }
  [[nodiscard]] index_t capacity() const noexcept { return capacity_; }
  [[nodiscard]] index_t n_batch() const noexcept { return 1; }
  [[nodiscard]] index_t n_kv_heads() const noexcept { return shape_.n_kv_heads; }
  [[nodiscard]] index_t dk() const noexcept { return shape_.dk; }
  [[nodiscard]] index_t dv() const noexcept { return shape_.dv; }
  /// Valid until the capacity grows.
  [[nodiscard]] kv_head_view<T, T, dynamic, dynamic> head(index_t, index_t h) const noexcept {
    const auto* first = reinterpret_cast<const std::byte*>(rows_.row(h, 0));
    const auto size = static_cast<index_t>(sizeof(T)), stride = (shape_.dk + shape_.dv) * size;
    const row_norms norms{.values = norms_.row(h, 0), .value_centres = centre(h)};
    const std::byte* value = first == nullptr ? nullptr : first + shape_.dk * size;  // no rows: none have been reserved
    return {first, value, norms, stride, stride, n_, shape_.dk, shape_.dv};
  }
  [[nodiscard]] status validate() const noexcept {
    constexpr index_t most = index_t{1} << 40;  // products of them and of 2^31 tokens are checked by reserve()
    const auto in_range = [](index_t x) { return x >= 1 && x <= most; };
    if (in_range(shape_.n_kv_heads) && in_range(shape_.dk) && in_range(shape_.dv)) return {};
    return status::error(errc::invalid_argument,
                         "the store has %lld KV heads of sizes %lld and %lld: give heads and sizes of at least 1",
                         static_cast<long long>(shape_.n_kv_heads), static_cast<long long>(shape_.dk),
                         static_cast<long long>(shape_.dv));
  }

  /// Room for n tokens.
  [[nodiscard]] status reserve(index_t n) noexcept {
    if (status s = validate(); !s) return s;
    if (n <= capacity_) return {};
    const index_t row = (shape_.dk + shape_.dv) * static_cast<index_t>(sizeof(T));
    if (status s = detail::check_capacity(n, shape_.n_kv_heads * row); !s) return s;
    if (!rows_.reserve(n, n_) || !norms_.reserve(n, n_)) return detail::no_room(n, shape_.n_kv_heads);
    capacity_ = n;
    return {};
  }

  /// Adds one token: k [n_kv_heads, dk], v [n_kv_heads, dv], dense.
  [[nodiscard]] status append(const T* k, const T* v) noexcept { return append(k, shape_.dk, v, shape_.dv); }
  /// The same with strides from head to head, in elements.
  [[nodiscard]] status append(const T* k, index_t k_stride, const T* v, index_t v_stride) noexcept {
    if (n_ == capacity_) {
      if (status s = reserve(detail::grown(capacity_)); !s) return s;
    }
    const kernel::floating_point_scope standard;
    for (index_t h = 0; h < shape_.n_kv_heads; ++h) {
      T* to = rows_.row(h, n_);
      std::memcpy(to, k + h * k_stride, static_cast<std::size_t>(shape_.dk) * sizeof(T));
      std::memcpy(to + shape_.dk, v + h * v_stride, static_cast<std::size_t>(shape_.dv) * sizeof(T));
      measure(h, n_);
    }
    ++n_;
    return {};
  }

  /// Replaces everything by the n tokens of a cache (a prefill's), batch `b`: any kv_cache of the same heads and sizes,
  /// but for a view of this store.
  template <kv_cache KV>
  [[nodiscard]] status assign(const KV& cache, index_t b = 0) noexcept {
    if (status s = validate(); !s) return s;
    if (status s = detail::check_copy(cache, b, shape_.n_kv_heads, shape_.dk, shape_.dv); !s) return s;
    const index_t n = cache.head(b, 0).size();
    if (status s = reserve(n); !s) return s;
    const kernel::floating_point_scope standard;
    for (index_t h = 0; h < shape_.n_kv_heads; ++h) {
      const auto from = cache.head(b, h);
      for (index_t i = 0; i < n; ++i) {
        T* to = rows_.row(h, i);
        detail::copy_row(from.key(i), to, shape_.dk, scratch_);
        detail::copy_row(from.value(i), to + shape_.dk, shape_.dv, scratch_);
      }
      take_mean(h, std::min<index_t>(n, 4096));
      for (index_t i = 0; i < n; ++i) measure(h, i);
    }
    n_ = n;
    return {};
  }

  /// Forgets the tokens from n on; the capacity stays.
  void truncate(index_t n) noexcept { n_ = std::clamp<index_t>(n, 0, n_); }
  void clear() noexcept { n_ = 0; }

 private:
  [[nodiscard]] const float* centre(index_t h) const noexcept { return centres_.data() + h * shape_.dv; }
  [[nodiscard]] std::span<const T> value(index_t h, index_t i) const noexcept {
    return {rows_.row(h, i) + shape_.dk, static_cast<std::size_t>(shape_.dv)};
  }
  void measure(index_t h, index_t i) noexcept { *norms_.row(h, i) = kernel::distance_of(value(h, i), centre(h)); }
  void take_mean(index_t h, index_t n) noexcept {
    using kernel::axpy;
    float* mean = centres_.data() + h * shape_.dv;
    std::fill_n(mean, shape_.dv, 0.0f);
    for (index_t i = 0; i < n; ++i) axpy(1 / static_cast<float>(n), value(h, i), mean);
    // One value that is not finite spoils its own norm alone.
    for (index_t j = 0; j < shape_.dv; ++j) mean[j] = std::isfinite(mean[j]) ? mean[j] : 0;
  }

  interleaved_shape shape_{};
  index_t n_ = 0, capacity_ = 0;
  detail::owned_rows<T> rows_;       // [n_kv_heads, capacity, dk + dv]
  detail::owned_rows<float> norms_;  // [n_kv_heads, capacity]
  std::vector<float> centres_;       // [n_kv_heads, dv]
  std::vector<float> scratch_;
};

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
