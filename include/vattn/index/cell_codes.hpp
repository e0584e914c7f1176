// Key codes beside a cache, addressed by cell: blocks of 64 keys in the order in which a scan reads them.
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
#include <span>
#include <vector>

#include "vattn/base/pages.hpp"
#include "vattn/kernel/cell_scan.hpp"
#include "vattn/kernel/row.hpp"
#include "vattn/kernel/units.hpp"
#include "vattn/sketch/rotation.hpp"

namespace vattn::VATTN_ABI {

// Format. A key k becomes y = R(k − μ), R a rotation to P coordinates and μ a fixed vector near the keys' mean. Its
// first coordinates are quantised to b = 1 to 4 bits each, u in [0, 2^b), level c = 2u − (2^b − 1), and the bits of
// all u follow each other, lower ones first: six of them are a group. As in sketch/codes.hpp,
//   α = ‖y‖²/⟨c, y⟩ makes s = α⟨c, Rq⟩ unbiased for ⟨q, k − μ⟩ over rotations, and ρ = ‖y − αc‖ bounds its error by
//   ‖q‖ρ;
// coordinates that are not coded have level 0.
//
// A block is what kernel/cell_scan.hpp reads for 64 cells:
//   planes  u8 [planes][64]   byte k of a plane is cell k's. Groups 0 .. planes − 1 are the planes' bits 0–5; group
//                             planes + e has its bits 0–1, 2–3, 4–5 in bits 6–7 of the planes 3e, 3e + 1, 3e + 2
//   lengths u16 [64]          bits 7–15: α in units of `scale_unit`·64/32767; bits 0–6: ρ in units of
//                             `radius_unit`·256/32767, rounded up; in lane order (kernel/cell_scan_block.hpp)
//   reach   i16 [64]          512·ln(‖v − c‖/reach_unit), the value's distance from a fixed centre, in lane order
// ρ is of the α that is stored, so that rounding is among what it states.
// Lane order: even cells first, then the odd ones; it spares the scan a shuffle.
//
// What a cell holds is a function of its key, its value and the units alone, never of what was there before or beside
// it. A cell without a code (empty, or of a key that the units cannot express) is all 0 with the least reach, and its
// bit of `coded` is 0: callers read such a row for certain.

/// How keys of `dim` elements are coded with b bits a coordinate.
struct cell_layout {
  std::size_t width = 0;  ///< coordinates
  int bits = 2, coordinates = 0, groups = 0, planes = 0;

  cell_layout() = default;
  cell_layout(index_t dim, int bits_each) noexcept
      : width(sketch::random_rotation(std::max<index_t>(dim, 16), 0).width()), bits(bits_each) {
    // What one bit leaves of the last coordinates is little beside its own error; of more bits it is not.
    groups = (static_cast<int>(width) * bits + (bits > 1 ? 5 : 0)) / 6;
    coordinates = std::min(groups * 6 / bits, static_cast<int>(width));
    planes = (groups * 3 + 3) / 4;
    while (planes + planes / 3 < groups) ++planes;
  }
  [[nodiscard]] std::size_t block_bytes() const noexcept {
    return static_cast<std::size_t>(planes) * kernel::scan_keys + 2 * 2 * kernel::scan_keys;
  }
};

/// What codes are measured by; fixed while they stand.
struct code_units {
  float scale = 1;   ///< largest α
  float radius = 1;  ///< largest ρ
  float reach = 1;   ///< a typical distance of a value from the values' centre
};

/// Codes of one KV head's keys, by cell. Owns their memory.
class cell_codes {
 public:
  static constexpr int most_bits = 4;

  cell_codes() = default;
  cell_codes(index_t dim, int bits, std::uint64_t seed)
      : rotation_(std::max<index_t>(dim, 16), seed),
        dim_(dim),
        layout_(dim, bits),
        mean_(layout_.width),
        buffer_(layout_.width),
        levels_(layout_.width) {}

