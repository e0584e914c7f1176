// The scan for AVX-512 with VBMI: a table of 64 bytes is one register, and vpermb looks 64 keys up in it.
#include "vattn/macros_push.hpp"
#pragma once

#include "vattn/kernel/scan_block.hpp"

#if VATTN_DISPATCH
#include <immintrin.h>

#define VATTN_SCAN VATTN_TARGET_AVX512_BF16

#define VATTN_SCAN_INLINE VATTN_SCAN __attribute__((always_inline)) inline

namespace vattn::VATTN_ABI::kernel::detail {

VATTN_SCAN_INLINE __m512i load(const void* p) noexcept { return _mm512_loadu_si512(p); }

VATTN_SCAN_INLINE std::uint32_t taken(const scan_query& q, __m512i level, const std::int16_t* numbers) noexcept {
  const __m512i noise = _mm512_mulhrs_epi16(load(numbers), _mm512_set1_epi16(q.noise_factor));
  return _mm512_cmpge_epi16_mask(_mm512_adds_epi16(level, noise), _mm512_setzero_si512()) &
         _mm512_cmpge_epi16_mask(level, _mm512_set1_epi16(q.cut));
}

// Numbers of group planes + e, from bits 6 and 7 of three planes.
VATTN_SCAN_INLINE __m512i spread_number(const std::byte* planes, int e) noexcept {
  const std::byte* p = planes + 3 * e * scan_keys;
  const __m512i a = _mm512_and_si512(_mm512_srli_epi16(load(p), 6), _mm512_set1_epi8(0x03));
  const __m512i b = _mm512_and_si512(_mm512_srli_epi16(load(p + scan_keys), 4), _mm512_set1_epi8(0x0c));
  const __m512i c = _mm512_and_si512(_mm512_srli_epi16(load(p + 2 * scan_keys), 2), _mm512_set1_epi8(0x30));
  return _mm512_or_si512(a, _mm512_or_si512(b, c));
}

// Sums of 64 keys in 16 bits: those of the odd bytes, and both in one word.
template <int H>
struct key_sums {
  __m512i both[std::size_t{H}], odd[std::size_t{H}];
};

// Adds the table entries of N groups, at most eight, so that their sum fits a byte. Asks for N lines from `ahead` on:
// a core alone does not ask for enough of them to get what the memory can deliver, and many at once make it wait.
template <int H, int N, bool Spread>
VATTN_SCAN_INLINE void add_groups(const std::byte* planes, const std::uint8_t* table, std::size_t table_stride,
                                  int first, const std::byte* ahead, key_sums<H>& to) noexcept {
  static_assert(N * scan_query::largest_entry < 256);
  constexpr __mmask64 all = ~__mmask64{0};
  __m512i sum[std::size_t{H}];
  VATTN_UNROLL for (int i = 0; i < N; ++i) {
    prefetch_row<2>(ahead + i * scan_keys, scan_keys);
    // vpermb takes no notice of bits 6 and 7.
    const __m512i number = Spread ? spread_number(planes, first + i) : load(planes + (first + i) * scan_keys);
    VATTN_UNROLL for (int h = 0; h < H; ++h) {
      // The zero-masked form: GCC 12 takes the plain one for a use of what is not initialised.
      const __m512i entry =
          _mm512_maskz_permutexvar_epi8(all, number, load(table + static_cast<std::size_t>(h) * table_stride + i * 64));
      sum[h] = i == 0 ? entry : _mm512_add_epi8(sum[h], entry);
    }
  }
  VATTN_UNROLL for (int h = 0; h < H; ++h) {
    to.both[h] = _mm512_add_epi16(to.both[h], sum[h]);
    to.odd[h] = _mm512_add_epi16(to.odd[h], _mm512_srli_epi16(sum[h], 8));
  }
}

// As block_thresholds, for all heads at once: threshold in places 0-7 of `out`, certain in 8-15.
struct threshold_vectors {
  __m512d plain, floor, slack, sure_floor, sure;
};
VATTN_SCAN_INLINE __m512d as_doubles(const std::array<float, scan_heads>& x) noexcept {
  return _mm512_maskz_cvtps_pd(0xff, _mm256_loadu_ps(x.data()));
}
VATTN_SCAN_INLINE __m128i whole_steps(__m512d t) noexcept {
  const __m512d most = _mm512_set1_pd(32767.0);
  t = _mm512_maskz_min_pd(0xff, t, most);  // the second operand where t is not a number
  t = _mm512_maskz_max_pd(0xff, t, _mm512_set1_pd(-32767.0));
  return _mm256_maskz_cvtepi32_epi16(0xff, _mm512_maskz_cvttpd_epi32(0xff, t));
}
VATTN_SCAN_INLINE void vector_thresholds(const threshold_vectors& v, float radius, std::int16_t* out) noexcept {
  const __m512d rho = _mm512_set1_pd(static_cast<double>(radius));
  const __m512d low = _mm512_sub_pd(v.floor, _mm512_mul_pd(v.slack, rho));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), whole_steps(_mm512_maskz_min_pd(0xff, low, v.plain)));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 8),
                   whole_steps(_mm512_sub_pd(v.sure_floor, _mm512_mul_pd(v.sure, rho))));
}

