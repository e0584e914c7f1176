// Lengths of stores in tests.
#pragma once

#include <algorithm>
#include <vattn/store/store_attention.hpp>

namespace vattn::test {

/// Tokens that are sampled for a group of heads, whatever instruction set is in use: where the scan costs more, longer
/// than what is tried, so that most plans keep to it.
inline index_t long_enough(index_t group) {
  constexpr index_t fixed = 512;  // that are of no past, at most
  const read_costs costs(kernel::active_isa(), std::min(group, max_group));
  const auto tried = [&](index_t n) { return worth_sampling(n, n - fixed, costs); };
  index_t n = 6144 + 4608 * group;
  if (tried(n)) return n;
  while (!tried(n)) n += 1024;
  return n + n / 2;
}

}  // namespace vattn::test
