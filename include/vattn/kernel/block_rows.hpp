// What block kernels read: where rows lie, and their elements.
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

namespace vattn::kernel {

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

/// Types of rows that block kernels read.
template <class T>
concept block_element = element<T> || std::same_as<T, q8_0_block>;

/// Bytes of `dim` elements, of q8_0 a multiple of 32.
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

// Fetches memory for R rows from row i on, which are about to be read: whole, or some columns first. One core keeps
// about 24 lines on their way, half of what the memory can deliver; the rest must come from the second cache's own
// prefetching, which follows lines that are asked for in order, and kernels do not read in order. Measured on Zen 4
// (docs/performance.md): lines are asked for in order, 8 KB ahead, for the second cache; and touched in order just
// before they are read, if rows are long or not read whole. Of gathered rows the second next R are asked for.
template <int R, bool Whole>
inline void fetch_rows(const block_of_rows& rows, index_t i, index_t bytes) noexcept {
  if (rows.index) {
    for (index_t j = i + 2 * R; j < std::min(i + 3 * R, rows.count); ++j)
      prefetch_row(row_at(rows, j), static_cast<std::size_t>(bytes));
    return;
  }
  const std::byte* from = rows.first + i * rows.stride;
  const bool brief = bytes <= 256;
  if (Whole || brief) {
    for (int r = 0; r < R; ++r) prefetch_row<2>(from + 8192 + r * rows.stride, static_cast<std::size_t>(bytes));
  }
  if (Whole && brief) return;
  const auto touch = [](const std::byte* first, index_t size) {
    for (index_t byte = 0; byte < size; byte += 64)
      static_cast<void>(*reinterpret_cast<const volatile std::uint8_t*>(first + byte));
  };
  const index_t count = std::min<index_t>(R, rows.count - i);
  if (rows.stride == bytes) return touch(from, count * bytes);
  for (index_t r = 0; r < count; ++r) touch(from + r * rows.stride, bytes);
}

}  // namespace detail
}  // namespace vattn::kernel
