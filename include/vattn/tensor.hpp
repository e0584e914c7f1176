// A non-owning strided array: the shape of every buffer that crosses the API's edge.
#pragma once

#include <array>
#include <cstddef>
#include <type_traits>

#include "vattn/config.hpp"

namespace vattn {

/// `data` + Σ index·stride, strides in BYTES, so that padded, interleaved and permuted engine buffers
/// need no copy. Owns nothing, allocates nothing. `data` may be null where a parameter is optional.
template <class T, std::size_t Rank>
struct tensor_view {
  using byte = std::conditional_t<std::is_const_v<T>, const std::byte, std::byte>;

  T* data = nullptr;
  std::array<index_t, Rank> extents{};
  std::array<index_t, Rank> strides{};  ///< bytes

  constexpr tensor_view() = default;

  /// Dense row-major array of the given shape.
  constexpr tensor_view(T* first, const std::array<index_t, Rank>& shape) noexcept : data(first), extents(shape) {
    index_t stride = static_cast<index_t>(sizeof(T));
    for (std::size_t axis = Rank; axis-- > 0;) {
      strides[axis] = stride;
      stride *= shape[axis];
    }
  }

  constexpr tensor_view(T* first, const std::array<index_t, Rank>& shape,
                        const std::array<index_t, Rank>& byte_strides) noexcept
      : data(first), extents(shape), strides(byte_strides) {}

  [[nodiscard]] constexpr explicit operator bool() const noexcept { return data != nullptr; }

  template <class... I>
  requires(sizeof...(I) == Rank) [[nodiscard]] T& operator()(I... position) const noexcept {
    const std::array<index_t, Rank> at{static_cast<index_t>(position)...};
    index_t offset = 0;
    for (std::size_t axis = 0; axis < Rank; ++axis) offset += at[axis] * strides[axis];
    return *reinterpret_cast<T*>(reinterpret_cast<byte*>(data) + offset);
  }

  [[nodiscard]] constexpr index_t size() const noexcept {
    index_t n = 1;
    for (const index_t extent : extents) n *= extent;
    return n;
  }
};

}  // namespace vattn
