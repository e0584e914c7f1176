// What the scan of key codes reads and writes: blocks of codes, what a query asks of them, one block's result.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "vattn/base/philox.hpp"
#include "vattn/kernel/isa.hpp"
#include "vattn/kernel/row.hpp"

namespace vattn::VATTN_ABI::kernel {

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
//   threshold_h(block) = min(plain_h, floor_h − slack_h·ρ(block)),   certain_h(block) = sure_floor_h − sure_h·ρ(block)
// so that a key's probability is π = min(1, e^{level·step}) exactly: see `inclusion`.

/// What a scan asks. Spans are the caller's.
struct scan_query {
  const std::uint8_t* tables =
      nullptr;  ///< [heads][groups][64], each at most `largest_entry`, a key's sum at most `largest_sum`
  int heads = 0;
  std::array<std::int16_t, scan_heads> bias{};
  std::array<float, scan_heads> plain{}, floor{}, slack{}, sure_floor{}, sure{};  ///< steps; slack and sure a unit of ρ
  std::int16_t noise_factor = 0, reach_factor = 0;  ///< 2^15·steps a unit of 1/1024 and 1/512 nat
  std::int16_t least_reach = 0;                     ///< steps
  std::int16_t cut = 0;                             ///< steps
  std::int16_t sure_level = 0;                      ///< steps, >= 0: of keys that are certain
  std::uint64_t numbers = 0;                        ///< names the call's numbers u

  /// Eight of them fit a byte.
  static constexpr int largest_entry = 31;
  /// 16 times a key's sum is a number of 16 bits.
  static constexpr int largest_sum = 2047;
  /// Step that `noise_factor` and `reach_factor` allow, nats.
  static constexpr float smallest_step = 1.0f / 256;
};

/// Asks for a block of codes.
VATTN_ALWAYS_INLINE void fetch_codes(const code_blocks& codes, index_t block) noexcept {
  prefetch_row<2>(codes.first + static_cast<std::size_t>(block) * codes.stride, codes.stride);
}

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
    certain[h] = whole(static_cast<double>(q.sure_floor[i]) - static_cast<double>(q.sure[i]) * rho);
  }
}

struct scanned_block {
  alignas(64) std::int16_t score[scan_heads][scan_keys];  // lane order
  alignas(64) std::int16_t level[scan_keys];
  std::uint32_t even = 0, odd = 0;  // taken
  const std::int16_t* noise = nullptr;
};

// Of the block that begins at `at`: its numbers of 16 bits, and its largest ρ.
[[nodiscard]] inline const std::int16_t* block_lanes(const code_blocks& codes, const std::byte* at) noexcept {
  return reinterpret_cast<const std::int16_t*>(at + static_cast<std::size_t>(codes.planes) * scan_keys);
}
[[nodiscard]] inline float block_radius(const code_blocks& codes, const std::byte* at) noexcept {
  float r;
  std::memcpy(&r, block_lanes(codes, at) + 3 * scan_keys, sizeof r);
  return r;
}

}  // namespace detail
}  // namespace vattn::VATTN_ABI::kernel

#include "vattn/macros_pop.hpp"
