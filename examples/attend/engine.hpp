// make_engine: from names on a command line to a vattention<Policy>.
#pragma once

#include <any>
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

  template <class Row>
  score_result score(const Row& row, const population& tokens, const score_buffers& out) const noexcept {
    if (by_contribution) return select::exact_contributions{}.score(row, tokens, out);
    return select::exact_logits{}.score(row, tokens, out);
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

/// Exact logits as estimates without error.
struct exact_estimates : select::exact_logits {
  index_t heavy_count(const ranking& r, index_t n, const config& c) const noexcept {
    return select::top_k<>{}.heavy_count(r, n, c);
  }
};

/// A policy whose selector is an index over the keys, built once.
template <class Index, class Sampler, class Bound>
struct index_policy : default_policy {
  using selector = select::indexed<Index>;
  using sampler = Sampler;
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
    const bool finite_sample = request_.bound == bound_kind::bernstein || request_.bound == bound_kind::hoeffding;
    const bool indexed = request_.selector != selector_kind::exact || request_.sampler == sampler_kind::importance;
    if (indexed && (finite_sample || request_.target != target_kind::output || request_.top_p > 0)) {
      return status::error(errc::invalid_argument,
                           "--selector codes and --sampler importance go with --target output, --bound clt or student, "
                           "and without --top-p");
    }
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
    if (request_.selector == selector_kind::codes) {
      switch (request_.bits) {
        case 1:
          return with_index(sketch::key_codes<1>(problem_.dk, codes_seed), result, key, exec);
        case 2:
          return with_index(sketch::key_codes<2>(problem_.dk, codes_seed), result, key, exec);
        case 8:
          return with_index(sketch::key_codes<8>(problem_.dk, codes_seed), result, key, exec);
        default:
          return with_index(sketch::key_codes<4>(problem_.dk, codes_seed), result, key, exec);
      }
    }
    if (request_.sampler == sampler_kind::importance) {
      return request_.bound == bound_kind::student
                 ? attend_with<exact_importance<budget::student>>({}, result, key, exec)
                 : attend_with<exact_importance<budget::clt>>({}, result, key, exec);
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

  // The rotation of the codes; the draws have --seed.
  static constexpr std::uint64_t codes_seed = 1;

  template <class Bound>
  struct exact_importance : default_policy {
    using selector = exact_estimates;
    using sampler = sample::by_importance;
    using bound = Bound;
  };

  template <class Policy>
  [[nodiscard]] status attend_with(const typename Policy::selector& selector, const attention_result& result,
                                   const draw_key& key, executor_type& exec) {
    const vattention<Policy> attend(request_.settings, selector);
    return attend(problem_.query_view(), view_, request_.options, result, memory_, key, exec);
  }

  template <class Index>
  [[nodiscard]] status with_index(const Index& empty, const attention_result& result, const draw_key& key,
                                  executor_type& exec) {
    if (!indices_.has_value()) {  // once, instead of in every trial
      std::vector<Index> heads(static_cast<std::size_t>(problem_.kv_heads), empty);
      for (index_t h = 0; h < problem_.kv_heads; ++h) append_from(heads[static_cast<std::size_t>(h)], view_.head(0, h));
      indices_ = std::move(heads);
    }
    const select::indexed<Index> selector{.heads = std::any_cast<const std::vector<Index>&>(indices_)};
    using uniform = sample::uniform_without_replacement;
    const bool student = request_.bound == bound_kind::student;
    if (request_.sampler == sampler_kind::importance) {
      using by = sample::by_importance;
      return student ? attend_with<index_policy<Index, by, budget::student>>(selector, result, key, exec)
                     : attend_with<index_policy<Index, by, budget::clt>>(selector, result, key, exec);
    }
    return student ? attend_with<index_policy<Index, uniform, budget::student>>(selector, result, key, exec)
                   : attend_with<index_policy<Index, uniform, budget::clt>>(selector, result, key, exec);
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
    return attend_with<chosen_policy<Target, Bound>>(select, result, key, exec);
  }

  const problem& problem_;
  const request& request_;
  kv_view<T> view_;
  value_norms norms_;
  workspace memory_;
  std::any indices_;  // std::vector<Index>, one for each KV head
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
