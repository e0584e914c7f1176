// Rows in a unit: squares of numbers of any size, in float.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <type_traits>

#include "vattn/kernel/decoded.hpp"

namespace vattn::VATTN_ABI::kernel {

// Float holds numbers from 2^-126 to 2^128, and so squares of numbers from 2^-63 to 2^64 alone. What is squared is
// taken in a unit first, a power of two: that changes no digit, so results at any scale are those at scale 1 times a
// power of two. Where numbers are of ordinary size the unit is 1 and costs nothing.

/// What numbers of about this magnitude are to be multiplied by. 1 for magnitudes from 2^-12 to 2^12, for 0 and for
/// what is not finite.
[[nodiscard]] inline float unit_for(float magnitude) noexcept {
  constexpr int ordinary = 12;
  if (!(magnitude > 0) || !std::isfinite(magnitude)) return 1;
  const int e = std::ilogb(magnitude);
  return std::abs(e) <= ordinary ? 1.0f : std::ldexp(1.0f, std::clamp(-e, -126, 126));
}

/// `unit_for` the median of the magnitudes that are neither 0 nor infinite, which it reorders: one that is unlike all
/// others may overflow and is then found, but must not make the others vanish.
[[nodiscard]] inline float unit_for(std::span<float> magnitudes) noexcept {
  const auto last =
      std::remove_if(magnitudes.begin(), magnitudes.end(), [](float m) { return !(m > 0) || !std::isfinite(m); });
  if (last == magnitudes.begin()) return 1;
  const auto middle = magnitudes.begin() + (last - magnitudes.begin()) / 2;
  std::nth_element(magnitudes.begin(), middle, last);
  return unit_for(*middle);
}

/// Rows whose elements can be visited in tiles: those of the library. Others are taken as they are, in unit 1.
template <class R>
inline constexpr bool has_tiles = decoded<R>;
template <element T, std::size_t E>
inline constexpr bool has_tiles<std::span<const T, E>> = true;

namespace detail {
template <element T, std::size_t E, class Visit>
inline void for_each_tile(std::span<const T, E> row, Visit&& visit) noexcept {
  float buffer[tile];
  for (std::size_t j = 0; j < row.size(); j += tile) {
    const std::span<const T> part = std::span<const T>(row).subspan(j, std::min(tile, row.size() - j));
    kernel::load(part, buffer);  // in detail another may hide it
    visit(j, const_float_map(buffer, static_cast<Eigen::Index>(part.size())));
  }
}
}  // namespace detail

/// unit·row. A row itself.
template <row R>
struct unit_row {
  R inner;
  float unit = 1;
};

template <row R>
[[nodiscard]] inline float dot(const float* q, const unit_row<R>& r) noexcept {
  return r.unit * dot(q, r.inner);
}
template <row R>
inline void axpy(float w, const unit_row<R>& r, float* acc) noexcept {
  axpy(w * r.unit, r.inner, acc);
}
template <row R>
inline void load(const unit_row<R>& r, float* out) noexcept {
  load(r.inner, out);
  if constexpr (has_tiles<R>) {
    if (r.unit != 1) float_map(out, static_cast<Eigen::Index>(r.inner.size())) *= r.unit;
  }
}
template <row R>
[[nodiscard]] inline float squared_norm(const unit_row<R>& r) noexcept {
  if constexpr (has_tiles<R>) {
    if (r.unit != 1) {
      float sum = 0;
      detail::for_each_tile(r.inner, [&](std::size_t, const auto& part) { sum += (part * r.unit).squaredNorm(); });
      return sum;
    }
  }
  return squared_norm(r.inner);
}
/// `centre` in the unit too.
template <row R>
[[nodiscard]] inline float squared_distance(const unit_row<R>& r, const float* centre) noexcept {
  if constexpr (has_tiles<R>) {
    if (r.unit != 1) {
      float sum = 0;
      detail::for_each_tile(r.inner, [&](std::size_t j, const auto& part) {
        sum += (part * r.unit - const_float_map(centre + j, part.size())).squaredNorm();
      });
      return sum;
    }
  }
  return squared_distance(r.inner, centre);
}

/// The elements where they lie as floats; else null, and the row must be loaded.
template <row R>
[[nodiscard]] inline const float* as_floats(const R&) noexcept {
  return nullptr;
}
template <std::size_t E>
[[nodiscard]] inline const float* as_floats(const std::span<const float, E>& r) noexcept {
  return r.data();
}
template <row R>
[[nodiscard]] inline const float* as_floats(const unit_row<R>& r) noexcept {
  return r.unit == 1 ? as_floats(r.inner) : nullptr;
}

/// ‖x‖, for any x whose norm is a float.
[[nodiscard]] inline float norm(const const_float_map& x) noexcept {
  return static_cast<float>(x.cast<double>().norm());
}

namespace detail {
// sqrt(square(1)), or, where that float square has lost digits, from square(unit), the square of unit times as much.
template <class Square>
[[nodiscard]] inline float root_of(Square&& square) noexcept {
  const float s = square(1.0f);
  if (s > 0x1p-80f && s < 0x1p100f) return std::sqrt(s);
  const float unit = s < 1 ? 0x1p90f : 0x1p-70f;  // NaN: what is not finite stays so
  return std::sqrt(square(unit)) * (1 / unit);
}
}  // namespace detail

/// ‖row‖, for any row whose norm is a float.
template <row R>
[[nodiscard]] inline float norm_of(const R& r) noexcept {
  if constexpr (!has_tiles<R>) return std::sqrt(squared_norm(r));
  return detail::root_of([&](float unit) { return squared_norm(unit_row<R>{r, unit}); });
}

/// ‖unit·(row − centre)‖²; `centre` is in no unit.
template <row R>
[[nodiscard]] inline float squared_distance_in(float unit, const R& r, const float* centre) noexcept {
  if constexpr (has_tiles<R>) {
    if (unit != 1) {
      float sum = 0;
      detail::for_each_tile(r, [&](std::size_t j, const auto& part) {
        sum += ((part - const_float_map(centre + j, part.size())) * unit).squaredNorm();
      });
      return sum;
    }
  }
  return squared_distance(r, centre);
}

/// ‖row − centre‖, for any row where that is a float.
template <row R>
[[nodiscard]] inline float distance_of(const R& r, const float* centre) noexcept {
  if constexpr (!has_tiles<R>) return std::sqrt(squared_distance(r, centre));
  return detail::root_of([&](float unit) { return squared_distance_in(unit, r, centre); });
}

}  // namespace vattn::VATTN_ABI::kernel

#include "vattn/macros_pop.hpp"
