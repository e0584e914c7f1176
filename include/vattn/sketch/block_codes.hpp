// Key codes in the order in which a scan reads them: blocks of 64 keys, 6 bits a group, one byte plane after another.
#include "vattn/macros_push.hpp"
#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <span>
#include <vector>

#include "vattn/base/pages.hpp"
#include "vattn/kernel/scan.hpp"
#include "vattn/kernel/units.hpp"
#include "vattn/sketch/rotation.hpp"

namespace vattn::VATTN_ABI::sketch {

// Format. A key k becomes y = R(k − μ), R a rotation to P coordinates and μ a fixed vector near the keys' mean. Its
// first 6·G/b coordinates are quantised to b bits each, levels ±1, ±3, … (b = 1 from P = 128 on, 3 below), and
// 6/b consecutive ones make a group: a number of 6 bits, the lower coordinate in the lower bits. As in codes.hpp,
//   α = ‖y‖²/⟨c, y⟩ makes s = α⟨c, Rq⟩ unbiased for ⟨q, k − μ⟩ over rotations, and ρ = ‖y − αc‖ bounds its error by
//   ‖q‖ρ;
// coordinates that are not coded have level 0.
//
// A block is what the scan of kernel/scan.hpp reads for 64 keys:
//   planes  u8 [planes][64]   byte k of a plane is key k's. Groups 0 .. planes − 1 are the planes' bits 0–5; group
//                             planes + e has its bits 0–1, 2–3, 4–5 in bits 6–7 of the planes 3e, 3e + 1, 3e + 2
//   scale   i16 [64]          α in units of `alpha_unit()`/32767, in lane order
//   reach   i16 [64]          512·ln(‖v − c‖/reach_unit), the value's distance from a fixed centre, in lane order
//   radius  u16 [64]          ρ, bfloat16 rounded up, in lane order
//   largest f32               largest ρ of the block, +inf while a key in it is not finite
// Lane order: even keys first, then the odd ones; it spares the scan a shuffle.

/// How keys of `dim` elements are coded: 1 bit for each of their coordinates after the rotation, 3 where these are 64
/// or fewer.
struct code_layout {
  std::size_t width = 0;  ///< coordinates
  int bits = 1, coded = 0, groups = 0, planes = 0;

  code_layout() = default;
  explicit code_layout(index_t dim) noexcept
      : width(random_rotation(std::max<index_t>(dim, 16), 0).width()),
        bits(width >= 128 ? 1 : 3),
        coded(static_cast<int>(width) * bits / 6 * (6 / bits)),
        groups(coded * bits / 6),
        planes((groups * 3 + 3) / 4) {
    while (planes + planes / 3 < groups) ++planes;
  }
};

/// Codes of one KV head's keys. Owns their memory. Rows may be swapped: the order is the store's.
class block_codes {
 public:
  block_codes() = default;
  explicit block_codes(index_t dim, std::uint64_t seed)
      : rotation_(std::max<index_t>(dim, 16), seed),
        dim_(dim),
        layout_(dim),
        mean_(layout_.width),
        buffer_(layout_.width),
        levels_(static_cast<std::size_t>(layout_.coded)) {}

  [[nodiscard]] int groups() const noexcept { return layout_.groups; }
  [[nodiscard]] int planes() const noexcept { return layout_.planes; }
  [[nodiscard]] std::size_t width() const noexcept { return layout_.width; }
  [[nodiscard]] index_t size() const noexcept { return size_; }
  [[nodiscard]] std::size_t bytes() const noexcept { return blocks_.size(); }
  [[nodiscard]] float alpha_unit() const noexcept { return alpha_unit_; }
  [[nodiscard]] float reach_unit() const noexcept { return reach_unit_; }
  [[nodiscard]] kernel::code_blocks view() const noexcept {
    return {first(), block_bytes(), layout_.planes, layout_.groups};
  }

  [[nodiscard]] bool reserve(index_t n) noexcept { return blocks_.reserve(blocks_for(n) * block_bytes()); }
  void clear() noexcept {
    static_cast<void>(blocks_.resize(0));
    size_ = 0;
  }