  [[nodiscard]] const cell_layout& layout() const noexcept { return layout_; }
  [[nodiscard]] index_t dim() const noexcept { return dim_; }
  [[nodiscard]] const code_units& units() const noexcept { return units_; }
  /// Cells, of which some may have no code.
  [[nodiscard]] index_t size() const noexcept { return size_; }
  [[nodiscard]] std::size_t bytes() const noexcept {
    return blocks_.size() + coded_.size() * sizeof(std::uint64_t) + mean_.size() * sizeof(float);
  }
  [[nodiscard]] kernel::code_blocks view() const noexcept {
    return {blocks_.data(), layout_.block_bytes(), layout_.planes, layout_.groups};
  }
  /// Bit i of word b: cell 64·b + i has a code.
  [[nodiscard]] std::span<const std::uint64_t> coded() const noexcept { return coded_; }
  [[nodiscard]] bool has_code(index_t cell) const noexcept {
    return cell < size_ && (coded_[at(cell / kernel::scan_keys)] >> (cell % kernel::scan_keys) & 1) != 0;
  }
  [[nodiscard]] index_t codes() const noexcept {
    index_t n = 0;
    for (const std::uint64_t word : coded_) n += std::popcount(word);
    return n;
  }

  /// What keys are measured from and in; forgets all codes. `mean` [dim].
  void measure_from(std::span<const float> mean, const code_units& units) noexcept {
    resize_down(0);
    std::fill(buffer_.begin(), buffer_.end(), 0.0f);
    std::copy(mean.begin(), mean.end(), buffer_.begin());
    rotation_.apply(buffer_);
    mean_ = buffer_;
    const auto usable = [](float x) { return x > 0x1p-110f && x < 0x1p110f ? x : 1.0f; };
    units_ = {usable(units.scale), usable(units.radius), usable(units.reach)};
  }

  [[nodiscard]] bool reserve(index_t cells) noexcept {
    const std::size_t blocks = blocks_for(cells);
    return reserve_words(blocks) && blocks_.reserve(blocks * layout_.block_bytes());
  }
  /// Cells that come are without a code. False where there is no memory; nothing has changed then.
  [[nodiscard]] bool resize(index_t cells) noexcept {
    if (cells <= size_) return resize_down(cells), true;
    const std::size_t blocks = blocks_for(cells), had = coded_.size();
    if (blocks > had) {
      if (!reserve_words(std::max(blocks, coded_.capacity() < blocks ? had + had / 2 : 0)) ||
          !blocks_.resize(blocks * layout_.block_bytes()))
        return false;
      coded_.resize(blocks);
      for (std::size_t b = had; b < blocks; ++b) clear_block(b);
    }
    size_ = cells;
    return true;
  }

  /// α and ρ of a key under the present centre: what units must hold. `key` [dim].
  struct measured {
    float scale = 0, radius = 0;
  };
  [[nodiscard]] measured measure(std::span<const float> key) noexcept {
    const encoded e = encode(key);
    return {e.scale, e.radius(e.scale)};
  }

  /// The code of a cell below size(): `key` [dim], and how far its value is from the values' centre. False: it has no
  /// code, since something is not finite or beyond the units.
  bool set(index_t cell, std::span<const float> key, float distance) noexcept {
    erase(cell);
    const encoded e = encode(key);
    using kernel::cell_lengths;
    // Also false where one of them is not a number.
    if (!(e.scale <= units_.scale && distance < std::numeric_limits<float>::max())) return false;
    const float each = units_.scale * cell_lengths::scale_step;
    const auto scale = static_cast<unsigned>(std::min(cell_lengths::most_scale, std::round(e.scale / each)));
    const float radius =
        std::ceil(e.radius(static_cast<float>(scale) * each) / (units_.radius * cell_lengths::radius_step));
    if (!(radius <= cell_lengths::most_radius)) return false;
    std::byte* to = block(cell);
    const auto k = static_cast<std::size_t>(cell % kernel::scan_keys);
    for (int g = 0; g < layout_.groups; ++g) {
      unsigned number = 0;
      for (int bit = 0; bit < 6; ++bit) {
        const int place = 6 * g + bit;
        if (place / layout_.bits >= layout_.coordinates) break;
        const auto level = static_cast<unsigned>(levels_[static_cast<std::size_t>(place / layout_.bits)]);
        number |= (level >> (place % layout_.bits) & 1u) << bit;
      }
      put(to, k, g, number);
    }
    const std::size_t l = lane(k);
    lanes(to, 0)[l] = cell_lengths::word(scale, static_cast<unsigned>(radius));
    const float log_reach = std::log(std::max(distance / units_.reach, 1e-30f));
    lanes(to, 1)[l] = static_cast<std::int16_t>(std::clamp(std::lround(512 * log_reach), -32767l, 32767l));
    coded_[at(cell / kernel::scan_keys)] |= std::uint64_t{1} << k;
    return true;
  }
  /// The cell has no code any more.
  void erase(index_t cell) noexcept {
    std::byte* to = block(cell);
    const auto k = static_cast<std::size_t>(cell % kernel::scan_keys);
    for (std::size_t p = 0; p < static_cast<std::size_t>(layout_.planes); ++p)
      to[p * kernel::scan_keys + k] = std::byte{0};
    const std::size_t l = lane(k);
    lanes(to, 0)[l] = 0;
    lanes(to, 1)[l] = no_reach;
    coded_[at(cell / kernel::scan_keys)] &= ~(std::uint64_t{1} << k);
  }

