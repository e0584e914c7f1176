// The scan for AVX2: a table of 64 bytes is four of vpshufb, of which all but the right one give 0.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>

#include "vattn/kernel/scan_block.hpp"

#if VATTN_DISPATCH
#include <immintrin.h>

#define VATTN_SCAN_INLINE VATTN_TARGET_AVX2 __attribute__((always_inline)) inline

namespace vattn::VATTN_ABI::kernel::detail {

VATTN_SCAN_INLINE __m256i load_256(const void* p) noexcept {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
VATTN_SCAN_INLINE void store_256(void* p, __m256i x) noexcept { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }

// Numbers of group g for the 32 keys from `at` on.
VATTN_SCAN_INLINE __m256i numbers_256(const std::byte* at, int planes, int g) noexcept {
  if (g < planes) return _mm256_and_si256(load_256(at + g * scan_keys), _mm256_set1_epi8(0x3f));
  const std::byte* p = at + 3 * (g - planes) * scan_keys;
  const __m256i a = _mm256_and_si256(_mm256_srli_epi16(load_256(p), 6), _mm256_set1_epi8(0x03));
  const __m256i b = _mm256_and_si256(_mm256_srli_epi16(load_256(p + scan_keys), 4), _mm256_set1_epi8(0x0c));
  const __m256i c = _mm256_and_si256(_mm256_srli_epi16(load_256(p + 2 * scan_keys), 2), _mm256_set1_epi8(0x30));
  return _mm256_or_si256(a, _mm256_or_si256(b, c));
}

// Sums of table entries of 64 keys for H heads: bytes take a few entries, 16 bits all of them, even and odd keys apart.
template <int H>
struct key_sums_256 {
  __m256i even[std::size_t{H}][2], odd[std::size_t{H}][2];

  VATTN_SCAN_INLINE void clear() noexcept {
    VATTN_UNROLL for (int h = 0; h < H; ++h) even[h][0] = even[h][1] = odd[h][0] = odd[h][1] = _mm256_setzero_si256();
  }
  VATTN_SCAN_INLINE void widen(const __m256i (&sum)[std::size_t{H}][2]) noexcept {
    VATTN_UNROLL for (int h = 0; h < H; ++h) {
      VATTN_UNROLL for (int half = 0; half < 2; ++half) {
        even[h][half] = _mm256_add_epi16(even[h][half], _mm256_and_si256(sum[h][half], _mm256_set1_epi16(0xff)));
        odd[h][half] = _mm256_add_epi16(odd[h][half], _mm256_srli_epi16(sum[h][half], 8));
      }
    }
  }
  VATTN_SCAN_INLINE void store(int head, scanned_block& out) const noexcept {
    VATTN_UNROLL for (int h = 0; h < H; ++h) {
      VATTN_UNROLL for (int half = 0; half < 2; ++half) {
        store_256(out.score[head + h] + 16 * half, even[h][half]);
        store_256(out.score[head + h] + 32 + 16 * half, odd[h][half]);
      }
    }
  }
};

// Table entries of 64 keys summed for H heads from `head` on, into their scores. With four heads, sums, numbers and a
// quarter of a table are the sixteen registers.
template <int H>
VATTN_SCAN_INLINE void sum_entries_256(const scan_query& q, const code_blocks& codes, const std::byte* at, int head,
                                       scanned_block& out) noexcept {
  constexpr int fit = 8;  // entries in a byte
  static_assert(fit * scan_query::largest_entry < 256);
  const std::size_t stride = static_cast<std::size_t>(codes.groups) * 64;
  const std::uint8_t* table = q.tables + static_cast<std::size_t>(head) * stride;
  key_sums_256<H> sums;
  sums.clear();
  for (int g = 0; g < codes.groups;) {
    __m256i sum[std::size_t{H}][2];
    VATTN_UNROLL for (int h = 0; h < H; ++h) sum[h][0] = sum[h][1] = _mm256_setzero_si256();
    for (const int end = std::min(g + fit, codes.groups); g < end; ++g, table += 64) {
      const __m256i low = numbers_256(at, codes.planes, g), high = numbers_256(at + 32, codes.planes, g);
      VATTN_UNROLL for (int quarter = 0; quarter < 4; ++quarter) {
        // Bit 7, for which vpshufb gives 0, is set by the sum unless bits 4 and 5 are `quarter`.
        const __m256i flip = _mm256_set1_epi8(static_cast<char>(16 * quarter)), rest = _mm256_set1_epi8(0x70);
        const __m256i first = _mm256_add_epi8(_mm256_xor_si256(low, flip), rest);
        const __m256i second = _mm256_add_epi8(_mm256_xor_si256(high, flip), rest);
        VATTN_UNROLL for (int h = 0; h < H; ++h) {
          const std::uint8_t* entries = table + static_cast<std::size_t>(h) * stride + 16 * quarter;
          const __m256i t = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(entries)));
          sum[h][0] = _mm256_adds_epu8(sum[h][0], _mm256_shuffle_epi8(t, first));
          sum[h][1] = _mm256_adds_epu8(sum[h][1], _mm256_shuffle_epi8(t, second));
        }
      }
    }
    sums.widen(sum);
  }
  sums.store(head, out);
}

