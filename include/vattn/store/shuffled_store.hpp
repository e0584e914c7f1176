// An owning KV cache whose past lies in random order, with key codes beside it: what fast verified decode reads.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <span>
#include <vector>

#include "vattn/base/floating_point.hpp"
#include "vattn/base/philox.hpp"
#include "vattn/kernel/units.hpp"
#include "vattn/sketch/block_codes.hpp"
#include "vattn/store/owned_rows.hpp"

namespace vattn::VATTN_ABI {

struct store_shape {
  index_t n_kv_heads = 1;
  index_t dk = 0, dv = 0;
  index_t sinks = 16;      ///< first tokens, always read
  index_t window = 16;     ///< last tokens, always read
  std::uint64_t seed = 0;  ///< of the order and of the codes' rotations
};

/// One head of a store. Rows are in the store's order: [0, sinks) as they came, then the past at random, then the
/// window as it came; `position(row)` says where a row stood.
template <kernel::element T>
class store_head {
 public:
  using key_row = std::span<const T>;
  using value_row = std::span<const T>;
  using key_element = T;
  using value_element = T;
  static constexpr bool shuffled = true;  ///< see rows_in_order

  store_head(const T* k, const T* v, index_t n, index_t dk, index_t dv, index_t sinks, index_t past,
             const sketch::block_codes* codes, const float* centre) noexcept
      : k_(k), v_(v), n_(n), dk_(dk), dv_(dv), sinks_(sinks), past_(past), codes_(codes), centre_(centre) {}

  [[nodiscard]] index_t size() const noexcept { return n_; }
  [[nodiscard]] index_t dk() const noexcept { return dk_; }
  [[nodiscard]] index_t dv() const noexcept { return dv_; }
  [[nodiscard]] key_row key(index_t row) const noexcept { return {k_ + row * dk_, static_cast<std::size_t>(dk_)}; }
  [[nodiscard]] value_row value(index_t row) const noexcept { return {v_ + row * dv_, static_cast<std::size_t>(dv_)}; }

  [[nodiscard]] kernel::strided_rows key_rows() const noexcept {
    return {reinterpret_cast<const std::byte*>(k_), dk_ * static_cast<index_t>(sizeof(T))};
  }
  [[nodiscard]] kernel::strided_rows value_rows() const noexcept {
    return {reinterpret_cast<const std::byte*>(v_), dv_ * static_cast<index_t>(sizeof(T))};
  }

  /// Rows [sinks(), sinks() + past()) are the past, a uniformly random order of it.
  [[nodiscard]] index_t sinks() const noexcept { return sinks_; }
  [[nodiscard]] index_t past() const noexcept { return past_; }
  [[nodiscard]] const sketch::block_codes& codes() const noexcept { return *codes_; }
  [[nodiscard]] const float* value_centre() const noexcept { return centre_; }  ///< [dv]

 private:
  const T *k_, *v_;
  index_t n_, dk_, dv_, sinks_, past_;
  const sketch::block_codes* codes_;
  const float* centre_;
};

/// KV cache of one sequence in one layer. Tokens that leave the recent window are put in random order (Fisher–Yates
/// from the inside out), so that any run of consecutive rows of the past is a uniform sample without replacement, read
/// at the speed of a copy; each has a code of 1 to 3 bits a coordinate from which its logits are estimated
/// (sketch/block_codes.hpp). A kv_cache of batch 1: a decode query sees all rows, and attention does not depend on
/// their order. For calls that do (causal queries before the last, masks, ALiBi) use a view instead.
///
/// Memory: K and V, and 23 bytes a token and head for codes (31 at head size 64) and 4 bytes a token. `append` costs
/// the code of one key and two exchanged rows a head; it allocates when the capacity grows (reserve() to avoid that).
/// Errors are statuses; after one nothing has changed but what the message says. Not for concurrent appends; reading
/// from many threads is fine. The order is a function of the seed and of the positions: truncating and appending again
/// restores it.
template <kernel::element T>
class shuffled_store {
 public:
  using key_type = T;
  using value_type = T;

