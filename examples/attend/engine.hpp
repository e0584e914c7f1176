// make_engine: from names on a command line to a vattention<Policy>.
#pragma once

#include <cmath>
#include <memory>
#include <tuple>
#include <utility>

#include "attend/problem.hpp"
#include "common/methods.hpp"
#include "common/selectors.hpp"
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

/// Exact logits as bounds that are met.
struct exact_bounds : exact_estimates {
  static constexpr bool upper_bounds = true;
};

template <class Selector, class Sampler, class Bound>
struct sampled_policy : default_policy {
  using selector = Selector;
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
    const bool importance = request_.sampler == sampler_kind::importance;
    const auto refuse = [](const char* what) { return status::error(errc::invalid_argument, "%s", what); };
    if ((request_.selector != "exact" || importance) && (request_.target != target_kind::output || request_.top_p > 0))
      return refuse("--selector and --sampler importance go with --target output, and without --top-p");
    if ((request_.share_group || request_.two_phases) && !importance)
      return refuse("--share-group and --two-phase go with --sampler importance");
    if (finite_sample && importance && (request_.share_group || request_.two_phases))
      return refuse("--share-group and --two-phase are asymptotic: --bound clt or student");
    if (finite_sample && (importance || request_.selector != "exact")) {
      if (request_.bound == bound_kind::hoeffding)
        return refuse("with a selector the finite-sample bound is bernstein");
      if (!importance)
        return refuse("a selector with --bound bernstein needs --sampler importance (certified attention)");
      if (request_.selector != "codes" && request_.selector != "quest" && request_.selector != "exact")
        return refuse("--bound bernstein needs scores that bound the logits: --selector codes, quest or exact");
    }
    if (request_.two_phases && request_.selector != "codes")
      return refuse("--two-phase goes with --selector codes, of 2 bits or more");
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
      case method::magic_pig:
        return magic_pig_attention(q, view_, request_.options, result, memory_, pigs(),
                                   {.sinks = c.sinks, .window = c.window}, key, exec);
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
    if (request_.selector == "streaming-llm") return with_selector(select::none{}, result, key, exec);
    if (request_.selector != "exact") return with_catalogue(result, key, exec);
    if (request_.sampler == sampler_kind::importance) {
      if (request_.bound == bound_kind::bernstein)
        return attend_with<sampled_policy<exact_bounds, sample::by_importance, budget::bernstein>>({}, result, key,
                                                                                                   exec);
      return sample_by_importance(exact_estimates{}, result, key, exec);
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

  // Rotations and hyperplanes; the draws have --seed.
  static constexpr std::uint64_t index_seed = 1;

  template <class Policy>
  [[nodiscard]] status attend_with(const typename Policy::selector& selector, const attention_result& result,
                                   const draw_key& key, executor_type& exec) {
    const vattention<Policy> attend(request_.settings, selector);
    return attend(problem_.query_view(), view_, request_.options, result, memory_, key, exec);
  }

  template <class Selector>
  [[nodiscard]] status sample_by_importance(const Selector& selector, const attention_result& result,
                                            const draw_key& key, executor_type& exec) {
    using by = sample::by_importance;
    if (request_.bound == bound_kind::student)
      return attend_with<sampled_policy<Selector, by, budget::student>>(selector, result, key, exec);
    if (request_.share_group)
      return attend_with<sampled_policy<Selector, sample::by_group_importance, budget::clt>>(selector, result, key,
                                                                                             exec);
    return attend_with<sampled_policy<Selector, by, budget::clt>>(selector, result, key, exec);
  }

  // A selector that ranks: as it is for the uniform sampler, calibrated for the other.
  template <class Selector>
  [[nodiscard]] status with_selector(const Selector& selector, const attention_result& result, const draw_key& key,
                                     executor_type& exec) {
    if (request_.sampler == sampler_kind::importance)
      return sample_by_importance(select::calibrated<Selector>{selector}, result, key, exec);
    return sample_uniformly(selector, result, key, exec);
  }

  template <class Selector>
  [[nodiscard]] status sample_uniformly(const Selector& selector, const attention_result& result, const draw_key& key,
                                        executor_type& exec) {
    using uniform = sample::uniform_without_replacement;
    return request_.bound == bound_kind::student
               ? attend_with<sampled_policy<Selector, uniform, budget::student>>(selector, result, key, exec)
               : attend_with<sampled_policy<Selector, uniform, budget::clt>>(selector, result, key, exec);
  }

  // Indices are built once, instead of in every trial.
  [[nodiscard]] status with_catalogue(const attention_result& result, const draw_key& key, executor_type& exec) {
    const selector_entry& entry = *find_selector(request_.selector);
    if (indices_.empty()) {
      for (index_t h = 0; h < problem_.kv_heads; ++h) {
        const auto head = view_.head(0, h);
        indices_.push_back(entry.make(prefill_of(head, request_.bits, index_seed)));
        std::visit([&](auto& index) { append_from(index, head); }, indices_.back());
        if (!request_.two_phases) continue;
        coarse_.emplace_back(sketch::key_codes<1>(problem_.dk, index_seed + 1));
        append_from(coarse_.back(), head);
      }
    }
    return std::visit(
        [&](const auto& first) {
          using index = std::remove_cvref_t<decltype(first)>;
          auto& heads = heads_of<index>();
          if (heads.empty()) {
            for (const index_variant& each : indices_) heads.push_back(std::get<index>(each));
          }
          const select::indexed<index> selector{.heads = heads};
          if constexpr (index::estimates) {
            using by = sample::by_importance;
            if (request_.bound == bound_kind::bernstein)
              return attend_with<sampled_policy<select::hard_bounds<index>, by, budget::bernstein>>({heads}, result,
                                                                                                    key, exec);
            if (request_.two_phases)
              return attend_with<sampled_policy<select::two_phase<index, index>, sample::in_two_phases, budget::clt>>(
                  {{coarse_}, {heads}}, result, key, exec);
            if (request_.sampler == sampler_kind::importance) return sample_by_importance(selector, result, key, exec);
            // What a token may move at most, as far as its score can be trusted: ranks, and guards what is not read.
            select::top_k<select::contributions<select::upper_scores<index>>> guarded;
            guarded.heads = heads;
            return sample_uniformly(guarded, result, key, exec);
          } else if constexpr (index::upper_bounds) {
            if (request_.bound == bound_kind::bernstein)
              return attend_with<sampled_policy<select::indexed<index>, sample::by_importance, budget::bernstein>>(
                  selector, result, key, exec);
            // Bounds of logits become bounds of what a token can move: a guard for what is not ranked high.
            using guarded = select::top_k<select::contributions<select::indexed<index>>>;
            guarded bounded;
            bounded.heads = heads;
            return with_selector(bounded, result, key, exec);
          } else {
            return with_selector(selector, result, key, exec);
          }
        },
        indices_.front());
  }

  // MagicPIG's own estimator asks the hash tables themselves.
  [[nodiscard]] std::span<const select::magic_pig> pigs() {
    for (index_t h = static_cast<index_t>(pigs_.size()); h < problem_.kv_heads; ++h) {
      const auto head = view_.head(0, h);
      pigs_.emplace_back(problem_.dk, 10, 150, index_seed, prefill_of(head, request_.bits, index_seed).centre);
      append_from(pigs_.back(), head);
    }
    return pigs_;
  }

  template <class Index>
  [[nodiscard]] std::vector<Index>& heads_of() {
    return std::get<std::vector<Index>>(heads_);
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
  // One for each KV head.
  std::vector<index_variant> indices_;
  std::tuple<std::vector<any_index<score_says::order>>, std::vector<any_index<score_says::estimate>>,
             std::vector<any_index<score_says::bound>>>
      heads_;
  std::vector<any_index<score_says::estimate>> coarse_;
  std::vector<select::magic_pig> pigs_;
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
