// Is a row as long as it should be?
#pragma once

#include "vattn/kernel/row.hpp"

namespace vattn::kernel {

/// True if the row has `size` elements, or does not say how many it has: `row` asks for no size().
template <row R>
[[nodiscard]] bool has_size(const R& r, index_t size) noexcept {
  if constexpr (requires { r.size(); }) {
    return static_cast<index_t>(r.size()) == size;
  } else {
    return true;
  }
}

}  // namespace vattn::kernel
