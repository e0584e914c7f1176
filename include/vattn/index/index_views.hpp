// Which cells each of several queries sees, and which of the queries are worth sampling together.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <bit>
#include <span>
#include <utility>

#include "vattn/call/call.hpp"
#include "vattn/index/index_costs.hpp"
#include "vattn/kernel/cell_scan.hpp"

namespace vattn::VATTN_ABI {

/// Which cells each of the queries of a group sees, a bit each: none where all heads have the same query.
struct cells_of_queries {
  const std::uint64_t* bits = nullptr;  // [queries, blocks]
  index_t queries = 0, blocks = 0;

  [[nodiscard]] explicit operator bool() const noexcept { return bits != nullptr; }
  [[nodiscard]] bool sees(index_t query, index_t cell) const noexcept {
    return !bits || (bits[query * blocks + cell / kernel::scan_keys] >> (cell % kernel::scan_keys) & 1) != 0;
  }
  [[nodiscard]] std::uint64_t all(index_t block) const noexcept {
    std::uint64_t seen = ~std::uint64_t{0};
    for (index_t q = 0; q < queries; ++q) seen &= bits[q * blocks + block];
    return seen;
  }
  [[nodiscard]] std::uint64_t any(index_t block) const noexcept {
    std::uint64_t seen = 0;
    for (index_t q = 0; q < queries; ++q) seen |= bits[q * blocks + block];
    return seen;
  }
  [[nodiscard]] index_t seen_by_any() const noexcept {
    index_t count = 0;
    for (index_t b = 0; b < blocks; ++b) count += std::popcount(any(b));
    return count;
  }
  /// Cells that one of two queries sees and the other does not.
  [[nodiscard]] index_t apart(index_t q, index_t r) const noexcept {
    index_t count = 0;
    for (index_t b = 0; b < blocks; ++b) count += std::popcount(bits[q * blocks + b] ^ bits[r * blocks + b]);
    return count;
  }
};

/// Sets the bits of tokens [first, last) of a query, and clears all others. The blocks that have any.
inline std::pair<index_t, index_t> mark_cells(const population& tokens, index_t first, index_t last,
                                              std::span<std::uint64_t> bits) noexcept {
  constexpr index_t width = kernel::scan_keys;
  const auto at = [](index_t i) { return static_cast<std::size_t>(i); };
  if (first >= last || !tokens.contiguous()) {
    std::fill(bits.begin(), bits.end(), std::uint64_t{0});
    for (index_t j = first; j < last; ++j) bits[at(tokens[j] / width)] |= std::uint64_t{1} << (tokens[j] % width);
    return {0, first < last ? static_cast<index_t>(bits.size()) : 0};
  }
  const index_t from = tokens[first], to = tokens[last - 1] + 1, begin = from / width, end = (to - 1) / width + 1;
  std::fill(bits.begin(), bits.begin() + begin, std::uint64_t{0});
  std::fill(bits.begin() + begin, bits.begin() + end, ~std::uint64_t{0});
  std::fill(bits.begin() + end, bits.end(), std::uint64_t{0});
  bits[at(begin)] &= ~std::uint64_t{0} << (from % width);
  bits[at(end - 1)] &= ~std::uint64_t{0} >> (end * width - to);
  return {begin, end};
}

/// Query heads of a KV head up to which several queries share a sample. A scan's time is that of its heads: with more,
/// sharing it saves less than it costs to read what the other queries want (docs/index.md).
inline constexpr index_t most_heads_to_share = 2;

/// Query by query, the heads of those that see nearly the same cells together: `attend(heads, seen)` for each such set.
/// What only some of them see is read for all, so that it may be half of what a scan and tables of one's own cost.
/// `views` [queries, blocks of n cells].
template <kv_head Head, class Attend>
void attend_by_views(head_group<Head>& group, const index_costs& costs, std::span<std::uint64_t> views,
                     Attend&& attend) noexcept {
  const index_t queries = group[group.size() - 1].query - group[0].query + 1, each = group.size() / queries;
  if (queries == 1) return attend(group, cells_of_queries{});
  const index_t n = group[0].row.head.size(), blocks = n / kernel::scan_keys + 1;
  const cells_of_queries seen{views.data(), queries, blocks};
  for (index_t q = 0; q < queries; ++q) {
    const population& own = group[q * each].tokens;
    mark_cells(own, 0, own.size(),
               views.subspan(static_cast<std::size_t>(q * blocks), static_cast<std::size_t>(blocks)));
  }
  const double most = std::min((costs.once + costs.scan * static_cast<double>(n)) / 2, static_cast<double>(n) / 16);
  for (index_t first = 0, last = 1; first < queries; first = last++) {
    for (double apart = 0; last < queries; ++last) {
      apart += static_cast<double>(seen.apart(first, last));
      if (apart > most) break;
    }
    const cells_of_queries here =
        last - first > 1 ? cells_of_queries{seen.bits + first * blocks, last - first, blocks} : cells_of_queries{};
    if (last - first == queries) return attend(group, here);
    head_group<Head> some;
    some.memory = group.memory, some.helpers = group.helpers, some.worker = group.worker;
    for (index_t g = first * each; g < last * each; ++g) some.push(std::move(group[g]));
    attend(some, here);
    for (index_t g = 0; g < some.size(); ++g) group.put(first * each + g, std::move(some[g]));
  }
}

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
