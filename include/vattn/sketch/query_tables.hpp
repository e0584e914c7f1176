// What the scan of key codes asks for the heads of a group: their tables in whole steps, and what scores mean.
#include "vattn/macros_push.hpp"
#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <span>

#include "vattn/kernel/scan.hpp"
#include "vattn/sketch/block_codes.hpp"

namespace vattn::VATTN_ABI::sketch {

/// A scan_query without its thresholds, and the units of its scores. One step for all heads.
struct query_tables {
  kernel::scan_query query;
  float step = 1;         ///< nats
  float table_error = 0;  ///< of a score by the tables' rounding, standard deviation, nats
  float slope = 0;        ///< 1/sqrt(P): a score's standard deviation is ‖q‖·slope·ρ
  std::array<float, kernel::scan_heads> norm{}, offset{};  ///< ‖q‖; ⟨q, μ⟩, since scores are of k − μ

  [[nodiscard]] float score(std::int16_t steps) const noexcept { return static_cast<float>(steps) * step; }
  /// σ a unit of ρ.
  [[nodiscard]] float error(index_t h) const noexcept { return norm[static_cast<std::size_t>(h)] * slope; }
  /// log(max(r, K)/unit), as the scan has it.
  [[nodiscard]] float log_reach(std::int16_t reach) const noexcept {
    return step *
           static_cast<float>(std::max(kernel::detail::multiply_round(reach, query.reach_factor), +query.least_reach));
  }

  /// Floats of scratch for `make`.
  [[nodiscard]] static std::size_t scratch_size(const block_codes& codes, index_t heads) noexcept {
    return static_cast<std::size_t>(heads) * static_cast<std::size_t>(codes.groups()) * 64 + codes.width();
  }

  /// `queries` [heads, dim], scaled; `tables` [heads, groups, 64], kept by the query; `scratch` [scratch_size()].
  /// False: a query is not finite.
  [[nodiscard]] bool make(const block_codes& codes, const float* queries, index_t heads, index_t dim,
                          std::span<std::uint8_t> tables, std::span<float> scratch) noexcept {
    using entries = Eigen::Array<float, 64, 1>;
    const auto size = static_cast<std::size_t>(codes.groups()) * 64;
    const std::span<float> rotated = scratch.last(codes.width());
    float delta = 0;
    for (index_t h = 0; h < heads; ++h) {
      const std::span<float> table = scratch.subspan(static_cast<std::size_t>(h) * size, size);
      codes.tabulate(queries + h * dim, rotated, table);
      const float length = kernel::norm({rotated.data(), static_cast<Eigen::Index>(rotated.size())});
      if (!std::isfinite(length)) return false;
      norm[static_cast<std::size_t>(h)] = length;
      offset[static_cast<std::size_t>(h)] = codes.offset(rotated);
      float all = 0;
      for (std::size_t from = 0; from < size; from += 64) {
        const Eigen::Map<const entries> t(table.data() + from);
        const float range = t.maxCoeff() - t.minCoeff();
        delta = std::max(delta, range / kernel::scan_query::largest_entry);
        all += range;
      }
      // Entries are rounded up by less than 1 each.
      delta = std::max(delta, all / static_cast<float>(kernel::scan_query::largest_sum - codes.groups()));
    }
    const float unit = std::max(codes.alpha_unit(), std::numeric_limits<float>::min());
    delta = std::max(delta, 16 * kernel::scan_query::smallest_step / unit);
    step = delta * unit / 16;
    for (index_t h = 0; h < heads; ++h) {
      float bias = 0;
      for (std::size_t from = 0; from < size; from += 64) {
        const std::size_t at = static_cast<std::size_t>(h) * size + from;
        const Eigen::Map<const entries> t(scratch.data() + at);
        const float low = t.minCoeff();
        bias += low;
        const Eigen::Array<int, 64, 1> whole = ((t - low) * (1 / delta) + 0.5f).cast<int>();
        for (int e = 0; e < 64; ++e) tables[at + static_cast<std::size_t>(e)] = static_cast<std::uint8_t>(whole[e]);
      }
      query.bias[static_cast<std::size_t>(h)] = static_cast<std::int16_t>(std::lround(16 * bias / delta));
    }
    query.tables = tables.data();
    query.heads = static_cast<int>(heads);
    query.noise_factor = static_cast<std::int16_t>(std::max(1l, std::lround(32768 / (1024 * step))));
    query.reach_factor = static_cast<std::int16_t>(std::max(1l, std::lround(32768 / (512 * step))));
    table_error = 16 * step * std::sqrt(static_cast<float>(codes.groups()) / 12);  // uniform, 16 steps a group
    slope = 1 / std::sqrt(static_cast<float>(codes.width()));
    return true;
  }
};

}  // namespace vattn::VATTN_ABI::sketch

#include "vattn/macros_pop.hpp"
