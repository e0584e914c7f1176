// Rows of any cache as blocks for the block kernels: where they lie if these can read them there, else copied.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <cstring>
#include <span>
#include <type_traits>

#include "vattn/kernel/block.hpp"
#include "vattn/kv/view.hpp"

namespace vattn::VATTN_ABI {

namespace detail {
template <class Row>
struct element_of_row {
  using type = float;  // decoded
};
template <kernel::element T, std::size_t E>
struct element_of_row<std::span<const T, E>> {
  using type = T;
};
template <kernel::quantised_block B>
struct element_of_row<kernel::block_row<B>> {
  using type = B;
};
}  // namespace detail

/// Bytes of memory that a row_gatherer of any head has enough with.
[[nodiscard]] constexpr std::size_t gathered_bytes(index_t dk, index_t dv) noexcept {
  return static_cast<std::size_t>(kernel::block_rows * std::max(dk, dv)) * sizeof(float);
}

/// Blocks of rows of a KV head. Rows that a strided head's block kernels read in place are not copied; others are, as
/// they are where kernels know their elements (pages, rings), else decoded to float (FP8, transposed values).
template <kv_head Head>
class row_gatherer {
  using key_row = std::remove_cvref_t<decltype(std::declval<const Head&>().key(0))>;
  using value_row = std::remove_cvref_t<decltype(std::declval<const Head&>().value(0))>;

 public:
  using key_element = typename detail::element_of_row<key_row>::type;
  using value_element = typename detail::element_of_row<value_row>::type;
  static constexpr bool in_place = strided_head<Head>;

  /// `storage` [gathered_bytes()], for what is copied.
  row_gatherer(const Head& head, std::span<std::byte> storage) noexcept : head_(head), storage_(storage) {}

  /// At most block_rows cells, valid until the next call.
  [[nodiscard]] kernel::block_of_rows keys(const ordinal* cells, index_t n) const noexcept {
    if constexpr (in_place) {
      return kernel::block_of_rows::gathered(head_.key_rows(), cells, n);
    } else {
      const index_t stride = key_bytes(head_.dk());
      for (index_t i = 0; i < n; ++i) copy<key_element>(head_.key(index_t{cells[i]}), storage_.data() + i * stride);
      return {{storage_.data(), stride}, 0, n};
    }
  }
  [[nodiscard]] kernel::block_of_rows values(const ordinal* cells, index_t n) const noexcept {
    if constexpr (in_place) {
      return kernel::block_of_rows::gathered(head_.value_rows(), cells, n);
    } else {
      const index_t stride = value_bytes(head_.dv());
      for (index_t i = 0; i < n; ++i) copy<value_element>(head_.value(index_t{cells[i]}), storage_.data() + i * stride);
      return {{storage_.data(), stride}, 0, n};
    }
  }
  VATTN_ALWAYS_INLINE void fetch_key(index_t cell) const noexcept { fetch(head_.key(cell)); }
  VATTN_ALWAYS_INLINE void fetch_value(index_t cell) const noexcept { fetch(head_.value(cell)); }

 private:
  [[nodiscard]] static index_t key_bytes(index_t dk) noexcept { return kernel::row_bytes<key_element>(dk); }
  [[nodiscard]] static index_t value_bytes(index_t dv) noexcept { return kernel::row_bytes<value_element>(dv); }

  template <class T, class Row>
  static void copy(const Row& row, std::byte* to) noexcept {
    if constexpr (requires {
                    { row.data() } -> std::same_as<const T*>;
                  }) {
      std::memcpy(to, row.data(), row.size_bytes());
    } else {
      using kernel::load;
      load(row, reinterpret_cast<float*>(to));
    }
  }
  template <class Row>
  static VATTN_ALWAYS_INLINE void fetch(const Row& row) noexcept {
    if constexpr (requires {
                    row.data();
                    row.size_bytes();
                  })
      kernel::prefetch_row(reinterpret_cast<const std::byte*>(row.data()), row.size_bytes());
  }

  const Head& head_;
  std::span<std::byte> storage_;
};

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
