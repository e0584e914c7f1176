// The scan of key codes: scores of 64 keys for the heads of a group, and which of the keys to take.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "vattn/kernel/block.hpp"
#include "vattn/kernel/isa.hpp"
#include "vattn/sample/philox.hpp"

#if VATTN_DISPATCH
#include <immintrin.h>
#endif

namespace vattn::kernel {

inline constexpr index_t scan_keys = 64;  ///< keys of a block
inline constexpr int scan_heads = 8;      ///< query heads that one scan serves, at most

/// Blocks of codes; sketch/block_codes.hpp has the format.
struct code_blocks {
  const std::byte* first = nullptr;
  std::size_t stride = 0;  ///< bytes from block to block
  int planes = 0, groups = 0;
};

// Everything that the scan adds is an integer number of steps: `step` nats, one for all heads.
//   score_h = round(α·(16·Σ_g table_h[g][code_g] + bias_h))      s in steps
//   level   = max_h (score_h − threshold_h(block)) + max(reach, least_reach), at least sure_level where
//             score_h + max(reach, least_reach) >= certain_h(block): the largest log inclusion probability that a head
//             gives the key, cut at ±2^15 steps
//   taken   ⟺ level + noise >= 0 and level >= cut, noise = −ln u in steps, u the key's number of this call
//   threshold_h(block) = min(plain_h, floor_h − slack_h·ρ(block)),   certain_h(block) = floor_h − sure_h·ρ(block)
// so that a key's probability is π = min(1, e^{level·step}) exactly: see `inclusion`.

/// What a scan asks. Spans are the caller's.
struct scan_query {
  const std::uint8_t* tables =
      nullptr;  ///< [heads][groups][64], each at most `largest_entry`, a key's sum at most `largest_sum`
  int heads = 0;
  std::array<std::int16_t, scan_heads> bias{};
  std::array<float, scan_heads> plain{}, floor{}, slack{}, sure{};  ///< steps; the last two a unit of ρ
  std::int16_t noise_factor = 0, reach_factor = 0;                  ///< 2^15·steps a unit of 1/1024 and 1/512 nat
  std::int16_t least_reach = 0;                                     ///< steps
  std::int16_t cut = 0;                                             ///< steps
  std::int16_t sure_level = 0;                                      ///< steps, >= 0: of keys that are certain
  std::uint64_t numbers = 0;                                        ///< names the call's numbers u