  shuffled_store() = default;
  explicit shuffled_store(const store_shape& shape) : shape_(shape) {
    if (!valid_shape()) return;
    k_ = {shape.n_kv_heads, shape.dk};
    v_ = {shape.n_kv_heads, shape.dv};
    for (index_t h = 0; h < shape.n_kv_heads; ++h)
      codes_.emplace_back(shape.dk, shape.seed + static_cast<std::uint64_t>(h));
    centres_.resize(static_cast<std::size_t>(shape.n_kv_heads * shape.dv));
    scratch_.resize(static_cast<std::size_t>(std::max(shape.dk, shape.dv)));
    mean_.resize(static_cast<std::size_t>(shape.dk));
  }

  [[nodiscard]] const store_shape& shape() const noexcept { return shape_; }
  [[nodiscard]] index_t size() const noexcept { return n_; }
  [[nodiscard]] index_t n_batch() const noexcept { return 1; }
  [[nodiscard]] index_t n_kv_heads() const noexcept { return shape_.n_kv_heads; }
  [[nodiscard]] index_t dk() const noexcept { return shape_.dk; }
  [[nodiscard]] index_t dv() const noexcept { return shape_.dv; }
  [[nodiscard]] store_head<T> head(index_t, index_t h) const noexcept {
    const auto i = static_cast<std::size_t>(h);
    return {keys(h),   values(h),  n_,
            shape_.dk, shape_.dv,  std::min(shape_.sinks, n_),
            past_,     &codes_[i], centres_.data() + h * shape_.dv};
  }
  [[nodiscard]] status validate() const noexcept {
    if (!valid_shape() || codes_.empty()) {
      return status::error(errc::invalid_argument,
                           "the store has %lld KV heads of sizes %lld and %lld, %lld sinks and a window of %lld: "
                           "give heads and sizes of at least 1, sinks and window of at least 0",
                           static_cast<long long>(shape_.n_kv_heads), static_cast<long long>(shape_.dk),
                           static_cast<long long>(shape_.dv), static_cast<long long>(shape_.sinks),
                           static_cast<long long>(shape_.window));
    }
    return {};
  }

  /// Position in the sequence of a row.
  [[nodiscard]] index_t position(index_t row) const noexcept {
    const bool in_past = row >= shape_.sinks && row < shape_.sinks + past_;
    return in_past ? index_t{positions_[static_cast<std::size_t>(row - shape_.sinks)]} : row;
  }

  /// Bytes of K and V, and of everything that is kept about them.
  [[nodiscard]] std::size_t row_bytes() const noexcept {
    return static_cast<std::size_t>(n_ * shape_.n_kv_heads * (shape_.dk + shape_.dv)) * sizeof(T);
  }
  [[nodiscard]] std::size_t sketch_bytes() const noexcept {
    std::size_t bytes = positions_.size() * sizeof(ordinal) + centres_.size() * sizeof(float);
    for (const auto& c : codes_) bytes += c.bytes();
    return bytes;
  }

  /// Room for n tokens.
  [[nodiscard]] status reserve(index_t n) noexcept {
    if (status s = validate(); !s) return s;
    if (n <= capacity_) return {};
    const index_t wider = std::max(shape_.dk, shape_.dv) * static_cast<index_t>(sizeof(T));
    if (status s = detail::check_capacity(n, shape_.n_kv_heads * wider); !s) return s;
    bool ok = reserve_positions(n) && k_.reserve(n, n_) && v_.reserve(n, n_);
    for (auto& c : codes_) ok = ok && c.reserve(n);
    if (!ok) return detail::no_room(n, shape_.n_kv_heads);
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
    for (index_t h = 0; h < shape_.n_kv_heads; ++h) {
      std::memcpy(keys(h) + n_ * shape_.dk, k + h * k_stride, static_cast<std::size_t>(shape_.dk) * sizeof(T));
      std::memcpy(values(h) + n_ * shape_.dv, v + h * v_stride, static_cast<std::size_t>(shape_.dv) * sizeof(T));
    }
    ++n_;
    if (n_ - shape_.sinks - past_ <= shape_.window) return {};
    const kernel::floating_point_scope standard;
    return leave_window();
  }

