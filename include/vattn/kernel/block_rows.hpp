// What block kernels read: where rows lie, and their elements.
#include "vattn/macros_push.hpp"
#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <bit>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "vattn/kernel/isa.hpp"
#include "vattn/kernel/quantised.hpp"
#include "vattn/kernel/row.hpp"

namespace vattn::VATTN_ABI::kernel {

/// Rows of a block; tokens whose logits are known before their values are read.
inline constexpr index_t block_rows = 64;

/// Equal rows at equal distances: row i begins at `first + i·stride`, in bytes.
struct strided_rows {
  const std::byte* first = nullptr;
  index_t stride = 0;
};

/// Rows 0 to count of a block: row `from + i` or, with `index`, row `index[i]`.
struct block_of_rows {
  const std::byte* first;
  index_t stride;                  ///< bytes
  index_t count;                   ///< at most block_rows
  const ordinal* index = nullptr;  ///< gathered rows

  block_of_rows(const strided_rows& rows, index_t from, index_t n) noexcept
      : first(rows.first + from * rows.stride), stride(rows.stride), count(n) {}
  /// `n` rows from row i on.
  [[nodiscard]] block_of_rows part(index_t i, index_t n) const noexcept {
    block_of_rows b = *this;
    b.count = n;
    if (index) {
      b.index += i;
    } else {
      b.first += i * stride;
    }
    return b;
  }
  [[nodiscard]] static block_of_rows gathered(const strided_rows& rows, const ordinal* index, index_t n) noexcept {
    block_of_rows b(rows, 0, n);
    b.index = index;
    return b;
  }
};

/// Types of rows that block kernels read; of q4_0 by way of q8_0.
template <class T>
concept block_element = element<T> || quantised_block<T>;

/// Bytes of `dim` elements, of quantised rows a multiple of 32.
template <block_element T>
[[nodiscard]] constexpr index_t row_bytes(index_t dim) noexcept {
  constexpr index_t per = quantised_block<T> ? static_cast<index_t>(block_elements) : 1;
  return dim / per * static_cast<index_t>(sizeof(T));
}

namespace detail {

template <int N>
inline constexpr auto extent = static_cast<std::size_t>(N);

[[nodiscard]] inline const std::byte* row_at(const block_of_rows& b, index_t i) noexcept {
  return b.first + (b.index ? index_t{b.index[i]} : i) * b.stride;
}

template <block_element T>
[[nodiscard]] inline float element_at(const std::byte* row, index_t d) noexcept {
  if constexpr (quantised_block<T>) {
    const T* block = reinterpret_cast<const T*>(row) + d / 32;
    return half_to_float(block->scale) * static_cast<float>(block->quants[d % 32]);
  } else {
    T x;
    std::memcpy(&x, row + d * static_cast<index_t>(sizeof(T)), sizeof x);
    if constexpr (std::same_as<T, float>) {
      return x;
    } else if constexpr (std::same_as<T, Eigen::half>) {
      return half_to_float(std::bit_cast<std::uint16_t>(x));
    } else {
      return bfloat16_to_float(std::bit_cast<std::uint16_t>(x));
    }
  }
}

// The same numbers: d·(nibble − 8) has a quant of q8_0.
inline void widen(const q4_0_block& from, q8_0_block& to) noexcept {
  constexpr std::size_t half = block_elements / 2;
  std::uint8_t nibbles[half];
  std::int8_t quants[block_elements];
  std::memcpy(nibbles, from.quants, half);
  for (std::size_t j = 0; j < half; ++j) quants[j] = static_cast<std::int8_t>((nibbles[j] & 0x0f) - 8);
  for (std::size_t j = 0; j < half; ++j) quants[half + j] = static_cast<std::int8_t>((nibbles[j] >> 4) - 8);
  to.scale = from.scale;
  std::memcpy(to.quants, quants, block_elements);
}

// Rows of q4_0 that are wider than this are decoded one by one.
inline constexpr index_t widest_widened = 1024;

// visit(first, rows): the rows of q4_0 as rows of q8_0 on the stack, as many at a time as fit, a multiple of 16.
template <class Visit>
inline void for_widened(const block_of_rows& rows, index_t dim, Visit&& visit) noexcept {
  constexpr index_t capacity = 16 * widest_widened / 32;
  q8_0_block wide[capacity];
  const index_t blocks = dim / 32, most = std::min(block_rows, capacity / std::max<index_t>(1, blocks) / 16 * 16);
  const strided_rows all{reinterpret_cast<const std::byte*>(wide), blocks * static_cast<index_t>(sizeof wide[0])};
  for (index_t first = 0; first < rows.count; first += most) {
    const index_t n = std::min(most, rows.count - first);
    for (index_t i = 0; i < n; ++i) {
      const auto* from = reinterpret_cast<const q4_0_block*>(row_at(rows, first + i));
      for (index_t b = 0; b < blocks; ++b) widen(from[b], wide[i * blocks + b]);
    }
    visit(first, block_of_rows(all, 0, n));
  }
}
// visit(i, row), one by one.
template <class Visit>
inline void for_decoded(const block_of_rows& rows, index_t dim, Visit&& visit) noexcept {
  for (index_t i = 0; i < rows.count; ++i)
    visit(i, block_row(reinterpret_cast<const q4_0_block*>(row_at(rows, i)), static_cast<std::size_t>(dim)));
}

// Fetches memory for rows that are about to be read. One core keeps 16 to 24 lines on their way, half of what the
// memory can deliver; the rest must come from the second cache's own prefetching, which follows lines that are asked
// for in order, and kernels do not read in order. Measured (docs/performance.md): on Zen 4 lines are asked for in
// order, 8 KB ahead, for the second cache, and touched in order just before they are read, if rows are long or not read
// whole. On Intel's cores whole rows are asked for 2 KB ahead, for the first cache, and of others what is read next of
// the rows 4 on, for the first, and then 32 on, for the second: in the other order V takes a fifth longer.
class row_fetcher {
 public:
  row_fetcher(const block_of_rows& rows, index_t bytes) noexcept
      : rows_(rows), bytes_(bytes), far_(fetches_far()), brief_(bytes <= 256) {}