  /// What keys and value distances are measured from; forgets all codes. `mean` [dim]; `reach` > 0 a typical distance.
  void recentre(std::span<const float> mean, float reach) noexcept {
    clear();
    std::fill(buffer_.begin(), buffer_.end(), 0.0f);
    std::copy(mean.begin(), mean.end(), buffer_.begin());
    rotation_.apply(buffer_);
    mean_ = buffer_;
    alpha_unit_ = 0;
    reach_unit_ = reach > 0 && std::isfinite(reach) ? reach : 1;
  }

  /// Adds a row: `key` [dim], and how far its value is from the values' centre. False where there is no memory.
  [[nodiscard]] bool append(std::span<const float> key, float distance) noexcept {
    if (size_ % kernel::scan_keys == 0 && !blocks_.resize(blocks_.size() + block_bytes())) return false;
    ++size_;
    encode(key, distance, size_ - 1);
    return true;
  }
  /// Drops the last row.
  void pop() noexcept {
    --size_;
    if (size_ % kernel::scan_keys == 0) {
      static_cast<void>(blocks_.resize(blocks_.size() - block_bytes()));
    } else {
      lanes(block(size_), 2)[lane(static_cast<std::size_t>(size_ % kernel::scan_keys))] = 0;
      refresh(size_ / kernel::scan_keys);
    }
  }

  /// Exchanges two rows.
  void swap(index_t a, index_t b) noexcept {
    if (a == b) return;
    std::byte *x = block(a), *y = block(b);
    const auto i = static_cast<std::size_t>(a % kernel::scan_keys), j = static_cast<std::size_t>(b % kernel::scan_keys);
    for (std::size_t p = 0; p < static_cast<std::size_t>(layout_.planes); ++p)
      std::swap(x[p * kernel::scan_keys + i], y[p * kernel::scan_keys + j]);
    for (std::size_t array = 0; array < 3; ++array) std::swap(lanes(x, array)[lane(i)], lanes(y, array)[lane(j)]);
    refresh(a / kernel::scan_keys);
    refresh(b / kernel::scan_keys);
  }

  /// ρ of a row, rounded up.
  [[nodiscard]] float radius(index_t row) const noexcept {
    return kernel::bfloat16_to_float(
        static_cast<std::uint16_t>(lanes(block(row), 2)[lane(static_cast<std::size_t>(row % kernel::scan_keys))]));
  }
  /// The value's distance from the centre, to 0.1 %.
  [[nodiscard]] float reach(index_t row) const noexcept {
    const auto l = lanes(block(row), 1)[lane(static_cast<std::size_t>(row % kernel::scan_keys))];
    return reach_unit_ * std::exp(static_cast<float>(l) / 512);
  }
  [[nodiscard]] float largest_radius(index_t b) const noexcept {
    float r;
    std::memcpy(&r, first() + static_cast<std::size_t>(b) * block_bytes() + largest_at(), sizeof r);
    return r;
  }

  /// table[g·64 + e] = ⟨c, Rq⟩ of group g where its bits are e; `scaled_query` [dim], `scratch` [width()] receives Rq.
  void tabulate(const float* scaled_query, std::span<float> scratch, std::span<float> table) const noexcept {
    std::fill(scratch.begin(), scratch.end(), 0.0f);
    std::copy_n(scaled_query, dim_, scratch.begin());
    rotation_.apply(scratch);
    const int per = 6 / layout_.bits, levels = 1 << layout_.bits;
    for (int g = 0; g < layout_.groups; ++g) {
      float* t = table.data() + g * 64;
      t[0] = 0;
      int have = 1;
      for (int j = 0; j < per; ++j) {  // lower coordinates in lower bits: each one multiplies what is there
        const float q = scratch.data()[g * per + j];
        for (int level = levels - 1; level >= 0; --level) {
          const float add = q * static_cast<float>(2 * level - levels + 1);
          for (int e = 0; e < have; ++e) t[level * have + e] = t[e] + add;
        }
        have *= levels;
      }
    }
  }

