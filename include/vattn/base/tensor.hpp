// A non-owning strided array, the shape of every buffer that crosses the API's edge, and what can be known to be wrong
// with one.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "vattn/base/config.hpp"
#include "vattn/base/status.hpp"

namespace vattn::VATTN_ABI {

/// a·b, or the end of the range that it would pass: sizes that no machine has are refused by name instead of wrapping
/// round to ones that look right.
[[nodiscard]] constexpr index_t saturated_product(index_t a, index_t b) noexcept {
  constexpr index_t most = std::numeric_limits<index_t>::max();
  if (a == 0 || b == 0) return 0;
  const auto size = [](index_t x) { return x < 0 ? 0 - static_cast<std::uint64_t>(x) : static_cast<std::uint64_t>(x); };
  if (size(a) > static_cast<std::uint64_t>(most) / size(b)) return (a < 0) == (b < 0) ? most : -most;
  return a * b;
}

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
      stride = saturated_product(stride, shape[axis]);
    }
  }

  constexpr tensor_view(T* first, const std::array<index_t, Rank>& shape,
                        const std::array<index_t, Rank>& byte_strides) noexcept
      : data(first), extents(shape), strides(byte_strides) {}

  [[nodiscard]] constexpr explicit operator bool() const noexcept { return data != nullptr; }

  template <class... I>
  requires(sizeof...(I) == Rank)
  [[nodiscard]] T& operator()(I... position) const noexcept {
    const std::array<index_t, Rank> at{static_cast<index_t>(position)...};
    index_t offset = 0;
    for (std::size_t axis = 0; axis < Rank; ++axis) offset += at[axis] * strides[axis];
    return *reinterpret_cast<T*>(reinterpret_cast<byte*>(data) + offset);
  }

  [[nodiscard]] constexpr index_t size() const noexcept {
    index_t n = 1;
    for (const index_t extent : extents) n = saturated_product(n, extent);
    return n;
  }
};

namespace detail {

/// Bytes beyond which no buffer reaches: sums of a few offsets below it do not overflow.
inline constexpr index_t widest_buffer = index_t{1} << 60;

/// |stride|, also where no index_t is that.
[[nodiscard]] constexpr index_t magnitude(index_t stride) noexcept {
  return stride < 0 ? -std::max(stride, -std::numeric_limits<index_t>::max()) : stride;
}

/// Bytes from the first element to the last along one axis, in either direction.
[[nodiscard]] constexpr index_t reach_of_axis(index_t stride, index_t extent) noexcept {
  return extent <= 1 ? 0 : std::min(magnitude(saturated_product(stride, extent - 1)), widest_buffer);
}

[[nodiscard]] inline status check_aligned(const char* name, const void* first, std::size_t alignment) noexcept {
  if (reinterpret_cast<std::uintptr_t>(first) % alignment == 0) return {};
  return status::error(errc::invalid_argument,
                       "%s is not aligned to its element size %zu: give the address of an element", name, alignment);
}

/// What is read or written at `first` by elements of `alignment`: of `extents` elements, `strides` bytes apart. A
/// stride of 0 repeats what lies there.
template <std::size_t Rank>
[[nodiscard]] status check_elements(const char* name, const void* first, const std::array<index_t, Rank>& extents,
                                    const std::array<index_t, Rank>& strides, std::size_t alignment) noexcept {
  if (std::any_of(extents.begin(), extents.end(), [](index_t extent) { return extent <= 0; })) return {};
  if (status s = check_aligned(name, first, alignment); !s) return s;
  index_t reach = 0;
  for (std::size_t axis = 0; axis < Rank; ++axis) {
    if (extents[axis] > 1 && strides[axis] % static_cast<index_t>(alignment) != 0) {
      return status::error(errc::invalid_argument,
                           "the byte stride of axis %zu of %s is %lld: give a multiple of its element size %zu", axis,
                           name, static_cast<long long>(strides[axis]), alignment);
    }
    reach = std::min(widest_buffer, reach + reach_of_axis(strides[axis], extents[axis]));
  }
  if (reach < widest_buffer) return {};
  return status::error(errc::invalid_argument, "%s reaches over more than 2^60 bytes: check its extents and strides",
                       name);
}
template <class T, std::size_t Rank>
[[nodiscard]] status check_elements(const char* name, const tensor_view<T, Rank>& t) noexcept {
  return check_elements(name, t.data, t.extents, t.strides, alignof(T));
}

/// The same of what is written: each element has memory of its own. From the smallest stride to the largest each must
/// step over all that lies below it, as in any array, permuted or padded.
template <class T, std::size_t Rank>
[[nodiscard]] status check_results(const char* name, const tensor_view<T, Rank>& t) noexcept {
  if (status s = check_elements(name, t); !s || t.size() <= 1) return s;
  std::array<std::size_t, Rank> order{};
  for (std::size_t axis = 0; axis < Rank; ++axis) order[axis] = axis;
  std::sort(order.begin(), order.end(),
            [&](std::size_t a, std::size_t b) { return magnitude(t.strides[a]) < magnitude(t.strides[b]); });
  index_t below = static_cast<index_t>(sizeof(T));
  for (const std::size_t axis : order) {
    if (t.extents[axis] <= 1) continue;
    if (magnitude(t.strides[axis]) < below) {
      return status::error(errc::invalid_argument,
                           "elements of %s overlap: the byte stride of axis %zu is %lld, and what it steps over takes "
                           "%lld bytes; give each its own memory",
                           name, axis, static_cast<long long>(t.strides[axis]), static_cast<long long>(below));
    }
    below += reach_of_axis(t.strides[axis], t.extents[axis]);
  }
  return {};
}

}  // namespace detail
}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
