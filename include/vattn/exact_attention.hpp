// Dense attention behind the same call as vattention: the reference, and the fallback.
#include "vattn/macros_push.hpp"
#pragma once

#include "vattn/dense_attention.hpp"
#include "vattn/estimate/exact.hpp"
#include "vattn/runtime/call.hpp"

namespace vattn::VATTN_ABI {

/// Reads every visible row once and certifies so. False if a logit is not finite. Of no rows the output is 0 and the
/// log-sum-exp the sink's logit, −inf without a sink: so shards of a cache merge, whichever of them are empty.
template <kv_head Head>
[[nodiscard]] bool attend_exactly(const query_row<Head>& row, const population& tokens, scratch& s,
                                  softmax_state& state, certificate& c) noexcept {
  state.clear();
  softmax_state part(s.part);
  certify_exact(c);
  add_sink(state, row.sink_logit);
  return accumulate_exact(
      row, tokens.size(), [&](index_t j) { return tokens[j]; }, state, part, false);
}

/// Exact attention of every query and head. Shapes, errors and memory as `vattention`.
template <class Q, kv_cache KV, executor E = serial_executor>
status exact_attention(const tensor_view<const Q, 4>& q, const KV& cache, const attention_options& options,
                       const attention_result& result, workspace& memory, E&& exec = E{}) noexcept {
  const kernel::floating_point_scope standard;
  if (status s = check_call(q, cache, options, result); !s) return s;
  using head = std::remove_cvref_t<decltype(cache.head(0, 0))>;
  // A part of the tasks is of no use there: the second half of them needs the results of the first.
  if constexpr (strided_head<head> && !partial_executor<std::remove_cvref_t<E>>) {
    // Positions order the tokens, and decisions list them: neither is the block kernels' business.
    if (!options.positions && !result.decisions.tokens)
      return dense_call<Q, KV, head>(q, cache, options, result).run(memory, exec);
  }
  return for_each_query(q, cache, options, result, memory, {}, exec, {},
                        [](const auto& row, const population& tokens, const random_stream&, scratch& s,
                           softmax_state& state, certificate& c) { return attend_exactly(row, tokens, s, state, c); });
}

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