template <int H>
VATTN_SCAN_INLINE void scan_block_512(const scan_query& q, const threshold_vectors& v, const code_blocks& codes,
                                      index_t block, scanned_block& out) noexcept {
  const std::byte* at = codes.first + static_cast<std::size_t>(block) * codes.stride;
  const std::byte* lanes = at + static_cast<std::size_t>(codes.planes) * scan_keys;
  // Numbers of a block lie anywhere in their table, which the codes keep pushing out of the first cache.
  prefetch_row(reinterpret_cast<const std::byte*>(noise() + noise_place(q.numbers, block + 4)), 2 * scan_keys + 64);
  std::int16_t threshold[2 * scan_heads];
  const std::int16_t* certain = threshold + scan_heads;
  vector_thresholds(v, block_radius(codes, at), threshold);

  key_sums<H> sums;
  VATTN_UNROLL for (int h = 0; h < H; ++h) sums.both[h] = sums.odd[h] = _mm512_setzero_si512();
  const std::size_t stride = static_cast<std::size_t>(codes.groups) * 64;
  const std::byte* ahead = at + 8 * codes.stride;  // a line with each group
  int g = 0;
  for (; g + 8 <= codes.planes; g += 8)
    add_groups<H, 8, false>(at, q.tables + g * 64, stride, g, ahead + g * scan_keys, sums);
  for (; g < codes.planes; ++g) add_groups<H, 1, false>(at, q.tables + g * 64, stride, g, ahead + g * scan_keys, sums);
  for (; g + 5 <= codes.groups; g += 5)
    add_groups<H, 5, true>(at, q.tables + g * 64, stride, g - codes.planes, ahead + g * scan_keys, sums);
  for (; g < codes.groups; ++g)
    add_groups<H, 1, true>(at, q.tables + g * 64, stride, g - codes.planes, ahead + g * scan_keys, sums);
  // Blocks have more lines than groups, or not many fewer.
  for (; static_cast<std::size_t>(g * scan_keys) < codes.stride; ++g) prefetch_row<2>(ahead + g * scan_keys, scan_keys);
  __m512i even[std::size_t{H}], odd[std::size_t{H}];
  VATTN_UNROLL for (int h = 0; h < H; ++h) {
    odd[h] = sums.odd[h];
    even[h] = _mm512_sub_epi16(sums.both[h], _mm512_slli_epi16(odd[h], 8));
  }

  const __m512i alpha_even = load(lanes), alpha_odd = load(lanes + 64);
  const __m512i reach = _mm512_set1_epi16(q.reach_factor), least = _mm512_set1_epi16(q.least_reach);
  const __m512i reach_even = _mm512_max_epi16(_mm512_mulhrs_epi16(load(lanes + 128), reach), least);
  const __m512i reach_odd = _mm512_max_epi16(_mm512_mulhrs_epi16(load(lanes + 192), reach), least);
  __m512i level_even = _mm512_set1_epi16(-32768), level_odd = level_even;
  __mmask32 sure_even = 0, sure_odd = 0;
  VATTN_UNROLL for (int h = 0; h < H; ++h) {
    const __m512i bias = _mm512_set1_epi16(q.bias[static_cast<std::size_t>(h)]);
    const __m512i t = _mm512_set1_epi16(threshold[h]), c = _mm512_set1_epi16(certain[h]);
    even[h] = _mm512_mulhrs_epi16(_mm512_adds_epi16(_mm512_slli_epi16(even[h], 4), bias), alpha_even);
    odd[h] = _mm512_mulhrs_epi16(_mm512_adds_epi16(_mm512_slli_epi16(odd[h], 4), bias), alpha_odd);
    level_even = _mm512_max_epi16(level_even, _mm512_subs_epi16(even[h], t));
    level_odd = _mm512_max_epi16(level_odd, _mm512_subs_epi16(odd[h], t));
    sure_even |= _mm512_cmpge_epi16_mask(_mm512_adds_epi16(even[h], reach_even), c);
    sure_odd |= _mm512_cmpge_epi16_mask(_mm512_adds_epi16(odd[h], reach_odd), c);
  }
  const __m512i sure = _mm512_set1_epi16(q.sure_level);
  level_even = _mm512_adds_epi16(level_even, reach_even);
  level_odd = _mm512_adds_epi16(level_odd, reach_odd);
  level_even = _mm512_mask_max_epi16(level_even, sure_even, level_even, sure);
  level_odd = _mm512_mask_max_epi16(level_odd, sure_odd, level_odd, sure);
  out.noise = noise() + noise_place(q.numbers, block);
  out.even = taken(q, level_even, out.noise);
  out.odd = taken(q, level_odd, out.noise + 32);
  VATTN_UNROLL for (int h = 0; h < H; ++h) {
    _mm512_store_si512(out.score[h], even[h]);
    _mm512_store_si512(out.score[h] + 32, odd[h]);
  }
  _mm512_store_si512(out.level, level_even);
  _mm512_store_si512(out.level + 32, level_odd);
}

