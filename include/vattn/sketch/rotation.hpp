// A fixed random rotation in O(D log D): spreads every key's energy evenly over the coordinates.
#include "vattn/macros_push.hpp"
#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <span>

#include "vattn/base/philox.hpp"

namespace vattn::VATTN_ABI::sketch {

/// x -> H S₂ H S₁ x / P on P = bit_ceil(dim) coordinates, 8 at least (zeros appended), H the Hadamard matrix and S
/// random signs: orthogonal, so inner products are kept. Two rounds, since after one a vector with a single
/// coordinate is still ±1 everywhere. Signs are a function of the seed; nothing is stored.
class random_rotation {
 public:
  random_rotation() = default;
  random_rotation(index_t dim, std::uint64_t seed) noexcept
      : dim_(static_cast<std::size_t>(dim)), width_(width_of(dim_)), seed_(seed) {}

  [[nodiscard]] std::size_t dim() const noexcept { return dim_; }
  /// Coordinates after the rotation.
  [[nodiscard]] std::size_t width() const noexcept { return width_; }

  /// For one that was read from bytes.
  [[nodiscard]] bool valid() const noexcept { return dim_ <= (std::size_t{1} << 20) && width_ == width_of(dim_); }

  /// In place: the first dim() of `x` [width()] are the input, the rest is overwritten.
  void apply(std::span<float> x) const noexcept {
    for (std::size_t j = dim_; j < width_; ++j) x[j] = 0;
    using four = Eigen::Array4f;
    using four_map = Eigen::Map<four>;
    for (std::uint32_t round = 0; round < 2; ++round) {
      random_stream signs({.seed = seed_, .layer = purpose}, round);
      std::uint32_t bits = 0;
      for (std::size_t j = 0; j < width_; j += 4, bits >>= 4) {
        if (j % 32 == 0) bits = signs.next();
        // Butterflies of neighbours, and of pairs.
        const four v = four_map(&x[j]) * Eigen::Map<const four>(plus_minus[bits % 16].data());
        const float a = v[0] + v[1], b = v[0] - v[1], c = v[2] + v[3], d = v[2] - v[3];
        four_map(&x[j]) << a + c, b + d, a - c, b - d;
      }
      for (std::size_t half = 4; half < width_; half *= 2) {
        for (std::size_t j = 0; j < width_; j += 2 * half) {
          for (std::size_t i = j; i < j + half; i += 4) {
            four_map low(&x[i]), high(&x[i + half]);
            const four a = low, b = high;
            low = a + b;
            high = a - b;
          }
        }
      }
    }
    const float scale = 1 / static_cast<float>(width_);
    for (float& v : x) v *= scale;
  }

 private:
  [[nodiscard]] static std::size_t width_of(std::size_t dim) noexcept {
    return std::bit_ceil(std::max<std::size_t>(dim, 8));
  }
  // Signs of four coordinates, by four random bits.
  static constexpr auto plus_minus = [] {
    std::array<std::array<float, 4>, 16> signs{};
    for (std::size_t bits = 0; bits < 16; ++bits) {
      for (std::size_t i = 0; i < 4; ++i) signs[bits][i] = bits >> i & 1 ? -1.0f : 1.0f;
    }
    return signs;
  }();
  static constexpr std::uint32_t purpose = 0x50524f54;  // keeps these signs apart from any layer's draws
  std::size_t dim_ = 0, width_ = 0;
  std::uint64_t seed_ = 0;
};

}  // namespace vattn::VATTN_ABI::sketch

#include "vattn/macros_pop.hpp"