  /// Replaces everything by the n tokens of a cache (a prefill's), batch `b`: K and V are copied into random order,
  /// means are taken over all of them. Any kv_cache of the same heads and sizes.
  template <kv_cache KV>
  [[nodiscard]] status assign(const KV& cache, index_t b = 0) noexcept {
    if (status s = detail::check_copy(cache, b, shape_.n_kv_heads, shape_.dk, shape_.dv); !s) return s;
    const kernel::floating_point_scope standard;
    clear();
    const index_t n = cache.head(b, 0).size();
    if (status s = reserve(n + n / 8 + 1024); !s) return s;
    past_ = std::max<index_t>(0, n - shape_.sinks - shape_.window);
    n_ = n;
    positions_.resize(static_cast<std::size_t>(past_));
    for (index_t i = 0; i < past_; ++i) {
      const auto j = static_cast<std::size_t>(place(i));
      positions_[static_cast<std::size_t>(i)] = positions_[j];
      positions_[j] = static_cast<ordinal>(i + shape_.sinks);
    }
    for (index_t h = 0; h < shape_.n_kv_heads; ++h) {
      const auto head = cache.head(b, h);
      for (index_t row = 0; row < n; ++row) {
        detail::copy_row(head.key(position(row)), k_.row(h, row), shape_.dk, scratch_);
        detail::copy_row(head.value(position(row)), v_.row(h, row), shape_.dv, scratch_);
      }
      if (status s = encode(h); !s) return s;
    }
    return {};
  }

  /// Forgets the tokens from position n on; what remains is as if they had never come.
  void truncate(index_t n) noexcept {
    n = std::clamp<index_t>(n, 0, n_);
    const index_t keep = std::min(past_, std::max<index_t>(0, n - shape_.sinks - shape_.window));
    while (past_ > keep) {  // Fisher–Yates backwards: what came last goes back to the end
      --past_;
      exchange(place(past_), past_);
      positions_.pop_back();
      for (auto& c : codes_) c.pop();
    }
    n_ = n;
  }
  void clear() noexcept { truncate(0); }

  /// Takes means anew and codes everything again: O(n), for the end of a prefill that came by `append`.
  [[nodiscard]] status recode() noexcept {
    const kernel::floating_point_scope standard;
    for (index_t h = 0; h < shape_.n_kv_heads; ++h) {
      if (status s = encode(h); !s) return s;
    }
    return {};
  }

 private:
  [[nodiscard]] bool valid_shape() const noexcept {
    return shape_.n_kv_heads >= 1 && shape_.dk >= 1 && shape_.dv >= 1 && shape_.sinks >= 0 && shape_.window >= 0;
  }
  [[nodiscard]] T* keys(index_t h) noexcept { return k_.row(h, 0); }
  [[nodiscard]] T* values(index_t h) noexcept { return v_.row(h, 0); }
  [[nodiscard]] const T* keys(index_t h) const noexcept { return k_.row(h, 0); }
  [[nodiscard]] const T* values(index_t h) const noexcept { return v_.row(h, 0); }

  // Where the i-th token of the past goes when it comes: uniform on [0, i].
  [[nodiscard]] index_t place(index_t i) const noexcept {
    random_stream random({.seed = shape_.seed, .layer = purpose, .step = static_cast<std::uint32_t>(i)}, 0);
    return random.below(static_cast<std::uint32_t>(i + 1));
  }

  void exchange(index_t a, index_t b) noexcept {
    if (a == b) return;
    std::swap(positions_[static_cast<std::size_t>(a)], positions_[static_cast<std::size_t>(b)]);
    for (index_t h = 0; h < shape_.n_kv_heads; ++h) {
      T* k = keys(h) + shape_.sinks * shape_.dk;
      T* v = values(h) + shape_.sinks * shape_.dv;
      std::swap_ranges(k + a * shape_.dk, k + (a + 1) * shape_.dk, k + b * shape_.dk);
      std::swap_ranges(v + a * shape_.dv, v + (a + 1) * shape_.dv, v + b * shape_.dv);
      codes_[static_cast<std::size_t>(h)].swap(a, b);
    }
  }

