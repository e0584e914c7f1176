// What the library asks of a key/value cache, and the strided view that most engines' caches are.
#include "vattn/macros_push.hpp"
#pragma once

#include <concepts>
#include <span>
#include <type_traits>

#include "vattn/base/config.hpp"
#include "vattn/base/status.hpp"
#include "vattn/base/tensor.hpp"
#include "vattn/kernel/block_rows.hpp"
#include "vattn/kernel/row.hpp"

namespace vattn::VATTN_ABI {

/// One KV head of one sequence: n keys of dk elements and n values of dv elements.
/// `key(i)` and `value(i)` return rows (see kernel/row.hpp); paged, quantised and transposed caches
/// model this concept with rows of their own.
template <class H>
concept kv_head = requires(const H& head, index_t token) {
  { head.size() } -> std::convertible_to<index_t>;
  { head.dk() } -> std::convertible_to<index_t>;
  { head.dv() } -> std::convertible_to<index_t>;
  { head.key(token) } -> kernel::row;
  { head.value(token) } -> kernel::row;
};

/// A KV head whose rows lie at equal distances and are of types that block kernels read (kernel/block.hpp): attention
/// then reads them by blocks, for all queries of a group at once, instead of through `key` and `value`.
template <class H>
concept strided_head = kv_head<H> && requires(const H& head) {
  requires std::is_trivially_copyable_v<H>;
  requires kernel::block_element<typename H::key_element>;
  requires kernel::block_element<typename H::value_element>;
  { head.key_rows() } -> std::same_as<kernel::strided_rows>;
  { head.value_rows() } -> std::same_as<kernel::strided_rows>;
};

/// A KV head that stores one float a token, ‖v − centre‖ (`value_centre()`, [dv], null = the origin). With
/// it a ranking sees tokens whose value, not whose logit, is large; without, the functor reads all values.
template <class H>
concept kv_head_with_value_norms = kv_head<H> && requires(const H& head, index_t token) {
  { head.has_value_norms() } -> std::convertible_to<bool>;
  { head.value_norm(token) } -> std::convertible_to<float>;
  { head.value_centre() } -> std::convertible_to<const float*>;
};

/// A KV head that stores ‖k‖ of each key: |scale·q·k| <= scale·‖q‖‖k‖ is a hard bound that reads no key.
template <class H>
concept kv_head_with_key_norms = kv_head<H> && requires(const H& head, index_t token) {
  { head.has_key_norms() } -> std::convertible_to<bool>;
  { head.key_norm(token) } -> std::convertible_to<float>;
};

/// A KV head whose rows are in the order of their tokens, as all are but those that say `shuffled` (a
/// shuffled_store's): rows can then be told from tokens by causality, windows, masks and positions.
template <class H>
concept rows_in_order = kv_head<H> && !requires { requires H::shuffled; };

/// A cache: batch x KV heads. Sequences of a batch may differ in length (`head(b, h).size()`).
template <class C>
concept kv_cache = requires(const C& cache, index_t batch, index_t h) {
  { cache.n_batch() } -> std::convertible_to<index_t>;
  { cache.n_kv_heads() } -> std::convertible_to<index_t>;
  { cache.dk() } -> std::convertible_to<index_t>;
  { cache.dv() } -> std::convertible_to<index_t>;
  { cache.head(batch, h) } -> kv_head;
  { cache.validate() } -> std::same_as<status>;
};

/// BYTES from one token, KV head or sequence to the next; 0 repeats.
struct kv_strides {
  index_t token = 0;
  index_t head = 0;
  index_t batch = 0;
};

struct kv_shape {
  index_t n_batch = 1;
  index_t n_kv_heads = 1;
  index_t n_tokens = 0;
  index_t dk = 0;  ///< elements of a key
  index_t dv = 0;  ///< elements of a value (differs from dk for MLA)
};

/// Optional numbers about the rows of a cache, kept by whoever appends them. Null = not kept.
struct row_norms {
  const float* keys = nullptr;           ///< ‖k‖, [n_batch, n_kv_heads, n_tokens]
  const float* values = nullptr;         ///< ‖v − centre‖, [n_batch, n_kv_heads, n_tokens]
  const float* value_centres = nullptr;  ///< [n_batch, n_kv_heads, dv]; null = the origin
  /// Floats of `keys` and `values` from one KV head to the next, where a growing cache keeps room behind its tokens;
  /// 0 = n_tokens.
  index_t per_head = 0;
};

namespace detail {
/// `room`: floats from one KV head to the next, 0 = dense; `tokens`: those that a head needs, of `heads` in all.
[[nodiscard]] inline status check_norms(const row_norms& norms, index_t room, index_t tokens, index_t heads) noexcept {
  if (room != 0 && room < tokens) {
    return status::error(errc::invalid_argument, "norms have room for %lld cells a head, but there are %lld",
                         static_cast<long long>(room), static_cast<long long>(tokens));
  }
  const bool kept = room != 0 || norms.keys || norms.values;
  if (kept && saturated_product(heads, std::max(room, tokens)) >= widest_buffer / 4) {
    return status::error(errc::invalid_argument,
                         "norms of %lld heads with room for %lld cells each reach over more than 2^60 bytes",
                         static_cast<long long>(heads), static_cast<long long>(std::max(room, tokens)));
  }
  if (status s = check_aligned("norms.keys", norms.keys, alignof(float)); !s) return s;
  if (status s = check_aligned("norms.values", norms.values, alignof(float)); !s) return s;
  return check_aligned("norms.value_centres", norms.value_centres, alignof(float));
}
}  // namespace detail

/// One head of a `kv_view`. DK and DV are compile-time head sizes, or `dynamic`.
template <kernel::element TK, kernel::element TV, index_t DK, index_t DV>
class kv_head_view {
 public:
  using key_element = TK;
  using value_element = TV;
  using key_row = std::span<const TK, DK == dynamic ? std::dynamic_extent : static_cast<std::size_t>(DK)>;
  using value_row = std::span<const TV, DV == dynamic ? std::dynamic_extent : static_cast<std::size_t>(DV)>;