  /// ⟨q, μ⟩ of the query whose Rq `tabulate` left: scores are of k − μ.
  [[nodiscard]] float offset(std::span<const float> rotated) const noexcept {
    float sum = 0;
    for (std::size_t j = 0; j < rotated.size(); ++j) sum += rotated[j] * mean_[j];
    return sum;
  }

  [[nodiscard]] static constexpr std::size_t lane(std::size_t key) noexcept { return (key & 1) * 32 + key / 2; }

 private:
  [[nodiscard]] static std::size_t blocks_for(index_t n) noexcept {
    return static_cast<std::size_t>((n + kernel::scan_keys - 1) / kernel::scan_keys);
  }
  [[nodiscard]] std::size_t largest_at() const noexcept {
    return static_cast<std::size_t>(layout_.planes) * kernel::scan_keys + 3 * 2 * kernel::scan_keys;
  }
  [[nodiscard]] std::size_t block_bytes() const noexcept { return largest_at() + 64; }
  [[nodiscard]] std::byte* first() noexcept { return blocks_.data(); }
  [[nodiscard]] const std::byte* first() const noexcept { return blocks_.data(); }
  [[nodiscard]] std::byte* block(index_t row) noexcept {
    return first() + static_cast<std::size_t>(row / kernel::scan_keys) * block_bytes();
  }
  [[nodiscard]] const std::byte* block(index_t row) const noexcept {
    return first() + static_cast<std::size_t>(row / kernel::scan_keys) * block_bytes();
  }
  [[nodiscard]] std::int16_t* lanes(std::byte* b, std::size_t array) const noexcept {
    return reinterpret_cast<std::int16_t*>(b + static_cast<std::size_t>(layout_.planes) * kernel::scan_keys +
                                           array * 2 * kernel::scan_keys);
  }
  [[nodiscard]] const std::int16_t* lanes(const std::byte* b, std::size_t array) const noexcept {
    return reinterpret_cast<const std::int16_t*>(b + static_cast<std::size_t>(layout_.planes) * kernel::scan_keys +
                                                 array * 2 * kernel::scan_keys);
  }

  // Lanes without a key hold 0, and bfloat16 numbers from 0 to +inf are in the order of their bits.
  void refresh(index_t b) noexcept {
    std::byte* at = first() + static_cast<std::size_t>(b) * block_bytes();
    const std::int16_t* radii = lanes(at, 2);
    const std::int16_t most = *std::max_element(radii, radii + kernel::scan_keys);
    const float largest = kernel::bfloat16_to_float(static_cast<std::uint16_t>(most));
    std::memcpy(at + largest_at(), &largest, sizeof largest);
  }