  [[nodiscard]] float radius(index_t cell) const noexcept {
    const auto word = lanes(block(cell), 0)[lane(static_cast<std::size_t>(cell % kernel::scan_keys))];
    return static_cast<float>(kernel::cell_lengths::radius(word)) * units_.radius / 32767;
  }
  /// The value's distance from the centre, to 0.1 %.
  [[nodiscard]] float reach(index_t cell) const noexcept {
    const auto l = lanes(block(cell), 1)[lane(static_cast<std::size_t>(cell % kernel::scan_keys))];
    return units_.reach * std::exp(static_cast<float>(l) / 512);
  }
  /// The estimate α⟨c, Rq⟩ of ⟨q, k − μ⟩ as written, for tests. `rotated` [width] is Rq.
  [[nodiscard]] float score(index_t cell, std::span<const float> rotated) const noexcept {
    const std::byte* from = block(cell);
    const auto k = static_cast<std::size_t>(cell % kernel::scan_keys);
    float sum = 0;
    for (int j = 0; j < layout_.coordinates; ++j) {
      unsigned u = 0;
      for (int bit = 0; bit < layout_.bits; ++bit) {
        const int place = j * layout_.bits + bit;
        u |= (get(from, k, place / 6) >> (place % 6) & 1u) << bit;
      }
      sum += static_cast<float>(2 * static_cast<int>(u) - top()) * rotated[static_cast<std::size_t>(j)];
    }
    return sum * static_cast<float>(kernel::cell_lengths::scale(lanes(from, 0)[lane(k)])) * units_.scale / 32767;
  }

  /// Rq of a query [dim] into `rotated` [width]; returns ⟨q, μ⟩, since scores are of k − μ.
  [[nodiscard]] float rotate(const float* query, std::span<float> rotated) const noexcept {
    std::fill(rotated.begin(), rotated.end(), 0.0f);
    std::copy_n(query, dim_, rotated.begin());
    rotation_.apply(rotated);
    const auto n = static_cast<Eigen::Index>(rotated.size());
    return kernel::const_float_map(rotated.data(), n).dot(kernel::const_float_map(mean_.data(), n));
  }
  /// table[g·64 + e] = what a group whose number is e adds to ⟨c, Rq⟩.
  void tabulate(std::span<const float> rotated, std::span<float> table) const noexcept {
    for (int g = 0; g < layout_.groups; ++g) {
      float* t = table.data() + g * 64;
      t[0] = 0;
      for (int bit = 0; bit < 6; ++bit) {
        const int place = 6 * g + bit, j = place / layout_.bits, power = place % layout_.bits;
        const float q = j < layout_.coordinates ? rotated[static_cast<std::size_t>(j)] : 0.0f;
        const float add = q * static_cast<float>(2 << power), low = power == 0 ? -static_cast<float>(top()) * q : 0.0f;
        for (int e = 0; e < 1 << bit; ++e) t[e] += low, t[e + (1 << bit)] = t[e] + add;
      }
    }
  }

  [[nodiscard]] static constexpr std::size_t lane(std::size_t key) noexcept { return (key & 1) * 32 + key / 2; }