  [[nodiscard]] status leave_window() noexcept {
    const index_t row = past_;
    // Means from few tokens are poor: they are taken again whenever there are twice as many, while that is cheap.
    const bool recode_now = row >= 64 && row <= 1024 && (row & (row - 1)) == 0;
    for (index_t h = 0; h < shape_.n_kv_heads; ++h) {
      if (!code_row(h, row)) return no_memory();
    }
    ++past_;
    positions_.push_back(static_cast<ordinal>(row + shape_.sinks));
    exchange(place(row), row);
    return recode_now ? recode() : status{};
  }

  [[nodiscard]] bool code_row(index_t h, index_t row) noexcept {
    using kernel::load;
    const index_t at = row + shape_.sinks;
    load(std::span<const T>(keys(h) + at * shape_.dk, static_cast<std::size_t>(shape_.dk)), scratch_.data());
    const std::span<const T> value(values(h) + at * shape_.dv, static_cast<std::size_t>(shape_.dv));
    const float distance = kernel::distance_of(value, centres_.data() + h * shape_.dv);
    return codes_[static_cast<std::size_t>(h)].append(
        std::span<const float>(scratch_).first(static_cast<std::size_t>(shape_.dk)), distance);
  }

  // Means of keys and values over at most 4096 rows of the past, and the codes of all.
  [[nodiscard]] status encode(index_t h) noexcept {
    using kernel::axpy;
    const index_t rows = std::min<index_t>(past_, 4096);
    float* centre = centres_.data() + h * shape_.dv;
    std::fill(mean_.begin(), mean_.end(), 0.0f);
    std::fill_n(centre, shape_.dv, 0.0f);
    const auto key = [&](index_t i) {
      return std::span<const T>(keys(h) + (shape_.sinks + i) * shape_.dk, static_cast<std::size_t>(shape_.dk));
    };
    const auto value = [&](index_t i) {
      return std::span<const T>(values(h) + (shape_.sinks + i) * shape_.dv, static_cast<std::size_t>(shape_.dv));
    };
    for (index_t i = 0; i < rows; ++i) {
      axpy(1 / static_cast<float>(rows), key(i), mean_.data());
      axpy(1 / static_cast<float>(rows), value(i), centre);
    }
    double distance = 0;
    for (index_t i = 0; i < rows; ++i) distance += static_cast<double>(kernel::distance_of(value(i), centre));
    // A mean that is not finite would spoil every code; a key that is not finite spoils its own alone.
    for (float& x : mean_) x = std::isfinite(x) ? x : 0;
    for (index_t j = 0; j < shape_.dv; ++j) centre[j] = std::isfinite(centre[j]) ? centre[j] : 0;
    // Where all values are equal, any length of their size.
    const auto typical = static_cast<float>(distance / static_cast<double>(std::max<index_t>(1, rows)));
    float largest = 0;
    for (index_t j = 0; j < shape_.dv; ++j) largest = std::max(largest, std::abs(centre[j]));
    codes_[static_cast<std::size_t>(h)].recentre(mean_, typical > 0 ? typical : largest);
    for (index_t i = 0; i < past_; ++i) {
      if (!code_row(h, i)) return no_memory();
    }
    return {};
  }

  // The vectors of the past grow within this alone.
  [[nodiscard]] bool reserve_positions(index_t n) noexcept {
#if VATTN_HAS_EXCEPTIONS
    try {
      positions_.reserve(static_cast<std::size_t>(n));
    } catch (...) {
      return false;
    }
#else
    positions_.reserve(static_cast<std::size_t>(n));
#endif
    return true;
  }

  [[nodiscard]] static status no_memory() noexcept {
    return status::error(errc::out_of_memory,
                         "no memory for the codes of another token: the store is incomplete, "
                         "truncate() it by one token or clear() it");
  }

  static constexpr std::uint32_t purpose = 0x53485546;  // keeps the order's draws apart from any layer's

  store_shape shape_{};
  index_t n_ = 0, past_ = 0, capacity_ = 0;
  detail::owned_rows<T> k_, v_;             // [n_kv_heads, capacity, dk], [n_kv_heads, capacity, dv]
  std::vector<ordinal> positions_;          // [past]
  std::vector<sketch::block_codes> codes_;  // [n_kv_heads], of the past
  std::vector<float> centres_;              // [n_kv_heads, dv]
  std::vector<float> scratch_, mean_;
};

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
