// Plan once for a batch shape, then run with a workspace: for engines that bring their own threads and memory.
#include "vattn/macros_push.hpp"
#pragma once

#include <span>

#include "vattn/vattention.hpp"

namespace vattn::VATTN_ABI {

/// What a plan must know. Lengths may be less at run time, the rest is as said here.
struct plan_shape {
  index_t n_batch = 1;
  index_t n_queries = 1;
  index_t n_q_heads = 1;
  index_t n_kv_heads = 1;
  index_t max_tokens = 0;  ///< of the longest sequence
  index_t dk = 0, dv = 0;
  bool masked = false;  ///< calls have a mask, or positions
  index_t threads = 1;  ///< nth, or workers of the executor
};

/// The arguments of one call of a plan.
template <class Q, kv_cache KV>
struct run_arguments {
  tensor_view<const Q, 4> q;
  KV cache;
  attention_options options{};
  attention_result result{};
  draw_key key{};
};
template <class Q, class KV>
run_arguments(tensor_view<const Q, 4>, KV) -> run_arguments<Q, KV>;
template <class Q, class KV>
run_arguments(tensor_view<const Q, 4>, KV, attention_options) -> run_arguments<Q, KV>;
template <class Q, class KV>
run_arguments(tensor_view<const Q, 4>, KV, attention_options, attention_result) -> run_arguments<Q, KV>;
template <class Q, class KV>
run_arguments(tensor_view<const Q, 4>, KV, attention_options, attention_result, draw_key) -> run_arguments<Q, KV>;

/// A plain value: copy it, keep one for all layers of a shape.
template <class Policy = default_policy>
class attention_plan {
 public:
  using selector = typename Policy::selector;

  attention_plan(const plan_shape& shape, const config& settings, const selector& select) noexcept
      : shape_(shape), functor_(settings, select) {}

  [[nodiscard]] const plan_shape& shape() const noexcept { return shape_; }
  [[nodiscard]] const vattention<Policy>& functor() const noexcept { return functor_; }
  /// The same plan over another layer's indices. Their scratch_size() must not be larger.
  [[nodiscard]] attention_plan with_selector(const selector& select) const noexcept {
    return {shape_, functor_.settings(), select};
  }

  /// What is wrong with it; `run` says so too.
  [[nodiscard]] status validate() const noexcept {
    const plan_shape& s = shape_;
    if (s.n_batch < 0 || s.n_queries < 0 || s.n_q_heads < 0 || s.n_kv_heads < 1 || s.max_tokens < 0 || s.dk < 1 ||
        s.dv < 1 || s.threads < 1 || s.n_q_heads % s.n_kv_heads != 0) {
      return status::error(errc::invalid_argument,
                           "the plan has n_q_heads %lld, n_kv_heads %lld, max_tokens %lld, dk %lld, dv %lld, threads "
                           "%lld: sizes are at least 1, and query heads a multiple of KV heads",
                           ll(s.n_q_heads), ll(s.n_kv_heads), ll(s.max_tokens), ll(s.dk), ll(s.dv), ll(s.threads));
    }
    return functor_.settings().validate();
  }

