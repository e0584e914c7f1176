// Exact attention over any set of tokens: the reference, the heavy part, and the fallback.
#pragma once

#include <algorithm>
#include <cmath>
#include <span>

#include "vattn/estimate/state.hpp"
#include "vattn/kv/query.hpp"

namespace vattn {

/// Tokens whose logits are computed before their exponentials: 256 bytes of stack.
inline constexpr index_t logit_block = 64;

/// Tokens summed in one float accumulator before it is merged: keeps rounding at ~512·2⁻²⁴ whatever n.
inline constexpr index_t exact_block = 512;

/// Adds tokens `token_at(0..count)` to `state`, reading each key and value once. `part` is scratch of
/// the same width; with `with_power`, Σ x‖v‖² too. Returns false, leaving the
/// state unusable, if a logit is not finite; a non-finite value shows in the finished output.
template <kv_head Head, class TokenAt>
[[nodiscard]] bool accumulate_exact(const query_row<Head>& row, index_t count, TokenAt&& token_at, softmax_state& state,
                                    softmax_state& part, bool with_power) noexcept {
  using kernel::axpy, kernel::squared_norm;
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
        const auto value = row.head.value(token_at(first + j));
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

}  // namespace vattn
