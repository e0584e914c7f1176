// What the scan of an index asks of 64 cells, and what it finds.
#include "vattn/macros_push.hpp"
#pragma once

#include "vattn/kernel/scan_block.hpp"

namespace vattn::VATTN_ABI::kernel {

// As scan_block.hpp, with probabilities for which each key's own error counts:
//   score_h = round(α·(16·Σ_g table_h[g][code_g] + bias_h))      s in steps
//   level   = max(base, max_h max(score_h − plain_h, score_h + slack_h·ρ − floor_h) + max(reach, least_reach))
//   taken   ⟺ level + noise >= 0, noise = −ln u in steps, u the cell's number of this call
// so that a cell's probability is π = min(1, e^{level·step}) exactly: see `inclusion` in scan.hpp. For growing levels
// samples are nested.

/// α and ρ of a cell in a word, and what a scan multiplies with: both in 1/32767 of their units.
struct cell_lengths {
  static constexpr float scale_step = 64.0f / 32767, radius_step = 256.0f / 32767;
  static constexpr float most_scale = 511, most_radius = 127;

  [[nodiscard]] static constexpr std::int16_t word(unsigned scale, unsigned radius) noexcept {
    return static_cast<std::int16_t>(static_cast<std::uint16_t>(scale << 7 | radius));
  }
  [[nodiscard]] static constexpr std::int16_t scale(std::int16_t word) noexcept {
    return static_cast<std::int16_t>(static_cast<std::uint16_t>(word) >> 1 & 0x7fc0);
  }
  [[nodiscard]] static constexpr std::int16_t radius(std::int16_t word) noexcept {
    return static_cast<std::int16_t>((word & 0x7f) << 8);
  }
};

/// What a scan asks. `scan` without its thresholds.
struct cell_query {
  scan_query scan;
  std::array<std::int16_t, scan_heads> plain{}, floor{}, slack{};  ///< steps; slack those of the largest ρ
  std::int16_t base = -32768;                                      ///< level of every cell at least, steps
  /// [heads][groups][16], of tables that are sums of what bits 0 to 3 and 4 to 5 of a number add, or null: entry k < 4
  /// is table[16·k] − table[0] (mod 256), so that table[e] = table[e mod 16] + upper[e / 16]. Two shuffles of 16 bytes
  /// then do what four do for any table.
  const std::uint8_t* upper = nullptr;
};

/// A block's cells, in lane order.
struct scanned_cells : detail::scanned_block {};

namespace detail {
// Bit i to bit 2i.
[[nodiscard]] inline std::uint64_t spread_bits(std::uint64_t x) noexcept {
  x = (x | x << 16) & 0x0000ffff0000ffffu;
  x = (x | x << 8) & 0x00ff00ff00ff00ffu;
  x = (x | x << 4) & 0x0f0f0f0f0f0f0f0fu;
  x = (x | x << 2) & 0x3333333333333333u;
  return (x | x << 1) & 0x5555555555555555u;
}
}  // namespace detail

}  // namespace vattn::VATTN_ABI::kernel

#include "vattn/macros_pop.hpp"