  kv_head_view(const std::byte* k, const std::byte* v, const row_norms& norms, index_t k_token_stride,
               index_t v_token_stride, index_t n, index_t dk, index_t dv) noexcept
      : k_(k), v_(v), norms_(norms), k_stride_(k_token_stride), v_stride_(v_token_stride), n_(n), dk_(dk), dv_(dv) {}

  [[nodiscard]] index_t size() const noexcept { return n_; }
  [[nodiscard]] index_t dk() const noexcept { return DK == dynamic ? dk_ : DK; }
  [[nodiscard]] index_t dv() const noexcept { return DV == dynamic ? dv_ : DV; }
  [[nodiscard]] key_row key(index_t token) const noexcept {
    return key_row(reinterpret_cast<const TK*>(k_ + token * k_stride_), static_cast<std::size_t>(dk()));
  }
  [[nodiscard]] value_row value(index_t token) const noexcept {
    return value_row(reinterpret_cast<const TV*>(v_ + token * v_stride_), static_cast<std::size_t>(dv()));
  }
  [[nodiscard]] kernel::strided_rows key_rows() const noexcept { return {k_, k_stride_}; }
  [[nodiscard]] kernel::strided_rows value_rows() const noexcept { return {v_, v_stride_}; }
  [[nodiscard]] bool has_key_norms() const noexcept { return norms_.keys != nullptr; }
  [[nodiscard]] float key_norm(index_t token) const noexcept { return norms_.keys[token]; }
  [[nodiscard]] bool has_value_norms() const noexcept { return norms_.values != nullptr; }
  [[nodiscard]] float value_norm(index_t token) const noexcept { return norms_.values[token]; }
  [[nodiscard]] const float* value_centre() const noexcept { return norms_.value_centres; }

