// make_engine: from names on a command line to a vattention<Policy>.
#pragma once

#include <cmath>
#include <memory>
#include <utility>

#include "attend/problem.hpp"
#include "common/methods.hpp"
#include "common/value_norms.hpp"

namespace vattn::examples {

/// A selector that is chosen at run time: by logit or by contribution, a share of the tokens or of the mass.
struct chosen_selector {
  bool by_contribution = false;
  double mass = 0;

  template <class Row, class... Centre>
  score_result score(const Row& row, const population& tokens, std::span<float> scores,
                     Centre... centre) const noexcept {
    if (by_contribution) return select::exact_contributions{}.score(row, tokens, scores, centre...);
    return select::exact_logits{}.score(row, tokens, scores, centre...);
  }
  index_t heavy_count(ranking& r, index_t n, const config& c) const noexcept {
    if (mass > 0) return extend_to_mass(r, mass, r.size());
    return select::top_k<>{}.heavy_count(r, n, c);
  }
};

template <class Target, class Bound>
struct chosen_policy : default_policy {
  using selector = chosen_selector;
  using target = Target;
  using bound = Bound;
};

template <class T>
class engine_of {
 public:
  engine_of(const problem& p, const request& r) : problem_(p), request_(r) {
    const T* k = p.k.as<T>().data();
    const T* v = p.v.as<T>().data();
    view_ = token_major_kv(k, v, {.n_batch = 1, .n_kv_heads = p.kv_heads, .n_tokens = p.n, .dk = p.dk, .dv = p.dv});
  }

  [[nodiscard]] status check(const attention_result& result) const {
    if (status s = request_.settings.validate(); !s) return s;
    return check_call(problem_.query_view(), view_, request_.options, result);
  }

  [[nodiscard]] reference exact(support::progress& count) const {
    return exact_reference(problem_.query_view(), view_, request_.options, executor_for(count));
  }

  [[nodiscard]] status call(const attention_result& result, const draw_key& key, support::progress& count) {
    auto exec = executor_for(count);
    const auto q = problem_.query_view();
    const config& c = request_.settings;
    switch (request_.how) {
      case method::dense:
        return exact_attention(q, view_, request_.options, result, memory_, exec);
      case method::top_k:
        return fixed_budget(q, view_, request_.options, result, memory_,
                            {.sinks = c.sinks, .window = c.window, .heavy = c.heavy}, key, exec);
      case method::sample:
        return fixed_budget(q, view_, request_.options, result, memory_,
                            {.sinks = c.sinks, .window = c.window, .sampled = c.base}, key, exec);
      default:
        break;
    }
    if (norms_.centres.empty()) {  // once, instead of every value in every trial
      norms_ = measure_values(view_, problem_.n);
      view_ = view_.with_norms(norms_.view());
    }
    switch (request_.target) {
      case target_kind::denominator:
        return with_target<budget::denominator>(result, key, exec);
      case target_kind::numerator:
        return with_target<budget::numerator>(result, key, exec);
      case target_kind::sdpa:
        return with_target<budget::sdpa>(result, key, exec);
      default:
        return with_target<budget::output>(result, key, exec);
    }
  }

 private:
  using executor_type = support::counting_executor<thread_executor>;

  [[nodiscard]] executor_type executor_for(support::progress& count) const {
    return {thread_executor(request_.threads), count};
  }

  template <class Target>
  [[nodiscard]] status with_target(const attention_result& result, const draw_key& key, executor_type& exec) {
    switch (request_.bound) {
      case bound_kind::student:
        return run<Target, budget::student>(result, key, exec);
      case bound_kind::bernstein:
        return run<Target, budget::bernstein>(result, key, exec);
      case bound_kind::hoeffding:
        return run<Target, budget::hoeffding>(result, key, exec);
      default:
        return run<Target, budget::clt>(result, key, exec);
    }
  }

  template <class Target, class Bound>
  [[nodiscard]] status run(const attention_result& result, const draw_key& key, executor_type& exec) {
    // The paper ranks by logit. Contributions for the output, and where a bound needs a known range of x·v.
    const bool range_of_values = Bound::kind == guarantee::finite_sample && Target::kind != target_kind::denominator;
    const chosen_selector select{.by_contribution = Target::kind == target_kind::output || range_of_values,
                                 .mass = request_.top_p};
    const vattention<chosen_policy<Target, Bound>> attend(request_.settings, select);
    return attend(problem_.query_view(), view_, request_.options, result, memory_, key, exec);
  }

  const problem& problem_;
  const request& request_;
  kv_view<T> view_;
  value_norms norms_;
  workspace memory_;
};

template <class T>
engine make_engine(const problem& p, const request& r) {
  const auto e = std::make_shared<engine_of<T>>(p, r);
  return {.call = [e](const attention_result& result, const draw_key& key,
                      support::progress& count) { return e->call(result, key, count); },
          .check = [e](const attention_result& result) { return e->check(result); },
          .exact = [e](support::progress& count) { return e->exact(count); }};
}

}  // namespace vattn::examples
