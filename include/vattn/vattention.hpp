// vattention<Policy>: verified sparse attention, the whole pipeline.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <cmath>
#include <utility>

#include "vattn/certified_attention.hpp"
#include "vattn/exact_attention.hpp"
#include "vattn/importance_attention.hpp"
#include "vattn/policy.hpp"
#include "vattn/store/store_attention.hpp"
#include "vattn/two_phase_attention.hpp"
#include "vattn/uniform_attention.hpp"

namespace vattn::VATTN_ABI {

/// Attention of a few queries against a KV cache, read from as few rows as it takes for its error to be
/// at most ε with probability 1 − δ for each query and head, with a certificate that says what was
/// promised and what it cost. Holds settings alone: one object serves all layers and threads.
///
/// Shapes: q [n_batch, n_queries, n_q_heads, dk], output [n_batch, n_queries, n_q_heads, dv]; query head
/// h reads KV head h / (n_q_heads / n_kv_heads). Allocates nothing but a growing `workspace`. Never
/// throws; with a status other than ok the outputs are unspecified.
/// Source: "vAttention: Verified Sparse Attention", arXiv 2510.05688.
/// When not to use it: prefill, and caches of a few thousand tokens, where reading every row is cheaper.
template <class Policy = default_policy>
class vattention {
  static_assert(
      has_slots<Policy>,
      "vattention<Policy>: supply `selector`, `sampler`, `bound` and `target` (derive from vattn::default_policy "
      "and redefine what you change); vattn/policy.hpp names the concept of each");
  static_assert(!has_slots<Policy> || mix::target<Policy>,
                "vattention<Policy>: supply budget::output as the target, or a uniform sampler: importance samples and "
                "stores are judged by the error of the output");
  static_assert(!has_slots<Policy> || mix::store_selector<Policy>,
                "vattention<Policy>: supply select::none as the selector: sample::from_store ranks by the store's own "
                "codes");
  static_assert(!has_slots<Policy> || mix::store_bound<Policy>,
                "vattention<Policy>: supply budget::clt or budget::student: a store's codes bound nothing for certain "
                "(certified_policy over a view does)");
  static_assert(!has_slots<Policy> || mix::index_selector<Policy>,
                "vattention<Policy>: supply sample::from_index together with select::beside, or neither");
  static_assert(!has_slots<Policy> || mix::index_bound<Policy>,
                "vattention<Policy>: supply budget::clt or budget::student: the codes of an index bound nothing for "
                "certain (certified_policy does)");
  static_assert(!has_slots<Policy> || mix::phases<Policy>,
                "vattention<Policy>: supply sample::in_two_phases together with select::two_phase, or neither");
  static_assert(!has_slots<Policy> || mix::estimates<Policy>,
                "vattention<Policy>: supply a selector whose scores estimate logits (select::indexed over key codes, "
                "select::top_k<select::exact_logits>, or select::calibrated of any ranking): importance samplers make "
                "probabilities of them");
  static_assert(!has_slots<Policy> || mix::certified_sampler<Policy>,
                "vattention<Policy>: supply sample::by_importance: certified samples (finite-sample bounds) are drawn "
                "for each head, in one phase");
  static_assert(!has_slots<Policy> || mix::certified_bound<Policy>,
                "vattention<Policy>: supply budget::bernstein: it is the bound of certified importance samples");
  static_assert(!has_slots<Policy> || mix::hard_bounds<Policy>,
                "vattention<Policy>: supply a selector whose scores no logit exceeds (select::hard_bounds, or "
                "select::indexed over an index with upper_bounds): certified samples rest on them");
  static_assert(!has_slots<Policy> || mix::sound_scores<Policy>,
                "vattention<Policy>: supply select::hard_bounds instead of select::upper_scores: finite-sample bounds "
                "rest on scores that nothing exceeds");

 public:
  using selector = typename Policy::selector;
  using sampler = typename Policy::sampler;
  using bound = typename Policy::bound;
  using target = typename Policy::target;

  explicit vattention(const config& settings = {}, const selector& select = {}) noexcept
      : settings_(settings), selector_(select) {}

  [[nodiscard]] const vattn::config& settings() const noexcept { return settings_; }

