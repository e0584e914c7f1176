// Block kernels for AVX-512.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <limits>

#include "vattn/kernel/block_rows.hpp"

#if VATTN_DISPATCH
#include <immintrin.h>

#define VATTN_AVX512_INLINE VATTN_TARGET_AVX512 inline __attribute__((always_inline))
#define VATTN_BF16_INLINE VATTN_TARGET_AVX512_BF16 inline __attribute__((always_inline))

// GCC 12 unrolls these loops for counts that its callers do not pass, finds that such a count would overflow, and
// warns.
#if !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Waggressive-loop-optimizations"
#endif

namespace vattn::VATTN_ABI::kernel::detail {

// GCC 12 takes what the unmasked forms of these intrinsics leave undefined for a fault of the program (its bug
// 105593) and warns; masked with ones they are the same instructions.
inline constexpr __mmask16 all_16 = 0xffff;

// Rows are read 32 elements at a time. Those of bfloat16 split into the even and the odd ones, one instruction
// each; queries are prepared, and sums are stored, in the matching order.
inline constexpr index_t step = 32;

[[nodiscard]] constexpr index_t padded(index_t dim) noexcept { return (dim + step - 1) / step * step; }

template <block_element T>
inline constexpr bool evens_first = std::same_as<T, Eigen::bfloat16>;

// The elements of one step that exist: all, or those of the last.
struct step_mask {
  __mmask32 all = ~__mmask32{0};
  [[nodiscard]] __mmask16 low() const noexcept { return static_cast<__mmask16>(all); }
  [[nodiscard]] __mmask16 high() const noexcept { return static_cast<__mmask16>(all >> 16); }
};
[[nodiscard]] inline step_mask last_step(index_t dim) noexcept {
  return {~__mmask32{0} >> static_cast<unsigned>(padded(dim) - dim)};
}

template <block_element T, bool Whole>
VATTN_AVX512_INLINE void load_step(const std::byte* row, index_t at, const step_mask& m, __m512& a,
                                   __m512& b) noexcept {
  const std::byte* from = row + at * row_bytes<T>(step);
  if constexpr (quantised_block<T>) {
    const T* block = reinterpret_cast<const T*>(from);
    const __m128i half = _mm_cvtsi32_si128(block->scale);
    const __m512 scale = _mm512_maskz_broadcastss_ps(all_16, _mm_cvtph_ps(half));
    const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(block->quants));
    const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(block->quants + 16));
    a = _mm512_mul_ps(scale, _mm512_maskz_cvtepi32_ps(all_16, _mm512_maskz_cvtepi8_epi32(all_16, low)));
    b = _mm512_mul_ps(scale, _mm512_maskz_cvtepi32_ps(all_16, _mm512_maskz_cvtepi8_epi32(all_16, high)));
  } else if constexpr (std::same_as<T, float>) {
    a = Whole ? _mm512_loadu_ps(from) : _mm512_maskz_loadu_ps(m.low(), from);
    b = Whole ? _mm512_loadu_ps(from + 64) : _mm512_maskz_loadu_ps(m.high(), from + 64);
  } else if constexpr (std::same_as<T, Eigen::bfloat16>) {
    const __m512i bits = Whole ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi16(m.all, from);
    a = _mm512_castsi512_ps(_mm512_maskz_slli_epi32(all_16, bits, 16));
    b = _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  } else {
    const __mmask16 low = Whole ? all_16 : m.low(), high = Whole ? all_16 : m.high();
    a = _mm512_maskz_cvtph_ps(all_16, _mm256_maskz_loadu_epi16(low, from));
    b = _mm512_maskz_cvtph_ps(all_16, _mm256_maskz_loadu_epi16(high, from + 32));
  }
}

