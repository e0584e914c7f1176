// The scan of key codes: scores of 64 keys for the heads of a group, and which of the keys to take.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "vattn/kernel/block.hpp"
#include "vattn/kernel/scan_avx2.hpp"
#include "vattn/kernel/scan_avx512.hpp"
#include "vattn/kernel/scan_block.hpp"
#include "vattn/kernel/scan_neon.hpp"

namespace vattn::VATTN_ABI::kernel {

/// A key that was taken.
struct scan_pick {
  std::uint32_t row;
  std::int16_t level, reach;  ///< steps; as in the block
  std::int16_t margin;        ///< level + noise: it would be taken too were all thresholds that much higher
  std::uint16_t radius;       ///< as in the block
  std::array<std::int16_t, scan_heads> score;
};

namespace detail {

// Table entries of 64 keys summed for H heads from `head` on, into their scores: sums that stay in registers.
template <int H>
inline void sum_entries(const scan_query& q, const code_blocks& codes, const std::byte* at, int head,
                        scanned_block& out) noexcept {
  const index_t stride = index_t{codes.groups} * 64;
  for (int lane = 0; lane < scan_keys; ++lane) {
    const auto* plane = reinterpret_cast<const std::uint8_t*>(at) + (lane < 32 ? 2 * lane : 2 * (lane - 32) + 1);
    const std::uint8_t* table = q.tables + head * stride;
    unsigned sum[std::size_t{H}] = {};
    const auto* p = plane;
    for (int g = 0; g < codes.planes; ++g, table += 64, p += scan_keys) {
      VATTN_UNROLL for (int h = 0; h < H; ++h) sum[h] += (table + (*p & 63u))[h * stride];
    }
    p = plane;
    for (int g = codes.planes; g < codes.groups; ++g, table += 64, p += 3 * scan_keys) {
      const auto number = static_cast<unsigned>(*p >> 6 | (p[scan_keys] >> 6) << 2 | (p[2 * scan_keys] >> 6) << 4);
      VATTN_UNROLL for (int h = 0; h < H; ++h) sum[h] += (table + number)[h * stride];
    }
    VATTN_UNROLL for (int h = 0; h < H; ++h) out.score[head + h][lane] = static_cast<std::int16_t>(sum[h]);
  }
}

// Scores from their sums, levels, and what is taken: loops that compilers make vectors of.
inline void judge(const scan_query& q, const std::int16_t* lanes, const std::int16_t* threshold,
                  const std::int16_t* certain, scanned_block& out) noexcept {
  std::int16_t reach[scan_keys], sure[scan_keys], level[scan_keys];
  for (int i = 0; i < scan_keys; ++i) {
    reach[i] =
        static_cast<std::int16_t>(std::max(multiply_round(lanes[scan_keys + i], q.reach_factor), int{q.least_reach}));
    sure[i] = 0;
    level[i] = -32768;
  }
  for (int h = 0; h < q.heads; ++h) {
    std::int16_t* score = out.score[h];
    const int bias = q.bias[static_cast<std::size_t>(h)];
    const std::int16_t t = threshold[h], c = certain[h];
    for (int i = 0; i < scan_keys; ++i) {
      const std::int16_t s = static_cast<std::int16_t>(multiply_round(saturate(16 * score[i] + bias), lanes[i]));
      score[i] = s;
      level[i] = std::max(level[i], saturate(s - t));
      sure[i] = static_cast<std::int16_t>(sure[i] | (saturate(s + reach[i]) >= c ? 1 : 0));
    }
  }
  out.even = out.odd = 0;
  for (int i = 0; i < scan_keys; ++i) {
    const std::int16_t l = saturate(level[i] + reach[i]);
    out.level[i] = sure[i] != 0 ? std::max(l, q.sure_level) : l;
  }
  for (int i = 0; i < scan_keys; ++i) {
    const int noise = multiply_round(out.noise[i], q.noise_factor);
    const std::uint32_t take = saturate(out.level[i] + noise) >= 0 && out.level[i] >= q.cut ? 1u : 0u;
    (i < 32 ? out.even : out.odd) |= take << (i & 31);
  }
}

inline index_t scan_blocks_portable(const scan_query& q, const code_blocks& codes, index_t first, index_t last,
                                    bool all, scanned_block& out) noexcept {
  for (; first < last; ++first) {
    const std::byte* at = codes.first + static_cast<std::size_t>(first) * codes.stride;
    std::int16_t threshold[scan_heads], certain[scan_heads];
    block_thresholds(q, block_radius(codes, at), threshold, certain);
    int h = 0;
    for (; h + 4 <= q.heads; h += 4) sum_entries<4>(q, codes, at, h, out);
    const int rest = q.heads - h;
    if (rest == 3) sum_entries<3>(q, codes, at, h, out);
    if (rest == 2) sum_entries<2>(q, codes, at, h, out);
    if (rest == 1) sum_entries<1>(q, codes, at, h, out);
    out.noise = noise() + noise_place(q.numbers, first);
    judge(q, block_lanes(codes, at), threshold, certain, out);
    if (all || (out.even | out.odd) != 0) break;
  }
  return first;
}

// Scans from block `first` on up to one of which a key is taken (or, with `all`, one block), and returns which; `last`
// if there is none.
using scan_function = index_t (*)(const scan_query&, const code_blocks&, index_t first, index_t last, bool all,
                                  scanned_block&) noexcept;

[[nodiscard]] inline scan_function scan_for(isa how) noexcept {
#if VATTN_DISPATCH
  if (how >= isa::avx512_bf16) return scan_blocks_avx512;
  if (how >= isa::avx2) return scan_blocks_avx2;
#endif
#if VATTN_NEON
  if (how == isa::neon) return scan_blocks_neon;
#endif
  static_cast<void>(how);
  return scan_blocks_portable;
}

// Each member is stored once: a pick put together elsewhere and copied waits for its small stores.
inline void pick(const scanned_block& b, const scan_query& q, const code_blocks& codes, index_t block, int lane,
                 scan_pick& p) noexcept {
  const std::int16_t* lanes = block_lanes(codes, codes.first + static_cast<std::size_t>(block) * codes.stride);
  p.reach = lanes[scan_keys + lane];
  p.radius = static_cast<std::uint16_t>(lanes[2 * scan_keys + lane]);
  p.row = static_cast<std::uint32_t>(block * scan_keys + (lane < 32 ? 2 * lane : 2 * (lane - 32) + 1));
  p.level = b.level[lane];
  p.margin = saturate(p.level + multiply_round(b.noise[lane], q.noise_factor));
  for (int h = 0; h < scan_heads; ++h) p.score[static_cast<std::size_t>(h)] = b.score[h][lane];
}

}  // namespace detail

/// Probabilities with which keys of the n <= block_rows levels `highest`, highest − 1, … are taken (whole numbers of
/// steps): min(1, e^{level·step}) on the grid of the noise, so that weights are those of the draw; at least half a cell
/// of it. `out` [block_rows].
inline void inclusion(isa how, std::int16_t noise_factor, int highest, index_t n, float* out) noexcept {
  // round(noise·f/2^15) >= −level  ⟺  noise >= (−level·2^15 − 2^14)/f, for whole noise.
  const auto f = static_cast<float>(noise_factor);
  const auto whole = [](float x) { return static_cast<float>(static_cast<int>(x)); };  // unlike floor(), in vectors
  for (int i = 0; i < static_cast<int>(n); ++i) {
    const float x = (static_cast<float>(i - highest) * 32768.0f - 16384.0f) / f;
    out[i] = std::max(0.0f, whole(x) + (whole(x) < x ? 1.0f : 0.0f)) * (-1.0f / 1024);
  }
  static_cast<void>(block_exponentials(how, out, n, 0));
  for (index_t i = 0; i < n; ++i) out[i] = std::max(0.5f, whole(65536 * out[i] + 0.5f)) / 65536;
}

/// Scans blocks [first, last) and appends those taken to `out` (rows count from block 0; within a block the even ones
/// come first). Returns how many are in `out`, or −1 where it is full. The same numbers of steps for every instruction
/// set.
[[nodiscard]] inline index_t scan(isa how, const scan_query& q, const code_blocks& codes, index_t first, index_t last,
                                  scan_pick* out, index_t have, index_t capacity) noexcept {
  const detail::scan_function function = detail::scan_for(how);
  detail::scanned_block b{};  // scores of heads that are not there are 0
  for (index_t block = function(q, codes, first, last, false, b); block < last;
       block = function(q, codes, block + 1, last, false, b)) {
    if (have + scan_keys > capacity) return -1;
    std::uint64_t mask = std::uint64_t{b.odd} << 32 | b.even;
    for (; mask != 0; mask &= mask - 1) detail::pick(b, q, codes, block, std::countr_zero(mask), out[have++]);
  }
  return have;
}

/// All keys of a block, taken or not, ascending rows: what a slice needs of them.
struct scanned_keys {
  alignas(64) std::int16_t score[scan_heads][scan_keys];  ///< steps
  alignas(64) std::int16_t level[scan_keys], reach[scan_keys];
  alignas(64) std::uint16_t radius[scan_keys];
};
inline void scan_all(isa how, const scan_query& q, const code_blocks& codes, index_t block,
                     scanned_keys& out) noexcept {
  detail::scanned_block b;
  static_cast<void>(detail::scan_for(how)(q, codes, block, block + 1, true, b));
  const std::int16_t* lanes = detail::block_lanes(codes, codes.first + static_cast<std::size_t>(block) * codes.stride);
  const auto in_order = [](const std::int16_t* from, auto* to) {
    for (int i = 0; i < 32; ++i) {
      to[2 * i] = static_cast<std::remove_reference_t<decltype(*to)>>(from[i]);
      to[2 * i + 1] = static_cast<std::remove_reference_t<decltype(*to)>>(from[32 + i]);
    }
  };
  in_order(b.level, out.level);
  in_order(lanes + scan_keys, out.reach);
  in_order(lanes + 2 * scan_keys, out.radius);
  for (int h = 0; h < q.heads; ++h) in_order(b.score[h], out.score[h]);
}

}  // namespace vattn::VATTN_ABI::kernel

#include "vattn/macros_pop.hpp"