  /// Eight of them fit a byte.
  static constexpr int largest_entry = 31;
  /// 16 times a key's sum is a number of 16 bits.
  static constexpr int largest_sum = 2047;
  /// Step that `noise_factor` and `reach_factor` allow, nats.
  static constexpr float smallest_step = 1.0f / 256;
};

/// A key that was taken.
struct scan_pick {
  std::uint32_t row;
  std::int16_t level, reach;  ///< steps; as in the block
  std::int16_t margin;        ///< level + noise: it would be taken too were all thresholds that much higher
  std::uint16_t radius;       ///< as in the block
  std::array<std::int16_t, scan_heads> score;
};

namespace detail {

/// −ln u in 1/1024 nat, rounded down, for each u = (k + ½)/2^16 once, in random order. A block's numbers are 64
/// consecutive ones from a place that is random for the block and call, so over calls each key sees each equally often.
struct noise_table {
  static constexpr std::uint32_t size = 1u << 16;
  std::array<std::int16_t, size + scan_keys> value;
  noise_table() noexcept {
    for (std::uint32_t k = 0; k < size; ++k)
      value[k] = static_cast<std::int16_t>(-1024 * std::log((static_cast<double>(k) + 0.5) / size));
    random_stream random({.seed = 0x6e6f697365}, 0);
    for (std::uint32_t k = size; k > 1; --k) std::swap(value[k - 1], value[random.below(k)]);
    std::copy_n(value.begin(), scan_keys, value.begin() + size);
  }
};
[[nodiscard]] inline const std::int16_t* noise() noexcept {
  static const noise_table table;
  return table.value.data();
}
// The finish of splitmix64.
[[nodiscard]] inline std::uint64_t scrambled(std::uint64_t x) noexcept {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}
[[nodiscard]] inline std::uint32_t noise_place(std::uint64_t numbers, index_t block) noexcept {
  return static_cast<std::uint32_t>(scrambled(numbers + static_cast<std::uint64_t>(block) * 0x9E3779B97F4A7C15u) >> 48);
}

[[nodiscard]] inline std::int16_t saturate(int x) noexcept {
  return static_cast<std::int16_t>(std::clamp(x, -32768, 32767));
}
// What vpmulhrsw computes.
[[nodiscard]] inline int multiply_round(int a, int b) noexcept { return (a * b + 16384) >> 15; }

inline void block_thresholds(const scan_query& q, float radius, std::int16_t* out, std::int16_t* certain) noexcept {
  const auto whole = [](double t) {  // towards zero, without a call of floor(): what is stated is what is drawn with
    return static_cast<std::int16_t>(std::max(-32767.0, std::min(32767.0, t)));
  };
  // In double products are exact, so that it is the same with and without fused multiply-add.
  const auto rho = static_cast<double>(radius);
  for (int h = 0; h < q.heads; ++h) {
    const auto i = static_cast<std::size_t>(h);
    const auto floor = static_cast<double>(q.floor[i]);
    out[h] = whole(std::min(static_cast<double>(q.plain[i]), floor - static_cast<double>(q.slack[i]) * rho));
    certain[h] = whole(floor - static_cast<double>(q.sure[i]) * rho);
  }
}

struct scanned_block {
  alignas(64) std::int16_t score[scan_heads][scan_keys];  // lane order
  alignas(64) std::int16_t level[scan_keys];
  std::uint32_t even = 0, odd = 0;  // taken
  const std::int16_t* noise = nullptr;
};

[[nodiscard]] inline float block_radius(const code_blocks& codes, const std::byte* at) noexcept {
  float r;
  std::memcpy(&r, at + static_cast<std::size_t>(codes.planes) * scan_keys + 6 * scan_keys, sizeof r);
  return r;
}

inline void scan_block_portable(const scan_query& q, const code_blocks& codes, index_t block,
                                scanned_block& out) noexcept {
  const std::byte* at = codes.first + static_cast<std::size_t>(block) * codes.stride;
  const auto* planes = reinterpret_cast<const std::uint8_t*>(at);
  const auto* lanes = reinterpret_cast<const std::int16_t*>(at + static_cast<std::size_t>(codes.planes) * scan_keys);
  const std::int16_t* numbers = out.noise = noise() + noise_place(q.numbers, block);
  std::int16_t threshold[scan_heads], certain[scan_heads];
  block_thresholds(q, block_radius(codes, at), threshold, certain);
  out.even = out.odd = 0;
  for (int lane = 0; lane < scan_keys; ++lane) {
    const int key = lane < 32 ? 2 * lane : 2 * (lane - 32) + 1;
    std::array<int, scan_heads> sum{};
    for (int g = 0; g < codes.groups; ++g) {
      const auto plane = [&](int p) { return static_cast<unsigned>(planes[p * scan_keys + key]); };
      const int e = 3 * (g - codes.planes);
      const unsigned number =
          g < codes.planes ? plane(g) & 63u : plane(e) >> 6 | (plane(e + 1) >> 6) << 2 | (plane(e + 2) >> 6) << 4;
      const std::uint8_t* table = q.tables + g * 64 + static_cast<int>(number);
      for (int h = 0; h < q.heads; ++h) sum[static_cast<std::size_t>(h)] += table[h * codes.groups * 64];
    }
    const int reach = std::max(multiply_round(lanes[scan_keys + lane], q.reach_factor), int{q.least_reach});
    int level = -32768;
    bool sure = false;
    for (int h = 0; h < q.heads; ++h) {
      const auto i = static_cast<std::size_t>(h);
      const int raw = saturate(16 * sum[i] + q.bias[i]);
      out.score[h][lane] = static_cast<std::int16_t>(multiply_round(raw, lanes[lane]));
      level = std::max<int>(level, saturate(out.score[h][lane] - threshold[h]));
      sure |= saturate(out.score[h][lane] + reach) >= certain[h];
    }
    level = saturate(level + reach);
    if (sure) level = std::max<int>(level, q.sure_level);
    out.level[lane] = static_cast<std::int16_t>(level);
    const int noise = multiply_round(numbers[lane], q.noise_factor);
    const std::uint32_t take = saturate(level + noise) >= 0 && level >= q.cut ? 1u : 0u;
    (lane < 32 ? out.even : out.odd) |= take << (lane & 31);
  }
}

#if VATTN_DISPATCH
#define VATTN_SCAN VATTN_TARGET_AVX512_BF16

#define VATTN_SCAN_INLINE VATTN_SCAN __attribute__((always_inline)) inline
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

// Adds the table entries of N groups, at most eight, so that their sum fits a byte.
template <int H, int N, bool Spread>
VATTN_SCAN_INLINE void add_groups(const std::byte* planes, const std::uint8_t* table, std::size_t table_stride,
                                  int first, key_sums<H>& to) noexcept {
  static_assert(N * scan_query::largest_entry < 256);
  constexpr __mmask64 all = ~__mmask64{0};
  __m512i sum[std::size_t{H}];
  VATTN_UNROLL for (int i = 0; i < N; ++i) {
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
  __m512d plain, floor, slack, sure;
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
                   whole_steps(_mm512_sub_pd(v.floor, _mm512_mul_pd(v.sure, rho))));
}

template <int H>
VATTN_SCAN_INLINE void scan_block_512(const scan_query& q, const threshold_vectors& v, const code_blocks& codes,
                                      index_t block, scanned_block& out) noexcept {
  const std::byte* at = codes.first + static_cast<std::size_t>(block) * codes.stride;
  const std::byte* lanes = at + static_cast<std::size_t>(codes.planes) * scan_keys;
  // A core alone does not ask for enough lines to get what the memory can deliver.
  prefetch_row<2>(at + 8 * codes.stride, codes.stride);
  std::int16_t threshold[2 * scan_heads];
  const std::int16_t* certain = threshold + scan_heads;
  vector_thresholds(v, block_radius(codes, at), threshold);

  key_sums<H> sums;
  VATTN_UNROLL for (int h = 0; h < H; ++h) sums.both[h] = sums.odd[h] = _mm512_setzero_si512();
  const std::size_t stride = static_cast<std::size_t>(codes.groups) * 64;
  int g = 0;
  for (; g + 8 <= codes.planes; g += 8) add_groups<H, 8, false>(at, q.tables + g * 64, stride, g, sums);
  for (; g < codes.planes; ++g) add_groups<H, 1, false>(at, q.tables + g * 64, stride, g, sums);
  for (; g + 5 <= codes.groups; g += 5) add_groups<H, 5, true>(at, q.tables + g * 64, stride, g - codes.planes, sums);
  for (; g < codes.groups; ++g) add_groups<H, 1, true>(at, q.tables + g * 64, stride, g - codes.planes, sums);
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
VATTN_SCAN inline index_t scan_blocks_avx512(const scan_query& q, const code_blocks& codes, index_t first, index_t last,
                                             bool all, scanned_block& out) noexcept {
  const threshold_vectors v{as_doubles(q.plain), as_doubles(q.floor), as_doubles(q.slack), as_doubles(q.sure)};
  for (; first < last; ++first) {
    scan_block_512<H>(q, v, codes, first, out);
    if (all || (out.even | out.odd) != 0) break;
  }
  return first;
}
#undef VATTN_SCAN
#undef VATTN_SCAN_INLINE
#endif

inline index_t scan_blocks_portable(const scan_query& q, const code_blocks& codes, index_t first, index_t last,
                                    bool all, scanned_block& out) noexcept {
  for (; first < last; ++first) {
    scan_block_portable(q, codes, first, out);
    if (all || (out.even | out.odd) != 0) break;
  }
  return first;
}

// Scans from block `first` on up to one of which a key is taken (or, with `all`, one block), and returns which; `last`
// if there is none.
using scan_function = index_t (*)(const scan_query&, const code_blocks&, index_t first, index_t last, bool all,
                                  scanned_block&) noexcept;

[[nodiscard]] inline scan_function scan_for(isa how, int heads) noexcept {
#if VATTN_DISPATCH
  if (how >= isa::avx512_bf16) {
    switch (heads) {
      case 1:
        return scan_blocks_avx512<1>;
      case 2:
        return scan_blocks_avx512<2>;
      case 3:
        return scan_blocks_avx512<3>;
      case 4:
        return scan_blocks_avx512<4>;
      case 5:
        return scan_blocks_avx512<5>;
      case 6:
        return scan_blocks_avx512<6>;
      case 7:
        return scan_blocks_avx512<7>;
      case 8:
        return scan_blocks_avx512<8>;
      default:
        break;
    }
  }
#endif
  static_cast<void>(how), static_cast<void>(heads);
  return scan_blocks_portable;
}

inline scan_pick pick_of(const scanned_block& b, const scan_query& q, const code_blocks& codes, index_t block,
                         int lane) noexcept {
  const auto* lanes =
      reinterpret_cast<const std::int16_t*>(codes.first + static_cast<std::size_t>(block) * codes.stride +
                                            static_cast<std::size_t>(codes.planes) * scan_keys);
  scan_pick p{};
  p.reach = lanes[scan_keys + lane];
  p.radius = static_cast<std::uint16_t>(lanes[2 * scan_keys + lane]);
  p.row = static_cast<std::uint32_t>(block * scan_keys + (lane < 32 ? 2 * lane : 2 * (lane - 32) + 1));
  p.level = b.level[lane];
  p.margin = saturate(p.level + multiply_round(b.noise[lane], q.noise_factor));
  for (int h = 0; h < q.heads; ++h) p.score[static_cast<std::size_t>(h)] = b.score[h][lane];
  return p;
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
  const detail::scan_function function = detail::scan_for(how, q.heads);
  detail::scanned_block b;
  for (index_t block = function(q, codes, first, last, false, b); block < last;
       block = function(q, codes, block + 1, last, false, b)) {
    if (have + scan_keys > capacity) return -1;
    std::uint64_t mask = std::uint64_t{b.odd} << 32 | b.even;
    for (; mask != 0; mask &= mask - 1) out[have++] = detail::pick_of(b, q, codes, block, std::countr_zero(mask));
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
  static_cast<void>(detail::scan_for(how, q.heads)(q, codes, block, block + 1, true, b));
  const std::byte* lanes =
      codes.first + static_cast<std::size_t>(block) * codes.stride + static_cast<std::size_t>(codes.planes) * scan_keys;
  const auto in_order = [](const std::int16_t* from, auto* to) {
    for (int i = 0; i < 32; ++i) {
      to[2 * i] = static_cast<std::remove_reference_t<decltype(*to)>>(from[i]);
      to[2 * i + 1] = static_cast<std::remove_reference_t<decltype(*to)>>(from[32 + i]);
    }
  };
  in_order(b.level, out.level);
  in_order(reinterpret_cast<const std::int16_t*>(lanes) + scan_keys, out.reach);
  in_order(reinterpret_cast<const std::int16_t*>(lanes) + 2 * scan_keys, out.radius);
  for (int h = 0; h < q.heads; ++h) in_order(b.score[h], out.score[h]);
}

}  // namespace vattn::kernel
