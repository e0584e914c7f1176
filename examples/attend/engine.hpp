// The part of attend that depends on the element type of the cache, behind functions that do not.
#pragma once

#include <memory>

#include "attend/problem.hpp"
#include "common/any_attention.hpp"
#include "common/value_norms.hpp"
#include "support/progress.hpp"

namespace vattn::examples {

/// `call` runs the method once; `exact` what it is measured against. Both refer to the problem and the
/// request that they were made of.
struct engine {
  std::function<status(const attention_result&, const draw_key&, support::progress&)> call;
  std::function<status(const attention_result&)> check;
  std::function<reference(support::progress&)> exact;
};

/// T is the element type of k and v.
template <class T>
[[nodiscard]] engine make_engine(const problem& p, const request& r) {
  struct state {
    kv_view<T> cache;
    any_attention<T> attend;
    value_norms norms{};
  };
  const kv_shape shape{.n_batch = 1, .n_kv_heads = p.kv_heads, .n_tokens = p.n, .dk = p.dk, .dv = p.dv};
  const auto s = std::make_shared<state>(
      state{token_major_kv(p.k.as<T>().data(), p.v.as<T>().data(), shape), any_attention<T>(r)});
  using executor_type = support::counting_executor<thread_executor>;
  return {.call =
              [s, &p, &r](const attention_result& result, const draw_key& key, support::progress& count) {
                if (r.how == method::vattention && s->norms.centres.empty()) {  // once, not every value in every trial
                  s->norms = measure_values(s->cache, p.n);
                  s->cache = s->cache.with_norms(s->norms.view());
                }
                executor_type exec(thread_executor(r.threads), count);
                return s->attend(p.query_view(), s->cache, r.options, result, key, executor_ref(exec));
              },
          .check =
              [s, &p, &r](const attention_result& result) {
                return s->attend.check(p.query_view(), s->cache, r.options, result);
              },
          .exact =
              [s, &p, &r](support::progress& count) {
                executor_type exec(thread_executor(r.threads), count);
                return any_attention<T>::exact(p.query_view(), s->cache, r.options, executor_ref(exec));
              }};
}

}  // namespace vattn::examples
