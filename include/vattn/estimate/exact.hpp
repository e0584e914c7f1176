// Exact attention over any set of tokens: the reference, the heavy part, and the fallback.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <cmath>
#include <span>
#include <utility>

#include "vattn/estimate/group.hpp"
#include "vattn/estimate/state.hpp"
#include "vattn/kv/query.hpp"

namespace vattn::VATTN_ABI {

/// Tokens whose logits are computed before their exponentials: 256 bytes of stack.
inline constexpr index_t logit_block = 64;

/// Tokens summed in one float accumulator before it is merged: keeps rounding at ~512·2⁻²⁴ whatever n.
inline constexpr index_t exact_block = 512;

/// Wider keys are read one by one: a query is prepared for block kernels on the stack.
inline constexpr index_t widest_blocked = 1024;

/// As `accumulate_exact`, by blocks.
template <strided_head Head, class TokenAt>
[[nodiscard]] bool accumulate_blocks(const query_row<Head>& row, index_t count, TokenAt&& token_at,
                                     softmax_state& state, softmax_state& part, bool with_power) noexcept {
  float prepared[kernel::query_storage(1, widest_blocked)];
  float logits[exact_block];
  ordinal tokens[exact_block];
  const query_group<Head> one{&row, &state,
                              kernel::prepare_queries<typename Head::key_element>(
                                  kernel::active_isa(), row.scaled_query, 1, row.head.dk(), row.scale, prepared),
                              part.numerator(), logits};
  for (index_t first = 0; first < count; first += exact_block) {
    const index_t width = std::min(exact_block, count - first);
    bool in_order = true;
    for (index_t j = 0; j < width; ++j) {
      tokens[j] = static_cast<ordinal>(token_at(first + j));
      in_order = in_order && tokens[j] == tokens[0] + static_cast<ordinal>(j);
    }
    const index_t start = tokens[0];
    const population all = in_order ? population(start, start + width)
                                    : population(std::span<const ordinal>(tokens, static_cast<std::size_t>(width)));
    if (one.add(all, with_power) != 0) return false;
  }
  return true;
}

/// Adds tokens `token_at(0..count)` to `state`, reading each key and value once. `part` is scratch of
/// the same width; with `with_power`, Σ x‖v‖² too. Returns false, leaving the
/// state unusable, if a logit is not finite; a non-finite value shows in the finished output.
template <kv_head Head, class TokenAt>
[[nodiscard]] bool accumulate_exact(const query_row<Head>& row, index_t count, TokenAt&& token_at, softmax_state& state,
                                    softmax_state& part, bool with_power) noexcept {
  using kernel::axpy, kernel::squared_norm;
  if constexpr (strided_head<Head>) {
    if (row.head.dk() <= widest_blocked)
      return accumulate_blocks(row, count, std::forward<TokenAt>(token_at), state, part, with_power);
  }
  float logits[logit_block];
  for (index_t block = 0; block < count; block += exact_block) {
    const index_t block_end = std::min(count, block + exact_block);
    part.clear();
    for (index_t first = block; first < block_end; first += logit_block) {
      const index_t width = std::min(logit_block, block_end - first);
      for (index_t j = 0; j < width; ++j) logits[j] = row.logit(token_at(first + j));
      const Eigen::Map<Eigen::ArrayXf> x(logits, static_cast<Eigen::Index>(width));
      if (!x.allFinite()) return false;
      part.raise(x.maxCoeff());
      Eigen::Map<Eigen::ArrayXf>(logits, static_cast<Eigen::Index>(width)) = (x - part.max_logit()).exp();
      part.add_denominator(x.sum());
      for (index_t j = 0; j < width; ++j) {
        const auto value = row.value(token_at(first + j));
        axpy(logits[j], value, part.numerator().data());
        if (with_power) part.add_power(static_cast<double>(logits[j]) * squared_norm(value));
      }
    }
    state.merge(part);
  }
  return true;
}

/// Adds a head's learned sink to the denominator. It has no value and is never sampled.
inline void add_sink(softmax_state& state, float sink_logit) noexcept {
  if (sink_logit == -std::numeric_limits<float>::infinity()) return;
  state.raise(sink_logit);
  state.add_denominator(std::exp(static_cast<double>(sink_logit) - state.max_logit()));
}

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
