// The scan of an index: scores of 64 cells for the heads of a group, and which of the cells a sample takes.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>

#include "vattn/kernel/cell_scan_avx512.hpp"
#include "vattn/kernel/cell_scan_block.hpp"
#include "vattn/kernel/scan.hpp"

namespace vattn::VATTN_ABI::kernel {

namespace detail {

// Scores from their sums, and margins: loops that compilers make vectors of.
inline void judge_cells(const cell_query& q, const std::int16_t* lanes, scanned_cells& out) noexcept {
  std::int16_t level[scan_keys];
  for (int i = 0; i < scan_keys; ++i) level[i] = -32768;
  std::int16_t scale[scan_keys], radius[scan_keys];
  for (int i = 0; i < scan_keys; ++i)
    scale[i] = cell_lengths::scale(lanes[i]), radius[i] = cell_lengths::radius(lanes[i]);
  for (int h = 0; h < q.scan.heads; ++h) {
    std::int16_t* score = out.score[h];
    const auto at = static_cast<std::size_t>(h);
    const int bias = q.scan.bias[at], plain = q.plain[at], floor = q.floor[at], slack = q.slack[at];
    for (int i = 0; i < scan_keys; ++i) {
      const int s = multiply_round(saturate(16 * score[i] + bias), scale[i]);
      score[i] = static_cast<std::int16_t>(s);
      const int high = saturate(s + multiply_round(radius[i], slack)) - floor;
      level[i] = std::max(level[i], saturate(std::max(s - plain, high)));
    }
  }
  for (int i = 0; i < scan_keys; ++i) {
    const int reach = std::max(multiply_round(lanes[scan_keys + i], q.scan.reach_factor), int{q.scan.least_reach});
    level[i] = std::max(saturate(level[i] + reach), q.base);
  }
  out.even = out.odd = 0;
  for (int i = 0; i < scan_keys; ++i) {
    const int noise = multiply_round(out.noise[i], q.scan.noise_factor);
    const std::uint32_t take = level[i] + noise >= 0 ? 1u : 0u;
    (i < 32 ? out.even : out.odd) |= take << (i & 31);
  }
}

inline void scan_cells_portable(const cell_query& q, const code_blocks& codes, index_t block,
                                scanned_cells& out) noexcept {
  const std::byte* at = codes.first + static_cast<std::size_t>(block) * codes.stride;
  int h = 0;
  for (; h + 4 <= q.scan.heads; h += 4) sum_entries<4>(q.scan, codes, at, h, out);
  const int rest = q.scan.heads - h;
  if (rest == 3) sum_entries<3>(q.scan, codes, at, h, out);
  if (rest == 2) sum_entries<2>(q.scan, codes, at, h, out);
  if (rest == 1) sum_entries<1>(q.scan, codes, at, h, out);
  out.noise = noise() + noise_place(q.scan.numbers, block);
  judge_cells(q, block_lanes(codes, at), out);
}

#if VATTN_DISPATCH
VATTN_TARGET_AVX2 __attribute__((always_inline)) inline __m256i twice_256(const std::uint8_t* from) noexcept {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
// As sum_entries_256, of tables that are sums of two parts.
template <int H>
VATTN_TARGET_AVX2 __attribute__((always_inline)) inline void sum_parts_256(const cell_query& q,
                                                                           const code_blocks& codes,
                                                                           const std::byte* at, int head,
                                                                           scanned_block& out) noexcept {
  constexpr int fit = 8;  // entries in a byte
  static_assert(fit * scan_query::largest_entry < 256);
  const std::size_t groups = static_cast<std::size_t>(codes.groups), first = static_cast<std::size_t>(head) * groups;
  const std::uint8_t *lower = q.scan.tables + first * 64, *upper = q.upper + first * 16;
  const __m256i four_bits = _mm256_set1_epi8(0x0f);
  key_sums_256<H> sums;
  sums.clear();
  for (int g = 0; g < codes.groups;) {
    __m256i sum[std::size_t{H}][2];
    VATTN_UNROLL for (int h = 0; h < H; ++h) sum[h][0] = sum[h][1] = _mm256_setzero_si256();
    for (const int end = std::min(g + fit, codes.groups); g < end; ++g, lower += 64, upper += 16) {
      const __m256i a = numbers_256(at, codes.planes, g), b = numbers_256(at + 32, codes.planes, g);
      const __m256i a_low = _mm256_and_si256(a, four_bits), b_low = _mm256_and_si256(b, four_bits);
      const __m256i a_high = _mm256_and_si256(_mm256_srli_epi16(a, 4), four_bits);
      const __m256i b_high = _mm256_and_si256(_mm256_srli_epi16(b, 4), four_bits);
      VATTN_UNROLL for (int h = 0; h < H; ++h) {
        const std::size_t skip = static_cast<std::size_t>(h) * groups;
        const __m256i low = twice_256(lower + skip * 64), high = twice_256(upper + skip * 16);
        sum[h][0] = _mm256_add_epi8(sum[h][0], _mm256_shuffle_epi8(low, a_low));
        sum[h][1] = _mm256_add_epi8(sum[h][1], _mm256_shuffle_epi8(low, b_low));
        sum[h][0] = _mm256_add_epi8(sum[h][0], _mm256_shuffle_epi8(high, a_high));
        sum[h][1] = _mm256_add_epi8(sum[h][1], _mm256_shuffle_epi8(high, b_high));
      }
    }
    sums.widen(sum);
  }
  sums.store(head, out);
}
template <int H>
VATTN_TARGET_AVX2 inline void sum_cells_256(const cell_query& q, const code_blocks& codes, const std::byte* at,
                                            int head, scanned_block& out) noexcept {
  if (q.upper) return sum_parts_256<H>(q, codes, at, head, out);
  sum_entries_256<H>(q.scan, codes, at, head, out);
}

VATTN_TARGET_AVX2 inline void scan_cells_avx2(const cell_query& q, const code_blocks& codes, index_t block,
                                              scanned_cells& out) noexcept {
  const std::byte* at = codes.first + static_cast<std::size_t>(block) * codes.stride;
  prefetch_row<2>(at + 8 * codes.stride, codes.stride);
  int h = 0;
  for (; h + 4 <= q.scan.heads; h += 4) sum_cells_256<4>(q, codes, at, h, out);
  const int rest = q.scan.heads - h;
  if (rest == 3) sum_cells_256<3>(q, codes, at, h, out);
  if (rest == 2) sum_cells_256<2>(q, codes, at, h, out);
  if (rest == 1) sum_cells_256<1>(q, codes, at, h, out);
  out.noise = noise() + noise_place(q.scan.numbers, block);
  const std::int16_t* lanes = block_lanes(codes, at);
  std::uint32_t taken[4];
  VATTN_UNROLL for (int part = 0; part < 4; ++part) {
    const int lane = 16 * part;
    const __m256i lengths = load_256(lanes + lane);
    const __m256i alpha = _mm256_and_si256(_mm256_srli_epi16(lengths, 1), _mm256_set1_epi16(0x7fc0));
    const __m256i radius = _mm256_and_si256(_mm256_slli_epi16(lengths, 8), _mm256_set1_epi16(0x7f00));
    const __m256i reach = _mm256_max_epi16(
        _mm256_mulhrs_epi16(load_256(lanes + scan_keys + lane), _mm256_set1_epi16(q.scan.reach_factor)),
        _mm256_set1_epi16(q.scan.least_reach));
    __m256i level = _mm256_set1_epi16(-32768);
    for (int g = 0; g < q.scan.heads; ++g) {
      const auto i = static_cast<std::size_t>(g);
      std::int16_t* to = out.score[g] + lane;
      const __m256i sum = _mm256_adds_epi16(_mm256_slli_epi16(load_256(to), 4), _mm256_set1_epi16(q.scan.bias[i]));
      const __m256i score = _mm256_mulhrs_epi16(sum, alpha);
      store_256(to, score);
      const __m256i high = _mm256_adds_epi16(score, _mm256_mulhrs_epi16(radius, _mm256_set1_epi16(q.slack[i])));
      level = _mm256_max_epi16(level, _mm256_subs_epi16(score, _mm256_set1_epi16(q.plain[i])));
      level = _mm256_max_epi16(level, _mm256_subs_epi16(high, _mm256_set1_epi16(q.floor[i])));
    }
    level = _mm256_max_epi16(_mm256_adds_epi16(level, reach), _mm256_set1_epi16(q.base));
    const __m256i noise = _mm256_mulhrs_epi16(load_256(out.noise + lane), _mm256_set1_epi16(q.scan.noise_factor));
    const __m256i left = _mm256_cmpgt_epi16(_mm256_setzero_si256(), _mm256_adds_epi16(level, noise));
    const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(left, left), 0xd8);
    taken[part] = ~static_cast<std::uint32_t>(_mm256_movemask_epi8(bytes)) & 0xffffu;
  }
  out.even = taken[0] | taken[1] << 16;
  out.odd = taken[2] | taken[3] << 16;
}
#endif

#if VATTN_NEON
inline void scan_cells_neon(const cell_query& q, const code_blocks& codes, index_t block, scanned_cells& out) noexcept {
  const std::byte* at = codes.first + static_cast<std::size_t>(block) * codes.stride;
  prefetch_row<2>(at + 8 * codes.stride, codes.stride);
  int h = 0;
  for (; h + 4 <= q.scan.heads; h += 4) sum_entries_128<4>(q.scan, codes, at, h, out);
  const int rest = q.scan.heads - h;
  if (rest == 3) sum_entries_128<3>(q.scan, codes, at, h, out);
  if (rest == 2) sum_entries_128<2>(q.scan, codes, at, h, out);
  if (rest == 1) sum_entries_128<1>(q.scan, codes, at, h, out);
  out.noise = noise() + noise_place(q.scan.numbers, block);
  const std::int16_t* lanes = block_lanes(codes, at);
  uint16x8_t taken[8];
  for (int part = 0; part < 8; ++part) {
    const int lane = 8 * part;
    const uint16x8_t lengths = vreinterpretq_u16_s16(vld1q_s16(lanes + lane));
    const int16x8_t alpha = vreinterpretq_s16_u16(vandq_u16(vshrq_n_u16(lengths, 1), vdupq_n_u16(0x7fc0)));
    const int16x8_t radius = vreinterpretq_s16_u16(vandq_u16(vshlq_n_u16(lengths, 8), vdupq_n_u16(0x7f00)));
    const int16x8_t reach = vmaxq_s16(vqrdmulhq_n_s16(vld1q_s16(lanes + scan_keys + lane), q.scan.reach_factor),
                                      vdupq_n_s16(q.scan.least_reach));
    int16x8_t level = vdupq_n_s16(-32768);
    for (int g = 0; g < q.scan.heads; ++g) {
      const auto i = static_cast<std::size_t>(g);
      std::int16_t* to = out.score[g] + lane;
      const int16x8_t score =
          vqrdmulhq_s16(vqaddq_s16(vshlq_n_s16(vld1q_s16(to), 4), vdupq_n_s16(q.scan.bias[i])), alpha);
      vst1q_s16(to, score);
      const int16x8_t high = vqaddq_s16(score, vqrdmulhq_n_s16(radius, q.slack[i]));
      level = vmaxq_s16(level, vqsubq_s16(score, vdupq_n_s16(q.plain[i])));
      level = vmaxq_s16(level, vqsubq_s16(high, vdupq_n_s16(q.floor[i])));
    }
    level = vmaxq_s16(vqaddq_s16(level, reach), vdupq_n_s16(q.base));
    const int16x8_t margin = vqaddq_s16(level, vqrdmulhq_n_s16(vld1q_s16(out.noise + lane), q.scan.noise_factor));
    taken[part] = vcgezq_s16(margin);
  }
  const uint16x8_t even[4] = {taken[0], taken[1], taken[2], taken[3]};
  const uint16x8_t odd[4] = {taken[4], taken[5], taken[6], taken[7]};
  out.even = bits_128(even);
  out.odd = bits_128(odd);
}
#endif

using cell_scan_function = void (*)(const cell_query&, const code_blocks&, index_t, scanned_cells&) noexcept;

[[nodiscard]] inline cell_scan_function cell_scan_for(isa how) noexcept {
#if VATTN_DISPATCH
  if (how >= isa::avx512_bf16) return scan_cells_avx512;
  if (how >= isa::avx2) return scan_cells_avx2;
#endif
#if VATTN_NEON
  if (how == isa::neon) return scan_cells_neon;
#endif
  static_cast<void>(how);
  return scan_cells_portable;
}

}  // namespace detail

/// Cells that a scan has taken, a structure of arrays over the caller's memory.
struct cell_candidates {
  ordinal* cell = nullptr;        // [capacity]
  std::int16_t* reach = nullptr;  // as in the block
  std::int16_t* radius = nullptr;
  std::int16_t* noise = nullptr;  // −ln u in steps
  std::int16_t* score = nullptr;  // [heads, capacity], steps
  index_t capacity = 0, size = 0;
};

/// Scans blocks [first, last) and appends the cells that are taken. `seen` [blocks]: bit i of word b says that cell
/// 64·b + i may be taken; blocks without one are not read. False where `out` is full. The same numbers for every
/// instruction set.
[[nodiscard]] inline bool scan_cells(isa how, const cell_query& q, const code_blocks& codes, index_t first,
                                     index_t last, const std::uint64_t* seen, cell_candidates& out) noexcept {
  const detail::cell_scan_function function = detail::cell_scan_for(how);
  scanned_cells b;
  for (index_t block = first; block < last; ++block) {
    if (seen[block] == 0) continue;
    function(q, codes, block, b);
    std::uint64_t mask = detail::spread_bits(b.even) | detail::spread_bits(b.odd) << 1;
    mask &= seen[block];
    if (mask == 0) continue;
    if (out.size + scan_keys > out.capacity) return false;
    const std::int16_t* lanes =
        detail::block_lanes(codes, codes.first + static_cast<std::size_t>(block) * codes.stride);
    for (; mask != 0; mask &= mask - 1) {
      const int i = std::countr_zero(mask), lane = (i & 1) * 32 + i / 2;
      const index_t to = out.size++;
      out.cell[to] = static_cast<ordinal>(block * scan_keys + i);
      out.reach[to] = lanes[scan_keys + lane];
      out.radius[to] = cell_lengths::radius(lanes[lane]);
      out.noise[to] = static_cast<std::int16_t>(detail::multiply_round(b.noise[lane], q.scan.noise_factor));
      for (int h = 0; h < q.scan.heads; ++h) out.score[h * out.capacity + to] = b.score[h][lane];
    }
  }
  return true;
}

/// Scores of a block's cells, taken or not, in lane order.
inline void score_cells(isa how, const cell_query& q, const code_blocks& codes, index_t block,
                        scanned_cells& out) noexcept {
  detail::cell_scan_for(how)(q, codes, block, out);
}

namespace detail {

// Levels of 64 candidates from i on.
inline void cell_levels_portable(const cell_query& q, const cell_candidates& c, index_t first,
                                 std::int16_t* level) noexcept {
  for (int i = 0; i < scan_keys; ++i) level[i] = -32768;
  const std::int16_t *radius = c.radius + first, *reach = c.reach + first;
  for (int h = 0; h < q.scan.heads; ++h) {
    const auto at = static_cast<std::size_t>(h);
    const int plain = q.plain[at], floor = q.floor[at], slack = q.slack[at];
    const std::int16_t* score = c.score + h * c.capacity + first;
    for (int i = 0; i < scan_keys; ++i) {
      const int high = saturate(score[i] + multiply_round(radius[i], slack)) - floor;
      level[i] = std::max(level[i], saturate(std::max(score[i] - plain, high)));
    }
  }
  for (int i = 0; i < scan_keys; ++i) {
    const int far = std::max(multiply_round(reach[i], q.scan.reach_factor), int{q.scan.least_reach});
    level[i] = std::max(saturate(level[i] + far), q.base);
  }
}

#if VATTN_DISPATCH
VATTN_TARGET_AVX2 inline void cell_levels_avx2(const cell_query& q, const cell_candidates& c, index_t first,
                                               std::int16_t* level) noexcept {
  for (index_t i = first; i < first + scan_keys; i += 16, level += 16) {
    const __m256i radius = load_256(c.radius + i);
    __m256i most = _mm256_set1_epi16(-32768);
    for (int h = 0; h < q.scan.heads; ++h) {
      const auto at = static_cast<std::size_t>(h);
      const __m256i score = load_256(c.score + h * c.capacity + i);
      const __m256i high = _mm256_adds_epi16(score, _mm256_mulhrs_epi16(radius, _mm256_set1_epi16(q.slack[at])));
      most = _mm256_max_epi16(most, _mm256_subs_epi16(score, _mm256_set1_epi16(q.plain[at])));
      most = _mm256_max_epi16(most, _mm256_subs_epi16(high, _mm256_set1_epi16(q.floor[at])));
    }
    const __m256i reach =
        _mm256_max_epi16(_mm256_mulhrs_epi16(load_256(c.reach + i), _mm256_set1_epi16(q.scan.reach_factor)),
                         _mm256_set1_epi16(q.scan.least_reach));
    store_256(level, _mm256_max_epi16(_mm256_adds_epi16(most, reach), _mm256_set1_epi16(q.base)));
  }
}
#endif

}  // namespace detail

/// Levels of all candidates under the thresholds of `q`, which need not be those that they were taken with. `level`
/// [size], and columns, have room up to a multiple of 64.
inline void cell_levels(isa how, const cell_query& q, const cell_candidates& c, std::int16_t* level) noexcept {
  for (index_t first = 0; first < c.size; first += scan_keys) {
#if VATTN_DISPATCH
    if (how >= isa::avx2) {
      detail::cell_levels_avx2(q, c, first, level + first);
      continue;
    }
#endif
    static_cast<void>(how);
    detail::cell_levels_portable(q, c, first, level + first);
  }
}

}  // namespace vattn::VATTN_ABI::kernel

#include "vattn/macros_pop.hpp"
