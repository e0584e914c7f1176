// Rows that are no plain consecutive elements: a row type says how to decode a part, and the arithmetic follows.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>

#include "vattn/kernel/row.hpp"

namespace vattn::VATTN_ABI::kernel {

/// A row of this namespace with `size()` and `decode(first, count, out)`: out[j] = row[first + j], where `first` is a
/// multiple of `tile` and count <= tile. It then models `kernel::row` by the functions below.
template <class R>
concept decoded = requires(const R& r, std::size_t j, float* out) {
  { r.size() } -> std::convertible_to<std::size_t>;
  { r.decode(j, j, out) } noexcept;
};

namespace detail {
template <decoded R, class Visit>
inline void for_each_tile(const R& row, Visit&& visit) noexcept {
  float buffer[tile];
  const std::size_t size = row.size();
  for (std::size_t j = 0; j < size; j += tile) {
    const std::size_t count = std::min(tile, size - j);
    row.decode(j, count, buffer);
    visit(j, const_float_map(buffer, static_cast<Eigen::Index>(count)));
  }
}
}  // namespace detail

/// out[j] = row[j]
template <decoded R>
inline void load(const R& row, float* out) noexcept {
  const std::size_t size = row.size();
  for (std::size_t j = 0; j < size; j += tile) row.decode(j, std::min(tile, size - j), out + j);
}

/// Σ_j q[j]·row[j], in float.
template <decoded R>
[[nodiscard]] inline float dot(const float* q, const R& row) noexcept {
  float sum = 0;
  detail::for_each_tile(row,
                        [&](std::size_t j, const auto& part) { sum += const_float_map(q + j, part.size()).dot(part); });
  return sum;
}

/// acc[j] += w·row[j]
template <decoded R>
inline void axpy(float w, const R& row, float* acc) noexcept {
  detail::for_each_tile(row, [&](std::size_t j, const auto& part) { float_map(acc + j, part.size()) += w * part; });
}

/// ‖row‖², in float.
template <decoded R>
[[nodiscard]] inline float squared_norm(const R& row) noexcept {
  float sum = 0;
  detail::for_each_tile(row, [&](std::size_t, const auto& part) { sum += part.squaredNorm(); });
  return sum;
}

/// ‖row − centre‖², in float.
template <decoded R>
[[nodiscard]] inline float squared_distance(const R& row, const float* centre) noexcept {
  float sum = 0;
  detail::for_each_tile(row, [&](std::size_t j, const auto& part) {
    sum += (part - const_float_map(centre + j, part.size())).squaredNorm();
  });
  return sum;
}

}  // namespace vattn::VATTN_ABI::kernel

#include "vattn/macros_pop.hpp"