  /// Bytes of workspace for sequences of at most n tokens. `masked`: the call has a mask, or positions. 0 where no call
  /// is served: with settings that do not validate, or sizes that are none.
  [[nodiscard]] std::size_t workspace_bytes(index_t n, index_t dk, index_t dv, bool masked = false,
                                            index_t workers = 1) const noexcept {
    const kernel::floating_point_scope standard;
    if (!settings_.validate() || n < 0 || n >= population::max_size || dk < 1 || dv < 1 || workers < 1) return 0;
    scratch::sparse_sizes sparse = sizes(n, dv);
    if (beside_cache && !indexed()) return call_bytes(n, dk, dv, masked, all_rows(dk, dv), workers);
    if constexpr (from_store) sparse.group_bytes = store_bytes(n, max_group, dk, dv);
    if constexpr (beside_cache) sparse.group_bytes = index_bytes(n, max_group, dk, dv, fixed_rows());
    return call_bytes(n, dk, dv, masked, sparse, workers);
  }

  /// `observe(head_task&)` sees each query of each head once it is done, on the thread that did it (see
  /// call/audit.hpp).
  template <class Q, kv_cache KV, executor E = serial_executor, class Observer = unobserved>
  status operator()(const tensor_view<const Q, 4>& q, const KV& cache, const attention_options& options,
                    const attention_result& result, workspace& memory, const draw_key& key = {}, E&& exec = E{},
                    Observer&& observe = Observer{}) const noexcept {
    const kernel::floating_point_scope standard;
    if (status s = settings_.validate(); !s) return s;
    if (status s = check_call(q, cache, options, result); !s) return s;
    if (status s = key.check(q.extents[0], q.extents[2]); !s) return s;
    vattention each = *this;
    if (settings_.joint)
      each.settings_.delta /= static_cast<double>(
          std::max<index_t>(1, result.output.extents[0] * result.output.extents[1] * result.output.extents[2]));
    if constexpr (from_store) {
      if (status s = check_store_call(cache, options); !s) return s;
    }
    if constexpr (takes_index) {
      if (indexed()) {
        if (status s = check_index_call(cache, selector_); !s) return s;
      }
    }
    const index_t n = longest(cache), group = q.extents[2] / cache.n_kv_heads();
    // Where no sample would pay, all heads at once, each cut among the threads: but not where an observer waits for
    // each.
    using head = std::remove_cvref_t<decltype(cache.head(0, 0))>;
    if constexpr ((from_store || beside_cache) && strided_head<head> &&
                  std::same_as<std::remove_cvref_t<Observer>, unobserved> &&
                  !partial_executor<std::remove_cvref_t<E>>) {
      if (!result.decisions.tokens && (from_store || !options.positions) && !may_pay(cache, group)) {
        certificate asked;
        each.state_promise(asked);
        const status s = dense_call<Q, KV, head>(q, cache, options, result, asked).run(memory, exec);
        if (s.code() != errc::workspace_too_small) return s;  // sized for what needs less
      }
    }
    scratch::sparse_sizes sparse = sizes(n, cache.dv());
    if constexpr (from_store) sparse.group_bytes = store_bytes(n, max_group, cache.dk(), cache.dv());
    if constexpr (beside_cache) {
      // Several tasks would write what is remembered of one KV head.
      if (q.extents[1] != 1 || group > max_group || !options.mask.same_for_heads()) each.selector_.memory = {};
      sparse.group_bytes = index_bytes(n, max_group, cache.dk(), cache.dv(), fixed_rows());
      if (!indexed()) sparse = all_rows(cache.dk(), cache.dv());
    }
    sparse.shared = std::clamp<index_t>(group, 1, sparse.shared);
    // Queries share the rows where all are read, and, of few heads, a scan and a sample.
    if (beside_cache && (!indexed() || group <= most_heads_to_share))
      sparse.queries = std::clamp<index_t>(max_group / sparse.shared, 1, std::max<index_t>(1, q.extents[1]));
    return for_each_group(q, cache, options, result, memory, key, exec, sparse, [&](auto& heads) {
      each.attend(heads);
      for (index_t g = 0; g < heads.size(); ++g) observe(heads[g]);
    });
  }

 private:
  // Whether a sample of a store, or by an index, may cost less than all rows.
  template <kv_cache KV>
  [[nodiscard]] bool may_pay(const KV& cache, index_t group) const noexcept {
    const index_t n = longest(cache);
    if constexpr (from_store) {
      return worth_sampling(n, cache.head(0, 0).past(), read_costs(kernel::active_isa(), std::min(group, max_group)));
    } else {
      return indexed() && index_may_pay(n, fixed_rows(), selector_.costs);
    }
  }

  void state_promise(certificate& c) const noexcept {
    c.epsilon = settings_.epsilon, c.delta = settings_.delta, c.scale = settings_.scale, c.target = target::kind;
  }

