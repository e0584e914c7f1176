// The scan of an index for AVX-512 with VBMI; sums as in scan_avx512.hpp.
#include "vattn/macros_push.hpp"
#pragma once

#include "vattn/kernel/cell_scan_block.hpp"
#include "vattn/kernel/scan_avx512.hpp"

#if VATTN_DISPATCH
#define VATTN_SCAN VATTN_TARGET_AVX512_BF16
#define VATTN_SCAN_INLINE VATTN_SCAN __attribute__((always_inline)) inline

namespace vattn::VATTN_ABI::kernel::detail {

template <int H>
VATTN_SCAN inline void scan_cells_512(const cell_query& q, const code_blocks& codes, index_t block,
                                      scanned_cells& out) noexcept {
  const std::byte* at = codes.first + static_cast<std::size_t>(block) * codes.stride;
  const std::byte* lanes = at + static_cast<std::size_t>(codes.planes) * scan_keys;
  // Numbers of a block lie anywhere in their table, which the codes keep pushing out of the first cache.
  prefetch_row(reinterpret_cast<const std::byte*>(noise() + noise_place(q.scan.numbers, block + 4)),
               2 * scan_keys + 64);
  key_sums<H> sums;
  VATTN_UNROLL for (int h = 0; h < H; ++h) sums.both[h] = sums.odd[h] = _mm512_setzero_si512();
  const std::size_t stride = static_cast<std::size_t>(codes.groups) * 64;
  const std::byte* ahead = at + 8 * codes.stride;  // a line with each group
  int g = 0;
  for (; g + 8 <= codes.planes; g += 8)
    add_groups<H, 8, false>(at, q.scan.tables + g * 64, stride, g, ahead + g * scan_keys, sums);
  for (; g < codes.planes; ++g)
    add_groups<H, 1, false>(at, q.scan.tables + g * 64, stride, g, ahead + g * scan_keys, sums);
  for (; g + 5 <= codes.groups; g += 5)
    add_groups<H, 5, true>(at, q.scan.tables + g * 64, stride, g - codes.planes, ahead + g * scan_keys, sums);
  for (; g < codes.groups; ++g)
    add_groups<H, 1, true>(at, q.scan.tables + g * 64, stride, g - codes.planes, ahead + g * scan_keys, sums);

  const __m512i lengths_even = load(lanes), lengths_odd = load(lanes + 64);
  const __m512i alpha_bits = _mm512_set1_epi16(0x7fc0), rho_bits = _mm512_set1_epi16(0x7f00);
  const __m512i alpha_even = _mm512_and_si512(_mm512_srli_epi16(lengths_even, 1), alpha_bits);
  const __m512i alpha_odd = _mm512_and_si512(_mm512_srli_epi16(lengths_odd, 1), alpha_bits);
  const __m512i rho_even = _mm512_and_si512(_mm512_slli_epi16(lengths_even, 8), rho_bits);
  const __m512i rho_odd = _mm512_and_si512(_mm512_slli_epi16(lengths_odd, 8), rho_bits);
  const __m512i reach = _mm512_set1_epi16(q.scan.reach_factor), least = _mm512_set1_epi16(q.scan.least_reach);
  __m512i level_even = _mm512_set1_epi16(-32768), level_odd = level_even;
  VATTN_UNROLL for (int h = 0; h < H; ++h) {
    const auto i = static_cast<std::size_t>(h);
    const __m512i bias = _mm512_set1_epi16(q.scan.bias[i]), plain = _mm512_set1_epi16(q.plain[i]);
    const __m512i floor = _mm512_set1_epi16(q.floor[i]), slack = _mm512_set1_epi16(q.slack[i]);
    __m512i odd = sums.odd[h], even = _mm512_sub_epi16(sums.both[h], _mm512_slli_epi16(odd, 8));
    even = _mm512_mulhrs_epi16(_mm512_adds_epi16(_mm512_slli_epi16(even, 4), bias), alpha_even);
    odd = _mm512_mulhrs_epi16(_mm512_adds_epi16(_mm512_slli_epi16(odd, 4), bias), alpha_odd);
    _mm512_store_si512(out.score[h], even);
    _mm512_store_si512(out.score[h] + 32, odd);
    const __m512i high_even = _mm512_adds_epi16(even, _mm512_mulhrs_epi16(rho_even, slack));
    const __m512i high_odd = _mm512_adds_epi16(odd, _mm512_mulhrs_epi16(rho_odd, slack));
    level_even = _mm512_max_epi16(level_even, _mm512_subs_epi16(even, plain));
    level_odd = _mm512_max_epi16(level_odd, _mm512_subs_epi16(odd, plain));
    level_even = _mm512_max_epi16(level_even, _mm512_subs_epi16(high_even, floor));
    level_odd = _mm512_max_epi16(level_odd, _mm512_subs_epi16(high_odd, floor));
  }
  const __m512i reach_even = _mm512_max_epi16(_mm512_mulhrs_epi16(load(lanes + 128), reach), least);
  const __m512i reach_odd = _mm512_max_epi16(_mm512_mulhrs_epi16(load(lanes + 192), reach), least);
  const __m512i base = _mm512_set1_epi16(q.base), factor = _mm512_set1_epi16(q.scan.noise_factor);
  level_even = _mm512_max_epi16(_mm512_adds_epi16(level_even, reach_even), base);
  level_odd = _mm512_max_epi16(_mm512_adds_epi16(level_odd, reach_odd), base);
  out.noise = noise() + noise_place(q.scan.numbers, block);
  const __m512i noise_even = _mm512_mulhrs_epi16(load(out.noise), factor);
  const __m512i noise_odd = _mm512_mulhrs_epi16(load(out.noise + 32), factor);
  out.even = _mm512_cmpge_epi16_mask(_mm512_adds_epi16(level_even, noise_even), _mm512_setzero_si512());
  out.odd = _mm512_cmpge_epi16_mask(_mm512_adds_epi16(level_odd, noise_odd), _mm512_setzero_si512());
}

VATTN_SCAN inline void scan_cells_avx512(const cell_query& q, const code_blocks& codes, index_t block,
                                         scanned_cells& out) noexcept {
  switch (q.scan.heads) {
    case 1:
      return scan_cells_512<1>(q, codes, block, out);
    case 2:
      return scan_cells_512<2>(q, codes, block, out);
    case 3:
      return scan_cells_512<3>(q, codes, block, out);
    case 4:
      return scan_cells_512<4>(q, codes, block, out);
    case 5:
      return scan_cells_512<5>(q, codes, block, out);
    case 6:
      return scan_cells_512<6>(q, codes, block, out);
    case 7:
      return scan_cells_512<7>(q, codes, block, out);
    default:
      return scan_cells_512<8>(q, codes, block, out);
  }
}

}  // namespace vattn::VATTN_ABI::kernel::detail

#undef VATTN_SCAN
#undef VATTN_SCAN_INLINE
#endif

#include "vattn/macros_pop.hpp"
