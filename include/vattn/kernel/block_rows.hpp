// What block kernels read: where rows lie, and their elements.
#pragma once

#include <Eigen/Core>
#include <bit>
#include <concepts>
#include <cstddef>
#include <cstdint>

#include "vattn/kernel/isa.hpp"
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
  [[nodiscard]] static block_of_rows gathered(const strided_rows& rows, const ordinal* index, index_t n) noexcept {
    block_of_rows b(rows, 0, n);
    b.index = index;
    return b;
  }
};

/// Types of rows that block kernels read.
template <class T>
concept block_element = element<T>;

template <block_element T>
[[nodiscard]] constexpr index_t row_bytes(index_t dim) noexcept {
  return dim * static_cast<index_t>(sizeof(T));
}

namespace detail {

template <int N>
inline constexpr auto extent = static_cast<std::size_t>(N);

[[nodiscard]] inline const std::byte* row_at(const block_of_rows& b, index_t i) noexcept {
  return b.first + (b.index ? index_t{b.index[i]} : i) * b.stride;
}

template <block_element T>
[[nodiscard]] inline float element_at(const std::byte* row, index_t d) noexcept {
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

// Gathered rows are fetched while those before them are summed. Not for rows in order: hardware prefetches those,
// and instructions of ours halve its speed.
template <int R>
inline void prefetch_gathered(const block_of_rows& rows, index_t from, index_t bytes) noexcept {
#if defined(__GNUC__)
  if (!rows.index) return;
  for (index_t i = from; i < std::min(from + R, rows.count); ++i) {
    for (index_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(row_at(rows, i) + byte);
  }
#else
  static_cast<void>(rows), static_cast<void>(from), static_cast<void>(bytes);
#endif
}

}  // namespace detail
}  // namespace vattn::kernel