  /// Rows [i, i + R) are read next. Of gathered rows the second next R are asked for.
  template <int R>
  VATTN_ALWAYS_INLINE void whole(index_t i) const noexcept {
    if (rows_.index) {
      for (index_t j = i + 2 * R; j < std::min(i + 3 * R, rows_.count); ++j) ask<3>(row_at(rows_, j), bytes_);
      return;
    }
    const std::byte* from = rows_.first + i * rows_.stride;
    if (!far_) {
      for (int r = 0; r < R; ++r) ask<3>(from + 2048 + r * rows_.stride, bytes_);
      return;
    }
    for (int r = 0; r < R; ++r) ask<2>(from + 8192 + r * rows_.stride, bytes_);
    for (index_t r = 0; !brief_ && r < std::min<index_t>(R, rows_.count - i); ++r) touch(from + r * rows_.stride);
  }
  /// Bytes [from, from + bytes) of row i are read next; the same ones of all rows before others of any.
  VATTN_ALWAYS_INLINE void columns(index_t i, index_t from, index_t bytes) const noexcept {
    if (rows_.index) {
      if (from == 0 && i + 2 < rows_.count) ask<3>(row_at(rows_, i + 2), bytes_);
      return;
    }
    const std::byte* row = rows_.first + i * rows_.stride;
    if (!far_) {
      ask<3>(row + 4 * rows_.stride + from, bytes);
      ask<2>(row + 32 * rows_.stride + from, bytes);
      return;
    }
    if (from > 0) return;
    if (brief_) ask<2>(row + 8192, bytes_);
    touch(row);
  }

 private:
  template <int Locality>
  static VATTN_ALWAYS_INLINE void ask(const std::byte* from, index_t bytes) noexcept {
    prefetch_row<Locality>(from, static_cast<std::size_t>(bytes));
  }
  VATTN_ALWAYS_INLINE void touch(const std::byte* row) const noexcept {
    for (index_t byte = 0; byte < bytes_; byte += 64)
      static_cast<void>(*reinterpret_cast<const volatile std::uint8_t*>(row + byte));
  }

  const block_of_rows& rows_;
  index_t bytes_;
  bool far_, brief_;
};

}  // namespace detail
}  // namespace vattn::VATTN_ABI::kernel

#include "vattn/macros_pop.hpp"