  template <class Archive>
  void archive(Archive& a) {
    a(rotation_, dim_, layout_, units_, size_, mean_, coded_);
    std::vector<std::byte> bytes(blocks_.data(), blocks_.data() + blocks_.size());
    a(bytes);
    if (bytes.size() == blocks_.size() && std::equal(bytes.begin(), bytes.end(), blocks_.data())) return;
    if (blocks_.resize(bytes.size())) std::copy(bytes.begin(), bytes.end(), blocks_.data());
    buffer_.resize(mean_.size());
    levels_.resize(mean_.size());
  }
  [[nodiscard]] bool valid() const noexcept {
    return valid_sizes() && blocks_.size() == coded_.size() * layout_.block_bytes() && buffer_.size() == layout_.width;
  }
  /// Bytes of blocks, for comparison.
  [[nodiscard]] std::span<const std::byte> blocks() const noexcept { return {blocks_.data(), blocks_.size()}; }

 private:
  static constexpr std::int16_t no_reach = -32768;
  // α, and of the key y and its levels c what ρ is made of.
  struct encoded {
    float scale = 0, square = 0, along = 0, norm2 = 0;  // ‖y‖², ⟨c, y⟩, ‖c‖²
    float unit = 1;                                     // of the y of the last three (kernel/units.hpp)
    /// ‖y − αc‖, and room for sums of rounded squares.
    [[nodiscard]] float radius(float alpha) const noexcept {
      const float a = alpha * unit, left = square - 2 * a * along + a * a * norm2;
      return (std::sqrt(std::max(0.0f, left)) + 1e-6f * std::sqrt(square)) * (1 / unit);
    }
  };

  [[nodiscard]] static constexpr std::size_t at(index_t i) noexcept { return static_cast<std::size_t>(i); }
  [[nodiscard]] int top() const noexcept { return (1 << layout_.bits) - 1; }
  [[nodiscard]] static std::size_t blocks_for(index_t n) noexcept {
    return at((n + kernel::scan_keys - 1) / kernel::scan_keys);
  }
  [[nodiscard]] bool valid_sizes() const noexcept {
    if (dim_ < 1 || dim_ > (index_t{1} << 20) || layout_.bits < 1 || layout_.bits > most_bits || size_ < 0 ||
        size_ >= (index_t{1} << 31))
      return false;
    const cell_layout l(dim_, layout_.bits);
    const auto usable = [](float x) { return x > 0 && std::isfinite(x); };
    return rotation_.valid() && rotation_.dim() == at(std::max<index_t>(dim_, 16)) && l.width == layout_.width &&
           l.groups == layout_.groups && l.planes == layout_.planes && l.coordinates == layout_.coordinates &&
           mean_.size() == l.width && coded_.size() == blocks_for(size_) && usable(units_.scale) &&
           usable(units_.radius) && usable(units_.reach);
  }
  [[nodiscard]] bool reserve_words(std::size_t words) noexcept {
#if VATTN_HAS_EXCEPTIONS
    try {
      coded_.reserve(words);
    } catch (...) {
      return false;
    }
#else
    coded_.reserve(words);
#endif
    return true;
  }
  void resize_down(index_t cells) noexcept {
    const std::size_t blocks = blocks_for(cells);
    coded_.resize(blocks);
    static_cast<void>(blocks_.resize(blocks * layout_.block_bytes()));
    const index_t end = std::min(size_, static_cast<index_t>(blocks) * kernel::scan_keys);
    size_ = cells;
    for (index_t cell = cells; cell < end; ++cell) erase(cell);
  }
  void clear_block(std::size_t b) noexcept {
    std::byte* to = blocks_.data() + b * layout_.block_bytes();
    std::memset(to, 0, layout_.block_bytes());
    std::fill_n(lanes(to, 1), kernel::scan_keys, no_reach);
    coded_[b] = 0;
  }

