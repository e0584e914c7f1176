// Rows of the cache in, float arithmetic out: dot, axpy, load. The element types end here.
#include "vattn/macros_push.hpp"
#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <bit>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>

#include "vattn/base/config.hpp"

namespace vattn::VATTN_ABI::kernel {

/// Element types of a row that is stored as plain consecutive elements.
template <class T>
concept element = std::same_as<T, float> || std::same_as<T, Eigen::half> || std::same_as<T, Eigen::bfloat16>;

using float_map = Eigen::Map<Eigen::VectorXf>;
using const_float_map = Eigen::Map<const Eigen::VectorXf>;

/// IEEE half to float without branches, so that compilers vectorise it at the baseline ISA. Exact for
/// subnormals: the product with 2^112 moves the exponent and normalises in one step.
[[nodiscard]] inline float half_to_float(std::uint16_t bits) noexcept {
  const std::uint32_t magnitude = static_cast<std::uint32_t>(bits & 0x7fffu) << 13;
  const float scaled = std::bit_cast<float>(magnitude) * 0x1p112f;
  const std::uint32_t inf_or_nan = (bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
  const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000u) << 16;
  return std::bit_cast<float>(std::bit_cast<std::uint32_t>(scaled) | inf_or_nan | sign);
}

[[nodiscard]] inline float bfloat16_to_float(std::uint16_t bits) noexcept {
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

/// Asks for the lines of a row, for the first cache or, with Locality = 2, the second.
template <int Locality = 3>
VATTN_ALWAYS_INLINE void prefetch_row(const std::byte* row, std::size_t bytes) noexcept {
#if defined(__GNUC__)
  for (std::size_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at, 0, Locality);
#else
  static_cast<void>(row), static_cast<void>(bytes);
#endif
}

/// out[j] = row[j]
template <element T, std::size_t E>
inline void load(std::span<const T, E> row, float* out) noexcept {
  if constexpr (std::same_as<T, float>) {
    std::copy(row.begin(), row.end(), out);  // unlike memcpy, it takes an empty row without an address
  } else {
    const auto* bits = reinterpret_cast<const std::uint16_t*>(row.data());
    for (std::size_t j = 0; j < row.size(); ++j) {
      out[j] = std::same_as<T, Eigen::half> ? half_to_float(bits[j]) : bfloat16_to_float(bits[j]);
    }
  }
}

/// Elements converted at a time by `dot` and `axpy`: 512 bytes of stack, 8 KiB rows cost 16 passes.
inline constexpr std::size_t tile = 128;

/// Σ_j q[j]·row[j], in float.
template <element T, std::size_t E>
[[nodiscard]] inline float dot(const float* q, std::span<const T, E> row) noexcept {
  if constexpr (std::same_as<T, float>) {
    const auto n = static_cast<Eigen::Index>(row.size());
    return const_float_map(q, n).dot(const_float_map(row.data(), n));
  } else {
    float sum = 0, buffer[tile];
    for (std::size_t j = 0; j < row.size(); j += tile) {
      const std::span<const T> part = std::span<const T>(row).subspan(j, std::min(tile, row.size() - j));
      load(part, buffer);
      const auto n = static_cast<Eigen::Index>(part.size());
      sum += const_float_map(q + j, n).dot(const_float_map(buffer, n));
    }
    return sum;
  }
}

/// acc[j] += w·row[j]
template <element T, std::size_t E>
inline void axpy(float w, std::span<const T, E> row, float* acc) noexcept {
  if constexpr (std::same_as<T, float>) {
    const auto n = static_cast<Eigen::Index>(row.size());
    float_map(acc, n) += w * const_float_map(row.data(), n);
  } else {
    float buffer[tile];
    for (std::size_t j = 0; j < row.size(); j += tile) {
      const std::span<const T> part = std::span<const T>(row).subspan(j, std::min(tile, row.size() - j));
      load(part, buffer);
      const auto n = static_cast<Eigen::Index>(part.size());
      float_map(acc + j, n) += w * const_float_map(buffer, n);
    }
  }
}

/// ‖row‖², in float.
template <element T, std::size_t E>
[[nodiscard]] inline float squared_norm(std::span<const T, E> row) noexcept {
  if constexpr (std::same_as<T, float>) {
    return const_float_map(row.data(), static_cast<Eigen::Index>(row.size())).squaredNorm();
  } else {
    float sum = 0, buffer[tile];
    for (std::size_t j = 0; j < row.size(); j += tile) {
      const std::span<const T> part = std::span<const T>(row).subspan(j, std::min(tile, row.size() - j));
      load(part, buffer);
      sum += const_float_map(buffer, static_cast<Eigen::Index>(part.size())).squaredNorm();
    }
    return sum;
  }
}

/// ‖row − centre‖², in float.
template <element T, std::size_t E>
[[nodiscard]] inline float squared_distance(std::span<const T, E> row, const float* centre) noexcept {
  float sum = 0, buffer[tile];
  for (std::size_t j = 0; j < row.size(); j += tile) {
    const std::span<const T> part = std::span<const T>(row).subspan(j, std::min(tile, row.size() - j));
    load(part, buffer);
    const auto n = static_cast<Eigen::Index>(part.size());
    sum += (const_float_map(buffer, n) - const_float_map(centre + j, n)).squaredNorm();
  }
  return sum;
}

/// What a cache's `key(i)` and `value(i)` return. For a row type of your own supply these five in its
/// namespace, where argument-dependent lookup finds them.
template <class R>
concept row = requires(const R& r, const float* q, float* acc) {
  { dot(q, r) } -> std::convertible_to<float>;
  { squared_norm(r) } -> std::convertible_to<float>;
  { squared_distance(r, q) } -> std::convertible_to<float>;
  axpy(1.0f, r, acc);
  load(r, acc);
};

}  // namespace vattn::VATTN_ABI::kernel

#include "vattn/macros_pop.hpp"