// Lane p of the result is the sum of the lanes of v[p]. Halves, quarters … of two vectors are exchanged and
// added, so that sixteen sums cost fifteen shuffles.
VATTN_AVX512_INLINE __m512 sums_of_16(__m512 (&v)[16]) noexcept {
  VATTN_UNROLL for (int i = 0; i < 8; ++i) {
    v[i] = _mm512_add_ps(_mm512_maskz_shuffle_f32x4(all_16, v[i], v[i + 8], 0x4e),
                         _mm512_mask_blend_ps(0xff00, v[i], v[i + 8]));
  }
  VATTN_UNROLL for (int i = 0; i < 4; ++i) {
    const __m512 other = _mm512_mask_blend_ps(0xf0f0, v[i + 4], v[i]);
    v[i] = _mm512_add_ps(_mm512_mask_blend_ps(0xf0f0, v[i], v[i + 4]),
                         _mm512_maskz_shuffle_f32x4(all_16, other, other, 0xb1));
  }
  VATTN_UNROLL for (int i = 0; i < 2; ++i) {
    const __m512 other = _mm512_mask_blend_ps(0xcccc, v[i + 2], v[i]);
    v[i] = _mm512_add_ps(_mm512_mask_blend_ps(0xcccc, v[i], v[i + 2]), _mm512_maskz_permute_ps(all_16, other, 0x4e));
  }
  const __m512 other = _mm512_mask_blend_ps(0xaaaa, v[1], v[0]);
  return _mm512_add_ps(_mm512_mask_blend_ps(0xaaaa, v[0], v[1]), _mm512_maskz_permute_ps(all_16, other, 0xb1));
}

// 16/G logits of each of G queries: lanes 16/G·g and on go to query g.
template <int G>
VATTN_AVX512_INLINE void store_logits(__m512 all, float* out) noexcept {
  constexpr int R = 16 / G;
  VATTN_UNROLL for (int g = 0; g < G; ++g) {
    _mm512_mask_storeu_ps(out + g * (block_rows - R), static_cast<__mmask16>(((1 << R) - 1) << g * R), all);
  }
}

// R rows from `first`; past the last it is that one again, whose logits nobody reads.
template <int R>
VATTN_AVX512_INLINE void rows_at(const block_of_rows& rows, index_t first,
                                 const std::byte* (&row)[extent<R>]) noexcept {
  if (!rows.index && first + R <= rows.count) {
    VATTN_UNROLL for (int r = 0; r < R; ++r) row[r] = rows.first + (first + r) * rows.stride;
  } else {
    for (int r = 0; r < R; ++r) row[r] = row_at(rows, std::min(first + r, rows.count - 1));
  }
}

template <int R, int G, block_element T, bool Whole>
VATTN_AVX512_INLINE void product_step(const float* q, index_t width, const std::byte* const (&row)[extent<R>],
                                      index_t at, const step_mask& m, __m512 (&sum)[16]) noexcept {
  __m512 low[extent<R>], high[extent<R>];
  VATTN_UNROLL for (int r = 0; r < R; ++r) load_step<T, Whole>(row[r], at, m, low[r], high[r]);
  VATTN_UNROLL for (int g = 0; g < G; ++g) {
    const __m512 query = _mm512_loadu_ps(q + g * width + at * step);
    VATTN_UNROLL for (int r = 0; r < R; ++r) sum[g * R + r] = _mm512_fmadd_ps(low[r], query, sum[g * R + r]);
  }
  VATTN_UNROLL for (int g = 0; g < G; ++g) {
    const __m512 query = _mm512_loadu_ps(q + g * width + at * step + 16);
    VATTN_UNROLL for (int r = 0; r < R; ++r) sum[g * R + r] = _mm512_fmadd_ps(high[r], query, sum[g * R + r]);
  }
}