  // The heads of a group by the policy's sampling design: looks until each is verified (call/looks.hpp), and all rows
  // of those that are not.
  template <kv_head Head>
  void attend(head_group<Head>& heads) const noexcept {
    for (index_t g = 0; g < heads.size(); ++g) state_promise(heads[g].c);
    if constexpr (takes_index) {
      if (indexed()) return attend_by_index<Policy>(heads, settings_, selector_);
    }
    if constexpr (beside_cache) return attend_group_exactly(heads);
    if constexpr (from_store) return attend_from_store<Policy>(heads, settings_);
    if constexpr (!beside_cache && !from_store) {
      // The heads see the same tokens.
      const auto most = static_cast<index_t>(settings_.max_density * static_cast<double>(heads[0].tokens.size()));
      if (fixed_rows() + settings_.min_sample < most) sample(heads);
      for (index_t g = 0; g < heads.size(); ++g) {
        head_task<Head>& task = heads[g];
        if (task.ok && !task.done) task.ok = attend_exactly(task.row, task.tokens, task.s, task.state, task.c);
      }
    }
  }

  template <kv_head Head>
  void sample(head_group<Head>& heads) const noexcept {
    if constexpr (!importance_sampler<sampler>) {
      ranked_sampler<Policy, Head> design(heads, settings_, selector_);
      look_until_verified(design, heads, settings_.max_rounds);
    } else if constexpr (bound::kind == guarantee::finite_sample) {
      certified_sampler<bound, selector, Head> design(heads, settings_, selector_);
      look_until_verified(design, heads, design.most_looks);
    } else if constexpr (two_phases) {
      attend_in_two_phases<bound>(heads, settings_, selector_, sampler::shape, sampler::widening);
    } else {
      attend_by_importance<bound>(heads, settings_, selector_, sampler::shape);
    }
  }

  [[nodiscard]] index_t fixed_rows() const noexcept { return settings_.sinks + settings_.window; }

  static constexpr bool shares_sample = group_sampler<sampler>;  // among the query heads of a KV head
  static constexpr bool two_phases = phased_sampler<sampler>;
  static constexpr bool from_store = samples_a_store<sampler>;
  static constexpr bool cheapest = std::same_as<selector, select::cheapest>;
  // Either an index lies beside the cache and calls go by it, or all rows are read.
  static constexpr bool beside_cache = samples_by_index<sampler> || cheapest;
  // An index serves this promise, if the call has one.
  static constexpr bool takes_index =
      beside_cache && bound::kind == guarantee::asymptotic && target::kind == target_kind::output;

  // Whether calls go by an index: the default's, if they have one, and if it can serve what the policy promises.
  [[nodiscard]] bool indexed() const noexcept {
    if constexpr (takes_index) {
      return !cheapest || !selector_.sequences.empty();
    } else {
      return false;
    }
  }
  // Of groups that are attended together, and cut among workers.
  [[nodiscard]] scratch::sparse_sizes whole_groups() const noexcept {
    return {.observed = true, .sinks = settings_.sinks, .window = settings_.window, .shared = max_group, .cut = true};
  }
  // Nothing is sampled.
  [[nodiscard]] scratch::sparse_sizes all_rows(index_t dk, index_t dv) const noexcept {
    scratch::sparse_sizes sizes = whole_groups();
    sizes.group_bytes = exact_group_bytes(max_group, dk, dv);
    return sizes;
  }

  [[nodiscard]] scratch::sparse_sizes sizes(index_t n, index_t dv) const noexcept {
    const auto most = static_cast<std::size_t>(std::ceil(settings_.max_density * static_cast<double>(n)));
    scratch::sparse_sizes sizes{.selector = selector_scratch(selector_), .sampled = true, .observed = true};
    sizes.sinks = settings_.sinks, sizes.window = settings_.window;
    sizes.errors = importance_sampler<sampler> || requires { requires selector::wants_errors; };
    if constexpr (beside_cache) {
      sizes = whole_groups();
      sizes.measured = true;
    } else if constexpr (from_store) {
      return {.measured = true, .observed = true, .shared = max_group};
    } else if constexpr (importance_sampler<sampler>) {
      sizes.weighted = most;
      if constexpr (two_phases) sizes.candidates = most;
      if constexpr (shares_sample) sizes.shared = max_shared;
      if constexpr (bound::kind == guarantee::finite_sample) {
        sizes.ranked = true;
        sizes.matrix = 2 * static_cast<std::size_t>(dv) * static_cast<std::size_t>(dv);
      }
    } else {
      sizes.ranked = true;
      sizes.drawn = most;
      sizes.table = sampler::table_size(static_cast<ordinal>(n));
    }
    return sizes;
  }

  vattn::config settings_;
  [[no_unique_address]] selector selector_;
};

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