template <int H>
VATTN_SCAN inline index_t scan_heads_512(const scan_query& q, const code_blocks& codes, index_t first, index_t last,
                                         bool all, scanned_block& out) noexcept {
  const threshold_vectors v{as_doubles(q.plain), as_doubles(q.floor), as_doubles(q.slack), as_doubles(q.sure_floor),
                            as_doubles(q.sure)};
  for (; first < last; ++first) {
    scan_block_512<H>(q, v, codes, first, out);
    if (all || (out.even | out.odd) != 0) break;
  }
  return first;
}

VATTN_SCAN inline index_t scan_blocks_avx512(const scan_query& q, const code_blocks& codes, index_t first, index_t last,
                                             bool all, scanned_block& out) noexcept {
  switch (q.heads) {
    case 1:
      return scan_heads_512<1>(q, codes, first, last, all, out);
    case 2:
      return scan_heads_512<2>(q, codes, first, last, all, out);
    case 3:
      return scan_heads_512<3>(q, codes, first, last, all, out);
    case 4:
      return scan_heads_512<4>(q, codes, first, last, all, out);
    case 5:
      return scan_heads_512<5>(q, codes, first, last, all, out);
    case 6:
      return scan_heads_512<6>(q, codes, first, last, all, out);
    case 7:
      return scan_heads_512<7>(q, codes, first, last, all, out);
    default:
      return scan_heads_512<8>(q, codes, first, last, all, out);
  }
}

}  // namespace vattn::VATTN_ABI::kernel::detail

#undef VATTN_SCAN
#undef VATTN_SCAN_INLINE
#endif

#include "vattn/macros_pop.hpp"
