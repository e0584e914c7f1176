// Quantised rows as engines store them: ggml's q8_0 and q4_0, and FP8 e4m3. Formats first, code below.
//
// q8_0  blocks of 32 elements, 34 bytes: an IEEE half d, then 32 signed bytes q_0..q_31.        x_j = d·q_j
// q4_0  blocks of 32 elements, 18 bytes: an IEEE half d, then 16 bytes; the low nibble of byte j is element j, the
//       high nibble element j + 16.                                                               x_j = d·(nibble − 8)
// Blocks of a row are adjacent, without padding; a row is a whole number of blocks; d is little-endian and may be
// negative (q4_0). The alignment of a block is that of its half: 2 bytes.
//
// e4m3  one byte: sign, 4 bits of exponent (bias 7), 3 of mantissa; exponent 0 is subnormal; no infinities; 0x7f and
//       0xff are NaN; the largest number is 448. One float scale for a whole cache.           x_j = scale·e4m3_j
#include "vattn/macros_push.hpp"
#pragma once

#include <Eigen/Core>
#include <bit>
#include <cmath>
#include <cstdint>

#include "vattn/base/config.hpp"
#include "vattn/base/floating_point.hpp"
#include "vattn/kernel/decoded.hpp"

namespace vattn::VATTN_ABI::kernel {

inline constexpr std::size_t block_elements = 32;

struct q8_0_block {
  std::uint16_t scale;  ///< bits of the half
  std::int8_t quants[block_elements];
};
struct q4_0_block {
  std::uint16_t scale;  ///< bits of the half
  std::uint8_t quants[block_elements / 2];
};
static_assert(sizeof(q8_0_block) == 34 && alignof(q8_0_block) == 2);
static_assert(sizeof(q4_0_block) == 18 && alignof(q4_0_block) == 2);

template <class B>
concept quantised_block = std::same_as<B, q8_0_block> || std::same_as<B, q4_0_block>;

inline void decode_block(const q8_0_block& block, float* out) noexcept {
  const float d = half_to_float(block.scale);
  for (std::size_t j = 0; j < block_elements; ++j) out[j] = d * static_cast<float>(block.quants[j]);
}
inline void decode_block(const q4_0_block& block, float* out) noexcept {
  const float d = half_to_float(block.scale);
  for (std::size_t j = 0; j < block_elements / 2; ++j) {
    out[j] = d * static_cast<float>((block.quants[j] & 0x0f) - 8);
    out[j + block_elements / 2] = d * static_cast<float>((block.quants[j] >> 4) - 8);
  }
}

/// A row of `size` elements, a multiple of 32, in whole blocks.
template <quantised_block B>
class block_row {
 public:
  block_row(const B* blocks, std::size_t size) noexcept : blocks_(blocks), size_(size) {}
  [[nodiscard]] std::size_t size() const noexcept { return size_; }
  [[nodiscard]] const B* data() const noexcept { return blocks_; }
  [[nodiscard]] std::size_t size_bytes() const noexcept { return size_ / block_elements * sizeof(B); }
  void decode(std::size_t first, std::size_t count, float* out) const noexcept {
    for (std::size_t j = 0; j < count; j += block_elements)
      decode_block(blocks_[(first + j) / block_elements], out + j);
  }

 private:
  const B* blocks_;
  std::size_t size_;
};
static_assert(tile % block_elements == 0, "a tile is decoded in whole blocks");

/// One element of an FP8 cache.
struct e4m3 {
  std::uint8_t bits;
};

/// One byte of e4m3, exactly.
[[nodiscard]] inline float e4m3_to_float(std::uint8_t bits) noexcept {
  const std::uint32_t magnitude = static_cast<std::uint32_t>(bits & 0x7fu) << 20;
  const float scaled = std::bit_cast<float>(magnitude) * 0x1p120f;  // 2^(127 − 7); normalises subnormals too
  const std::uint32_t nan = (bits & 0x7fu) == 0x7fu ? 0x7fc00000u : 0u;
  const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x80u) << 24;
  return std::bit_cast<float>(std::bit_cast<std::uint32_t>(scaled) | nan | sign);
}

/// scale·e4m3.
class e4m3_row {
 public:
  e4m3_row(const e4m3* first, std::size_t size, float scale) noexcept : first_(first), size_(size), scale_(scale) {}
  [[nodiscard]] std::size_t size() const noexcept { return size_; }
  void decode(std::size_t first, std::size_t count, float* out) const noexcept {
    for (std::size_t j = 0; j < count; ++j) out[j] = scale_ * e4m3_to_float(first_[first + j].bits);
  }

 private:
  const e4m3* first_;
  std::size_t size_;
  float scale_;
};

/// x [32] to the nearest q8_0: d = max|x|/127 as a half, q = x·127/max|x| rounded half away from zero.
inline void quantise(const float* x, q8_0_block& block) noexcept {
  const floating_point_scope standard;
  float most = 0;
  for (std::size_t j = 0; j < block_elements; ++j) most = std::max(most, std::abs(x[j]));
  const float d = most / 127, inverse = d != 0 ? 1 / d : 0;
  block.scale = Eigen::numext::bit_cast<std::uint16_t>(Eigen::half(d));
  for (std::size_t j = 0; j < block_elements; ++j)
    block.quants[j] = static_cast<std::int8_t>(std::round(x[j] * inverse));
}

/// x [32] to q4_0: the element of largest magnitude becomes −8, so d = that element/−8, and 7 is the other end.
inline void quantise(const float* x, q4_0_block& block) noexcept {
  const floating_point_scope standard;
  float extreme = 0;
  for (std::size_t j = 0; j < block_elements; ++j)
    if (std::abs(x[j]) > std::abs(extreme)) extreme = x[j];
  const float d = extreme / -8, inverse = d != 0 ? 1 / d : 0;
  block.scale = Eigen::numext::bit_cast<std::uint16_t>(Eigen::half(d));
  const auto code = [&](float value) { return std::min(15, static_cast<int>(value * inverse + 8.5f)); };
  for (std::size_t j = 0; j < block_elements / 2; ++j)
    block.quants[j] = static_cast<std::uint8_t>(code(x[j]) | code(x[j + block_elements / 2]) << 4);
}

/// A row of `size` finite elements, a multiple of 32, to `size / 32` blocks.
template <quantised_block B>
inline void quantise(const float* x, std::size_t size, B* blocks) noexcept {
  const floating_point_scope standard;
  for (std::size_t j = 0; j < size; j += block_elements) quantise(x + j, blocks[j / block_elements]);
}

static_assert(row<block_row<q8_0_block>> && row<block_row<q4_0_block>> && row<e4m3_row>);

}  // namespace vattn::VATTN_ABI::kernel

#include "vattn/macros_pop.hpp"