  [[nodiscard]] std::byte* block(index_t cell) noexcept {
    return blocks_.data() + at(cell / kernel::scan_keys) * layout_.block_bytes();
  }
  [[nodiscard]] const std::byte* block(index_t cell) const noexcept {
    return blocks_.data() + at(cell / kernel::scan_keys) * layout_.block_bytes();
  }
  [[nodiscard]] std::int16_t* lanes(std::byte* b, std::size_t array) const noexcept {
    return reinterpret_cast<std::int16_t*>(b + at(layout_.planes) * kernel::scan_keys + array * 2 * kernel::scan_keys);
  }
  [[nodiscard]] const std::int16_t* lanes(const std::byte* b, std::size_t array) const noexcept {
    return reinterpret_cast<const std::int16_t*>(b + at(layout_.planes) * kernel::scan_keys +
                                                 array * 2 * kernel::scan_keys);
  }
  void put(std::byte* to, std::size_t k, int g, unsigned number) const noexcept {
    const auto add = [&](int plane, unsigned bits) { to[at(plane) * kernel::scan_keys + k] |= std::byte(bits); };
    if (g < layout_.planes) return add(g, number);
    for (int part = 0; part < 3; ++part) add(3 * (g - layout_.planes) + part, (number >> (2 * part) & 3u) << 6);
  }
  [[nodiscard]] unsigned get(const std::byte* from, std::size_t k, int g) const noexcept {
    const auto of = [&](int plane) { return std::to_integer<unsigned>(from[at(plane) * kernel::scan_keys + k]); };
    if (g < layout_.planes) return of(g) & 63u;
    const int first = 3 * (g - layout_.planes);
    return of(first) >> 6 | (of(first + 1) >> 6) << 2 | (of(first + 2) >> 6) << 4;
  }

  // Leaves the levels u in levels_. What is not finite ends in numbers that `set` refuses.
  [[nodiscard]] encoded encode(std::span<const float> key) noexcept {
    std::fill(buffer_.begin(), buffer_.end(), 0.0f);
    std::copy(key.begin(), key.end(), buffer_.begin());
    rotation_.apply(buffer_);
    const auto width = static_cast<Eigen::Index>(layout_.width);
    Eigen::Map<Eigen::ArrayXf> all(buffer_.data(), width);
    all -= Eigen::Map<const Eigen::ArrayXf>(mean_.data(), width);
    float square = all.square().sum(), unit = 1;
    if (!(square > 0x1p-80f && square < 0x1p100f)) {  // float holds other squares badly, or not at all
      unit = kernel::unit_for(all.abs().maxCoeff());
      all *= unit;
      square = all.square().sum();
    }
    constexpr float infinite = std::numeric_limits<float>::infinity();
    if (!std::isfinite(square)) return {infinite, infinite, 0, 0};
    // Half steps of optimal uniform quantisers of a normal variable, in standard deviations (Max 1960).
    constexpr float half_steps[] = {1.0f, 0.7979f, 0.4979f, 0.2930f, 0.1676f};
    const float half = half_steps[layout_.bits];
    // Finite where the square is tiny, so that 0 times it is a number.
    const float inverse = std::min(square > 0 ? std::sqrt(static_cast<float>(width) / square) / (2 * half) : 0.0f,
                                   std::numeric_limits<float>::max());
    const Eigen::Map<const Eigen::ArrayXf> y(buffer_.data(), layout_.coordinates);
    Eigen::Map<Eigen::ArrayXi> up(levels_.data(), layout_.coordinates);
    const auto edge = 0.5f * static_cast<float>(1 << layout_.bits);
    up = (y * inverse + edge).max(0.0f).min(2 * edge - 1).template cast<int>();
    const auto c = up.template cast<float>() * 2.0f - (2 * edge - 1);
    const float along = (c * y).sum(), norm2 = c.square().sum();
    // Where hardly anything of y lies in the coded coordinates, unbiasedness would cost a huge error.
    const bool hidden = along * along < 0.05f * square * norm2;
    const float alpha = square > 0 ? (hidden ? std::max(0.0f, along / norm2) : square / along) : 0;
    return {alpha * (1 / unit), square, along, norm2, unit};
  }

  sketch::random_rotation rotation_;
  index_t dim_ = 0;
  cell_layout layout_;
  code_units units_;
  index_t size_ = 0;
  std::vector<float> mean_, buffer_;  // [width]
  std::vector<int> levels_;           // [width], of the key at hand
  std::vector<std::uint64_t> coded_;
  page_buffer blocks_;
};

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
