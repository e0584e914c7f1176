// What the scan of an index asks for the heads of a group: tables in whole steps, and thresholds in nats made steps.
#include "vattn/macros_push.hpp"
#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <span>

#include "vattn/index/cell_codes.hpp"
#include "vattn/kernel/cell_scan.hpp"

namespace vattn::VATTN_ABI {

/// Thresholds of a sample: π = min(1, max(base, max_h max(e^{s_h + log r − plain_h}, e^{s_h + zσ_h + log r −
/// floor_h}))), s the scores of k − μ, r = max(‖v − c‖, away) over the reach unit, σ_h = ‖q_h‖ρ/sqrt(P).
struct cell_thresholds {
  std::array<double, kernel::scan_heads> plain{}, floor{};  ///< nats; +inf: the rule takes nothing
  double base = 0;                                          ///< probability that every cell has at least
  double z = 0;                                             ///< errors by which the floor lets a score be too low
  double away = 0;                                          ///< least distance that counts, over the reach unit
};

/// A cell_query, and the units of its scores. One step for all heads.
struct cell_tables {
  kernel::cell_query query;
  float step = 1;         ///< nats
  float table_error = 0;  ///< of a score by the tables' rounding, standard deviation, nats
  float unit_error = 0;   ///< 1/sqrt(P) times the ρ of radius 32767
  std::array<float, kernel::scan_heads> norm{}, offset{};  ///< ‖q‖; ⟨q, μ⟩, since scores are of k − μ

  [[nodiscard]] float score(std::int16_t steps) const noexcept { return static_cast<float>(steps) * step; }
  /// Standard deviation of a score, nats.
  [[nodiscard]] float error(index_t h, std::int16_t radius) const noexcept {
    return norm[static_cast<std::size_t>(h)] * unit_error * static_cast<float>(radius) * (1.0f / 32767);
  }
  /// log(r/unit) as the scan has it, without the least.
  [[nodiscard]] float log_reach(std::int16_t reach) const noexcept { return static_cast<float>(reach) * (1.0f / 512); }

  /// Tables and their upper parts.
  [[nodiscard]] static std::size_t table_bytes(const cell_layout& codes, index_t heads) noexcept {
    return static_cast<std::size_t>(heads * codes.groups) * (64 + 16);
  }
  /// Floats of scratch for `make`.
  [[nodiscard]] static std::size_t scratch_size(const cell_layout& codes, index_t heads) noexcept {
    return static_cast<std::size_t>(heads * codes.groups) * 64 + codes.width;
  }

  /// `queries` [heads, dim], scaled; `tables` [table_bytes()], kept by the query; `scratch` [scratch_size()]. False: a
  /// query is not finite.
  [[nodiscard]] bool make(const cell_codes& codes, const float* queries, index_t heads, std::span<std::uint8_t> tables,
                          std::span<float> scratch) noexcept {
    using entries = Eigen::Array<float, 64, 1>;
    using kernel::scan_query;
    const auto groups = static_cast<std::size_t>(codes.layout().groups), size = groups * 64;
    const std::span<float> rotated = scratch.last(codes.layout().width);
    float delta = 0;
    for (index_t h = 0; h < heads; ++h) {
      const auto i = static_cast<std::size_t>(h);
      offset[i] = codes.rotate(queries + h * codes.dim(), rotated);
      const float norm2 =
          kernel::const_float_map(rotated.data(), static_cast<Eigen::Index>(rotated.size())).squaredNorm();
      if (!std::isfinite(norm2) || !std::isfinite(offset[i])) return false;
      norm[i] = std::sqrt(norm2);
      codes.tabulate(rotated, scratch.subspan(i * size, size));
      float all = 0;
      for (std::size_t g = 0; g < groups; ++g) {
        const Eigen::Map<const entries> t(scratch.data() + i * size + g * 64);
        const float range = t.maxCoeff() - t.minCoeff();
        delta = std::max(delta, range / (scan_query::largest_entry - 1));  // two parts are rounded

        all += range;
      }
      // Entries are rounded up by 1 each at most.
      delta = std::max(delta, all / static_cast<float>(scan_query::largest_sum - codes.layout().groups));
    }
    const float unit = codes.units().scale;
    delta = std::max(delta, 16 * scan_query::smallest_step / unit);
    step = delta * unit / 16;
    // A number's bits add up, so an entry is what bits 0 to 3 add and what 4 and 5 do, each in whole steps.
    std::uint8_t* const upper = tables.data() + static_cast<std::size_t>(heads) * size;
    for (index_t h = 0; h < heads; ++h) {
      const auto i = static_cast<std::size_t>(h);
      float bias = 0;
      for (std::size_t g = 0; g < groups; ++g) {
        const std::size_t at = i * size + g * 64;
        const float* const t = scratch.data() + at;
        const Eigen::Map<const Eigen::Array<float, 16, 1>> low_bits(t);
        const float low = low_bits.minCoeff();
        const std::array<float, 4> high_bits{0, t[16] - t[0], t[32] - t[0], t[48] - t[0]};
        const float high = *std::min_element(high_bits.begin(), high_bits.end());
        bias += low + high;
        const Eigen::Array<int, 16, 1> whole = ((low_bits - low) * (1 / delta) + 0.5f).cast<int>();
        std::uint8_t* const to = tables.data() + at;
        for (int k = 0; k < 4; ++k) {
          const auto add = static_cast<int>(std::lround((high_bits[static_cast<std::size_t>(k)] - high) * (1 / delta)));
          for (int e = 0; e < 16; ++e) to[16 * k + e] = static_cast<std::uint8_t>(whole[e] + add);
        }
        for (int k = 0; k < 16; ++k)
          upper[(i * groups + g) * 16 + static_cast<std::size_t>(k)] =
              static_cast<std::uint8_t>(k < 4 ? to[16 * k] - to[0] : 0);
      }
      query.scan.bias[i] = static_cast<std::int16_t>(std::lround(16 * bias / delta));
    }
    query.upper = upper;
    query.scan.tables = tables.data();
    query.scan.heads = static_cast<int>(heads);
    query.scan.noise_factor = static_cast<std::int16_t>(std::max(1l, std::lround(32768 / (1024 * step))));
    query.scan.reach_factor = static_cast<std::int16_t>(std::max(1l, std::lround(32768 / (512 * step))));
    table_error = 16 * step * std::sqrt(static_cast<float>(2 * groups) / 12) *
                  0.5f;  // α is half its unit at most, but for few keys
    unit_error = codes.units().radius / std::sqrt(static_cast<float>(codes.layout().width));
    return true;
  }

  /// Puts thresholds into the query.
  void set(const cell_thresholds& t) noexcept {
    const auto steps = [&](double nats) {
      return static_cast<std::int16_t>(std::clamp(nats / static_cast<double>(step), -32767.0, 32767.0));
    };
    for (int h = 0; h < query.scan.heads; ++h) {
      const auto i = static_cast<std::size_t>(h);
      query.plain[i] = steps(t.plain[i]);
      query.floor[i] = steps(t.floor[i]);
      query.slack[i] = steps(t.z * static_cast<double>(norm[i] * unit_error));
    }
    query.base = t.base > 0 ? steps(std::log(t.base)) : std::int16_t{-32768};
    query.scan.least_reach = t.away > 0 ? steps(std::log(t.away)) : std::int16_t{-32767};
  }
};

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
