// The scan for 64-bit ARM: a table of 64 bytes is four registers, and one tbl looks 16 keys up in them.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>

#include "vattn/kernel/scan_block.hpp"

#if VATTN_NEON
#include <arm_neon.h>

namespace vattn::VATTN_ABI::kernel::detail {

// Numbers of group g for the 16 keys from `at` on.
inline uint8x16_t numbers_128(const std::uint8_t* at, int planes, int g) noexcept {
  if (g < planes) return vandq_u8(vld1q_u8(at + g * scan_keys), vdupq_n_u8(0x3f));
  const std::uint8_t* p = at + 3 * (g - planes) * scan_keys;
  const uint8x16_t a = vshrq_n_u8(vld1q_u8(p), 6), b = vshrq_n_u8(vld1q_u8(p + scan_keys), 6);
  return vsliq_n_u8(vsliq_n_u8(a, b, 2), vshrq_n_u8(vld1q_u8(p + 2 * scan_keys), 6), 4);
}

// Table entries of 64 keys summed for H heads from `head` on, into their scores. With four heads, sums, numbers and a
// table are 24 of the 32 registers.
template <int H>
inline void sum_entries_128(const scan_query& q, const code_blocks& codes, const std::byte* block, int head,
                            scanned_block& out) noexcept {
  constexpr int fit = 8;  // entries in a byte
  static_assert(fit * scan_query::largest_entry < 256);
  const auto* at = reinterpret_cast<const std::uint8_t*>(block);
  const std::size_t stride = static_cast<std::size_t>(codes.groups) * 64;
  const std::uint8_t* table = q.tables + static_cast<std::size_t>(head) * stride;
  uint16x8_t even[std::size_t{H}][4], odd[std::size_t{H}][4];
  for (int h = 0; h < H; ++h) {
    for (int part = 0; part < 4; ++part) even[h][part] = odd[h][part] = vdupq_n_u16(0);
  }
  for (int g = 0; g < codes.groups;) {
    uint8x16_t sum[std::size_t{H}][4];
    VATTN_UNROLL for (int h = 0; h < H; ++h) {
      VATTN_UNROLL for (int part = 0; part < 4; ++part) sum[h][part] = vdupq_n_u8(0);
    }
    for (const int end = std::min(g + fit, codes.groups); g < end; ++g, table += 64) {
      uint8x16_t number[4];
      VATTN_UNROLL for (int part = 0; part < 4; ++part) number[part] = numbers_128(at + 16 * part, codes.planes, g);
      VATTN_UNROLL for (int h = 0; h < H; ++h) {
        const uint8x16x4_t t = vld1q_u8_x4(table + static_cast<std::size_t>(h) * stride);
        VATTN_UNROLL for (int part = 0; part < 4; ++part) sum[h][part] =
            vaddq_u8(sum[h][part], vqtbl4q_u8(t, number[part]));
      }
    }
    VATTN_UNROLL for (int h = 0; h < H; ++h) {
      VATTN_UNROLL for (int part = 0; part < 4; ++part) {
        const uint16x8_t pairs = vreinterpretq_u16_u8(sum[h][part]);
        even[h][part] = vaddq_u16(even[h][part], vandq_u16(pairs, vdupq_n_u16(0xff)));
        odd[h][part] = vsraq_n_u16(odd[h][part], pairs, 8);
      }
    }
  }
  for (int h = 0; h < H; ++h) {
    for (int part = 0; part < 4; ++part) {
      vst1q_s16(out.score[head + h] + 8 * part, vreinterpretq_s16_u16(even[h][part]));
      vst1q_s16(out.score[head + h] + 32 + 8 * part, vreinterpretq_s16_u16(odd[h][part]));
    }
  }
}

// Scores of 8 keys from their sums, and the level; all ones in the lanes of those that are taken.
inline uint16x8_t judge_128(const scan_query& q, const std::int16_t* lanes, const std::int16_t* threshold,
                            const std::int16_t* certain, int lane, scanned_block& out) noexcept {
  const int16x8_t alpha = vld1q_s16(lanes + lane);
  const int16x8_t reach =
      vmaxq_s16(vqrdmulhq_n_s16(vld1q_s16(lanes + scan_keys + lane), q.reach_factor), vdupq_n_s16(q.least_reach));
  int16x8_t level = vdupq_n_s16(-32768);
  uint16x8_t sure = vdupq_n_u16(0);
  for (int h = 0; h < q.heads; ++h) {
    const int16x8_t bias = vdupq_n_s16(q.bias[static_cast<std::size_t>(h)]);
    std::int16_t* at = out.score[h] + lane;
    const int16x8_t score = vqrdmulhq_s16(vqaddq_s16(vshlq_n_s16(vld1q_s16(at), 4), bias), alpha);
    vst1q_s16(at, score);
    level = vmaxq_s16(level, vqsubq_s16(score, vdupq_n_s16(threshold[h])));
    sure = vorrq_u16(sure, vcgeq_s16(vqaddq_s16(score, reach), vdupq_n_s16(certain[h])));
  }
  level = vqaddq_s16(level, reach);
  level = vbslq_s16(sure, vmaxq_s16(level, vdupq_n_s16(q.sure_level)), level);
  vst1q_s16(out.level + lane, level);
  const int16x8_t margin = vqaddq_s16(level, vqrdmulhq_n_s16(vld1q_s16(out.noise + lane), q.noise_factor));
  return vandq_u16(vcgezq_s16(margin), vcgeq_s16(level, vdupq_n_s16(q.cut)));
}

// A bit a lane.
inline std::uint32_t bits_128(const uint16x8_t (&lanes)[4]) noexcept {
  constexpr std::uint8_t bit[16] = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
  const uint8x16_t low = vandq_u8(vcombine_u8(vmovn_u16(lanes[0]), vmovn_u16(lanes[1])), vld1q_u8(bit));
  const uint8x16_t high = vandq_u8(vcombine_u8(vmovn_u16(lanes[2]), vmovn_u16(lanes[3])), vld1q_u8(bit));
  uint8x16_t sum = vpaddq_u8(low, high);
  sum = vpaddq_u8(sum, sum);
  sum = vpaddq_u8(sum, sum);
  return vgetq_lane_u32(vreinterpretq_u32_u8(sum), 0);
}

inline index_t scan_blocks_neon(const scan_query& q, const code_blocks& codes, index_t first, index_t last, bool all,
                                scanned_block& out) noexcept {
  for (; first < last; ++first) {
    const std::byte* at = codes.first + static_cast<std::size_t>(first) * codes.stride;
    const auto* lanes = block_lanes(codes, at);
    prefetch_row<2>(at + 8 * codes.stride, codes.stride);
    std::int16_t threshold[scan_heads], certain[scan_heads];
    block_thresholds(q, block_radius(codes, at), threshold, certain);
    int h = 0;
    for (; h + 4 <= q.heads; h += 4) sum_entries_128<4>(q, codes, at, h, out);
    const int rest = q.heads - h;
    if (rest == 3) sum_entries_128<3>(q, codes, at, h, out);
    if (rest == 2) sum_entries_128<2>(q, codes, at, h, out);
    if (rest == 1) sum_entries_128<1>(q, codes, at, h, out);
    out.noise = noise() + noise_place(q.numbers, first);
    uint16x8_t even[4], odd[4];
    for (int part = 0; part < 4; ++part) {
      even[part] = judge_128(q, lanes, threshold, certain, 8 * part, out);
      odd[part] = judge_128(q, lanes, threshold, certain, 32 + 8 * part, out);
    }
    out.even = bits_128(even);
    out.odd = bits_128(odd);
    if (all || (out.even | out.odd) != 0) break;
  }
  return first;
}

}  // namespace vattn::VATTN_ABI::kernel::detail

#endif

#include "vattn/macros_pop.hpp"