  void encode(std::span<const float> key, float distance, index_t row) noexcept {
    std::fill(buffer_.begin(), buffer_.end(), 0.0f);
    std::copy(key.begin(), key.end(), buffer_.begin());
    rotation_.apply(buffer_);
    const auto sum_of_squares = [&] {
      float sum = 0;
      for (const float y : buffer_) sum += y * y;
      return sum;
    };
    for (std::size_t j = 0; j < width(); ++j) buffer_[j] -= mean_[j];
    float square = sum_of_squares(), unit = 1;
    if (!(square > 0x1p-80f && square < 0x1p100f)) {  // float holds other squares badly, or not at all
      kernel::float_map all(buffer_.data(), static_cast<Eigen::Index>(width()));
      unit = kernel::unit_for(all.cwiseAbs().maxCoeff());
      all *= unit;
      square = sum_of_squares();
    }
    std::byte* to = block(row);
    const auto k = static_cast<std::size_t>(row % kernel::scan_keys);
    for (std::size_t p = 0; p < static_cast<std::size_t>(layout_.planes); ++p)
      to[p * kernel::scan_keys + k] = std::byte{0};
    float alpha = 0, rho = std::numeric_limits<float>::infinity();
    // A key that is not finite is read for certain.
    if (std::isfinite(square) && std::isfinite(distance)) {
      // Half steps of optimal uniform quantisers of a normal variable, in standard deviations (Max 1960).
      const float half = layout_.bits == 1 ? 1.0f : 0.2930f;
      const int levels = 1 << layout_.bits, per = 6 / layout_.bits;
      // Finite where the square is tiny, so that 0 times it is a number.
      const float inverse = std::min(square > 0 ? std::sqrt(static_cast<float>(width()) / square) / (2 * half) : 0.0f,
                                     std::numeric_limits<float>::max());
      const Eigen::Map<const Eigen::ArrayXf> y(buffer_.data(), layout_.coded);
      Eigen::Map<Eigen::ArrayXi> up(levels_.data(), layout_.coded);
      const auto edge = 0.5f * static_cast<float>(levels);
      up = (y * inverse + edge).max(0.0f).min(2 * edge - 1).cast<int>();
      const auto c = up.cast<float>() * 2.0f - (2 * edge - 1);
      const float along = (c * y).sum(), norm2 = c.square().sum();
      for (int g = 0; g < layout_.groups; ++g) {
        unsigned number = 0;
        for (int j = 0; j < per; ++j) number |= static_cast<unsigned>(up[g * per + j]) << (j * layout_.bits);
        put(to, k, g, number);
      }
      // Where hardly anything of y lies in the coded coordinates, unbiasedness would cost a huge error.
      const bool hidden = along * along < 0.05f * square * norm2;
      alpha = square > 0 ? (hidden ? along / norm2 : square / along) : 0;
      const float left = square - 2 * alpha * along + alpha * alpha * norm2;
      rho = std::sqrt(std::max(0.0f, left)) + 1e-6f * std::sqrt(square);  // sums of rounded squares
      alpha *= 1 / unit, rho *= 1 / unit;
    }
    if (alpha > alpha_unit_) rescale(2 * alpha);
    lanes(to, 0)[lane(k)] =
        static_cast<std::int16_t>(alpha_unit_ > 0 ? std::lround(std::max(0.0f, alpha) / alpha_unit_ * 32767) : 0);
    const float log_reach = std::log(std::max(std::isfinite(distance) ? distance / reach_unit_ : 0.0f, 1e-30f));
    lanes(to, 1)[lane(k)] = static_cast<std::int16_t>(std::clamp(std::lround(512 * log_reach), -32767l, 32767l));
    lanes(to, 2)[lane(k)] = static_cast<std::int16_t>((std::bit_cast<std::uint32_t>(rho) + 0xffffu) >> 16);
    refresh(row / kernel::scan_keys);
  }

  void put(std::byte* to, std::size_t k, int g, unsigned number) const noexcept {
    const auto add = [&](int plane, unsigned bits) {
      std::byte& b = to[static_cast<std::size_t>(plane) * kernel::scan_keys + k];
      b |= static_cast<std::byte>(bits);
    };
    if (g < layout_.planes) return add(g, number);
    for (int part = 0; part < 3; ++part) add(3 * (g - layout_.planes) + part, (number >> (2 * part) & 3u) << 6);
  }

  void rescale(float unit) noexcept {
    const float share = alpha_unit_ / unit;
    alpha_unit_ = unit;
    for (index_t b = 0; b * kernel::scan_keys < size_; ++b) {
      std::int16_t* scale = lanes(first() + static_cast<std::size_t>(b) * block_bytes(), 0);
      for (std::size_t i = 0; i < kernel::scan_keys; ++i)
        scale[i] = static_cast<std::int16_t>(std::lround(static_cast<float>(scale[i]) * share));
    }
  }

  random_rotation rotation_;
  index_t dim_ = 0;
  code_layout layout_;
  index_t size_ = 0;
  float alpha_unit_ = 0, reach_unit_ = 1;
  std::vector<float> mean_, buffer_;  // [width()]
  std::vector<int> levels_;           // [layout_.coded], of the key at hand
  page_buffer blocks_;
};

}  // namespace vattn::VATTN_ABI::sketch

#include "vattn/macros_pop.hpp"
