// Memory for what is about to be appended to several vectors, taken before any of them changes.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include "vattn/base/config.hpp"

namespace vattn::VATTN_ABI::detail {

/// Room for `more` elements, growing as push_back does. An append that takes all its room first either happens or,
/// where memory runs out (std::bad_alloc, the standard library's), leaves its object as it was.
template <class T>
void make_room(std::vector<T>& v, std::size_t more) {
  if (v.capacity() - v.size() < more) v.reserve(std::max(v.size() + more, 2 * v.capacity()));
}

}  // namespace vattn::VATTN_ABI::detail

#include "vattn/macros_pop.hpp"