// q [G, padded(dim)] in the order of the steps.
template <int G, block_element T>
VATTN_AVX512_INLINE void products_512(const float* q, index_t dim, const block_of_rows& rows, float* out) noexcept {
  constexpr int R = 16 / G;
  const index_t width = padded(dim), whole = dim / step;
  const step_mask last = last_step(dim);
  const row_fetcher memory(rows, row_bytes<T>(dim));
  for (index_t i = 0; i < rows.count; i += R) {
    memory.whole<R>(i);
    const std::byte* row[extent<R>];
    rows_at<R>(rows, i, row);
    __m512 sum[16];
    VATTN_UNROLL for (int s = 0; s < 16; ++s) sum[s] = _mm512_setzero_ps();
    for (index_t at = 0; at < whole; ++at) product_step<R, G, T, true>(q, width, row, at, last, sum);
    if (whole * step < dim) product_step<R, G, T, false>(q, width, row, whole, last, sum);
    store_logits<G>(sums_of_16(sum), out + i);
  }
}

template <block_element T>
VATTN_TARGET_AVX512 inline void logits_avx512(const float* q, index_t groups, index_t dim, const block_of_rows& rows,
                                              float* out) noexcept {
  const index_t width = padded(dim);
  index_t g = 0;
  for (; g + 4 <= groups; g += 4) products_512<4, T>(q + g * width, dim, rows, out + g * block_rows);
  if (g + 2 <= groups) products_512<2, T>(q + g * width, dim, rows, out + g * block_rows), g += 2;
  if (g < groups) products_512<1, T>(q + g * width, dim, rows, out + g * block_rows);
}

// Products of pairs of bfloat16: exact, and summed in float.
template <int R, int G, bool Whole>
VATTN_BF16_INLINE void pair_step(const std::uint16_t* q, index_t width, const std::byte* const (&row)[extent<R>],
                                 index_t at, const step_mask& m, __m512 (&sum)[16]) noexcept {
  __m512i key[extent<R>];
  VATTN_UNROLL for (int r = 0; r < R; ++r) {
    const std::byte* from = row[r] + at * 64;
    key[r] = Whole ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi16(m.all, from);
  }
  VATTN_UNROLL for (int g = 0; g < G; ++g) {
    const __m512i query = _mm512_loadu_si512(q + g * width + at * step);
    VATTN_UNROLL for (int r = 0; r < R; ++r) {
      sum[g * R + r] = _mm512_dpbf16_ps(sum[g * R + r], (__m512bh)key[r], (__m512bh)query);
    }
  }
}

template <int G>
VATTN_BF16_INLINE void pair_products(const std::uint16_t* q, float scale, index_t dim, const block_of_rows& rows,
                                     float* out) noexcept {
  constexpr int R = 16 / G;
  const index_t width = padded(dim), whole = dim / step;
  const step_mask last = last_step(dim);
  const row_fetcher memory(rows, row_bytes<Eigen::bfloat16>(dim));
  for (index_t i = 0; i < rows.count; i += R) {
    memory.whole<R>(i);
    const std::byte* row[extent<R>];
    rows_at<R>(rows, i, row);
    __m512 sum[16];
    VATTN_UNROLL for (int s = 0; s < 16; ++s) sum[s] = _mm512_setzero_ps();
    for (index_t at = 0; at < whole; ++at) pair_step<R, G, true>(q, width, row, at, last, sum);
    if (whole * step < dim) pair_step<R, G, false>(q, width, row, whole, last, sum);
    store_logits<G>(_mm512_mul_ps(sums_of_16(sum), _mm512_set1_ps(scale)), out + i);
  }
}

/// q [groups, padded(dim)] in bfloat16, unscaled.
VATTN_TARGET_AVX512_BF16 inline void logits_bf16(const std::uint16_t* q, float scale, index_t groups, index_t dim,
                                                 const block_of_rows& rows, float* out) noexcept {
  const index_t width = padded(dim);
  index_t g = 0;
  for (; g + 4 <= groups; g += 4) pair_products<4>(q + g * width, scale, dim, rows, out + g * block_rows);
  if (g + 2 <= groups) pair_products<2>(q + g * width, scale, dim, rows, out + g * block_rows), g += 2;
  if (g < groups) pair_products<1>(q + g * width, scale, dim, rows, out + g * block_rows);
}

