// Is a row as long as it should be?
#include "vattn/macros_push.hpp"
#pragma once

#include "vattn/kernel/row.hpp"

namespace vattn::VATTN_ABI::kernel {

/// True if the row has `size` elements, or does not say how many it has: `row` asks for no size().
template <row R>
[[nodiscard]] bool has_size(const R& r, index_t size) noexcept {
  if constexpr (requires { r.size(); }) {
    return static_cast<index_t>(r.size()) == size;
  } else {
    return true;
  }
}

}  // namespace vattn::VATTN_ABI::kernel

#include "vattn/macros_pop.hpp"
