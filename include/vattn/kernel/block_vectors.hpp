// Block kernels on the compiler's vectors: the portable ones, and AVX2's.
#include "vattn/macros_push.hpp"
#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#include "vattn/kernel/block_rows.hpp"

#if defined(__GNUC__)

// Loops are written once, on vectors of W floats, and inlined into one function for each instruction set, whose
// target attribute decides what the vectors become. GCC 12 unrolls these loops for counts that its callers do not pass,
// finds that such a count would overflow, and warns.
#if !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Waggressive-loop-optimizations"
#endif

namespace vattn::VATTN_ABI::kernel::detail {

template <int W>
struct lanes {
  typedef float floats __attribute__((vector_size(W * 4)));
  typedef std::int32_t ints __attribute__((vector_size(W * 4)));
  typedef std::uint32_t words __attribute__((vector_size(W * 4)));
  typedef std::uint16_t halves __attribute__((vector_size(W * 2)));
  typedef std::int8_t bytes __attribute__((vector_size(W)));
};

template <int W>
VATTN_ALWAYS_INLINE void load_floats(const float* from, typename lanes<W>::floats& to) noexcept {
  std::memcpy(&to, from, sizeof to);
}

// Elements d to d + W of a row. d is a multiple of W.
template <int W, block_element T>
VATTN_ALWAYS_INLINE void load_row(const std::byte* row, index_t d, typename lanes<W>::floats& to) noexcept {
  using words = typename lanes<W>::words;
  if constexpr (quantised_block<T>) {
    const T* block = reinterpret_cast<const T*>(row) + d / 32;
    typename lanes<W>::bytes quants;
    std::memcpy(&quants, block->quants + d % 32, sizeof quants);
    to = __builtin_convertvector(quants, typename lanes<W>::floats) * half_to_float(block->scale);
  } else if constexpr (std::same_as<T, float>) {
    std::memcpy(&to, row + d * 4, sizeof to);
  } else if constexpr (std::same_as<T, Eigen::bfloat16>) {
    typename lanes<W>::halves bits;
    std::memcpy(&bits, row + d * 2, sizeof bits);
    const words wide = __builtin_convertvector(bits, words) << 16;
    std::memcpy(&to, &wide, sizeof to);
  } else if constexpr (std::same_as<T, Eigen::half>) {  // as half_to_float
    typename lanes<W>::halves bits;
    std::memcpy(&bits, row + d * 2, sizeof bits);
    const words wide = __builtin_convertvector(bits, words);
    const words magnitude = (wide & 0x7fffu) << 13;
    typename lanes<W>::floats scaled;
    std::memcpy(&scaled, &magnitude, sizeof scaled);
    scaled *= 0x1p112f;
    words out;
    std::memcpy(&out, &scaled, sizeof out);
    const words special = (words)((wide & 0x7c00u) == 0x7c00u) & 0x7f800000u;
    out |= special | (wide & 0x8000u) << 16;
    std::memcpy(&to, &out, sizeof to);
  }
}

template <int W>
[[nodiscard]] VATTN_ALWAYS_INLINE float sum_of(const typename lanes<W>::floats& v) noexcept {
  if constexpr (W > 4) {
    typename lanes<W / 2>::floats half[2];
    std::memcpy(&half, &v, sizeof half);
    half[0] += half[1];
    return sum_of<W / 2>(half[0]);
  } else {
    return (v[0] + v[1]) + (v[2] + v[3]);
  }
}

// out[g·block_rows + i] = q_g·k_i for R rows and G queries: R·G sums in registers.
template <int W, int R, int G, block_element T>
VATTN_ALWAYS_INLINE void products(const float* q, index_t dim, const block_of_rows& rows, index_t first,
                                  float* out) noexcept {
  using floats = typename lanes<W>::floats;
  const std::byte* row[extent<R>];
  for (int r = 0; r < R; ++r) row[r] = row_at(rows, first + r);
  floats sum[extent<R>][extent<G>] = {};
  index_t d = 0;
  for (; d + W <= dim; d += W) {
    floats key[extent<R>];
    VATTN_UNROLL for (int r = 0; r < R; ++r) load_row<W, T>(row[r], d, key[r]);
    VATTN_UNROLL for (int g = 0; g < G; ++g) {
      floats query;
      load_floats<W>(q + g * dim + d, query);
      VATTN_UNROLL for (int r = 0; r < R; ++r) sum[r][g] += key[r] * query;
    }
  }
  VATTN_UNROLL for (int g = 0; g < G; ++g) {
    VATTN_UNROLL for (int r = 0; r < R; ++r) {
      float s = sum_of<W>(sum[r][g]);
      for (index_t t = d; t < dim; ++t) s += element_at<T>(row[r], t) * q[g * dim + t];
      out[g * block_rows + first + r] = s;
    }
  }
}

template <int W, int R, int G, block_element T>
VATTN_ALWAYS_INLINE void all_products(const float* q, index_t dim, const block_of_rows& rows, float* out) noexcept {
  const row_fetcher memory(rows, row_bytes<T>(dim));
  index_t i = 0;
  for (; i + R <= rows.count; i += R) {
    memory.whole<R>(i);
    products<W, R, G, T>(q, dim, rows, i, out);
  }
  for (; i < rows.count; ++i) products<W, 1, G, T>(q, dim, rows, i, out);
}

// acc[g·dim + d] += Σ_i x[g·block_rows + i]·v_i[d] for C vectors of d at a time: C·G sums in registers.
template <int W, int C, int G, block_element T>
VATTN_ALWAYS_INLINE void add_columns(const float* x, const block_of_rows& rows, index_t d, index_t dim,
                                     float* acc) noexcept {
  using floats = typename lanes<W>::floats;
  floats sum[extent<C>][extent<G>];
  VATTN_UNROLL for (int g = 0; g < G; ++g) {
    VATTN_UNROLL for (int c = 0; c < C; ++c) load_floats<W>(acc + g * dim + d + c * W, sum[c][g]);
  }
  const row_fetcher memory(rows, row_bytes<T>(dim));
  for (index_t i = 0; i < rows.count; ++i) {
    memory.columns(i, row_bytes<T>(d), row_bytes<T>(d + C * W) - row_bytes<T>(d));
    const std::byte* row = row_at(rows, i);
    floats value[extent<C>];
    VATTN_UNROLL for (int c = 0; c < C; ++c) load_row<W, T>(row, d + c * W, value[c]);
    VATTN_UNROLL for (int g = 0; g < G; ++g) {
      const float w = x[g * block_rows + i];
      VATTN_UNROLL for (int c = 0; c < C; ++c) sum[c][g] += value[c] * w;
    }
  }
  VATTN_UNROLL for (int g = 0; g < G; ++g) {
    VATTN_UNROLL for (int c = 0; c < C; ++c) std::memcpy(acc + g * dim + d + c * W, &sum[c][g], sizeof sum[c][g]);
  }
}

template <int W, int A, int G, block_element T>
VATTN_ALWAYS_INLINE void add_values(const float* x, const block_of_rows& rows, index_t dim, float* acc) noexcept {
  constexpr int C = A / G;
  index_t d = 0;
  for (; d + C * W <= dim; d += C * W) add_columns<W, C, G, T>(x, rows, d, dim, acc);
  for (; d + W <= dim; d += W) add_columns<W, 1, G, T>(x, rows, d, dim, acc);
  for (index_t i = 0; d < dim && i < rows.count; ++i) {
    const std::byte* row = row_at(rows, i);
    for (index_t t = d; t < dim; ++t) {
      for (int g = 0; g < G; ++g) acc[g * dim + t] += element_at<T>(row, t) * x[g * block_rows + i];
    }
  }
}

/// exp by 2^k·e^r, |r| <= ln2/2, a polynomial of degree 6: relative error below 5e-7. Below −87 it gives 0.
template <int W>
VATTN_ALWAYS_INLINE float exponentials(float* x, index_t n, float top) noexcept {
  using floats = typename lanes<W>::floats;
  using ints = typename lanes<W>::ints;
  floats total = {};
  for (index_t i = n; i % W != 0; ++i) x[i] = -std::numeric_limits<float>::infinity();
  for (index_t i = 0; i < n; i += W) {
    floats v;
    load_floats<W>(x + i, v);
    v -= top;
    const ints small = v < -87.0f;
    const floats floor = small ? floats{} - 87.0f : v;
    const floats scaled = floor * 1.44269504f - 0.5f;
    const ints k = __builtin_convertvector(scaled, ints);  // towards zero: of a number <= −0.5, its rounding
    const floats kf = __builtin_convertvector(k, floats);
    const floats r = (floor - kf * 0.693145752f) - kf * 1.42860677e-6f;
    floats p = r * (1.0f / 720) + (1.0f / 120);
    p = p * r + (1.0f / 24);
    p = p * r + (1.0f / 6);
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const ints bits = (k + 127) << 23;
    floats power;
    std::memcpy(&power, &bits, sizeof power);
    p = small ? floats{} : p * power;
    total += p;
    std::memcpy(x + i, &p, sizeof p);
  }
  return sum_of<W>(total);
}

template <int W>
VATTN_ALWAYS_INLINE bool maximum(const float* x, index_t n, float& top) noexcept {
  using floats = typename lanes<W>::floats;
  using ints = typename lanes<W>::ints;
  constexpr float least = -std::numeric_limits<float>::infinity();
  floats most = floats{} + least;
  ints odd = {};
  index_t i = 0;
  for (; i + W <= n; i += W) {
    floats v;
    load_floats<W>(x + i, v);
    ints bits;
    std::memcpy(&bits, &v, sizeof bits);
    odd |= (bits & 0x7f800000) == 0x7f800000;
    most = v > most ? v : most;
  }
  top = least;
  bool finite = true;
  for (; i < n; ++i) finite = finite && std::abs(x[i]) <= std::numeric_limits<float>::max(), top = std::max(top, x[i]);
  for (int l = 0; l < W; ++l) finite = finite && odd[l] == 0, top = std::max(top, most[l]);
  return finite;
}

/// A sums of W floats in registers.
template <int W, int A, block_element T>
struct vector_kernels {
  template <int G>
  static VATTN_ALWAYS_INLINE void products_of(const float* q, index_t dim, const block_of_rows& rows,
                                              float* out) noexcept {
    all_products<W, (A / G), G, T>(q, dim, rows, out);
  }
  static VATTN_ALWAYS_INLINE void logits(const float* q, index_t groups, index_t dim, const block_of_rows& rows,
                                         float* out) noexcept {
    index_t g = 0;
    for (; g + 4 <= groups; g += 4) products_of<4>(q + g * dim, dim, rows, out + g * block_rows);
    if (g + 2 <= groups) products_of<2>(q + g * dim, dim, rows, out + g * block_rows), g += 2;
    if (g < groups) products_of<1>(q + g * dim, dim, rows, out + g * block_rows);
  }
  static VATTN_ALWAYS_INLINE void add(const float* x, index_t groups, const block_of_rows& rows, index_t dim,
                                      float* acc) noexcept {
    index_t g = 0;
    for (; g + 4 <= groups; g += 4) add_values<W, A, 4, T>(x + g * block_rows, rows, dim, acc + g * dim);
    if (g + 2 <= groups) add_values<W, A, 2, T>(x + g * block_rows, rows, dim, acc + g * dim), g += 2;
    if (g < groups) add_values<W, A, 1, T>(x + g * block_rows, rows, dim, acc + g * dim);
  }
};

#if VATTN_DISPATCH
template <block_element T>
VATTN_TARGET_AVX2 inline void logits_avx2(const float* q, index_t groups, index_t dim, const block_of_rows& rows,
                                          float* out) noexcept {
  vector_kernels<8, 8, T>::logits(q, groups, dim, rows, out);
}
template <block_element T>
VATTN_TARGET_AVX2 inline void add_avx2(const float* x, index_t groups, const block_of_rows& rows, index_t dim,
                                       float* acc) noexcept {
  vector_kernels<8, 8, T>::add(x, groups, rows, dim, acc);
}
VATTN_TARGET_AVX2 inline float exponentials_avx2(float* x, index_t n, float top) noexcept {
  return exponentials<8>(x, n, top);
}
VATTN_TARGET_AVX2 inline bool maximum_avx2(const float* x, index_t n, float& top) noexcept {
  return maximum<8>(x, n, top);
}
#endif

}  // namespace vattn::VATTN_ABI::kernel::detail

#if !defined(__clang__)
#pragma GCC diagnostic pop
#endif

#endif

#include "vattn/macros_pop.hpp"