// Scores of 16 keys from their sums, and the level.
VATTN_SCAN_INLINE void judge_256(const scan_query& q, const std::int16_t* lanes, const std::int16_t* threshold,
                                 const std::int16_t* certain, int lane, scanned_block& out) noexcept {
  const __m256i alpha = load_256(lanes + lane);
  const __m256i reach =
      _mm256_max_epi16(_mm256_mulhrs_epi16(load_256(lanes + scan_keys + lane), _mm256_set1_epi16(q.reach_factor)),
                       _mm256_set1_epi16(q.least_reach));
  __m256i level = _mm256_set1_epi16(-32768), unsure = _mm256_set1_epi16(-1);
  for (int h = 0; h < q.heads; ++h) {
    const __m256i bias = _mm256_set1_epi16(q.bias[static_cast<std::size_t>(h)]);
    std::int16_t* at = out.score[h] + lane;
    const __m256i score = _mm256_mulhrs_epi16(_mm256_adds_epi16(_mm256_slli_epi16(load_256(at), 4), bias), alpha);
    store_256(at, score);
    level = _mm256_max_epi16(level, _mm256_subs_epi16(score, _mm256_set1_epi16(threshold[h])));
    unsure =
        _mm256_and_si256(unsure, _mm256_cmpgt_epi16(_mm256_set1_epi16(certain[h]), _mm256_adds_epi16(score, reach)));
  }
  level = _mm256_adds_epi16(level, reach);
  level = _mm256_blendv_epi8(_mm256_max_epi16(level, _mm256_set1_epi16(q.sure_level)), level, unsure);
  store_256(out.level + lane, level);
}

VATTN_SCAN_INLINE __m256i left_256(const scan_query& q, const scanned_block& b, int lane) noexcept {
  const __m256i level = load_256(b.level + lane);
  const __m256i noise = _mm256_mulhrs_epi16(load_256(b.noise + lane), _mm256_set1_epi16(q.noise_factor));
  return _mm256_or_si256(_mm256_cmpgt_epi16(_mm256_setzero_si256(), _mm256_adds_epi16(level, noise)),
                         _mm256_cmpgt_epi16(_mm256_set1_epi16(q.cut), level));
}
VATTN_SCAN_INLINE std::uint32_t taken_256(const scan_query& q, const scanned_block& b, int lane) noexcept {
  const __m256i left = _mm256_packs_epi16(left_256(q, b, lane), left_256(q, b, lane + 16));
  return ~static_cast<std::uint32_t>(_mm256_movemask_epi8(_mm256_permute4x64_epi64(left, 0xd8)));
}

VATTN_TARGET_AVX2 inline index_t scan_blocks_avx2(const scan_query& q, const code_blocks& codes, index_t first,
                                                  index_t last, bool all, scanned_block& out) noexcept {
  for (; first < last; ++first) {
    const std::byte* at = codes.first + static_cast<std::size_t>(first) * codes.stride;
    const auto* lanes = block_lanes(codes, at);
    prefetch_row<2>(at + 8 * codes.stride, codes.stride);
    std::int16_t threshold[scan_heads], certain[scan_heads];
    block_thresholds(q, block_radius(codes, at), threshold, certain);
    int h = 0;
    for (; h + 4 <= q.heads; h += 4) sum_entries_256<4>(q, codes, at, h, out);
    const int rest = q.heads - h;
    if (rest == 3) sum_entries_256<3>(q, codes, at, h, out);
    if (rest == 2) sum_entries_256<2>(q, codes, at, h, out);
    if (rest == 1) sum_entries_256<1>(q, codes, at, h, out);
    VATTN_UNROLL for (int lane = 0; lane < scan_keys; lane += 16) judge_256(q, lanes, threshold, certain, lane, out);
    out.noise = noise() + noise_place(q.numbers, first);
    out.even = taken_256(q, out, 0);
    out.odd = taken_256(q, out, 32);
    if (all || (out.even | out.odd) != 0) break;
  }
  return first;
}

}  // namespace vattn::VATTN_ABI::kernel::detail

#undef VATTN_SCAN_INLINE
#endif

#include "vattn/macros_pop.hpp"
