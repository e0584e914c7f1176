// Exact attention of the queries of a group to rows that lie in strides: each row is read once for all of them.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <span>

#include "vattn/estimate/state.hpp"
#include "vattn/kernel/block.hpp"
#include "vattn/kv/query.hpp"

namespace vattn::VATTN_ABI {

/// Tokens whose keys are read before their values are: streams of memory as long as this are read at full speed, and
/// those of 256 bytes stay in the second or third cache for the next queries. Also the tokens that are summed in one
/// float accumulator before it is merged, which keeps rounding at ~4096·2⁻²⁴ whatever n.
inline constexpr index_t phase_rows = 4096;

/// Queries of one KV head that see the same tokens, [groups], in one value unit, and scratch. All are the caller's.
template <strided_head Head>
struct query_group {
  const query_row<Head>* rows = nullptr;
  softmax_state* states = nullptr;
  kernel::block_queries queries{};  ///< prepared from the rows' scaled queries
  std::span<float> part{};          ///< [groups, dv]
  std::span<float> logits{};        ///< logits_size(groups)

  [[nodiscard]] static constexpr std::size_t logits_size(index_t groups) noexcept {
    return static_cast<std::size_t>(groups * phase_rows);
  }

  /// Adds at most phase_rows tokens to every query's state; `with_power`: Σ x‖v‖² too. Bit g of what it returns is
  /// set if a logit of query g was not finite, whose state is then left alone; a non-finite value shows in the
  /// finished output.
  [[nodiscard]] std::uint32_t add(const population& tokens, bool with_power = false) const noexcept {
    using kernel::block_rows;
    const index_t groups = queries.groups, count = tokens.size(), dv = rows[0].dv();
    if (count == 0) return 0;
    std::uint32_t odd = 0;
    const auto block_at = [&](const kernel::strided_rows& all, index_t first) {
      const index_t width = std::min(block_rows, count - first);
      return tokens.list() ? kernel::block_of_rows::gathered(all, tokens.list() + first, width)
                           : kernel::block_of_rows(all, tokens[0] + first, width);
    };
    // Block b's logits of query g begin at (b·groups + g)·block_rows.
    constexpr float least = -std::numeric_limits<float>::infinity();
    float top[max_groups];
    std::fill_n(top, groups, least);
    float* x = logits.data();
    for (index_t first = 0; first < count; first += block_rows, x += groups * block_rows) {
      const kernel::block_of_rows keys = block_at(rows[0].head.key_rows(), first);
      kernel::block_logits<typename Head::key_element>(queries, keys, x);
      for (index_t g = 0; g < groups; ++g) {
        float* l = x + g * block_rows;
        if (rows[g].transforms()) {
          for (index_t j = 0; j < keys.count; ++j) l[j] = rows[g].transform(l[j], tokens[first + j]);
        }
        float most = 0;
        if (!kernel::block_maximum(queries.how, l, keys.count, most)) {
          odd |= 1u << g;
          std::fill_n(l, keys.count, most = 0.0f);
        }
        top[g] = std::max(top[g], most);
      }
    }
    std::fill(part.begin(), part.end(), 0.0f);
    double sum[max_groups] = {}, power[max_groups] = {};
    x = logits.data();
    for (index_t first = 0; first < count; first += block_rows, x += groups * block_rows) {
      const kernel::block_of_rows values = block_at(rows[0].head.value_rows(), first);
      for (index_t g = 0; g < groups; ++g) {
        sum[g] +=
            static_cast<double>(kernel::block_exponentials(queries.how, x + g * block_rows, values.count, top[g]));
      }
      kernel::block_add<typename Head::value_element>(queries.how, x, groups, values, dv, part.data());
      for (index_t j = 0; with_power && j < values.count; ++j) {
        using kernel::squared_norm;
        const float norm2 = squared_norm(rows[0].value(tokens[first + j]));
        for (index_t g = 0; g < groups; ++g) power[g] += static_cast<double>(x[g * block_rows + j] * norm2);
      }
    }
    if (const float unit = rows[0].value_unit; unit != 1) {
      for (float& sum_of_values : part) sum_of_values *= unit;
    }
    for (index_t g = 0; g < groups; ++g) {
      if (odd >> g & 1) continue;
      const auto width = static_cast<std::size_t>(dv);
      softmax_state here(top[g], sum[g], part.subspan(static_cast<std::size_t>(g) * width, width));
      here.add_power(power[g]);
      states[g].merge(here);
    }
    return odd;
  }

  /// Queries at a time.
  static constexpr index_t max_groups = 16;
};

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