// 32 sums from memory, in the order of the steps, and back.
template <block_element T>
VATTN_AVX512_INLINE void load_sums(const float* from, const step_mask& m, __m512& a, __m512& b) noexcept {
  const __m512 low = _mm512_maskz_loadu_ps(m.low(), from), high = _mm512_maskz_loadu_ps(m.high(), from + 16);
  if constexpr (evens_first<T>) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    a = _mm512_permutex2var_ps(low, even, high);
    b = _mm512_permutex2var_ps(low, _mm512_add_epi32(even, _mm512_set1_epi32(1)), high);
  } else {
    a = low, b = high;
  }
}
template <block_element T>
VATTN_AVX512_INLINE void store_sums(float* to, const step_mask& m, __m512 a, __m512 b) noexcept {
  if constexpr (evens_first<T>) {
    const __m512i zip = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512 low = _mm512_permutex2var_ps(a, zip, b);
    b = _mm512_permutex2var_ps(a, _mm512_add_epi32(zip, _mm512_set1_epi32(8)), b);
    a = low;
  }
  _mm512_mask_storeu_ps(to, m.low(), a);
  _mm512_mask_storeu_ps(to + 16, m.high(), b);
}

// acc[g] += Σ_i x[g, i]·v_i for S steps of G queries: 2·S·G sums in registers. Whole: they are all 32 elements.
template <int S, int G, block_element T, bool Whole>
VATTN_AVX512_INLINE void add_steps(const float* x, const block_of_rows& rows, index_t at, index_t dim,
                                   const step_mask& last, float* acc) noexcept {
  const step_mask m = Whole ? step_mask{} : last;
  __m512 sum[extent<S>][extent<G>][2];
  VATTN_UNROLL for (int g = 0; g < G; ++g) {
    VATTN_UNROLL for (int s = 0; s < S; ++s)
        load_sums<T>(acc + g * dim + (at + s) * step, m, sum[s][g][0], sum[s][g][1]);
  }
  const row_fetcher memory(rows, row_bytes<T>(dim));
  for (index_t i = 0; i < rows.count; ++i) {
    memory.columns(i, at * row_bytes<T>(step), S * row_bytes<T>(step));
    const std::byte* row = row_at(rows, i);
    __m512 weight[extent<G>];
    VATTN_UNROLL for (int g = 0; g < G; ++g) weight[g] = _mm512_set1_ps(x[g * block_rows + i]);
    VATTN_UNROLL for (int s = 0; s < S; ++s) {
      __m512 low, high;
      load_step<T, Whole>(row, at + s, last, low, high);
      VATTN_UNROLL for (int g = 0; g < G; ++g) {
        sum[s][g][0] = _mm512_fmadd_ps(low, weight[g], sum[s][g][0]);
        sum[s][g][1] = _mm512_fmadd_ps(high, weight[g], sum[s][g][1]);
      }
    }
  }
  VATTN_UNROLL for (int g = 0; g < G; ++g) {
    VATTN_UNROLL for (int s = 0; s < S; ++s)
        store_sums<T>(acc + g * dim + (at + s) * step, m, sum[s][g][0], sum[s][g][1]);
  }
}

template <int G, block_element T>
VATTN_AVX512_INLINE void add_512(const float* x, const block_of_rows& rows, index_t dim, float* acc) noexcept {
  constexpr int S = G == 4 ? 2 : 4;
  const index_t whole = dim / step;
  const step_mask last = last_step(dim);
  index_t at = 0;
  for (; at + S <= whole; at += S) add_steps<S, G, T, true>(x, rows, at, dim, last, acc);
  for (; at < whole; ++at) add_steps<1, G, T, true>(x, rows, at, dim, last, acc);
  if (at * step < dim) add_steps<1, G, T, false>(x, rows, at, dim, last, acc);
}

