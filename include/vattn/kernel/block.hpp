// Attention of a few queries to a block of rows: the loops that read K and V, for every instruction set.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>

#include "vattn/kernel/block_avx512.hpp"
#include "vattn/kernel/block_digits.hpp"
#include "vattn/kernel/block_rows.hpp"
#include "vattn/kernel/block_vectors.hpp"

namespace vattn::VATTN_ABI::kernel {

/// Queries of a group, as the kernels for rows of T read them. Made by `prepare_queries`.
struct block_queries {
  isa how = isa::portable;
  index_t groups = 0, dim = 0;
  const float* values = nullptr;          ///< [groups, dim], scaled; with AVX-512 [groups, padded(dim)]
  const std::uint16_t* halves = nullptr;  ///< bfloat16, [groups, padded(dim)], unscaled; where they are exact
  float scale = 1;                        ///< of `halves`
#if VATTN_DISPATCH
  const detail::query_digits* digits = nullptr;  ///< [groups, dim/32], for rows of q8_0; where q is finite
#endif
};

/// Floats of storage that `prepare_queries` needs.
[[nodiscard]] constexpr std::size_t query_storage(index_t groups, index_t dim) noexcept {
  const index_t padded = (dim + 31) / 32 * 32;
  return static_cast<std::size_t>(groups * (padded + padded / 2));
}

/// q [groups, dim]: queries times `scale`. Of a query that was bfloat16 before it was scaled, its products with
/// rows of bfloat16 are exact in half the instructions; it is recognised by what is left when the scale is taken
/// off again. Other queries keep their float. `q` and `storage` must outlive the result.
template <block_element T>
requires(!std::same_as<T, q4_0_block>)
[[nodiscard]] inline block_queries prepare_queries(isa how, const float* q, index_t groups, index_t dim, float scale,
                                                   std::span<float> storage) noexcept {
  block_queries out{.how = how, .groups = groups, .dim = dim, .values = q};
#if VATTN_DISPATCH
  if (how < isa::avx512) return out;
  const index_t width = detail::padded(dim);
  out.values = storage.data();
  if constexpr (std::same_as<T, q8_0_block>) {
    static_assert(sizeof(detail::query_digits) <= sizeof(float) * query_storage(1, 32));
    auto* digits = reinterpret_cast<detail::query_digits*>(storage.data());
    if (how >= isa::avx512_bf16 && scale != 0 && dim <= detail::widest_digits &&
        detail::split_query(q, groups * dim, scale, digits)) {
      out.digits = digits;
      return out;
    }
  }
  if constexpr (std::same_as<T, Eigen::bfloat16>) {
    if (how >= isa::avx512_bf16 && scale != 0) {
      auto* halves = reinterpret_cast<std::uint16_t*>(storage.data() + groups * width);
      std::uint32_t inexact = 0;
      for (index_t g = 0; g < groups; ++g) {
        for (index_t d = 0; d < dim; ++d) {
          const float x = q[g * dim + d] / scale;
          const auto bits = std::bit_cast<std::uint32_t>(x);
          const std::uint32_t rounded = (bits + 0x8000u) & 0xffff0000u;
          const float left = x - std::bit_cast<float>(rounded);  // NaN where q is not finite
          inexact |= !(std::abs(left) <= 0x1p-22f * std::abs(x));
          halves[g * width + d] = static_cast<std::uint16_t>(rounded >> 16);
        }
        for (index_t d = dim; d < width; ++d) halves[g * width + d] = 0;
      }
      if (inexact == 0) out.halves = halves, out.scale = scale;
    }
  }
  float* values = storage.data();
  for (index_t g = 0; g < groups; ++g, values += width) {
    std::fill_n(values, width, 0.0f);
    for (index_t d = 0; d < dim; ++d) {
      const index_t in_step = d % detail::step;
      values[detail::evens_first<T> ? d - in_step + in_step / 2 + in_step % 2 * 16 : d] = q[g * dim + d];
    }
  }
#else
  static_cast<void>(scale), static_cast<void>(storage);
#endif
  return out;
}

/// out[g, i] = q_g·k_i, out [groups, block_rows]; places from `rows.count` on may be overwritten.
template <block_element T>
requires(!std::same_as<T, q4_0_block>)
inline void block_logits(const block_queries& q, const block_of_rows& rows, float* out) noexcept {
#if VATTN_DISPATCH
  if constexpr (std::same_as<T, q8_0_block>) {
    if (q.digits) return detail::logits_digits(q.digits, q.groups, q.dim, rows, out);
  }
  if (q.halves) return detail::logits_bf16(q.halves, q.scale, q.groups, q.dim, rows, out);
  if (q.how >= isa::avx512) return detail::logits_avx512<T>(q.values, q.groups, q.dim, rows, out);
  if (q.how == isa::avx2) return detail::logits_avx2<T>(q.values, q.groups, q.dim, rows, out);
#endif
#if defined(__GNUC__)
  detail::vector_kernels<4, 8, T>::logits(q.values, q.groups, q.dim, rows, out);
#else
  for (index_t i = 0; i < rows.count; ++i) {
    const std::byte* row = detail::row_at(rows, i);
    for (index_t g = 0; g < q.groups; ++g) {
      float sum = 0;
      for (index_t d = 0; d < q.dim; ++d) sum += q.values[g * q.dim + d] * detail::element_at<T>(row, d);
      out[g * block_rows + i] = sum;
    }
  }
#endif
}

/// acc[g] += Σ_i x[g, i]·v_i: x [groups, block_rows] weights, rows of dim elements of T, acc [groups, dim].
template <block_element T>
requires(!std::same_as<T, q4_0_block>)
inline void block_add(isa how, const float* x, index_t groups, const block_of_rows& rows, index_t dim,
                      float* acc) noexcept {
#if VATTN_DISPATCH
  if (how >= isa::avx512) return detail::add_avx512<T>(x, groups, rows, dim, acc);
  if (how == isa::avx2) return detail::add_avx2<T>(x, groups, rows, dim, acc);
#endif
  static_cast<void>(how);
#if defined(__GNUC__)
  detail::vector_kernels<4, 8, T>::add(x, groups, rows, dim, acc);
#else
  for (index_t i = 0; i < rows.count; ++i) {
    const std::byte* row = detail::row_at(rows, i);
    for (index_t g = 0; g < groups; ++g) {
      for (index_t d = 0; d < dim; ++d) acc[g * dim + d] += x[g * block_rows + i] * detail::element_at<T>(row, d);
    }
  }
#endif
}

// Rows of q4_0 are those of q8_0 once they are widened; of ones that are too wide for that, queries stay as they are.
template <std::same_as<q4_0_block> T>
[[nodiscard]] inline block_queries prepare_queries(isa how, const float* q, index_t groups, index_t dim, float scale,
                                                   std::span<float> storage) noexcept {
  if (dim <= detail::widest_widened) return prepare_queries<q8_0_block>(how, q, groups, dim, scale, storage);
  return {.how = how, .groups = groups, .dim = dim, .values = q};
}
template <std::same_as<q4_0_block> T>
inline void block_logits(const block_queries& q, const block_of_rows& rows, float* out) noexcept {
  if (q.dim <= detail::widest_widened) {
    return detail::for_widened(
        rows, q.dim, [&](index_t first, const block_of_rows& wide) { block_logits<q8_0_block>(q, wide, out + first); });
  }
  detail::for_decoded(rows, q.dim, [&](index_t i, const block_row<T>& row) {
    for (index_t g = 0; g < q.groups; ++g) out[g * block_rows + i] = dot(q.values + g * q.dim, row);
  });
}
template <std::same_as<q4_0_block> T>
inline void block_add(isa how, const float* x, index_t groups, const block_of_rows& rows, index_t dim,
                      float* acc) noexcept {
  if (dim <= detail::widest_widened) {
    return detail::for_widened(rows, dim, [&](index_t first, const block_of_rows& wide) {
      block_add<q8_0_block>(how, x + first, groups, wide, dim, acc);
    });
  }
  detail::for_decoded(rows, dim, [&](index_t i, const block_row<T>& row) {
    for (index_t g = 0; g < groups; ++g) axpy(x[g * block_rows + i], row, acc + g * dim);
  });
}

/// x[i] = exp(x[i] − top) for i < n, and their sum; relative error below 5e-7, 0 below e^−87. x [block_rows], top no
/// less than any x. What lies behind n may be overwritten.
[[nodiscard]] inline float block_exponentials(isa how, float* x, index_t n, float top) noexcept {
#if VATTN_DISPATCH
  if (how >= isa::avx512) return detail::exponentials_avx512(x, n, top);
  if (how == isa::avx2) return detail::exponentials_avx2(x, n, top);
#endif
  static_cast<void>(how);
#if defined(__GNUC__)
  return detail::exponentials<4>(x, n, top);
#else
  float sum = 0;
  for (index_t i = 0; i < n; ++i) sum += x[i] = std::exp(x[i] - top);
  return sum;
#endif
}

/// The same of any number of rows: x has room for n rounded up to 16, of which what lies behind n may be overwritten.
inline void exponentials(isa how, float* x, index_t n, float top) noexcept {
  for (index_t from = 0; from < n; from += block_rows)
    static_cast<void>(block_exponentials(how, x + from, std::min(block_rows, n - from), top));
}

/// The largest of x [n], n in [1, block_rows]; false, and any `top`, if one of them is not finite.
[[nodiscard]] inline bool block_maximum(isa how, const float* x, index_t n, float& top) noexcept {
#if VATTN_DISPATCH
  if (how >= isa::avx512) return detail::maximum_avx512(x, n, top);
  if (how == isa::avx2) return detail::maximum_avx2(x, n, top);
#endif
  static_cast<void>(how);
#if defined(__GNUC__)
  return detail::maximum<4>(x, n, top);
#else
  const Eigen::Map<const Eigen::ArrayXf> all(x, static_cast<Eigen::Index>(n));
  top = all.maxCoeff();
  return all.allFinite();
#endif
}

}  // namespace vattn::VATTN_ABI::kernel

#include "vattn/macros_pop.hpp"