  /// That a call fits the plan, before the call itself is checked.
  template <class Q, kv_cache KV>
  [[nodiscard]] status check(const run_arguments<Q, KV>& a, index_t threads) const noexcept {
    if (status s = validate(); !s) return s;
    if (status s = a.cache.validate(); !s) return s;
    const plan_shape& p = shape_;
    if (a.q.extents != std::array<index_t, 4>{p.n_batch, p.n_queries, p.n_q_heads, p.dk} ||
        a.cache.n_kv_heads() != p.n_kv_heads || a.cache.dv() != p.dv) {
      return status::error(errc::invalid_argument,
                           "q is [%lld, %lld, %lld, %lld] with %lld KV heads and dv %lld, the plan is for [%lld, %lld, "
                           "%lld, %lld] with %lld and %lld: plan again",
                           ll(a.q.extents[0]), ll(a.q.extents[1]), ll(a.q.extents[2]), ll(a.q.extents[3]),
                           ll(a.cache.n_kv_heads()), ll(a.cache.dv()), ll(p.n_batch), ll(p.n_queries), ll(p.n_q_heads),
                           ll(p.dk), ll(p.n_kv_heads), ll(p.dv));
    }
    if (const index_t n = longest(a.cache); n > p.max_tokens) {
      return status::error(errc::invalid_argument, "a sequence has %lld tokens, the plan at most %lld: plan again",
                           ll(n), ll(p.max_tokens));
    }
    if ((a.options.mask || a.options.positions) && !p.masked)
      return status::error(errc::invalid_argument, "the call has a mask or positions: plan with masked = true");
    if (threads > p.threads) {
      return status::error(errc::invalid_argument, "%lld threads, but the plan is for %lld: plan again", ll(threads),
                           ll(p.threads));
    }
    return {};
  }

 private:
  static constexpr long long ll(index_t value) noexcept { return static_cast<long long>(value); }

  plan_shape shape_;
  vattention<Policy> functor_;
};

/// Allocates nothing and reads no tensor.
template <class Policy = default_policy>
[[nodiscard]] attention_plan<Policy> plan(const plan_shape& shape, const config& settings,
                                          const typename Policy::selector& select = {}) noexcept {
  return {shape, settings, select};
}

/// For all threads together. Any alignment will do.
template <class Policy>
[[nodiscard]] std::size_t workspace_bytes(const attention_plan<Policy>& p) noexcept {
  const plan_shape& s = p.shape();
  return p.functor().workspace_bytes(s.max_tokens, s.dk, s.dv, s.masked, s.threads);
}

/// Thread `ith` of `nth`: does tasks ith, ith + nth, ... in its own slice of `memory`, with no synchronisation of any
/// kind. All threads get the same arguments and memory; the results are complete when all have returned, are the same
/// bits for any nth, and are those of the functor itself. Each thread returns the status of its own tasks.
struct own_share {
  index_t ith = 0, nth = 1;
  [[nodiscard]] index_t workers() const noexcept { return nth; }
  [[nodiscard]] index_t share(index_t n) const noexcept { return ith < n ? (n - ith + nth - 1) / nth : 0; }
  template <class F>
  void for_each(index_t n, F&& f) const {
    for (index_t task = ith; task < n; task += nth) f(task, ith);
  }
};

/// Through an executor of at most `threads` workers. `memory` [workspace_bytes(plan)]. Allocates nothing.
template <class Policy, class Q, kv_cache KV, executor E, class Observer = unobserved>
requires(!std::integral<std::remove_cvref_t<E>>)
status run(const attention_plan<Policy>& p, const run_arguments<Q, KV>& a, std::span<std::byte> memory, E&& exec,
           Observer&& observe = Observer{}) noexcept {
  if (status s = p.check(a, workers_of(exec)); !s) return s;
  workspace slices(memory);
  return p.functor()(a.q, a.cache, a.options, a.result, slices, a.key, exec, observe);
}

template <class Policy, class Q, kv_cache KV, class Observer = unobserved>
status run(const attention_plan<Policy>& p, const run_arguments<Q, KV>& a, std::span<std::byte> memory, index_t ith,
           index_t nth, Observer&& observe = Observer{}) noexcept {
  if (nth < 1 || ith < 0 || ith >= nth) {
    return status::error(errc::invalid_argument, "thread %lld of %lld: give ith from 0 to nth - 1",
                         static_cast<long long>(ith), static_cast<long long>(nth));
  }
  return run(p, a, memory, own_share{ith, nth}, observe);
}

template <class Policy, class Q, kv_cache KV>
status run(const attention_plan<Policy>& p, const run_arguments<Q, KV>& a, std::span<std::byte> memory) noexcept {
  return run(p, a, memory, own_share{});
}

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