 private:
  const std::byte* k_;
  const std::byte* v_;
  row_norms norms_;
  index_t k_stride_, v_stride_, n_, dk_, dv_;
};

/// Non-owning view of K and V with byte strides of their own. Allocates nothing; the buffers must
/// outlive it. Not for caches whose element stride is not constant (x-packed, transposed V).
template <kernel::element TK, kernel::element TV = TK, index_t DK = dynamic, index_t DV = DK>
class kv_view {
 public:
  using key_type = TK;
  using value_type = TV;

  kv_view() = default;
  kv_view(const TK* k, const kv_strides& k_strides, const TV* v, const kv_strides& v_strides,
          const kv_shape& shape) noexcept
      : k_(k), v_(v), k_strides_(k_strides), v_strides_(v_strides), shape_(shape) {}

  [[nodiscard]] index_t n_batch() const noexcept { return shape_.n_batch; }
  [[nodiscard]] index_t n_kv_heads() const noexcept { return shape_.n_kv_heads; }
  [[nodiscard]] index_t dk() const noexcept { return DK == dynamic ? shape_.dk : DK; }
  [[nodiscard]] index_t dv() const noexcept { return DV == dynamic ? shape_.dv : DV; }

  /// The same cache with numbers about its rows, so that selectors need not read the rows for them. A value
  /// centre is any fixed vector near the values (the mean of the first few hundred): a good one saves rows,
  /// none costs the promise.
  [[nodiscard]] kv_view with_norms(const row_norms& norms) const noexcept {
    kv_view copy = *this;
    copy.norms_ = norms;
    return copy;
  }

  [[nodiscard]] kv_head_view<TK, TV, DK, DV> head(index_t batch, index_t h) const noexcept {
    const index_t which = batch * shape_.n_kv_heads + h;
    const auto at = [which](const float* first, index_t width) { return first ? first + which * width : nullptr; };
    const index_t per_head = norms_.per_head > 0 ? norms_.per_head : shape_.n_tokens;
    const auto first = [&](const void* rows, const kv_strides& strides) {  // of an empty cache they may be null
      const auto* bytes = static_cast<const std::byte*>(rows);
      return bytes ? bytes + batch * strides.batch + h * strides.head : nullptr;
    };
    return {first(k_, k_strides_),
            first(v_, v_strides_),
            row_norms{at(norms_.keys, per_head), at(norms_.values, per_head), at(norms_.value_centres, shape_.dv)},
            k_strides_.token,
            v_strides_.token,
            shape_.n_tokens,
            shape_.dk,
            shape_.dv};
  }

  /// Catches what cannot be meant: null or misaligned buffers, sizes that contradict DK or DV, strides in elements. A
  /// stride of 0 repeats its axis: heads that were expanded, a prefix that a batch shares.
  [[nodiscard]] status validate() const noexcept {
    const kv_shape& s = shape_;
    if (s.n_batch < 0 || s.n_kv_heads < 1 || s.n_tokens < 0 || s.dk < 1 || s.dv < 1) {
      return status::error(errc::invalid_argument,
                           "KV shape is n_batch %lld, n_kv_heads %lld, n_tokens %lld, dk %lld, dv %lld: n_batch and "
                           "n_tokens may be 0, the others must be at least 1",
                           ll(s.n_batch), ll(s.n_kv_heads), ll(s.n_tokens), ll(s.dk), ll(s.dv));
    }
    if ((DK != dynamic && DK != s.dk) || (DV != dynamic && DV != s.dv)) {
      return status::error(errc::invalid_argument,
                           "the view is compiled for dk %lld, dv %lld but the cache has dk %lld, dv %lld: use "
                           "vattn::dynamic or the right sizes (are K and V swapped?)",
                           ll(DK), ll(DV), ll(s.dk), ll(s.dv));
    }
    if (s.n_batch == 0 || s.n_tokens == 0) return {};
    if (k_ == nullptr || v_ == nullptr) {
      return status::error(errc::invalid_argument, "%s is null but the cache has %lld tokens: pass its first row",
                           k_ == nullptr ? "K" : "V", ll(s.n_tokens));
    }
    if (status st =
            detail::check_norms(norms_, norms_.per_head, s.n_tokens, saturated_product(s.n_batch, s.n_kv_heads));
        !st)
      return st;
    if (status st = check_strides("K", k_, k_strides_, s.dk, sizeof(TK), alignof(TK)); !st) return st;
    return check_strides("V", v_, v_strides_, s.dv, sizeof(TV), alignof(TV));
  }