// Rows that are read again, for more columns or queries, are still in the first cache.
inline constexpr index_t sub_block = 16;

template <block_element T>
VATTN_TARGET_AVX512 inline void add_avx512(const float* x, index_t groups, const block_of_rows& rows, index_t dim,
                                           float* acc) noexcept {
  for (index_t i = 0; i < rows.count; i += sub_block) {
    const block_of_rows part = rows.part(i, std::min(sub_block, rows.count - i));
    const float* weights = x + i;
    index_t g = 0;
    for (; g + 4 <= groups; g += 4) add_512<4, T>(weights + g * block_rows, part, dim, acc + g * dim);
    if (g + 2 <= groups) add_512<2, T>(weights + g * block_rows, part, dim, acc + g * dim), g += 2;
    if (g < groups) add_512<1, T>(weights + g * block_rows, part, dim, acc + g * dim);
  }
}

VATTN_AVX512_INLINE float sum_of_lanes(__m512 v) noexcept {
  float lane[16];
  _mm512_storeu_ps(lane, v);
  for (int half = 8; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
  }
  return lane[0];
}

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wsign-conversion"  // of an intrinsic that is a macro where nothing is optimised
#endif
// As exponentials() in block_vectors.hpp: 2^k·e^r, the fused products making one constant of ln 2 enough.
VATTN_TARGET_AVX512 inline float exponentials_avx512(float* x, index_t n, float top) noexcept {
  __m512 total = _mm512_setzero_ps();
  for (index_t i = 0; i < n; i += 16) {
    const auto here = static_cast<__mmask16>(n - i >= 16 ? 0xffff : (1 << (n - i)) - 1);
    const __m512 v = _mm512_sub_ps(_mm512_maskz_loadu_ps(here, x + i), _mm512_set1_ps(top));
    const __mmask16 used = _mm512_mask_cmp_ps_mask(here, v, _mm512_set1_ps(-87.0f), _CMP_GE_OQ);
    const __m512 k = _mm512_maskz_cvtepi32_ps(
        all_16, _mm512_maskz_cvtps_epi32(all_16, _mm512_mul_ps(v, _mm512_set1_ps(1.44269504f))));
    const __m512 r = _mm512_fnmadd_ps(k, _mm512_set1_ps(0.693147181f), v);
    __m512 p = _mm512_fmadd_ps(r, _mm512_set1_ps(1.0f / 720), _mm512_set1_ps(1.0f / 120));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    p = _mm512_maskz_scalef_ps(used, p, k);
    total = _mm512_add_ps(total, p);
    _mm512_mask_storeu_ps(x + i, here, p);
  }
  return sum_of_lanes(total);
}
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

VATTN_TARGET_AVX512 inline bool maximum_avx512(const float* x, index_t n, float& top) noexcept {
  const __m512 least = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  __m512 most = least;
  int odd = 0;
  for (index_t i = 0; i < n; i += 16) {
    const auto here = static_cast<__mmask16>(n - i >= 16 ? 0xffff : (1 << (n - i)) - 1);
    const __m512 v = _mm512_mask_loadu_ps(least, here, x + i);
    odd |= _mm512_mask_fpclass_ps_mask(here, v, 0x99);  // NaN, either infinity
    most = _mm512_maskz_max_ps(all_16, most, v);
  }
  float lane[16];
  _mm512_storeu_ps(lane, most);
  top = *std::max_element(lane, lane + 16);
  return odd == 0;
}

}  // namespace vattn::VATTN_ABI::kernel::detail

#if !defined(__clang__)
#pragma GCC diagnostic pop
#endif

#undef VATTN_AVX512_INLINE
#undef VATTN_BF16_INLINE
#endif

#include "vattn/macros_pop.hpp"
