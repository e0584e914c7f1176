// What ranks tell each other before they sample: where values lie about, and what each shard weighs by its scores.
#include "vattn/macros_push.hpp"
#pragma once

#include <array>
#include <cmath>
#include <span>

#include "vattn/dist/shard_format.hpp"
#include "vattn/estimate/strata.hpp"

namespace vattn::VATTN_ABI::dist {

/// The messages of all ranks of one group: rank r's begins at first + r·stride.
struct messages {
  const std::byte* first = nullptr;
  std::size_t stride = 0;
  index_t ranks = 1;
  [[nodiscard]] const std::byte* of(index_t r) const noexcept { return first + static_cast<std::size_t>(r) * stride; }
};

/// Bytes of floats, up to where doubles may follow.
[[nodiscard]] constexpr std::size_t padded_floats(index_t count) noexcept {
  return (static_cast<std::size_t>(count) * sizeof(float) + 7) / 8 * 8;
}

/// Of a shard, for the heads of a group.
struct shard_opening {
  double tokens = 0;  ///< that the queries see
  double cells = 0;   ///< that are scanned
  double unit = 1;    ///< of its index's distances
  bool samples = false;
  bool remembers = false;  ///< it may begin where its last step ended
  /// log Σ e^s‖v − c‖ and log Σ e^s over the cells, as their scores have it.
  std::array<double, max_group> mass, sum;

  [[nodiscard]] static std::size_t bytes(index_t heads, index_t dv) noexcept {
    return (fixed + 2 * static_cast<std::size_t>(heads)) * sizeof(double) + padded_floats(dv);
  }
  /// The message; `centre` [dv]: of the index's values.
  void write(index_t heads, const float* centre, index_t dv, std::span<std::byte> to) const noexcept {
    wire_writer out(to);
    const double all[fixed] = {tokens, cells, unit, samples ? 1.0 : 0.0, remembers ? 1.0 : 0.0};
    out.put(all, fixed);
    out.put(mass.data(), heads);
    out.put(sum.data(), heads);
    out.put(centre, dv);
  }
  [[nodiscard]] static shard_opening read(const std::byte* from, index_t heads) noexcept {
    wire_reader in(from);
    const double* const all = in.look<double>(fixed);
    shard_opening o{all[0], all[1], all[2], all[3] != 0, all[4] != 0, {}, {}};
    in.get(o.mass.data(), heads);
    in.get(o.sum.data(), heads);
    return o;
  }
  /// Of a message: without reading the rest.
  [[nodiscard]] static double unit_of(const std::byte* from) noexcept {
    return wire_reader(from).look<double>(fixed)[2];
  }
  [[nodiscard]] static const float* centre_of(const std::byte* from, index_t heads) noexcept {
    return reinterpret_cast<const float*>(from + (fixed + 2 * static_cast<std::size_t>(heads)) * sizeof(double));
  }

 private:
  static constexpr index_t fixed = 5;
};

/// log(e^a + e^b).
[[nodiscard]] inline double log_add(double a, double b) noexcept {
  const double top = a > b ? a : b;
  return top > -stats::infinity ? top + std::log(std::exp(a - top) + std::exp(b - top)) : top;
}

}  // namespace vattn::VATTN_ABI::dist

#include "vattn/macros_pop.hpp"
