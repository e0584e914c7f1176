// How the row that begins at an address is read: plain elements, quantised blocks, FP8, groups at a distance.
#include "vattn/macros_push.hpp"
#pragma once

#include <concepts>
#include <cstddef>
#include <span>

#include "vattn/base/config.hpp"
#include "vattn/base/tensor.hpp"
#include "vattn/kernel/grouped.hpp"
#include "vattn/kernel/quantised.hpp"
#include "vattn/kernel/row.hpp"

namespace vattn::VATTN_ABI {

/// `at(first, width)` is the row of `width` elements at `first`. `extent(width)`: bytes of it that lie together, which
/// no other row may share; `multiple()`: what the width must be a multiple of; `alignment`: of `first`.
template <class F>
concept row_format = requires(const F& f, const std::byte* first, index_t width) {
  { f.at(first, width) } noexcept -> kernel::row;
  { f.extent(width) } noexcept -> std::same_as<index_t>;
  { f.multiple() } noexcept -> std::same_as<index_t>;
  { F::alignment } -> std::convertible_to<std::size_t>;
  { F::width } -> std::convertible_to<index_t>;
};

/// Consecutive elements; D elements, or `dynamic`.
template <kernel::element T, index_t D = dynamic>
struct plain_rows {
  static constexpr std::size_t alignment = alignof(T);
  static constexpr index_t width = D;
  using element = T;
  using row = std::span<const T, D == dynamic ? std::dynamic_extent : static_cast<std::size_t>(D)>;

  [[nodiscard]] row at(const std::byte* first, index_t elements) const noexcept {
    return row(reinterpret_cast<const T*>(first), static_cast<std::size_t>(D == dynamic ? elements : D));
  }
  [[nodiscard]] index_t extent(index_t elements) const noexcept { return saturated_product(elements, sizeof(T)); }
  [[nodiscard]] index_t multiple() const noexcept { return 1; }
};

/// ggml's q8_0 or q4_0.
template <kernel::quantised_block B>
struct quantised_rows {
  using element = B;
  static constexpr std::size_t alignment = alignof(B);
  static constexpr index_t width = dynamic;

  [[nodiscard]] kernel::block_row<B> at(const std::byte* first, index_t elements) const noexcept {
    return {reinterpret_cast<const B*>(first), static_cast<std::size_t>(elements)};
  }
  [[nodiscard]] index_t extent(index_t elements) const noexcept {
    return saturated_product(elements / multiple(), sizeof(B));
  }
  [[nodiscard]] index_t multiple() const noexcept { return static_cast<index_t>(kernel::block_elements); }
};

/// FP8 with one scale for the cache.
struct e4m3_rows {
  static constexpr std::size_t alignment = 1;
  static constexpr index_t width = dynamic;
  float scale = 1;

  [[nodiscard]] kernel::e4m3_row at(const std::byte* first, index_t elements) const noexcept {
    return {reinterpret_cast<const kernel::e4m3*>(first), static_cast<std::size_t>(elements), scale};
  }
  [[nodiscard]] index_t extent(index_t elements) const noexcept { return elements; }
  [[nodiscard]] index_t multiple() const noexcept { return 1; }
};

/// Groups of `group` elements, `stride` bytes apart. Slow where the group is short: see kernel::grouped_row.
template <kernel::element T>
struct grouped_rows {
  static constexpr std::size_t alignment = alignof(T);
  static constexpr index_t width = dynamic;
  index_t group = 1;
  index_t stride = sizeof(T);

  [[nodiscard]] kernel::grouped_row<T> at(const std::byte* first, index_t elements) const noexcept {
    return {first, static_cast<std::size_t>(elements), static_cast<std::size_t>(group), stride};
  }
  [[nodiscard]] index_t extent(index_t) const noexcept { return group * static_cast<index_t>(sizeof(T)); }
  [[nodiscard]] index_t multiple() const noexcept { return group; }
};

/// Element types of the engines' caches.
template <class T>
concept stored = kernel::element<T> || kernel::quantised_block<T> || std::same_as<T, kernel::e4m3>;

/// Scales of FP8 caches; 1 for all others.
struct row_scales {
  float k = 1, v = 1;
};

namespace detail {
template <class T, index_t D>
struct format_of;
template <kernel::element T, index_t D>
struct format_of<T, D> {
  using type = plain_rows<T, D>;
};
template <kernel::quantised_block B, index_t D>
struct format_of<B, D> {
  using type = quantised_rows<B>;
};
template <index_t D>
struct format_of<kernel::e4m3, D> {
  using type = e4m3_rows;
};
}  // namespace detail

/// The format in which rows of T lie where nothing else is said.
template <stored T, index_t D = dynamic>
using rows_of = typename detail::format_of<T, D>::type;

/// One of them, with its scale where it has one.
template <stored T, index_t D = dynamic>
[[nodiscard]] constexpr rows_of<T, D> make_format(float scale) noexcept {
  if constexpr (std::same_as<T, kernel::e4m3>) {
    return {scale};
  } else {
    static_cast<void>(scale);
    return {};
  }
}

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