 private:
  static constexpr long long ll(index_t value) noexcept { return static_cast<long long>(value); }

  [[nodiscard]] status check_strides(const char* name, const void* first, const kv_strides& strides, index_t width,
                                     std::size_t element, std::size_t alignment) const noexcept {
    const index_t row_bytes = saturated_product(width, static_cast<index_t>(element));
    const auto check = [&](const char* axis, index_t stride, index_t extent) -> status {
      if (extent > 1 && stride != 0 && detail::magnitude(stride) < row_bytes) {
        return status::error(
            errc::invalid_argument,
            "the %s stride of %s is %lld bytes, less than one row of %lld bytes: strides are in bytes, "
            "not in elements",
            axis, name, ll(stride), ll(row_bytes));
      }
      if (extent > 1 && stride % static_cast<index_t>(alignment) != 0) {
        return status::error(errc::invalid_argument,
                             "the %s stride of %s is %lld bytes, no multiple of the element size %zu", axis, name,
                             ll(stride), alignment);
      }
      return {};
    };
    if (status st = check("token", strides.token, shape_.n_tokens); !st) return st;
    if (status st = check("head", strides.head, shape_.n_kv_heads); !st) return st;
    if (status st = check("batch", strides.batch, shape_.n_batch); !st) return st;
    return detail::check_elements<4>(name, first, {shape_.n_batch, shape_.n_kv_heads, shape_.n_tokens, width},
                                     {strides.batch, strides.head, strides.token, static_cast<index_t>(element)},
                                     alignment);
  }

  const TK* k_ = nullptr;
  const TV* v_ = nullptr;
  row_norms norms_{};
  kv_strides k_strides_{}, v_strides_{};
  kv_shape shape_{};
};

/// K [n_batch, n_kv_heads, n_tokens, dk] and V [n_batch, n_kv_heads, n_tokens, dv], dense ("HF cache").
template <index_t DK = dynamic, index_t DV = DK, kernel::element TK, kernel::element TV>
[[nodiscard]] kv_view<TK, TV, DK, DV> contiguous_kv(const TK* k, const TV* v, const kv_shape& shape) noexcept {
  const auto strides = [&](index_t width) {
    const index_t head = saturated_product(width, shape.n_tokens);
    return kv_strides{.token = width, .head = head, .batch = saturated_product(head, shape.n_kv_heads)};
  };
  return {k, strides(saturated_product(shape.dk, sizeof(TK))), v, strides(saturated_product(shape.dv, sizeof(TV))),
          shape};
}

/// K [n_batch, n_tokens, n_kv_heads, dk] and V [n_batch, n_tokens, n_kv_heads, dv], dense (tokens outermost).
template <index_t DK = dynamic, index_t DV = DK, kernel::element TK, kernel::element TV>
[[nodiscard]] kv_view<TK, TV, DK, DV> token_major_kv(const TK* k, const TV* v, const kv_shape& shape) noexcept {
  const auto strides = [&](index_t width) {
    const index_t token = saturated_product(width, shape.n_kv_heads);
    return kv_strides{.token = token, .head = width, .batch = saturated_product(token, shape.n_tokens)};
  };
  return {k, strides(saturated_product(shape.dk, sizeof(TK))), v, strides(saturated_product(shape.dv, sizeof(TV))),
          shape};
}

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
